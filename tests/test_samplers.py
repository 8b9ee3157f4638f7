"""Samplers that fail with few steps, that draw noise of their own, or that mix the tiles of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lib_dinotile.engine.host import Interrupted
from tests.host_contract import batch_of, close, latents_of, sampled
from tests.test_host_state import same, snapshot
from tests.webui_odd_samplers import DRAWN, MIXED, NEEDED
from tests.webui_stand_in import KINDS, WebUI
from tests.webui_stand_in import webui as stand_in

some = pytest.mark.parametrize
ALL = 0.999


@pytest.fixture(params=KINDS, ids=str)
def webui(request: pytest.FixtureRequest) -> Iterator[WebUI]:
    with stand_in(request.param) as made:
        yield made


def counted(webui: WebUI) -> list[int]:
    """Gets an entry for every call of the model."""
    calls: list[int] = []
    inner = webui.apply
    webui.apply = lambda *args, **more: calls.append(1) or inner(*args, **more)  # type: ignore[method-assign]
    return calls


@some("sampler", NEEDED)
@some("denoise, asked", [(0.03, 1), (0.2, 2), (0.5, 4)])
def test_a_pass_takes_as_many_steps_as_its_sampler_needs(webui, sampler, denoise, asked):
    host = webui.host(p := webui.job(sampler))
    taken = max(asked, NEEDED[sampler][1])
    with webui.running():
        latents = latents_of(host)
        assert host.steps(denoise) == taken
        note = f"{taken} sampling steps instead of {asked}: {sampler} cannot do fewer"
        assert host.steps_note(denoise) == (note if taken > asked else "")
        found = sampled(host, batch_of(range(3)), latents, denoise=denoise)
    assert found.isfinite().all() and p.sampler.model_wrap_cfg.total_steps == taken
    if taken > asked and denoise < 0.1:  # the strength stays, however many steps it is cut into
        assert (found - latents).abs().mean() < 0.5 * latents.abs().mean()


def test_a_sampler_that_fails_with_any_number_of_steps_is_left_to_say_so_itself(webui):
    host = webui.host(p := webui.job("UniPC"))

    def fails(model, x, sigmas, extra_args, callback, disable):
        raise RuntimeError("not with this model")

    p.sampler.func = fails
    with webui.running(), pytest.raises(RuntimeError, match="not with this model"):
        assert host.steps(0.03) == 1 and host.steps_note(0.03) == host.batch_note() == ""
        sampled(host, batch_of(range(3)), latents_of(host), denoise=0.03)


@some("sampler", DRAWN)
def test_the_noise_that_a_sampler_draws_itself_is_a_tiles_own_whatever_is_beside_it(webui, sampler):
    host = webui.host(webui.job(sampler, denoise=ALL))
    with webui.running():
        latents = latents_of(host)
        together = sampled(host, batch_of(range(3)), latents)
        alone = torch.cat([sampled(host, batch_of([number]), latents[number][None]) for number in range(3)])
        quiet = webui.host(webui.job("LMS", denoise=ALL))
        close(together, alone)
        assert (together - sampled(quiet, batch_of(range(3)), latents)).abs().max() > 0.1, "it drew no noise"


def test_the_model_draws_its_noise_as_ever(webui):
    """Extensions may; only the sampler's is a part of the canvas's."""
    host, seen = webui.host(webui.job("ER SDE")), []
    hook = webui.unet.register_forward_pre_hook(lambda module, args: seen.append(torch.randn(3, 4, 8, 8)))
    with webui.running():
        sampled(host, batch_of(range(3)), latents_of(host))
        torch.manual_seed(2)
        expected = torch.randn(3, 4, 8, 8)
        seen.clear()
        torch.manual_seed(2)
        sampled(host, batch_of(range(3)), latents_of(host))
    hook.remove()
    assert torch.equal(seen[0], expected)


@some("sampler", [*MIXED, *NEEDED, *DRAWN, "Euler", "DPM++ SDE", "DDIM"])
def test_a_sampler_that_mixes_the_tiles_of_a_batch_is_known(webui, sampler):
    host = webui.host(webui.job(sampler))
    with webui.running():
        note = host.batch_note()
    mixes = f"tiles are sampled one at a time: with {sampler} the tiles of a batch would influence each other"
    assert note == (mixes if sampler in MIXED else "")


@some("sampler", [*NEEDED, *DRAWN, "DPM adaptive", "Euler CFG++", "DDIM"])
def test_trying_a_sampler_out_asks_no_model_and_leaves_nothing_behind(webui, sampler):
    p = webui.job(sampler)
    host, calls, state = webui.host(p), counted(webui), torch.get_rng_state()
    before, loaded = snapshot(webui, p), webui.loaded
    with webui.running():
        for denoise in (0.03, 0.5, None):
            host.steps(denoise)
        host.batch_note()
    same(before, snapshot(webui, p))
    assert not calls and webui.loaded is loaded and torch.equal(torch.get_rng_state(), state)


@some("name", ["interrupted", "skipped", "stopping_generation"])
def test_a_stop_is_heard_at_the_next_step_and_a_batch_that_is_through_is_kept(webui, name):
    """The page's Interrupt sets the last of the three where there is more than one job to do."""
    host, state = webui.host(webui.job()), webui.modules["modules.shared"].state
    steps = host.steps()

    def stop_at(step: int) -> int:
        """The steps that were taken when it was told to stop in one of them."""
        seen, inner = [], webui.apply
        with monkeypatch.context() as patch:

            def apply(*args: Any, **more: Any) -> Any:
                seen.append(host._p.sampler.model_wrap_cfg.step)
                if seen[-1] == step:
                    setattr(state, name, True)
                return inner(*args, **more)

            patch.setattr(webui, "apply", apply)
            try:
                found = sampled(host, batch_of(range(3)), latents_of(host))
                assert found.isfinite().all()
            finally:
                setattr(state, name, False)
        return seen[-1]

    monkeypatch = pytest.MonkeyPatch()
    with webui.running():
        for step in range(steps - 1):
            with pytest.raises(Interrupted):
                stop_at(step)
        assert stop_at(steps - 1) == steps - 1


def test_a_sampler_is_tried_once_for_each_strength(webui, monkeypatch):
    p: Any = webui.job("UniPC")
    host, tried, inner = webui.host(p), [], p.sampler.sample_img2img
    monkeypatch.setattr(p.sampler, "sample_img2img", lambda *args, **more: tried.append(1) or inner(*args, **more))
    with webui.running():
        assert host.steps(0.03) == 3
        (count,) = {len(tried), len(tried) * bool(host.steps(0.03) == host.steps(0.03))}
        assert len(tried) == count == 3
