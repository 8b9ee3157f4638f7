"""From names in the settings to the condition of a tile."""

import dataclasses
import itertools
import os
import shutil
import types
from unittest.mock import Mock

import pytest
import torch

from lib_dinotile import DinotileError
from lib_dinotile.condition import conditioner as module
from lib_dinotile.condition.adapter import AdapterCondition, AdapterConfig
from lib_dinotile.condition.adapter_file import save_adapter
from lib_dinotile.condition.conditioner import Conditioner, installed_weights
from lib_dinotile.dino import cache
from lib_dinotile.dino import head as heads_module
from lib_dinotile.dino.checkpoint import read_checkpoint
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import RestorationHead, save_heads
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, TilePlan
from tests.test_adapter import SMALL, random_adapter
from tests.test_encoder import write_checkpoint
from tests.test_tiling import random_image

HOST = types.SimpleNamespace(
    base="sd15",
    shape=SMALL.shape,
    device="cpu",
    dtype=torch.float32,
    guidance_decoder=lambda choice: (choice if choice != "Automatic" else "TAESD", lambda latents: latents[:, :3]),
)
CONFIG = AdapterConfig("sd15", SMALL.shape, "mini", features=192, width=16, blocks=1)


@pytest.fixture
def adapters(tmp_path):
    save_adapter(random_adapter(CONFIG), tmp_path / "fur.safetensors", torch.float32)
    heads = {-2: RestorationHead(192, 4), -1: RestorationHead(192, 4)}
    restored = random_adapter(dataclasses.replace(CONFIG, restored=True))
    save_adapter(restored, tmp_path / "restored.safetensors", torch.float32, heads)
    return installed_weights(tmp_path)


def settings(**values):
    return Settings(**{"adapter": "fur", "patches": 8, "guidance": 0.0, "guard": "off", **values})


def test_every_tile_is_conditioned_by_the_features_of_its_own_place(adapters):
    conditioner = Conditioner.load(settings(), HOST, adapters)
    field = conditioner.features(random_image(64, 48), (128, 96))
    tiles = [Rect(0, 0, 64, 64), Rect(64, 32, 64, 64)]
    canvas = Canvas(random_image(128, 96), plan := TilePlan(128, 96, 64))
    conditions = conditioner.conditions(random_image(64, 48), field, canvas, plan)
    given = conditions.adapted(tiles, (8, 8)).residuals(1.0, 0.0)
    adapter = random_adapter(CONFIG)
    for number, tile in enumerate(tiles):
        own = AdapterCondition(adapter, field.adapter.crop([tile], adapter.grid((8, 8))), (8, 8)).residuals(1.0, 0.0)
        for a, b in zip(given, own):
            assert torch.allclose(a[number], b[0], atol=1e-5)
    assert not torch.allclose(given[0][0], given[0][1], atol=1e-3)


def test_none_is_asked_for_and_none_is_given(adapters):
    assert Conditioner.load(settings(adapter="None"), HOST, adapters) is None


