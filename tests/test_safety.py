"""What a request or a stranger's file cannot do: reach other files, fill the memory, run code, start a download."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.condition.adapter import Adapter, AdapterConfig
from lib_dinotile.condition.adapter_file import load_adapter, save_adapter
from lib_dinotile.condition.conditioner import Conditioner, installed_weights
from lib_dinotile.dino.checkpoint import is_dinov3, read_checkpoint
from lib_dinotile.dino.encoder import BUILT_IN, KNOWN, installed, load_encoder
from lib_dinotile.dino.head import RestorationHead, load_heads, save_heads
from lib_dinotile.engine.host import check_name
from lib_dinotile.settings import Settings
from lib_dinotile.weights import MAX_HEADER
from tests.test_adapter import SMALL
from tests.test_encoder import architecture, backend, dinov3_runs, timm, transformers, write_checkpoint  # noqa: F401

ROOT = Path(__file__).parents[1]
CONFIG = AdapterConfig("sd15", SMALL.shape, BUILT_IN, features=192, width=16, blocks=1)
HOST: Any = types.SimpleNamespace(base="sd15", shape=SMALL.shape, device="cpu", dtype=torch.float32)


def refused(error: BaseException) -> str:
    """What the user is told: one line, not endless."""
    line = str(error)
    assert isinstance(error, DinotileError) and line.isprintable() and len(line) < 2100, line[:3000]
    return line


# Names from requests ------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A WebUI's folders beside files that a request is not to reach."""
    for kind in ("adapters", "heads", "encoders", "outside"):
        (tmp_path / kind).mkdir()
    for folder in ("adapters", "outside"):
        save_adapter(Adapter(CONFIG), tmp_path / folder / "fur.safetensors")
    for folder in ("heads", "outside"):
        save_heads({-1: RestorationHead(192, 4)}, tmp_path / folder / "sharp.safetensors", BUILT_IN)
    write_checkpoint(tmp_path / "encoders" / "mine")
    write_checkpoint(tmp_path / "outside" / "eye")
    for kind in ("adapters", "heads"):
        (tmp_path / kind / "link").symlink_to(tmp_path / "outside")
        os.mkfifo(tmp_path / kind / "pipe.safetensors")
        (tmp_path / kind / "folder.safetensors").mkdir()
    return tmp_path


def asked(models: Path, **values: object) -> Conditioner | None:
    """What a WebUI does with the names in a request."""
    quick = {"guidance": 0.0, "guard": "report", "patches": 8}
    return Conditioner.load(
        Settings.parse({**quick, **values}),
        HOST,
        installed_weights(models / "adapters"),
        models / "encoders",
        installed_weights(models / "heads"),
        trusted=False,
    )


def hostile(name: str, path: Path) -> list[str]:
    """Ways to say a file or folder that is there, but not where the request may look."""
    return [
        f"../outside/{name}",
        f"..\\outside\\{name}",
        f"{name}/../../outside/{name}",
        f"./{name}",
        f"%2e%2e/outside/{name}",
        str(path),
        f"{path}.safetensors",
        f"file://{path}",
        f"//localhost{path}",
        f"\\\\localhost{path}",
        f"C:\\{name}",
        f"~/{name}",
        "~root",
        "$HOME",
        "link/" + name,
        "pipe",
        "folder",
        f"{name}\x00",
        f"{name}\x00.safetensors",
        f"{name}\n{name}",
        name.upper(),
        name.replace("e", "\u0435").replace("u", "\u057d").replace("s", "\u0455"),
        f"\u202e{name}",
        f"{name}\u200b",
        "",
        ".",
        "..",
        "/",
        "x" * 1_000_000,
        f"{name}; touch pwned",
        f"$(touch pwned) {name}",
    ]


