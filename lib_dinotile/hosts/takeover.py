"""img2img is taken over between `p.init` and the decoded samples.

`process_images` calls `p.init` once and `p.sample` per batch count, and takes what `sample` returns for pixels if it
says `already_decoded`. So the two are replaced on the processing object, and everything else of the WebUI goes on
working.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from modules import images, processing, sd_samplers, sd_samplers_common, shared
from PIL import Image
from torch import Tensor

from lib_dinotile import DinotileError, engine
from lib_dinotile.condition.conditioner import Conditioner, installed_adapters
from lib_dinotile.hosts import folders
from lib_dinotile.hosts.webui import WebUIHost, overridden
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.noise import NoiseField


def make_host(p: Any) -> WebUIHost:
    """The host for the WebUI that this runs in."""
    if hasattr(p.sd_model, "forge_objects"):
        from lib_dinotile.hosts.forge import ForgeHost

        return ForgeHost(p)
    from lib_dinotile.hosts.a1111 import A1111Host

    return A1111Host(p)


def refuse(p: Any, error: Exception) -> None:
    """Let the job fail with this error. The WebUI only logs what a script's hook raises, and would go on without it."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    p.init = fail


def to_sample(image: Image.Image) -> Tensor:
    """Pixels (3, H, W) in [-1, 1] that the WebUI makes this very RGB image of.

    It cuts off the fraction when it makes bytes of them, so they aim at the middle of a level.
    """
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() + 0.5) / 127.5 - 1


