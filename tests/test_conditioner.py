"""From names in the settings to the condition of a tile."""

import types

import pytest
import torch

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import AdapterCondition, AdapterConfig
from lib_dinotile.condition.adapter_file import save_adapter
from lib_dinotile.condition.conditioner import Conditioner, installed_weights
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.plan import Rect
from tests.test_adapter import SMALL, random_adapter
from tests.test_tiling import random_image

HOST = types.SimpleNamespace(base="sd15", shape=SMALL.shape, device="cpu", dtype=torch.float32)
CONFIG = AdapterConfig("sd15", SMALL.shape, "mini", features=192, width=16, blocks=1)


@pytest.fixture
def adapters(tmp_path):
    save_adapter(random_adapter(CONFIG), tmp_path / "fur.safetensors", torch.float32)
    return installed_weights(tmp_path)


def settings(**values):
    return Settings(**{"adapter": "fur", "patches": 8, "guidance": 0.0, "guard": "off", **values})


def test_every_tile_is_conditioned_by_the_features_of_its_own_place(adapters):
    conditioner = Conditioner.load(settings(), HOST, adapters)
    field = conditioner.features(random_image(64, 48), (128, 96))
    tiles = [Rect(0, 0, 64, 64), Rect(64, 32, 64, 64)]
    given = conditioner.condition(field, tiles, (8, 8)).residuals(1.0, 0.0)
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
        ({"adapter": "leaves"}, {}, "adapter: 'leaves' is not installed, give one of None, fur"),
        ({"adapter": "../fur"}, {}, "adapter: '../fur' is not installed"),
        ({}, {"base": "sdxl"}, "is for sd15 checkpoints, this one is sdxl"),
        ({}, {"shape": None}, "this checkpoint's UNet takes no residuals"),
        ({"encoder": "nowhere"}, {}, "encoder: 'nowhere' is not installed"),
        ({"encoder": "/etc"}, {}, "encoder: '/etc' is not installed"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_refused_with_one_line(adapters, values, host, says):
    with pytest.raises(DinotileError, match=says) as error:
        Conditioner.load(settings(**values), types.SimpleNamespace(**{**vars(HOST), **host}), adapters, trusted=False)
    assert "\n" not in str(error.value)