@pytest.mark.parametrize(
    ("option", "own", "other"), [("adapter", "fur", "fur"), ("head", "sharp", "sharp"), ("encoder", "mine", "eye")]
)
def test_only_what_is_listed_is_found_by_name(models, monkeypatch, option, own, other):
    monkeypatch.chdir(models / "outside")  # so that a bare name is a path as well
    assert asked(models, **{"encoder": BUILT_IN, option: own})
    for name in hostile(other, models / "outside" / other):
        with pytest.raises(DinotileError) as error:
            asked(models, **{"encoder": BUILT_IN, option: name})
        assert refused(error.value).startswith(f"{option}: "), name
    assert not (models / "outside" / "pwned").exists()


def test_only_the_host_s_upscalers_are_found_by_name(tmp_path):
    check_name("upscaler", "Lanczos", ["Lanczos"])
    for name in hostile("Lanczos", tmp_path / "Lanczos"):
        with pytest.raises(DinotileError) as error:
            check_name("upscaler", name, ["Lanczos"])
        refused(error.value)


def test_what_lies_elsewhere_is_not_listed(models):
    assert list(installed_weights(models / "adapters")) == ["fur"]
    assert list(installed_weights(models / "heads")) == ["sharp"]
    assert installed(models / "encoders") == [BUILT_IN, "mine"]


@pytest.mark.parametrize("name", ["../outside/eye", "{outside}/eye", "someone/else", "eye"])
@pytest.mark.parametrize("trusted", [True, False])
def test_an_adapter_s_file_cannot_name_a_path_or_a_download(models, monkeypatch, name, trusted):
    monkeypatch.chdir(models / "outside")
    name = name.format(outside=models / "outside")
    save_adapter(Adapter(dataclasses.replace(CONFIG, encoder=name)), models / "adapters" / "fur.safetensors")
    with pytest.raises(DinotileError) as error:
        Conditioner.load(Settings(adapter="fur"), HOST, installed_weights(models / "adapters"), trusted=trusted)
    assert f"adapter 'fur' reads encoder {name!r}: install it" in refused(error.value)


