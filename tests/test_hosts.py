"""A contract that every host passes, in stand-ins of the WebUIs (tests/live has the real ones): what they paint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.engine.denoisers import MultiDiffusion, TileBatch
from lib_dinotile.engine.flow import upscale
from lib_dinotile.engine.host import Batch
from lib_dinotile.engine.memory import BatchSize
from lib_dinotile.engine.team import Team
from lib_dinotile.settings import DECODERS, Generation, Settings
from lib_dinotile.tiling.blend import Blend
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import Rect, TilePlan
from tests.host_contract import (
    CANVAS,
    FEATURES,
    HINT,
    PROMPTS,
    SIZE,
    TILES,
    Expected,
    Script,
    asked,
    batch_of,
    close,
    controlled,
    latents_of,
    places,
    sampled,
)
from tests.test_tiling import random_image
from tests.webui_samplers import Network
from tests.webui_stand_in import A1111, FLUX, FORGE, KINDS, NEGATIVE, NEO, UNETS, Kind, Scripts, WebUI
from tests.webui_stand_in import webui as stand_in

some = pytest.mark.parametrize
SDXL = Kind("a1111", base="sdxl"), Kind("forge", base="sdxl")
with_unet = some("webui", UNETS, indirect=True, ids=str)


@pytest.fixture(params=KINDS, ids=str)
def webui(request: pytest.FixtureRequest) -> Iterator[WebUI]:
    with stand_in(request.param) as made:
        yield made


# Pixels and latents --------------------------------------------------------------------------------------------------


def test_pixels_come_back_and_a_tile_always_has_the_same_latent(webui):
    host = webui.host(webui.job())
    state = torch.get_rng_state()
    with webui.running():
        latents = latents_of(host)
        again = torch.cat([host.encode(host.decode(latents[:1])), latents_of(host)[1:]])
        pixels = host.decode(latents)
    assert latents.shape == (3, host.channels, 64 // host.factor, 64 // host.factor)
    assert host.factor == (16 if webui.kind.packed else 8)
    assert pixels.shape == (3, 3, 64, 64) and pixels.dtype == torch.float32
    assert pixels.min() > -0.05 and pixels.max() < 1.05
    assert torch.equal(again[1:], latents[1:])
    assert torch.allclose(again[:1], latents[:1], atol=0.05)
    assert torch.equal(torch.get_rng_state(), state)


def test_broken_latents_are_nan_and_not_an_error(webui):
    host = webui.host(webui.job())
    with webui.running():
        latents = latents_of(host)
        latents[1, 0, 0, 0] = torch.nan
        pixels = host.decode(latents)
    assert pixels.flatten(1).isnan().all(1).tolist() == [False, True, False]


def test_a_vae_that_breaks_is_nan_and_not_an_error(webui):
    host, devices = webui.host(webui.job()), webui.modules["modules.devices"]

    def broken(latents: Tensor) -> Tensor:
        if hasattr(devices, "NansException"):
            raise devices.NansException("A tensor with NaNs was produced in VAE.")
        raise RuntimeError("something else")

    webui.model.decode_first_stage = broken
    with webui.running():
        if webui.kind.family == "neo":
            with pytest.raises(RuntimeError, match="something else"):
                host.decode(latents_of(host))
        else:
            assert host.decode(latents_of(host)).isnan().all()


# Sampling ------------------------------------------------------------------------------------------------------------


@some("feature, denoise", [*((name, None) for name in FEATURES), ("all", 0.9)])
def test_a_batch_of_tiles_is_what_the_tiles_are_one_by_one(webui, feature, denoise):
    p = webui.job()
    host, wanted = webui.host(p), asked(feature, webui)
    batch = batch_of(range(3), **wanted)
    with webui.running():
        latents = latents_of(host)
        found = sampled(host, batch, latents, denoise=denoise)
        one = Rect(0, 0, *[64 // host.factor] * 2)
        expected = [
            Expected(webui, p).sample(
                latents[number : number + 1], places(host, TILES[number : number + 1]), batch_of([number], **wanted),
                [one], [torch.ones(())], denoise or 0.6,
            )
            for number in range(3)
        ]  # fmt: skip
    close(found, torch.cat(expected))
    assert not webui.logged and p.sampler.seen[-1][0] == SIZE


@some("feature", FEATURES)
def test_a_canvas_is_blended_from_its_tiles_at_every_step(webui, feature):
    p = webui.job()
    host, wanted = webui.host(p), asked(feature, webui)
    plan = TilePlan(*CANVAS, SIZE[0], 16, host.factor, "fused")
    assert len(plan.tiles) == 2 and plan.tile_size == SIZE

    def make(tiles: Sequence[Rect]) -> Batch:
        numbers = [plan.tiles.index(tile) for tile in tiles]
        made = batch_of(numbers, **wanted)
        return Batch(tiles, made.prompts, made.condition, made.guide)

    tiled = MultiDiffusion(plan, plan.tiles, host.factor, make, BatchSize(2, lambda: None, lambda line: None), Team())
    areas = [tile.shrink(host.factor) for tile in plan.tiles]
    blend = Blend(plan.shrink(host.factor), rim=1)
    whole = Rect(0, 0, *CANVAS)
    with webui.running():
        latents = latents_of(host, 1, CANVAS[0])
        found = host.sample(latents, tiled, places(host, [whole]), CANVAS)
        expected = Expected(webui, p).sample(
            latents, places(host, [whole]), make(plan.tiles), areas, [blend.weight(area) for area in areas], 0.6
        )
    close(found, expected)
    if webui.kind.chain:  # room is made for the tiles that the model sees together, not for the canvas
        assert webui.seen[-1][:1] + webui.seen[-1][-2:] == (2, areas[0].height, areas[0].width)
    assert webui.modules["modules.shared"].state.images[-1].size == (CANVAS[0] // 8, CANVAS[1] // 8)


@with_unet
@some("sampler", ["Euler a", "DPM++ SDE", "DDIM", "Euler CFG++"])
def test_samplers_of_all_kinds(webui, sampler):
    p = webui.job(sampler)
    host = webui.host(p)
    with webui.running():
        latents, mask = latents_of(host), torch.ones(3, 1, 8, 8)
        mask[..., :4] = 0.25
        found = sampled(host, batch_of(range(3), **FEATURES["all"]), latents, mask=mask)
        expected = [
            Expected(webui, p).sample(
                latents[number : number + 1], places(host, [TILES[number]]), batch_of([number], **FEATURES["all"]),
                [Rect(0, 0, 8, 8)], [torch.ones(())], 0.6, mask[:1],
            )
            for number in range(3)
        ]  # fmt: skip
    close(found, torch.cat(expected))
    assert not webui.logged


def test_a_sampler_that_looks_at_the_negative_picture_cannot_be_fused():
    with stand_in(FORGE) as webui, webui.running():
        host = webui.host(webui.job("Euler CFG++"))
        with pytest.raises(DinotileError, match="fused does not work with the sampler Euler CFG\\+\\+"):
            host.check_fused()
        plan = TilePlan(*CANVAS, SIZE[0], 16, 8, "fused")
        size = BatchSize(2, lambda: None, lambda line: None)
        tiled = MultiDiffusion(plan, plan.tiles, 8, lambda tiles: batch_of([0, 1][: len(tiles)]), size, Team())
        with pytest.raises(DinotileError, match="fused does not work with the sampler Euler CFG\\+\\+"):
            host.sample(latents_of(host, 1, CANVAS[0]), tiled, places(host, [Rect(0, 0, *CANVAS)]), CANVAS)


def test_a_sampler_that_paints_in_other_sizes_is_refused():
    with stand_in(FORGE) as webui, webui.running():
        host = webui.host(p := webui.job())
        latents = latents_of(host)
        tiled = TileBatch(batch_of(range(3), PROMPTS), lambda: torch.zeros(3, 3, 64, 64))
        forward = host._tiled_forward(p.sampler.model_wrap_cfg, tiled, latents, None, [])
        with pytest.raises(DinotileError, match="the sampler Euler changes the size of tiles: choose another"):
            forward(latents[..., ::2, ::2], torch.ones(3), image_cond=torch.zeros(3, 5, 1, 1))


@pytest.mark.parametrize("prompts", [PROMPTS, [None] * 3], ids=["of several lengths", "alike"])
def test_a_sampler_that_keeps_the_negative_picture_is_shown_that_of_all_tiles(prompts):
    """CFG++ of the Forge family: a function that keeps what it was called with last."""

    def shown(numbers: list[int]) -> tuple[Tensor, Tensor]:
        tiled = TileBatch(batch_of(numbers, prompts), lambda: torch.zeros(len(numbers), 3, 64, 64))
        forward, seen = host._tiled_forward(denoiser, tiled, latents[numbers], None, []), dict[str, Tensor]()

        def keep(args: dict[str, Any]) -> Tensor:
            seen.update(args)
            return args["denoised"]

        extra = {**p.sampler.sampler_extra_args, "model_options": {"sampler_post_cfg_function": [keep]}}
        return forward(latents[numbers], torch.ones(len(numbers)), **extra), seen["uncond_denoised"]

    with stand_in(FORGE) as webui, webui.running():
        host = webui.host(p := webui.job())
        latents, denoiser = latents_of(host), p.sampler.model_wrap_cfg
        p.sampler.sampler_extra_args = {"image_cond": torch.zeros(3, 5, 1, 1), "cond_scale": 5.0, "s_min_uncond": 0.0}
        output, negative = shown([0, 1, 2])
        alone = [shown([number]) for number in range(3)]
    close(output, torch.cat([each for each, _ in alone]))
    close(negative, torch.cat([each for _, each in alone]))


def test_where_the_mask_is_black_nothing_changes(webui):
    host = webui.host(webui.job())
    with webui.running():
        latents = latents_of(host)
        mask = torch.zeros(3, 1, *latents.shape[-2:])
        mask[..., 1:] = 1.0
        found = sampled(host, batch_of(range(3), guided=True), latents, mask=mask)
        plain = sampled(host, batch_of(range(3), guided=True), latents)
    assert torch.equal(found[..., 0], latents[..., 0])
    assert (found[..., 1:] - latents[..., 1:]).abs().mean() > 0.05
    assert not torch.allclose(plain[..., 0], latents[..., 0], atol=0.05)


@some("fill", [2, 3])
def test_what_fills_the_masked_area(webui, fill):
    """At full denoising nothing of the picture is left to begin with; here some is, so it must be noise, or nothing."""
    host = webui.host(p := webui.job(denoise=0.3))
    p.inpainting_fill = fill
    with webui.running():
        latents = latents_of(host)
        mask = torch.zeros(3, 1, *latents.shape[-2:])
        mask[..., 2:] = 1.0
        noise = places(host)
        start, content = noise.next(), noise.next()
        begun: list[Tensor] = []
        inner = p.sampler.sample_img2img
        p.sampler.sample_img2img = lambda p, x, noise, *args, **more: (
            begun.extend([x, noise]) or inner(p, x, noise, *args, **more)
        )
        sampled(host, batch_of(range(3)), latents, mask=mask)
    begin, used = (host._without_frame(each) for each in begun[-2:])
    filled = content if fill == 2 else torch.zeros_like(latents)
    assert torch.equal(used, start) and torch.equal(begin, torch.where(mask > 0, filled, latents))


@with_unet
def test_a_checkpoint_that_looks_at_the_picture(webui):
    """It is shown the tiles' own pixels, without what the mask hides."""
    host = webui.host(p := webui.job())
    p.sees = True
    with webui.running():
        latents = latents_of(host)
        mask = torch.ones(3, 1, 8, 8)
        mask[..., :4] = 0
        sampled(host, batch_of(range(3)), latents, mask=mask)
        (_, seen) = p.sampler.seen[-1]
        assert torch.equal(seen[:, :1], mask)
        grey = host._encode(torch.full((1, 3, 8, 8), 0.5)) / (webui.vae.SCALE)
        assert (seen[:, 1:, :, 4:] - grey).abs().max() < 0.1 < (seen[:, 1:, :, :4] - grey).abs().max()
        plan = TilePlan(*CANVAS, SIZE[0], 16, 8, "fused")
        size = BatchSize(2, lambda: None, lambda line: None)
        tiled = MultiDiffusion(plan, plan.tiles, 8, lambda tiles: batch_of([0, 1][: len(tiles)]), size, Team())
        with pytest.raises(DinotileError, match="inpainting"):
            host.check_fused()
        with pytest.raises(DinotileError, match="inpainting"):
            host.sample(latents_of(host, 1, CANVAS[0]), tiled, places(host, [Rect(0, 0, *CANVAS)]), CANVAS)