def test_loading_draws_nothing_from_the_common_generator(adapters):
    torch.manual_seed(0)
    Conditioner.load(settings(adapter="None"), HOST, adapters)
    Conditioner.load(settings(), HOST, adapters)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(
    "values, host, says",
    [
        ({"adapter": "leaves"}, {}, "adapter: 'leaves' is not installed, give one of None, fur, restored"),
        ({"adapter": "../fur"}, {}, "adapter: '../fur' is not installed"),
        ({}, {"base": "sdxl"}, "is for sd15 checkpoints, this one is sdxl"),
        ({}, {"shape": None}, "adapters do not work with this checkpoint's model"),
        ({"encoder": "nowhere"}, {}, "encoder: 'nowhere' is not installed"),
        ({"encoder": "/etc"}, {}, "encoder: '/etc' is not installed"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_refused_with_one_line(adapters, values, host, says):
    with pytest.raises(DinotileError, match=says) as error:
        Conditioner.load(settings(**values), types.SimpleNamespace(**{**vars(HOST), **host}), adapters, trusted=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["adapter", "head", "encoder"])
@pytest.mark.parametrize("trusted", [False, True])
def test_names_are_checked_also_where_they_have_no_part(option, trusted):
    idle = Settings(**{"guidance": 0.0, "guard": "off", option: "dinov9"})
    assert option == "adapter" or not idle.looks
    with pytest.raises(DinotileError, match="dinov9") as error:
        Conditioner.load(idle, HOST, {}, trusted=trusted)
    assert error.value.status_code == 422 and "\n" not in str(error.value)
    with pytest.raises(DinotileError, match="dinov9"):
        Conditioner.without_model(idle, trusted=trusted)


@pytest.fixture
def calls(monkeypatch):
    """What takes long, by name, each to be asked how often it was called."""
    watched = {}
    for place, name in (
        (cache, "feature_fields"),
        (module, "load_encoder"),
        (module, "load_adapter"),
        (heads_module, "load_heads"),
    ):
        watched[name] = Mock(wraps=getattr(place, name))
        monkeypatch.setattr(place, name, watched[name])
    for kept in (module._encoder, module._adapter, heads_module._read):
        kept.cache_clear()
    module._features.clear()
    return watched


@pytest.mark.parametrize("adapter, files, views", [("fur", 1, 1), ("restored", 1, 2)])
def test_all_runs_on_one_source_look_at_it_once(adapters, calls, adapter, files, views):
    """As the cells of a plot are, and the next seed: once at the source, and once at it shrunk, for a guard whose head
    does not say how far true patches may be."""
    source, plan = random_image(64, 48), TilePlan(128, 96, tile=64, overlap=16, factor=8)
    for strength, guidance, guard in itertools.product((0.5, 1.0), (0.25, 0.5, 1.0), ("report", "retry")):
        asked = settings(adapter=adapter, strength=strength, guidance=guidance, guard=guard)
        conditioner = Conditioner.load(asked, HOST, adapters)
        features = conditioner.features(source.copy(), (128, 96))
        conditioner.conditions(source, features, Canvas(source.resize((128, 96)), plan), plan)
    counts = {name: call.call_count for name, call in calls.items()}
    assert counts == {"feature_fields": views, "load_encoder": 1, "load_adapter": 1, "load_heads": files}


TIME = 1_700_000_000 * 10**9
"""Of a file, in nanoseconds: 100 more are not seen in seconds of double precision."""


@pytest.mark.parametrize("place", ["tiny", "org/tiny", "elsewhere"])
@pytest.mark.parametrize("later", [-(10**9), 100])
def test_an_encoder_that_is_exchanged_is_loaded_anew(tmp_path, place, later):
    folder, name = tmp_path / "encoders", place
    write_checkpoint(folder / "another")
    os.utime(folder / "another" / "model.safetensors", ns=(TIME, TIME))
    if place == "elsewhere":  # by its path, as on the command line
        name = str(tmp_path / place)
    asked = settings(adapter="None", guard="report", encoder=name)

    def exchanged(seed, time):
        shutil.rmtree(folder / name, ignore_errors=True)
        write_checkpoint(folder / name, seed=seed)
        os.utime(folder / name / "model.safetensors", ns=(time, time))
        return Conditioner.load(asked, HOST, {}, folder).encoder

    first, second = exchanged(0, TIME), exchanged(1, TIME + later)
    assert first.fingerprint != second.fingerprint == read_checkpoint(folder / name).fingerprint
    assert Conditioner.load(asked, HOST, {}, folder).encoder is second


def test_an_encoder_takes_the_place_of_one_that_is_found_later(tmp_path):
    """`folder/name` is looked up before `folder/<last part of name>`."""
    asked = settings(adapter="None", guard="report", encoder="org/tiny")
    write_checkpoint(tmp_path / "tiny")
    first = Conditioner.load(asked, HOST, {}, tmp_path).encoder
    write_checkpoint(tmp_path / "org" / "tiny", seed=1)
    os.utime(tmp_path / "org" / "tiny" / "model.safetensors", ns=(TIME, TIME))
    second = Conditioner.load(asked, HOST, {}, tmp_path).encoder
    assert first.fingerprint != second.fingerprint == read_checkpoint(tmp_path / "org" / "tiny").fingerprint


@pytest.mark.parametrize("what", ["adapter", "head"])
def test_a_file_that_is_exchanged_is_read_anew(tmp_path, what):
    file = tmp_path / "file.safetensors"

    def exchanged(seed, time):
        if what == "adapter":
            save_adapter(random_adapter(CONFIG, seed), file, torch.float32)
            asked = settings(adapter="file")
        else:
            head = RestorationHead(192, 0)
            head.outer.bias.data.fill_(seed)
            save_heads({-1: head}, file, "mini")
            asked = settings(adapter="None", guard="report", head="file")
        os.utime(file, ns=(time, time))
        loaded = Conditioner.load(asked, HOST, {"file": file}, heads={"file": file})
        return loaded._adapter if what == "adapter" else loaded._heads.heads[-1]

    first, second = (exchanged(seed, TIME + 100 * seed).state_dict() for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_what_automatic_stood_for_is_told_and_gives_the_same_again(adapters):
    def used(**values):
        return Conditioner.load(settings(**values), HOST, adapters).resolved

    told = used(adapter="fur", guidance=0.5)
    assert (told.encoder, told.head, told.decoder) == ("mini", "calibrated", "TAESD")
    again = Conditioner.load(told, HOST, adapters)
    assert again.resolved == told
    assert again.notes == Conditioner.load(settings(guidance=0.5), HOST, adapters).notes
    alone = {"adapter": "None", "guard": "report"}
    assert Conditioner.load(used(**alone), HOST, {}).notes == Conditioner.load(settings(**alone), HOST, {}).notes != []
    # A head in the adapter's own file goes with that.
    assert used(adapter="restored").head == "Automatic"
    assert used(adapter="restored", head="None").head == "None"


def test_a_coarse_decoder_is_told():
    def told(decoder):
        asked = settings(adapter="None", guidance=0.5, decoder=decoder)
        return Conditioner.load(asked, HOST, {}).notes

    assert "guidance decoder: TAESD" in told("TAESD")
    assert [note for note in told("linear") if "guidance decoder: linear (too coarse" in note]


def test_without_a_head_guidance_is_off_and_the_notes_say_so(adapters):
    def notes(**values):
        conditioner = Conditioner.load(settings(guidance=1.0, **values), HOST, adapters)
        conditioner.features(random_image(64, 48), (128, 96))
        return conditioner.notes

    off = [note for note in notes(head="None") if note.startswith("guidance is off")]
    assert len(off) == 1 and "set Restoration head to Automatic" in off[0]
    assert not any("guidance is off" in note for note in notes(head="None", distance="self-similarity"))
    assert "restoration head: calibrated" in notes() and not any("guidance is off" in note for note in notes())


@pytest.mark.parametrize("patches, looked", [(16, 16), (256, 64)])
def test_for_regions_the_encoder_looks_no_finer_than_they_are(patches, looked, monkeypatch):
    asked: list[int] = []

    def field(encoder, source, canvas, patches, windows=1):
        asked.append(patches)
        return FeatureField(torch.rand(8, 6, 8), canvas)

    monkeypatch.setattr(module, "_features", types.SimpleNamespace(field=field))
    conditioner = Conditioner(Settings(patches=patches, windows=4), load_encoder("mini"))
    assert conditioner.regions(random_image(64, 48), (128, 96)).canvas == (128, 96) and asked == [looked]
