"""What the tests of hosts share: tiles, conditions that tell them apart, and what a model gives for one by itself."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_dinotile.engine.denoisers import TileBatch
from lib_dinotile.engine.host import Batch, Prompt
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import Rect
from tests import webui_models as models
from tests.webui_samplers import Control, Network, ancestral, of_hint, parts
from tests.webui_stand_in import NEGATIVE, Scripts, WebUI

CANVAS, SIZE = (112, 64), (64, 64)
TILES = [Rect(0, 0, *SIZE), Rect(32, 0, *SIZE), Rect(48, 0, *SIZE)]
PROMPTS = [None, "a red fox in the snow", "moss"]
"""The first and the last of one length, which the model sees together."""
PARTS = ["moss :0.7 AND old wet stones :2", None, "a fox :0.7 AND snow :2"]


class Condition:
    """Residuals that tell tiles, slots, noise levels and steps apart."""

    def __init__(self, numbers: Sequence[int], latent: tuple[int, int] = (8, 8)) -> None:
        self.numbers, self.latent = numbers, latent

    def residuals(self, sigma: float, progress: float) -> list[Tensor]:
        assert 0 <= progress < 1
        sizes = [(8, 1), (8, 1), (8, 2), (16, 2), (16, 2)]
        strength = 0.2 * (1 + progress) / (1 + sigma)
        found = []
        for slot, (channels, scale) in enumerate(sizes):
            size = [-(-side // scale) for side in self.latent]
            made = [
                torch.randn(channels, *size, generator=torch.Generator().manual_seed(10 * number + slot))
                for number in self.numbers
            ]
            found.append(strength * torch.stack(made))
        return found

    def forget(self) -> None:
        pass


class Guide:
    """Moves x0, each tile its own way, at every other step."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    def __call__(self, x0: Tensor, step: int, total: int, chosen: Sequence[int] | None = None) -> Tensor | None:
        assert x0.ndim == 4 and 0 <= step < total
        if step % 2:
            return None
        numbers = self.numbers if chosen is None else [self.numbers[number] for number in chosen]
        assert len(x0) == len(numbers)
        return x0 * 0.9 + torch.tensor([0.3 + number for number in numbers]).view(-1, 1, 1, 1) / 4 + step / total


def regions(side: int) -> list[Any]:
    """Prompts of parts of the tiles, which fade into each other; side: of a tile, in latent cells."""
    left = torch.linspace(0, 1, side).expand(side, side)
    parted = [Prompt("moss :0.7 AND old wet stones :2", left), Prompt("sand :2 AND snow :0.7", 1 - left)]
    return [parted, None, [Prompt("a red fox", left * left.T), Prompt(None, 1 - left * left.T)]]


def batch_of(numbers: Sequence[int], prompts=(None,) * 3, residuals=False, guided=False) -> Batch:
    return Batch(
        [TILES[number] for number in numbers],
        [own if isinstance(own, list) else [Prompt(own)] for own in (prompts[number] for number in numbers)],
        Condition(numbers) if residuals else None,
        Guide(numbers) if guided else None,
    )