def test_scripts_see_what_is_sampled_and_may_change_its_noise(webui):
    host, seen = webui.host(p := webui.job()), []
    p.initial_noise_multiplier = 1.5

    def before(p: Any, x: Tensor, noise: Tensor, c: Any, uc: Any) -> None:
        seen.append((x, noise, len(c.batch), len(uc), webui.levels.shift))
        p.modified_noise = noise * 2 if webui.kind.chain else None

    p.scripts = Scripts(Script("other", process_before_every_sampling=before))
    with webui.running():
        latents = latents_of(host)
        found = sampled(host, batch_of(range(3)), latents)
        p.scripts, p.initial_noise_multiplier = None, 3.0 if webui.kind.chain else 1.5
        close(sampled(host, batch_of(range(3)), latents), found)
    ((x, noise, *counts, shift),) = seen
    assert torch.equal(host._without_frame(x), latents) and torch.equal(
        host._without_frame(noise), places(host).next() * 1.5
    )
    assert counts == [3, 3] and p.modified_noise is None and shift == (2.5 if webui.kind.flow else None)
    assert webui.merged == ([webui.model] * 2 if webui.kind.chain else [])


@some("kind", SDXL, ids=str)
def test_sdxl_is_told_the_size_of_a_tile_not_of_the_canvas(kind):
    with stand_in(kind) as webui:
        p = webui.job()
        host, one = webui.host(p), Rect(0, 0, 8, 8)
        assert host.base == "sdxl"
        with webui.running():
            latents = latents_of(host)
            found = sampled(host, batch_of(range(3), PROMPTS), latents)
            expected = [
                Expected(webui, p).sample(
                    latents[number : number + 1], places(host, [TILES[number]]), batch_of([number], PROMPTS),
                    [one], [torch.ones(())], 0.6,
                )
                for number in range(3)
            ]  # fmt: skip
        close(found, torch.cat(expected))


