"""ControlNet hints, cut to the tiles."""

import torch

from lib_dinotile.hosts.hints import crop_hint, is_spatial
from lib_dinotile.tiling.plan import TilePlan


def test_a_tile_gets_its_own_part_and_the_border_goes_on():
    plan = TilePlan(width=93, height=50, tile=64, overlap=16, factor=8)
    hint = torch.rand(1, 3, 50, 93)
    tiles = plan.tiles
    crops = crop_hint(hint, tiles, (93, 50))
    assert crops.shape == (2, 3, 56, 64)
    assert torch.equal(crops[0, :, :50], hint[0, :, :, :64])
    assert torch.equal(crops[1, :, :50, : 93 - tiles[1].x], hint[0, :, :, tiles[1].x :])
    assert torch.equal(crops[1, :, 55], crops[1, :, 49])


def test_every_image_of_a_batch_has_its_own():
    plan, hint = TilePlan(width=64, height=64, tile=64), torch.rand(2, 3, 64, 64)
    for image, number in ((0, 0), (1, 1), (2, 0)):
        assert torch.equal(crop_hint(hint, plan.tiles, (64, 64), image)[0], hint[number])


def test_a_hint_of_a_rounded_size_is_laid_over_the_canvas():
    plan = TilePlan(width=100, height=100, tile=64, overlap=0, factor=8)
    ramp = torch.linspace(0, 1, 96).expand(1, 3, 96, 96)
    crops = crop_hint(ramp, plan.tiles, (100, 100))
    assert abs(crops[0, 0, 0, 50] - 0.505) < 0.01 and crops[-1].max() == 1


def test_embeddings_are_left_whole():
    assert is_spatial(torch.zeros(1, 3, 64, 64))
    for other in (None, torch.zeros(1, 4, 768), torch.zeros(1, 1024, 1, 1), {"cond": 1}):
        assert not is_spatial(other)