class Expected:
    """What a WebUI's model gives for tiles, computed one by one and without any of the WebUI's sampling."""

    def __init__(self, webui: WebUI, p: Any, size: tuple[int, int] = SIZE, hint: Tensor | None = None) -> None:
        self.webui, self.p, self.hint = webui, p, hint
        self.size = size if webui.kind.base == "sdxl" else None

    def x0(self, x: Tensor, sigma: Tensor, number: int, batch: Batch, step: int, total: int) -> tuple[Tensor, Tensor]:
        """(x0, negative x0) (1, C, h, w) of tile `number` of the batch at noise level sigma."""
        webui, scale = self.webui, self.p.cfg_scale

        def ask(text: str) -> Tensor:
            cond = models.words(text, self.size)
            if self.size:
                cond = {name: value[None] for name, value in cond.items()}
            context = models.as_context(cond if self.size else cond[None])
            added = batch.condition and batch.condition.residuals(float(sigma), step / total)
            found = [residual[number : number + 1] for residual in added] if added else None
            if self.hint is not None:
                tile = batch.tiles[number]
                weight = tile.of(WEIGHT).mean() if webui.kind.chain else 1.0
                hint = [residual * weight for residual in of_hint(tile.of(self.hint), None, x.shape[-2:])]
                found = [a + b for a, b in zip(found, hint)] if found else hint
            control = {"middle": found[-1:], "output": found[:-1]} if found else None
            known = x.unsqueeze(2) if webui.kind.film else x
            out = webui.apply(known, sigma[None], context, control)
            return out.squeeze(2) if webui.kind.film else out

        negative = out = ask(NEGATIVE)
        for prompt in batch.prompts[number]:
            mask = 1.0 if prompt.mask is None else prompt.mask
            for part, weight in parts(prompt.text or self.p.prompts[0]):
                out = out + scale * weight * mask * (ask(part) - negative)
        moved = batch.guide and batch.guide(out, step, total, [number])
        return out if moved is None else moved, negative

    def sample(
        self,
        latents: Tensor,
        noise: TileNoise,
        batch: Batch,
        areas: Sequence[Rect],
        weights: Sequence[Tensor],
        denoise: float,
        mask: Tensor | None = None,
    ) -> Tensor:
        """areas: of the tiles in latents (1, C, h, w)."""
        steps, last = self.p.steps, int(denoise * self.p.steps)
        sigmas = self.webui.levels.sigmas(steps)[steps - last - 1 :]
        x = self.webui.levels.noisy(latents, noise.next(), sigmas[0])
        for step, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            x0, negative, total = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
            for number, (area, weight) in enumerate(zip(areas, weights)):
                for whole, part in zip((x0, negative), self.x0(area.of(x), sigma, number, batch, step, last + 1)):
                    area.of(whole).add_(part * weight)
                area.of(total).add_(weight)
            x0, negative = x0 / total, negative / total
            x0 = x0 if mask is None else torch.lerp(latents, x0, mask)
            if self.p.sampler_name == "Euler CFG++":
                x = x0 + (x - negative) / sigma * after
                continue
            # DDIM (arXiv 2010.02502) is Euler in other coordinates.
            down, up = (after, 0.0) if self.p.sampler_name in ("Euler", "DDIM") else ancestral(sigma, after)
            x = x + (x - x0) / sigma * (down - sigma)
            if up:
                x = x + noise.next() * up
        return x if mask is None else torch.lerp(latents, x, mask)


FEATURES = {
    "nothing": {},
    "prompts": {"prompts": PROMPTS},
    "parts of prompts": {"prompts": PARTS, "residuals": True},
    "regions": {"prompts": regions, "residuals": True, "guided": True},
    "residuals": {"residuals": True},
    "guidance": {"guided": True},
    "all": {"prompts": PROMPTS, "residuals": True, "guided": True},
}


def latents_of(host: Any, count: int = 3, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(count, 3, 64 // host.factor, width // host.factor, generator=generator)
    return host.encode(pixels.repeat_interleave(host.factor, -1).repeat_interleave(host.factor, -2))


def places(host: Any, tiles: Sequence[Rect] = TILES) -> TileNoise:
    return TileNoise(NoiseField(5, host.channels), [tile.shrink(host.factor) for tile in tiles])


def sampled(host: Any, batch: Batch, latents: Tensor, **more: Any) -> Tensor:
    tiled = TileBatch(batch, lambda: host.decode(latents))
    return host.sample(latents, tiled, places(host, batch.tiles), CANVAS, **more)


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted.to(found), atol=2e-4), f"off by {float((found - wanted).abs().max())}"


def asked(feature: str, webui: WebUI) -> dict[str, Any]:
    wanted = dict(FEATURES[feature])
    if feature == "regions":
        if webui.kind.film:
            pytest.skip("there is no place for masks in this WebUI's models for videos")
        wanted["prompts"] = regions(SIZE[0] // (16 if webui.kind.packed else 8))
    if webui.kind.flow and wanted.pop("residuals", False) and not wanted:
        pytest.skip("this model takes no residuals")
    return wanted


WEIGHT = torch.linspace(0.2, 1, CANVAS[0]).expand(1, 1, *CANVAS[::-1])
"""Of the ControlNet in Forge's chain, over the canvas."""
HINT = torch.rand(1, 3, CANVAS[1], CANVAS[0], generator=torch.Generator().manual_seed(4))


@contextlib.contextmanager
def controlled(webui: WebUI, p: Any, hint: Tensor = HINT) -> Iterator[list[Any]]:
    """A ControlNet is at work on all the canvas; a list of what holds its hint."""
    if webui.kind.chain:
        controls: list[Any] = []

        def before(p: Any, **_: Any) -> None:
            unet = p.sd_model.forge_objects.unet.clone()
            controls.append(Control(webui, hint))
            controls[-1].advanced_mask_weighting = WEIGHT
            unet.add_patched_controlnet(controls[-1])
            p.sd_model.forge_objects.unet = unet

        p.scripts = Scripts(Script("ControlNet", process_before_every_sampling=before))
        yield controls
    else:
        network = Network(webui, hint)
        p.scripts = Scripts(Script("ControlNet", latest_network=network))
        try:
            yield network.control_params
        finally:
            del webui.unet.forward


class Script:
    def __init__(self, title: str, **more: Any) -> None:
        self._title = title
        vars(self).update(more)

    def title(self) -> str:
        return self._title