# Files ----------------------------------------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file as it should not be; length: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {"x": tensor(0, 4, [1])}
DAMAGED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": raw(b""),
    "a header of 2**63 bytes": raw(GOOD, b"\0" * 4, 1 << 63),
    "a header of 2**64 - 1 bytes": raw(GOOD, b"\0" * 4, (1 << 64) - 1),
    "a header longer than the file": raw(GOOD, b"\0" * 4, 1000),
    "a header cut off": raw(GOOD, b"\0" * 4, 10),
    "no JSON": raw(b"\xff" * 64),
    "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00" + b"\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "zip": b"PK\x03\x04" + b"\0" * 60,
    "a list": raw([]),
    "nested deeply": raw(b'{"x":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    "behind the end": raw({"x": tensor(0, 400, [100])}, b"\0" * 4),
    "before the beginning": raw({"x": tensor(-4, 0, [1])}, b"\0" * 4),
    "end before start": raw({"x": tensor(4, 0, [1])}, b"\0" * 4),
    "overlapping": raw({"x": tensor(0, 8, [2]), "y": tensor(4, 12, [2])}, b"\0" * 12),
    "a hole": raw({"x": tensor(0, 4, [1]), "y": tensor(8, 12, [1])}, b"\0" * 12),
    "surplus bytes": raw(GOOD, b"\0" * 400),
    "shape of more bytes": raw({"x": tensor(0, 4, [2])}, b"\0" * 4),
    "dtype of more bytes": raw({"x": tensor(0, 4, [1], "F64")}, b"\0" * 4),
    "no such dtype": raw({"x": tensor(0, 4, [1], "F31")}, b"\0" * 4),
    "negative shape": raw({"x": tensor(0, 4, [-1])}, b"\0" * 4),
    "shape that overflows": raw({"x": tensor(0, 4, [1 << 40, 1 << 40])}, b"\0" * 4),
    "no whole shape": raw({"x": tensor(0, 4, [1.5])}, b"\0" * 4),  # type: ignore[list-item]
    "no offsets": raw({"x": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "one name twice": raw(
        b'{"x":' + json.dumps(tensor(0, 4, [1])).encode() + b',"x":' + json.dumps(tensor(4, 8, [1])).encode() + b"}",
        b"\0" * 8,
    ),
    "metadata of numbers": raw({"__metadata__": {"format": 1}, **GOOD}, b"\0" * 4),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_not_whole_is_one_line(tmp_path, capsys, kind):
    path = tmp_path / "file.safetensors"
    path.write_bytes(DAMAGED[kind])
    for read in (load_adapter, lambda path: load_heads(path, BUILT_IN, 192)):
        with pytest.raises(DinotileError, match="cannot be read") as error:
            read(path)
        refused(error.value)
    assert cli.main(["info", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    folder = write_checkpoint(tmp_path / "encoder")
    path.replace(folder / "model.safetensors")
    with pytest.raises(DinotileError, match="damaged or not whole") as error:
        read_checkpoint(folder)
    refused(error.value)


MEASURE = """
import resource, sys
from pathlib import Path
from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter_file import load_adapter
from lib_dinotile.dino.checkpoint import is_dinov3, read_checkpoint
from lib_dinotile.dino.head import load_heads
from lib_dinotile.condition.description import describe

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    reads = [read_checkpoint] if path.is_dir() else [load_adapter, lambda path: load_heads(path, "mini", 192), describe]
    for read in reads:
        try:
            print(f"{path.name} is read:", read(path))
        except DinotileError as error:
            print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def refusals(*paths: Path) -> tuple[list[str], int]:
    """The lines that refuse each of some files or encoders' folders, three for a file: as an adapter, as heads, by
    `info`; and how many megabytes more than before it took to say all of them."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of the memory is counted in another unit")
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    *lines, peak = run.stdout.splitlines()
    return lines, int(peak)


def spaces(path: Path, length: int) -> Path:
    """A good file with no tensors, but for its header of `length` bytes."""
    path.write_bytes(raw(b"{}" + b" " * (length - 2)))
    return path


def test_a_large_header_is_refused_before_it_is_read(tmp_path):
    file, folder = spaces(tmp_path / "file", 200_000_000), write_checkpoint(tmp_path / "encoder")
    spaces(folder / "model.safetensors", 200_000_000)
    lines, peak = refusals(file, folder)
    assert len(lines) == 4 and all("a header of 200000000 bytes" in line for line in lines) and peak < 20, (lines, peak)
    # Smaller ones safetensors itself would read.
    for length, says in ((MAX_HEADER, "names no format"), (MAX_HEADER + 8, f"a header of {MAX_HEADER + 8} bytes")):
        with pytest.raises(DinotileError, match=says):
            load_adapter(spaces(tmp_path / "file", length))


ADAPTERS = [
    {"features": str(10**9)},
    {"features": "9" * 1_000_000},
    {"slots": json.dumps([[10**9, 1], [10**9, 1]])},
    {"slots": json.dumps([[8, 1]] * 100_000)},
    {"slots": json.dumps([[8, 1], [8, 1 << 60]])},
    {"slots": "[[1e999, 1], [8, 1]]"},
    {"slots": "[" * 1_000_000},
    {"slots": "9" * 1_000_000},
    {"hyperparameters": json.dumps({"width": 8 * 10**9, "blocks": 1, "grid": 4})},
    {"hyperparameters": json.dumps({"width": 16, "blocks": 10**9, "grid": 4})},
    {"hyperparameters": '{"width": Infinity, "blocks": 1, "grid": 4}'},
    {"hyperparameters": "[" * 1_000_000},
    {"hyperparameters": "[]"},
    {"version": "1\n" * 100_000},
    # What is allowed, but not what the file has: 10 GB.
    {"hyperparameters": json.dumps({"width": 2048, "blocks": 32, "grid": 4})},
]
HEADS = [
    {"layers": [-1], "hidden": 200_000},  # 1.4 GB
    {"layers": [-1], "hidden": 10**9},
    {"layers": [-1], "hidden": 10**30},
    {"layers": [-1], "hidden": -4},
    {"layers": list(range(100_000)), "hidden": 4},
    {"layers": [-1], "hidden": "1e999"},
    {"layers": -1, "hidden": 4},
    {"layers": [1e999], "hidden": 4},
    [-1],
]


def rewrite(path: Path, **metadata: str) -> None:
    """Other metadata into a file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"].update(metadata)
    path.write_bytes(raw(header, data[end:]))


def test_adapters_of_absurd_size_are_one_line_and_take_no_memory(tmp_path):
    paths = [tmp_path / f"adapter-{number}" for number in range(len(ADAPTERS))]
    for path, metadata in zip(paths, ADAPTERS):
        save_adapter(Adapter(CONFIG), path, torch.float32)
        rewrite(path, **metadata)
    lines, peak = refusals(*paths)
    assert len(lines) == 3 * len(paths) and not any("is read" in line for line in lines), "\n".join(lines)
    assert peak < 100, peak


def test_heads_of_absurd_size_are_one_line_and_take_no_memory(tmp_path):
    paths = [tmp_path / f"head-{number}" for number in range(len(HEADS) + 1)]
    for path, heads in zip(paths, [*map(json.dumps, HEADS), "[" * 1_000_000]):
        save_heads({-1: RestorationHead(192, 4)}, path, BUILT_IN)
        rewrite(path, heads=heads)
    lines, peak = refusals(*paths)
    assert len(lines) == 3 * len(paths) and not any("is read" in line for line in lines), "\n".join(lines)
    assert peak < 100, peak


NUMBERS = [
    {"hidden_size": 10**9},
    {"hidden_size": 10**9, "num_attention_heads": 1},
    {"hidden_size": 48.0},
    {"num_hidden_layers": 10**5},
    {"num_attention_heads": 0},
    {"image_size": 10**9},
    {"image_size": 7},
    {"patch_size": 10**9},
    {"num_register_tokens": 10**9},
    {"mlp_ratio": 1e999},
    {"mlp_ratio": float("nan")},
    {"mlp_ratio": 10**9},
    {"layer_norm_eps": "x"},
    {"hidden_act": ["gelu"]},
    {"qkv_bias": 10**9},
]
NO_CONFIGURATIONS = ["{" * 1_000_000, "[" * 1_000_000, "1" * 1_000_000, " " * 100_000_000 + "{}"]


def test_configurations_of_absurd_size_are_one_line_and_take_no_memory(tmp_path):
    folders = [write_checkpoint(tmp_path / f"numbers-{i}", **change) for i, change in enumerate(NUMBERS)]
    for number, text in enumerate(NO_CONFIGURATIONS):
        folders.append(write_checkpoint(tmp_path / f"none-{number}"))
        (folders[-1] / "config.json").write_text(text)
    lines, peak = refusals(*folders)
    assert len(lines) == len(folders) and peak < 100, (lines, peak)
    for line in lines[: len(NUMBERS)]:
        assert "has numbers that fit no DINOv2" in line
    for line in lines[len(NUMBERS) :]:
        assert "config.json is not a model's configuration" in line


def test_an_encoder_s_folder_says_nothing_but_its_two_files(tmp_path, architecture, backend):  # noqa: F811
    """transformers would follow an adapter_config.json to other models, and pickles, where peft is installed."""
    evil = {"auto_map": {"AutoModel": "evil.Model"}, "quantization_config": {}}
    folder = write_checkpoint(tmp_path / "encoder", architecture, **evil)
    (folder / "evil.py").write_text("raise SystemExit('evil')")
    (folder / "pytorch_model.bin").write_bytes(DAMAGED["pickle"])
    (folder / "adapter_model.bin").write_bytes(DAMAGED["pickle"])
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}')
    expected = load_encoder(str(write_checkpoint(tmp_path / "plain", architecture)), backend=backend)
    pixels = torch.rand(1, 3, 2 * expected.patch, 2 * expected.patch)
    assert torch.equal(load_encoder(str(folder), backend=backend)(pixels), expected(pixels))


# Downloads ------------------------------------------------------------------------------------------------------------


class Downloaded(Exception):
    """Something asked the Hub."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that the Hub is asked for; nothing is in its cache, and whatever would reach a network raises."""
    import huggingface_hub
    import requests

    from lib_dinotile.dino import hub

    wanted: list[str] = []

    def cached(name: str, file: str, **_: object) -> str:
        raise FileNotFoundError(file)

    def download(name: str, *_: object) -> None:
        wanted.append(name)
        raise hub.Failed(name)

    def network(*arguments: object, **_: object) -> None:
        raise Downloaded(str(arguments))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", network)
    monkeypatch.setattr(requests.Session, "request", network)
    monkeypatch.setattr("socket.socket.connect", network)
    monkeypatch.setattr(hub, "download", download)
    return wanted


def test_nothing_is_downloaded_unless_its_name_is_chosen(models, hub):
    assert asked(models).encoder.id == "mine"
    assert asked(models, adapter="fur").encoder.id == BUILT_IN
    (models / "encoders" / "mine" / "config.json").unlink()
    assert asked(models).encoder.id == BUILT_IN
    for name in KNOWN:
        save_adapter(Adapter(dataclasses.replace(CONFIG, encoder=name)), models / "adapters" / "fur.safetensors")
        with pytest.raises(DinotileError, match=f"not on this machine: choose {name} as DINO encoder to download"):
            asked(models, adapter="fur")
    assert hub == []
    runs = [name for name in KNOWN if dinov3_runs() or not is_dinov3(name)]
    for name in KNOWN:
        says = f"'{name}' cannot be downloaded" if name in runs else "DINOv3 needs"
        with pytest.raises(DinotileError, match=says):
            asked(models, encoder=name)
    assert hub == runs


def test_a_name_that_is_no_known_one_is_not_asked_of_the_hub(models, hub):
    for name in ("someone/else", "facebook/dinov2-giant", "facebook/dinov2-small/../../someone/else", "dinov2-small"):
        with pytest.raises(DinotileError, match="is not installed"):
            asked(models, encoder=name)
    assert hub == []


# Code -----------------------------------------------------------------------------------------------------------------

SOURCES = [ROOT / "install.py", ROOT / "preload.py", *sorted((ROOT / "scripts").rglob("*.py"))]
SOURCES += sorted((ROOT / "lib_dinotile").rglob("*.py"))
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "code",
    "codeop",
    "pty",
}
MODULES |= {"pty", "subprocess", "yaml", "ctypes", "runpy", "imp", "xmlrpc", "ftplib", "telnetlib", "torch.hub"}
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
ATTRIBUTES = {"torch.load", "torch.jit.load", "numpy.load", "np.load", "torch.hub", "importlib.import_module"}
ATTRIBUTES |= {"os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "os.startfile", "torch.serialization"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute of a name, else only the last."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def risks(source: str) -> Iterator[str]:
    """What could run code that is not the program's."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in MODULES | ATTRIBUTES or name.split(".")[0] in MODULES)
        if isinstance(node, ast.Attribute) and dotted(node) in ATTRIBUTES:
            yield dotted(node)
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        yield from (name for name in ("shell", "allow_pickle", "trust_remote_code") if name in keywords)
        safe, called = keywords.get("use_safetensors"), dotted(node.func)
        weightless = "Scheduler" in called or "Tokenizer" in called
        loads = called.endswith(".from_pretrained") and not weightless
        if loads and not (isinstance(safe, ast.Constant) and safe.value is True):
            yield f"{called} without use_safetensors=True"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "load = torch.load",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('ls')",
        "import subprocess",
        "from subprocess import run",
        "run('ls', shell=True)",
        "numpy.load('x', allow_pickle=True)",
        "import yaml",
        "Model.from_pretrained('x')",
        "Model.from_pretrained('x', use_safetensors=False)",
        "__import__('os')",
    ],
)
def test_what_could_run_code_is_seen(source):
    assert list(risks(source))


def test_sources_are_found():
    assert {"install.py", "preload.py", "dinotile.py", "flow.py", "takeover.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_program_could_run_code(path):
    assert list(risks(path.read_text(encoding="utf-8"))) == []
