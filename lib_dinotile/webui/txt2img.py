"""txt2img goes on where it would end: what it has generated, after hires fix, is upscaled as img2img would do it.

`p.sample` is replaced on the processing object, so the rest of the WebUI (other extensions, face restoration, PNG info,
saving, grids) gets the large image.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from modules import devices, extra_networks, images, processing, sd_samplers, shared
from PIL import Image

from lib_dinotile import DinotileError, one_line
from lib_dinotile.engine import flow
from lib_dinotile.hosts import bars
from lib_dinotile.hosts.patched import patched
from lib_dinotile.hosts.webui import ORIGINAL
from lib_dinotile.settings import Settings, Txt2Img
from lib_dinotile.webui.area import Area
from lib_dinotile.webui.refusals import check_tiles_can_follow
from lib_dinotile.webui.replaced import FOUND, own, replace, undo
from lib_dinotile.webui.takeover import NOTES, Takeover, in_one_line

BEFORE = "-before-dinotile"
"""Ends the names of the files that images are kept in as they were before."""
SAME = (None, "", "Use same checkpoint")


def is_txt2img(p: Any) -> bool:
    """Whether a processing object is one of txt2img."""
    return isinstance(p, processing.StableDiffusionProcessingTxt2Img)


def options_for(p: Any) -> type[Settings]:
    """The table of the options that a processing object's tab has."""
    return Txt2Img if is_txt2img(p) else Settings


def takeover(p: Any, settings: Settings) -> Takeover:
    """For a job of either tab; DinotileError if it is set up in a way that tiles cannot follow."""
    return Txt2ImgTakeover(p, settings) if isinstance(settings, Txt2Img) else Takeover(p, settings)


def _other_modules(p: Any) -> bool:
    """Whether hires fix changes to other VAE or text encoders, which Forge has beside the checkpoint."""
    wanted = getattr(p, "hr_additional_modules", None)
    if wanted is None or "Use same choices" in wanted:
        return False
    present = p.override_settings.get("forge_additional_modules", getattr(shared.opts, "forge_additional_modules", []))
    return {os.path.basename(name) for name in wanted} != {os.path.basename(name) for name in present or ()}


def to_images(samples: Any) -> list[Image.Image]:
    """The RGB images that the WebUI makes of decoded samples (..., 3, H, W) in [-1, 1]."""
    pixels = torch.stack(list(samples)).float()
    pixels = ((pixels.reshape(-1, *pixels.shape[-3:]) + 1) / 2).clamp(0, 1)
    return [Image.fromarray((255.0 * each.permute(1, 2, 0).cpu().numpy()).astype(np.uint8)) for each in pixels]