class Takeover:
    """One img2img job of the WebUI, done by the engine."""

    def __init__(self, p: Any, settings: Settings) -> None:
        """Changes nothing yet; DinotileError if img2img is set up in a way that tiles cannot follow."""
        if not p.init_images or None in p.init_images:
            raise DinotileError("there is no image to upscale: drop one into the img2img tab")
        if p.image_mask is not None:
            raise DinotileError("DINO Tile does not paint inpaint masks: switch it off, or use the img2img tab")
        if p.refiner_checkpoint not in (None, "", "None", "none"):
            raise DinotileError("DINO Tile cannot change to a refiner within a tile: set Refiner to None")
        sizes = {image.size for image in p.init_images}
        if len(sizes) != 1:
            raise DinotileError("DINO Tile upscales a batch only if all its images have one size")
        if len(p.init_images) > p.batch_size:
            count = len(p.init_images)
            raise DinotileError(f"batch size {p.batch_size} is too small for {count} images: make it {count}")
        self._p, self._settings = p, settings
        self.size = engine.canvas_size(sizes.pop(), settings.scale)
        self._host: WebUIHost | None = None
        self._conditioner: Conditioner | None = None
        self._sources: list[Image.Image] = []

    def apply(self) -> None:
        """Replace `init` and `sample` of the processing object."""
        p = self._p
        p.width, p.height = self.size
        p.init, p.sample = self.init, self.sample
        # A new dict: the cells of an X/Y/Z plot share theirs.
        p.extra_generation_params = {**p.extra_generation_params, **self._settings.infotext}

    def init(self, all_prompts: list[str], all_seeds: list[int], all_subseeds: list[int]) -> None:
        """In place of `p.init`: everything that can go wrong before the first tile goes wrong here."""
        p, opts = self._p, shared.opts
        p.sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
        if getattr(p.sd_model, "cond_stage_key", None) != "edit":  # only InstructPix2Pix has it
            p.image_cfg_scale = None
        p.extra_generation_params["Denoising strength"] = p.denoising_strength
        if p.initial_noise_multiplier != 1.0:
            p.extra_generation_params["Noise multiplier"] = p.initial_noise_multiplier
        if opts.sd_vae_encode_method != "Full":
            p.extra_generation_params["VAE Encoder"] = opts.sd_vae_encode_method
        if opts.sd_vae_decode_method != "Full":
            p.extra_generation_params["VAE Decoder"] = opts.sd_vae_decode_method
        p.init_latent = p.mask = p.nmask = p.mask_for_overlay = p.overlay_images = p.paste_to = None
        if len(p.init_images) > 1:
            p.batch_size = len(p.init_images)
        if opts.save_init_img:
            for image in p.init_images:
                p.init_img_hash = hashlib.md5(image.tobytes()).hexdigest()
                images.save_image(
                    image,
                    path=opts.outdir_init_images,
                    basename=None,
                    forced_filename=p.init_img_hash,
                    save_to_dirs=False,
                    existing_info=image.info,
                )
        self._sources = [images.flatten(image, opts.img2img_background_color) for image in p.init_images]
        if opts.img2img_color_correction and p.color_corrections is None:
            corrections = [processing.setup_color_correction(source) for source in self._sources]
            p.color_corrections = corrections * (p.batch_size // len(corrections))

        self._host = make_host(p)
        self._conditioner = Conditioner.load(
            self._settings, self._host, installed_adapters(folders.adapters()), folders.encoders(), trusted=False
        )
        if self._conditioner:
            self._host.check_residuals()
        plan = self._host.plan = engine.make_plan(self._host, self.size, self._settings)
        batches = sum(1 for _ in plan.batches(self._settings.batch)) * p.batch_size
        state = shared.state
        if not state.processing_has_refined_job_count:  # once: it may be one image of many, or a cell of a plot
            state.job_count = max(state.job_count, p.n_iter) * (batches + 1)  # the WebUI counts a finished one itself
            state.processing_has_refined_job_count = True
        steps = sd_samplers_common.setup_img2img_steps(p)[1] + 1
        shared.total_tqdm.updateTotal(batches * p.n_iter * steps)

    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: list[int],
        subseeds: list[int],
        subseed_strength: float,
        prompts: list[str],
    ) -> list[Tensor]:
        """In place of `p.sample`: upscales every image of the batch; pixels (3, H, W) in [-1, 1]."""
        p, host = self._p, self._host
        results, painted = [], []
        if host.base == "sdxl":  # it is told the size of what it paints: a tile's, not the canvas's
            width, height = host.plan.tile_size
            with overridden(p, width=width, height=height):
                p.setup_conds()
            conditioning, unconditional_conditioning = p.c, p.uc
        for number in range(len(seeds)):
            uncond = None if unconditional_conditioning is None else unconditional_conditioning[number]
            host.bind(conditioning.batch[number], uncond)
            noise = NoiseField(seeds[number], host.channels, subseeds[number], subseed_strength)
            source = self._sources[number % len(self._sources)]
            try:
                # The WebUI's own preview would show single tiles; `progress` shows the canvas.
                with overridden(shared.state, do_set_current_image=lambda: None, current_latent=None):
                    result = engine.upscale(host, source, self._settings, noise, self._conditioner)
            except engine.UnfinishedError as error:
                # What is done of the batch is kept, too.
                done = results + ([error.result.image] if error.result.painted else [])
                kept = [self._keep(image, seeds[n], prompts[n]) for n, image in enumerate(done)]
                where = f" (kept in {', '.join(filter(None, kept))})" if any(kept) else ""
                raise engine.UnfinishedError(error.__cause__, error.result, where) from error.__cause__
            painted.append(None if result.complete else f"{result.painted} of {len(result.plan)}")
            results.append(result.image)
        # One entry per image of the batch; the WebUI leaves out what is None.
        p.extra_generation_params["DINO Tile painted"] = painted
        samples = processing.DecodedSamples()
        samples.extend(to_sample(image) for image in results)
        return samples

    def _keep(self, image: Image.Image, seed: int, prompt: str) -> str | None:
        """Saves what a failed run has painted where the finished image would have gone; the file's name."""
        if not self._p.save_samples():
            return None
        return images.save_image(
            image,
            self._p.outpath_samples,
            "",
            seed,
            prompt,
            shared.opts.samples_format,
            p=self._p,
            suffix="-unfinished",
        )[0]
