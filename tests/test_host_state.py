"""What hosts leave behind: nothing; and what they do for a while."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.engine.host import Batch, Interrupted
from lib_dinotile.tiling.plan import Rect
from tests.host_contract import TILES, Expected, Guide, Script, batch_of, close, latents_of, places, sampled
from tests.webui_stand_in import FORGE, KINDS, Scripts, WebUI
from tests.webui_stand_in import webui as stand_in

some = pytest.mark.parametrize


@pytest.fixture(params=KINDS, ids=str)
def webui(request: pytest.FixtureRequest) -> Iterator[WebUI]:
    with stand_in(request.param) as made:
        yield made


ITS_OWN = {"step", "total_steps", "last_latent", "sampler_extra_args", "last_noise_uncond", "ini_latent"}
"""What the WebUI's own sampling leaves behind, and `setup_conds`."""


def snapshot(webui: WebUI, p: Any) -> dict[str, Any]:
    """All attributes by name of what hosts patch, and the hooks of all modules."""
    places = {"p": p, "sampler": p.sampler, "denoiser": p.sampler.model_wrap_cfg, "model": webui.model}
    places |= {name: module for name, module in webui.modules.items() if "." in name}
    if webui.kind.chain:
        objects = webui.model.forge_objects
        places |= {"unet": objects.unet, "inner": objects.unet.model, "vae": objects.vae}
    shared = webui.modules["modules.shared"]
    places |= {"tqdm": shared.total_tqdm, "unet itself": webui.unet, "vae itself": webui.vae}
    kept = {f"{place}.{name}": value for place, one in places.items() for name, value in vars(one).items()}
    if webui.kind.chain:
        kept["model.forge_objects"] = (webui.model.forge_objects.unet, webui.model.forge_objects.vae)
    for part in (webui.unet, webui.vae):
        for name, module in part.named_modules():
            kept[f"hooks of {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    kept["callbacks"] = sum(map(len, webui.callbacks.values()))
    kept["references"] = [*webui.args.ref_latents]
    return {name: value for name, value in kept.items() if name.rpartition(".")[2] not in ITS_OWN}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        now = other[name]
        assert now is value or (not isinstance(value, Tensor) and now == value), name


def test_full_precision_ends_for_weights_that_the_webui_has_put_in_the_places_of_others():
    """As Forge does to move a model, and all of them to take a LoRA out."""
    with stand_in(FORGE, half=True) as webui, webui.running():
        host = webui.host(webui.job())
        with host.full_precision():
            out = webui.unet.out
            out._parameters["weight"] = torch.nn.Parameter(out.weight.detach().clone(), requires_grad=False)
        assert {weight.dtype for weight in webui.unet.parameters()} == {torch.bfloat16}


def test_the_samplers_module_keeps_none_of_the_noise(webui):
    """A hijacked one has `p.rng` until the next sampling."""
    p, kept = webui.job(), []
    host, inner = webui.host(p), p.sampler.sample_img2img
    p.sampler.sample_img2img = lambda p, *args, **more: kept.append(p.rng) or inner(p, *args, **more)
    with webui.running():
        sampled(host, batch_of(range(3)), latents_of(host))
    made = weakref.ref(host)
    del host
    gc.collect()
    assert made() is None and kept and {each._draw for each in kept} == {None}


def test_noise_levels_of_a_job_that_failed_are_taken_back():
    with stand_in(FORGE) as webui:
        levels: Any = types.SimpleNamespace(sigmas=torch.rand(9))
        levels.set_sigmas = lambda sigmas: setattr(levels, "sigmas", sigmas.float())
        webui.model.forge_objects.unet.model.predictor = levels
        host, before = webui.host(webui.job()), levels.sigmas.clone()
        host.restore_levels()
        levels.set_sigmas(before * 2)
        host.restore_levels()
        assert torch.equal(levels.sigmas, before)


def test_a_stopped_run_is_decoded_like_any_other(webui, monkeypatch):
    """The WebUIs have an option to take the preview's decoder for it."""
    host, seen = webui.host(webui.job()), []
    processing, state = webui.modules["modules.processing"], webui.modules["modules.shared"].state
    inner = processing.decode_latent_batch
    monkeypatch.setattr(
        processing, "decode_latent_batch", lambda *args, **more: seen.append(state.interrupted) or inner(*args, **more)
    )
    with webui.running():
        latents = latents_of(host, 1)
        state.interrupted = True
        host.decode(latents)
    assert seen == [False] and state.interrupted


@some("fault", ["none", "the user", "guidance", "the model", "a script"])
def test_everything_is_as_before_and_nothing_stays_alive(webui, fault):
    p = webui.job()
    host = webui.host(p)
    state = torch.get_rng_state()
    load_encoder("mini")
    gc.disable()
    try:
        with webui.running():
            latents = latents_of(host)
            before = snapshot(webui, p)
            batch = batch_of(range(3), residuals=not webui.kind.flow, guided=True)
            kept = [weakref.ref(batch), weakref.ref(batch.guide)]
            kept += [weakref.ref(batch.condition)] if batch.condition else []
            said = run_into(fault, webui, p, host, batch, latents)
        assert said == {"none": "", "the user": "Interrupted"}.get(fault, f"RuntimeError: {fault}")
        same(before, snapshot(webui, p))
        del batch
        assert [ref() for ref in kept] == [None] * len(kept)
        made = weakref.ref(host)
        del host
        assert made() is None
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        gc.enable()


def run_into(fault: str, webui: WebUI, p: Any, host: Any, batch: Batch, latents: Tensor) -> str:
    """Samples, and gives what is raised in words."""
    calls = []

    def fails(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) > 1 or fault == "a script":
            raise RuntimeError(fault)

    state = webui.modules["modules.shared"].state
    hook = None
    if fault == "the user":
        state.interrupted = True
    elif fault == "guidance":
        batch.guide.numbers = None
        batch.guide.__class__ = type("Failing", (Guide,), {"__call__": fails})
    elif fault == "the model":
        hook = (webui.unet.out).register_forward_hook(fails)
    elif fault == "a script":
        p.scripts = Scripts(Script("other", process_before_every_sampling=fails))
    try:
        sampled(host, batch, latents)
    except (RuntimeError, Interrupted) as error:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    finally:
        p.scripts, state.interrupted = None, False
        if hook:
            hook.remove()
    return ""


def test_full_precision_is_for_a_while():
    for kind in KINDS:
        with stand_in(kind, half=True) as webui, webui.running():
            p = webui.job()
            host = webui.host(p)
            before = snapshot(webui, p)
            weights = [weight for part in (webui.unet, webui.vae) for weight in part.parameters()]
            values = [weight.clone() for weight in weights]
            latents = latents_of(host)
            assert host.dtype == torch.bfloat16
            with host.full_precision():
                assert {weight.dtype for weight in weights} == {torch.float32}
                precise = sampled(host, batch_of(range(3)), latents_of(host))
                assert host.decode(precise).isfinite().all()
                one = Expected(webui, p).sample(
                    latents_of(host)[:1], places(host, TILES[:1]), batch_of([0]),
                    [Rect(0, 0, *latents.shape[-2:])], [torch.ones(())], 0.6,
                )  # fmt: skip
                close(precise[:1], one)
            rough = sampled(host, batch_of(range(3)), latents)
            assert not torch.allclose(rough.float(), precise, atol=1e-3)
            same(before, snapshot(webui, p))
            assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(weights, values))


def test_how_many_steps_there_are(webui):
    p = webui.job()
    host, seen = webui.host(p), []
    batch = batch_of(range(3))
    guide = lambda x0, step, total, chosen: seen.append((step, total))  # noqa: E731
    with webui.running():
        for denoise, wanted in ((None, 4), (0.9, 6), (0.2, 2)):
            seen.clear()
            sampled(host, Batch(batch.tiles, batch.prompts, None, guide), latents_of(host), denoise=denoise)
            assert host.steps(denoise) == wanted == len(seen) and seen == [(step, wanted) for step in range(wanted)]


def test_a_user_who_stops_is_heard(webui):
    p = webui.job()
    host, state = webui.host(p), webui.modules["modules.shared"].state
    assert not host.interrupted()
    for name in ("interrupted", "skipped", "stopping_generation"):
        setattr(state, name, True)
        assert host.interrupted()
        with webui.running(), pytest.raises(Interrupted):
            sampled(host, batch_of(range(3)), latents_of(host))
        setattr(state, name, False)