class Txt2ImgTakeover(Takeover):
    """One txt2img job of the WebUI, whose images are upscaled by the engine."""

    _settings: Txt2Img

    def __init__(self, p: Any, settings: Txt2Img) -> None:
        check_tiles_can_follow(p, settings)
        if p.enable_hr and (p.hr_checkpoint_name not in SAME or _other_modules(p)):
            raise DinotileError(
                "DINO Tile paints with the checkpoint of the first pass: leave Hires checkpoint, and its VAE and text "
                "encoder, at 'Use same'"
            )
        self._begin(p, settings)
        self._kept: list[str] = []

    def apply(self, called: Callable[[str], str] = str) -> None:
        self._called = called
        replace(self._p, refiner_checkpoint=None, init=self.init, sample=self.sample)
        self._tell(self._settings.infotext)

    @contextlib.contextmanager
    def _as_img2img(self) -> Iterator[None]:
        """While open, the processing object has what img2img asks of it, and is through with hires fix."""
        p, hires = self._p, self._p.enable_hr
        with contextlib.ExitStack() as stack:
            if hires and p.scripts is not None:
                let_in = p.scripts.process_before_every_sampling

                def as_second_pass(job: Any, **more: Any) -> None:
                    # To other extensions it is like hires fix: ControlNet has a larger hint, or is off there.
                    cfg = {"hr_cfg": job.cfg_scale} if hasattr(job, "hr_cfg") else {}
                    with patched(job, enable_hr=True, is_hr_pass=True, **cfg):
                        let_in(job, **more)

                stack.enter_context(patched(p.scripts, process_before_every_sampling=as_second_pass))
            values = {
                "denoising_strength": self._settings.denoise,
                "steps": self._settings.steps or p.steps,
                "initial_noise_multiplier": shared.opts.initial_noise_multiplier,
                "inpainting_fill": ORIGINAL,
                "sampler": sd_samplers.create_sampler(p.sampler_name, p.sd_model),
                "enable_hr": False,
                "is_hr_pass": False,
            }
            stack.enter_context(patched(p, **values))
            yield

    def _set_area(self, size: tuple[int, int]) -> None:
        """size: (width, height) of what is upscaled; there is no mask."""
        self._area = Area(SimpleNamespace(width=0, height=0, resize_mode=0, image_mask=None), self._settings, size)

    def _generated(self) -> tuple[int, int]:
        """(width, height) of what txt2img will have generated, hires fix included."""
        p, factor = self._p, processing.opt_f
        if not p.enable_hr:
            return p.width // factor * factor, p.height // factor * factor
        width, height = p.hr_upscale_to_x // factor - p.truncate_x, p.hr_upscale_to_y // factor - p.truncate_y
        return width * factor, height * factor

    @in_one_line
    def init(self, all_prompts: list[str], all_seeds: list[int], all_subseeds: list[int]) -> None:
        """In place of `p.init`: what can go wrong goes wrong before anything is generated."""
        p = self._p
        bars.expect(p.n_iter, p.batch_size, 1 + bool(p.enable_hr))  # first: hires fix counts only where nobody has
        own(p, "init")(all_prompts, all_seeds, all_subseeds)
        if shared.opts.initial_noise_multiplier != 1.0:
            p.extra_generation_params["Noise multiplier"] = shared.opts.initial_noise_multiplier
        self._set_area(self._generated())
        with self._as_img2img():
            self._prepare()
        assert self._host is not None
        self._check_memory(self._generated())
        plan = flow.make_plan(self._host, self._area.canvas, self._settings)
        self._tiles = flow.workload(plan, self._settings)[0]

    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: list[int],
        subseeds: list[int],
        subseed_strength: float,
        prompts: list[str],
    ) -> Any:
        """In place of `p.sample`: generates, and upscales every image of the batch; pixels (3, H, W) in [-1, 1].

        If the user stops it before the first tile, it gives what was generated until then.
        """
        p, ours = self._p, self._settings.infotext
        for key in NOTES:  # of the last batch
            p.extra_generation_params.pop(key, None)
            p.extra_generation_params.update({key: ours[key]} if key in ours else {})
        shared.state.textinfo = None
        passes = 1 + bool(p.enable_hr)
        steps = p.steps + bool(p.enable_hr) * (getattr(p, "hr_second_pass_steps", 0) or p.steps)
        arguments: dict[str, Any] = {
            "conditioning": conditioning,
            "unconditional_conditioning": unconditional_conditioning,
            "seeds": seeds,
            "subseeds": subseeds,
            "subseed_strength": subseed_strength,
            "prompts": prompts,
        }
        try:
            with bars.passing(bars.PASS * passes * len(seeds), steps), self._stopped_as_ever():
                generated = own(p, "sample")(**arguments)
            if bars.stopped():
                p.extra_generation_params["DINO Tile painted"] = [f"0 of {self._tiles}"] * len(seeds)
                getattr(p, FOUND).extend([(None, {})] * len(seeds))
                return generated
            if not getattr(generated, "already_decoded", False):
                decoded = processing.decode_latent_batch(
                    p.sd_model, generated, target_device=devices.cpu, check_for_nans=True
                )
                generated = processing.DecodedSamples()
                generated.extend(decoded)
        except BaseException:
            undo(p)  # the error is the WebUI's own
            self._let_go()
            raise
        return self._upscaled(generated, **arguments)

    def _stopped_as_ever(self) -> contextlib.AbstractContextManager[Any]:
        """While open, Interrupt stops a single image at once. The WebUI goes by the number of jobs, which is large
        here, and would let it be finished."""
        p, state = self._p, shared.state
        alone = p.n_iter == 1 and not p.enable_hr
        return patched(state, stop_generating=state.interrupt) if alone else contextlib.nullcontext()

    @in_one_line
    def _upscaled(
        self,
        generated: Any,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: list[int],
        subseeds: list[int],
        subseed_strength: float,
        prompts: list[str],
    ) -> Any:
        p = self._p
        self._sources, self._kept = to_images(generated), []
        try:
            if p.save_samples() and shared.opts.save_images_before_highres_fix:
                self._keep_sources(seeds, prompts)
            if len(self._sources) != len(seeds):
                raise DinotileError("DINO Tile upscales images, not videos: switch it off")
            self._set_area(self._sources[0].size)
            if p.enable_hr and not p.disable_extra_networks:  # hires fix has prompts of its own
                with devices.autocast(), patched(p, is_hr_pass=True):  # else it forgets the hashes of theirs
                    extra_networks.activate(p, p.extra_network_data)
            same = self._settings.steps in (0, p.steps)
            with self._as_img2img():
                conds = (conditioning, unconditional_conditioning) if same else self._conditionings()
                samples = self._paint(*conds, seeds, subseeds, subseed_strength, prompts)
        except Exception as error:
            raise DinotileError(
                one_line(error) + self._where(seeds, prompts), getattr(error, "status_code", 500)
            ) from error
        if self._host is not None and self._host.interrupted() and not self._painted:
            return generated
        return samples

    def _conditionings(self) -> tuple[Any, Any]:
        """Those of the batch for the steps of the tiles: prompts may have words that come or go at a certain step."""
        p, host = self._p, self._host
        assert host is not None  # the WebUI calls `init` first
        ours = {"c": None, "uc": None, "step_multiplier": p.step_multiplier, "firstpass_steps": p.firstpass_steps}
        with patched(p, **ours), devices.autocast():
            p.setup_conds()
            negative = p.uc
            entries = [
                host.marked(cond, None if negative is None else negative[number])
                for number, cond in enumerate(p.c.batch)
            ]
        batch = SimpleNamespace(batch=[cond for cond, _ in entries])
        return batch, None if negative is None else [uncond for _, uncond in entries]

    def _keep_sources(self, seeds: list[int], prompts: list[str]) -> None:
        """Saves what was generated, as hires fix saves what was before it."""
        p = self._p
        for number, image in enumerate(self._sources):
            text = processing.create_infotext(
                p, p.all_prompts, p.all_seeds, p.all_subseeds, [], iteration=p.iteration, position_in_batch=number
            )
            form = shared.opts.samples_format
            where = p.outpath_samples, "", seeds[number], prompts[number], form
            # A copy: saving may change an image.
            self._kept.append(images.save_image(image.copy(), *where, info=text, p=p, suffix=BEFORE)[0])

    def _where(self, seeds: list[int], prompts: list[str]) -> str:
        """Words for where what was generated is kept, when it could not be upscaled."""
        try:
            if not self._kept:
                self._keep_sources(seeds, prompts)
        except Exception as error:  # for want of space, say
            return f"; the image before upscaling could not be saved: {one_line(error)}"
        return f"; the image before upscaling is saved in {', '.join(filter(None, self._kept))}" if self._kept else ""
