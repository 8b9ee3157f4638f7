"""python -m lib_dinotile info: what a file of weights says of itself."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_dinotile import __main__ as cli
from lib_dinotile.condition import adapter_file, description
from lib_dinotile.condition.adapter import Adapter, AdapterConfig
from lib_dinotile.condition.adapter_file import save_adapter
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.dino.head import RestorationHead, save_heads

CONFIG = AdapterConfig("sd15", UNetShape.build([8, 16], 1), "facebook/dinov2-small", 24, width=16, blocks=1, layer=-2)


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(Adapter(CONFIG), path, steps="20000", data="photographs", **{"a note": "two\nlines"})
    return path


@pytest.fixture
def heads(tmp_path):
    path = tmp_path / "heads.safetensors"
    save_heads({layer: RestorationHead(24, 6) for layer in (-1, -3)}, path, "facebook/dinov2-small", steps="300")
    return path


@pytest.fixture
def both(tmp_path):
    """An adapter with restoration heads in its file."""
    path = tmp_path / "both.safetensors"
    heads = {layer: RestorationHead(24, 6) for layer in (-1, -3)}
    made = {"steps": "20000", "data": "photographs", "a note": "two\nlines"}
    save_adapter(Adapter(CONFIG), path, heads=heads, **made)
    return path


def told(capsys, *arguments):
    assert cli.main(["info", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in arguments else dict(line.split(": ", 1) for line in out.splitlines())


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_an_adapter_says_what_it_is_for_and_how_it_was_made(adapter, capsys):
    found = {name: value.strip() for name, value in told(capsys, adapter).items()}
    assert found == {
        "kind": "adapter",
        "base": "sd15",
        "encoder": "facebook/dinov2-small",
        "features": "24",
        "layer": "-2",
        "width": "16",
        "blocks": "1",
        "grid": "4",
        "unet": str(CONFIG.shape),
        "parameters": f"{count(Adapter(CONFIG)):,}",
        "precision": "half (F16)",
        "megabytes": str(round(adapter.stat().st_size / 1e6, 3)),
        "a note": '"two\\nlines"',
        "data": "photographs",
        "steps": "20000",
    }
    assert list(found)[-3:] == ["a note", "data", "steps"]


def test_programs_get_it_as_json(adapter, capsys):
    found = told(capsys, adapter, "--json")
    assert found["parameters"] == count(Adapter(CONFIG)) and found["width"] == 16
    assert found["made"] == {"a note": "two\nlines", "data": "photographs", "steps": "20000"}


def test_restoration_heads_say_which_layers_they_are_for(heads, capsys):
    found = told(capsys, heads, "--json")
    assert (found["kind"], found["layers"], found["hidden"]) == ("restoration heads", [-3, -1], 6)
    assert found["parameters"] == 2 * count(RestorationHead(24, 6)) and found["made"] == {"steps": "300"}
    assert told(capsys, heads)["layers"].strip() == "-3, -1"


def test_heads_in_an_adapters_file_are_told_apart(both, adapter, capsys):
    found, alone = told(capsys, both, "--json"), told(capsys, adapter, "--json")
    parameters = 2 * count(RestorationHead(24, 6))
    assert found.pop("heads") == {"layers": [-3, -1], "hidden": 6, "parameters": parameters}
    assert found.pop("reads through a head") == "no"
    assert {**found, "megabytes": 0} == {**alone, "megabytes": 0}
    assert told(capsys, both)["heads"].strip() == f"layers -3, -1; hidden 6; parameters {parameters:,}"


def test_no_tensor_is_read(adapter, heads, both, capsys, monkeypatch):
    class HeaderOnly:
        def __init__(self, path):
            with safe_open(path, "pt") as file:
                self._metadata = file.metadata()

        def metadata(self):
            return self._metadata

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    for module in (description, adapter_file):
        monkeypatch.setattr(module, "open_tensors", HeaderOnly)
    for path in (adapter, heads, both):
        told(capsys, path)


def rewrite(path, metadata, **tensors):
    """The file at `path` with some metadata and tensors replaced, or taken out where they are None."""
    with safe_open(path, framework="pt") as file:
        known = {**file.metadata(), **metadata}
    kept = {**load_file(path), **tensors}
    save_file(
        {name: tensor for name, tensor in kept.items() if tensor is not None},
        path,
        {name: value for name, value in known.items() if value is not None},
    )


@pytest.mark.parametrize(
    "which, metadata, tensors, says",
    [
        ("adapter", {"format": "other"}, {}, "holds no weights of dinotile"),
        ("adapter", {"version": "9"}, {}, "update dinotile"),
        ("adapter", {"slots": "[]"}, {}, "bad adapter metadata"),
        ("adapter", {"slots": f"[[{10**30}, 1], [8, 1]]"}, {}, "is damaged"),
        ("adapter", {"features": "25"}, {}, "does not fit its metadata"),
        ("adapter", {}, {"norm.weight": None}, "tensor norm.weight does not fit"),
        ("adapter", {}, {"heads.-1.norm.weight": torch.zeros(1)}, "tensor heads.-1.norm.weight does not fit"),
        ("heads", {"version": "9"}, {}, "update dinotile"),
        ("heads", {"heads": "{}"}, {}, "bad head metadata"),
        ("heads", {"heads": '{"layers": [-1], "hidden": 6}'}, {}, "tensor heads.-3.floor does not fit"),
        ("heads", {"heads": '{"layers": [-1, -3], "hidden": -4}'}, {}, "is damaged"),
        ("heads", {"heads": None}, {}, "bad head metadata"),
        ("both", {"heads": "{}"}, {}, "bad head metadata"),
        ("both", {"heads": "7"}, {}, "bad head metadata"),
        ("both", {}, {"heads.-3.floor": None}, "tensor heads.-3.floor does not fit"),
    ],
)
def test_what_is_damaged_is_one_line_and_exit_code_2(request, capsys, which, metadata, tensors, says):
    path = request.getfixturevalue(which)
    rewrite(path, metadata, **tensors)
    assert cli.main(["info", str(path)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_what_is_no_file_of_weights_is_one_line_and_exit_code_2(adapter, tmp_path, capsys):
    (tmp_path / "text").write_text("no weights")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(adapter.read_bytes()[:-1])
    (tmp_path / "short").write_bytes(adapter.read_bytes()[:99])
    save_file({"x": torch.zeros(1)}, tmp_path / "bare")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 88\n")
    for name, says in (
        ("pointer", "it is only a Git LFS pointer, download the file itself"),
        ("text", "cannot be read as a safetensors file"),
        ("empty", "cannot be read as a safetensors file"),
        ("cut", "cannot be read as a safetensors file"),
        ("short", "cannot be read as a safetensors file"),
        ("bare", "holds no weights of dinotile"),
        ("gone", "does not exist"),
        (".", "is not a file"),
    ):
        assert cli.main(["info", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