@some("kind", [FORGE, NEO, FLUX], ids=str)
def test_without_a_negative_prompt(kind):
    with stand_in(kind) as webui:
        p = webui.job()
        host = webui.host(p)
        p.cfg_scale = 1
        p.uc = None
        host.bind(p.prompts[0], "", p.c.batch[0], None)
        with webui.running():
            latents = latents_of(host)
            guided, plain = (sampled(host, batch_of(range(3), guided=guided), latents) for guided in (True, False))
        assert not torch.allclose(guided, plain, atol=0.05) and not webui.logged


# ControlNets ---------------------------------------------------------------------------------------------------------


@with_unet
@some("feature", ["nothing", "all"])
@some("image", [None, 0, 1])
def test_each_tile_gets_its_part_of_a_controlnets_hint(webui, feature, image):
    """image: of a batch whose images have hints of their own."""
    p, hint = webui.job(), HINT if image is None else torch.cat([HINT, 1 - HINT])
    host = webui.host(p)
    with webui.running():
        latents = latents_of(host)
        with controlled(webui, p, hint=hint) as holders:
            if not webui.kind.chain:
                cond, uncond = host.marked(p.c.batch[0], p.uc[0])
                host.bind(p.prompts[0], NEGATIVE, cond, uncond)
            host.image = image or 0
            for _ in range(2):  # and again, as for the next batch
                found = sampled(host, batch_of(range(3), **FEATURES[feature]), latents)
                assert webui.kind.chain or holders[0].hint_cond is hint
        expected = [
            Expected(webui, p, hint=hint[[image or 0]]).sample(
                latents[number : number + 1], places(host, [TILES[number]]), batch_of([number], **FEATURES[feature]),
                [Rect(0, 0, 8, 8)], [torch.ones(())], 0.6,
            )
            for number in range(3)
        ]  # fmt: skip
    close(found, torch.cat(expected))


