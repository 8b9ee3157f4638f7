"""What an adapter costs beside a UNet; counted on the meta device, so that nothing is computed."""

import pytest

from benchmarks.models import UNETS
from benchmarks.speed import adapter_calls, counted


@pytest.mark.parametrize("name", UNETS)
def test_an_adapter_costs_a_small_part_of_a_step(name):
    cost = counted(name)
    assert cost["parameters"] <= 60_000_000
    assert 0 < cost["step_share"] < cost["tile_share"] <= 0.03
    known = {"sd15": 859_520_964, "sdxl": 2_567_463_684}  # of the published checkpoints
    assert cost["unet_parameters"] == known[name]


def test_the_multi_scale_part_runs_once_a_tile_and_the_gate_at_every_step():
    calls = adapter_calls(batch=1, side=96)
    assert calls["prepare"] == calls["tiles"] > 1
    assert calls["forward"] == calls["unet"] == 7 * calls["tiles"]