def test_to_a1111s_controlnet_tiles_are_a_part_of_hires_fix():
    """It has a larger hint for that, and units that are at work in one of the passes only."""
    with stand_in(A1111) as webui:
        p, small = webui.job(), HINT[..., ::2, ::2].contiguous()
        host, network = webui.host(p), Network(webui, small, HINT)
        p.scripts = Scripts(Script("ControlNet", latest_network=network))
        with webui.running():
            latents = latents_of(host)
            host.bind(p.prompts[0], NEGATIVE, *host.marked(p.c.batch[0], p.uc[0]))
            found = sampled(host, batch_of(range(3)), latents)
        del webui.unet.forward
        assert network.in_hires_fix == {True}
        assert network.control_params[0].hint_cond is small and network.control_params[0].hr_hint_cond is HINT
        expected = [
            Expected(webui, p, hint=HINT).sample(
                latents[number : number + 1], places(host, [TILES[number]]), batch_of([number]),
                [Rect(0, 0, 8, 8)], [torch.ones(())], 0.6,
            )
            for number in range(3)
        ]  # fmt: skip
    close(found, torch.cat(expected))


# The whole engine ----------------------------------------------------------------------------------------------------


def test_a_whole_run_with_guidance_and_guard(webui, tmp_path):
    p = webui.job()
    host, noise = webui.host(p), None
    settings = Settings(
        enabled=True, tile=64, overlap=16, scale=1.5, encoder="mini", guidance=0.6, guard="repair", batch=2, patches=8
    )
    noise = NoiseField(3, host.channels)
    with webui.running():
        conditioner = Conditioner.load(settings, host, {})
        result = upscale(host, random_image(64, 48), settings, noise, conditioner)
    assert result.complete and result.image.size == (96, 72) and not webui.logged
    assert webui.modules["modules.shared"].state.textinfo.startswith("DINO Tile")


def test_the_model_of_its_own_keeps_the_contract_too():
    from lib_dinotile.hosts.diffusers import load_host

    host = load_host(Generation(model="mini", steps=6, denoise=0.6))
    pixels = torch.rand(3, 3, 64, 64)
    state = torch.get_rng_state()
    with torch.no_grad():
        latents = host.encode(pixels)
        assert torch.allclose(host.decode(latents), pixels, atol=1e-6)
        together = sampled(host, batch_of(range(3), guided=True), latents)
        alone = [sampled(host, batch_of([n], guided=True), latents[n : n + 1]) for n in range(3)]
        close(together, torch.cat(alone))
        mask = torch.zeros(3, 1, 32, 32)
        assert torch.equal(sampled(host, batch_of(range(3)), latents, mask=mask), latents)
    for choice in DECODERS:
        _, decode = host.guidance_decoder(choice)
        assert decode(latents).shape == (3, 3, 64, 64)
    assert torch.equal(torch.get_rng_state(), state)
