"""img2img is taken over between `p.init` and the decoded samples.

`process_images` calls `p.init` once and `p.sample` per batch count, and takes what `sample` returns for pixels if it
says `already_decoded`. So the two are replaced on the processing object, and everything else of the WebUI goes on
working.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from modules import errors, images, masking, processing, sd_samplers, shared
from PIL import Image
from torch import Tensor

from lib_dinotile import DinotileError, one_line
from lib_dinotile.condition.conditioner import Conditioner, installed_weights
from lib_dinotile.engine import flow
from lib_dinotile.engine.host import check_name
from lib_dinotile.engine.prompts import check_letters, check_prompts
from lib_dinotile.hosts import bars
from lib_dinotile.hosts.patched import patched
from lib_dinotile.hosts.webui import LATENT_NOISE, LATENT_NOTHING, ORIGINAL, WebUIHost
from lib_dinotile.settings import NONE, OFF, SOURCE, VERSION, Settings
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.webui import folders
from lib_dinotile.webui.area import Area
from lib_dinotile.webui.refusals import check_img2img
from lib_dinotile.webui.replaced import FOUND, forget_samples, own, replace, undo
from lib_dinotile.webui.speed import learn_speed
from lib_dinotile.webui.unfinished import keep

T = TypeVar("T")

NOTES = ("DINO Tile painted", "DINO Tile notes", "DINO Tile tile prompts")
"""Keys in PNG info whose values belong to the images of one batch."""
NO_PART = ("RNG", "ENSD")
"""Keys in PNG info for where the WebUI's own noise comes from. Tiles have theirs from a field of dinotile's own, the
same on all machines."""
SAVING = 4 * 3 * 4
"""Bytes a pixel of a result: the WebUI makes an image of it in up to four tensors of float32."""


def make_host(p: Any) -> WebUIHost:
    """The host for the WebUI that this runs in."""
    if hasattr(p.sd_model, "forge_objects"):
        from lib_dinotile.hosts.forge import ForgeHost

        return ForgeHost(p)
    from lib_dinotile.hosts.a1111 import A1111Host

    return A1111Host(p)


def _first(error: BaseException) -> BaseException:
    """What an error comes of in the end."""
    return error if error.__cause__ is None else _first(error.__cause__)


def in_one_line(work: Callable[..., T]) -> Callable[..., T]:
    """The WebUI shows, and its API answers, what an error says: let it be one line, whatever it is. The processing
    object is given back then: the WebUI lets no hook know of an error."""

    @functools.wraps(work)
    def wrapper(takeover: Takeover, *args: Any, **more: Any) -> T:
        try:
            return work(takeover, *args, **more)
        except BaseException as error:
            undo(takeover._p)
            takeover._let_go()
            if not isinstance(error, Exception):
                raise
            if not isinstance(_first(error), DinotileError):
                errors.report("DINO Tile: stopped by an error", exc_info=True)
            line, code = takeover._called(one_line(error)), getattr(error, "status_code", 500)
        # Not the error itself: its frames know all that the run had, and Forge keeps what was raised last.
        raise DinotileError(line, code)

    return wrapper


def to_sample(image: Image.Image) -> Tensor:
    """Pixels (3, H, W) in [-1, 1] that the WebUI makes this very RGB image of.

    It cuts off the fraction when it makes bytes of them, so they aim at the middle of a level.
    """
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().add_(0.5).div_(127.5).sub_(1)


def _getting_ready(text: str, share: float) -> None:
    """Shown above the progress bar before the first tile. DinotileError if the user stops it."""
    if bars.stopped():
        raise DinotileError("stopped before the first tile")
    shared.state.textinfo = f"DINO Tile: {text} ({share:.0%})"


class Takeover:
    """One img2img job of the WebUI, done by the engine."""

    _host: WebUIHost | None = None
    _conditioner: Conditioner | None = None
    _sources: Sequence[Image.Image] = ()
    _corrections: Sequence[Any] = ()
    """Of the WebUI's colour correction, by source, where there is a mask."""
    _area: Area
    _painted = 0
    """Tiles of the last batch."""

    def __init__(self, p: Any, settings: Settings) -> None:
        """Changes nothing yet; DinotileError if img2img is set up in a way that tiles cannot follow."""
        check_img2img(p, settings)
        self._begin(p, settings)
        self._area, anew = Area(p, settings, p.init_images[0].size), "Masked content paints something new there"
        if p.image_mask is not None and p.inpainting_fill in (LATENT_NOISE, LATENT_NOTHING):
            self._switch_off(anew, colour="none")  # what is new has colours of its own
        if p.image_mask is not None and p.inpainting_fill != ORIGINAL:
            self._switch_off(anew, guidance=0.0, guard=OFF)  # and is not to show what was there
        if self._area.colour_only:
            self._switch_off("the mask is only a few pixels wide", colour="none")

    def _begin(self, p: Any, settings: Settings) -> None:
        self._job, self._settings = weakref.ref(p), settings
        self._called: Callable[[str], str] = str
        self._notes: list[str] = []
        """For every image."""
        self._unsaved: list[tuple[Image.Image, int, str]] = []
        """Images of earlier batches, with seed and prompt, that the WebUI does not save."""

    def _switch_off(self, why: str, **values: Any) -> None:
        """Changes options for this job, and notes it for the user."""
        changed = {name: value for name, value in values.items() if getattr(self._settings, name) != value}
        if changed:
            self._settings = dataclasses.replace(self._settings, **changed)
            names = " and ".join(Settings.option(name).label for name in changed)
            self._notes.append(f"{names} off: {why}")

    @property
    def _p(self) -> Any:
        """The processing object: it has us, so we do not keep it alive."""
        return self._job()

    def _let_go(self) -> None:
        """After an error: a ControlNet extension may keep our `sample`, and with it all that it holds, until the next
        job; Forge keeps the job itself, and puts the model's noise levels back only after a good one."""
        if getattr(self._p, "init_latent", None) is not None:
            self._p.init_latent = None
        if self._host is not None:
            self._host.restore_levels()
        self._host = self._conditioner = None
        self._sources = self._corrections = ()
        self._unsaved = []

    def apply(self, called: Callable[[str], str] = str) -> None:
        """Replace methods of the processing object; called: makes of a refusal what the user reads."""
        p, self._called = self._p, called
        width, height = self._area.canvas  # so long: ControlNet cuts its hints to that
        # With "" for none as refiner, A1111's ControlNet would wait until `init` is over.
        methods = {"setup_prompts": self.setup_prompts, "init": self.init, "sample": self.sample}
        replace(p, width=width, height=height, refiner_checkpoint=None, **methods)
        self._tell({**dict.fromkeys(NO_PART), **self._settings.infotext, **self._area.infotext})

    def _tell(self, infotext: Mapping[str, Any]) -> None:
        """Puts these keys and values into PNG info, in place of those of an earlier image of the processing object."""
        p = self._p
        setattr(p, FOUND, [])
        others = {key: value for key, value in p.extra_generation_params.items() if not key.startswith(VERSION)}
        p.extra_generation_params = {**others, **infotext}  # a new dict: an X/Y/Z plot's cells share theirs

    @staticmethod
    def publish(p: Any, processed: Any) -> None:
        """Maps into the gallery, behind the images; reports into what the API tells."""
        found = p.__dict__.pop(FOUND, None)
        if not found:
            return
        texts = processed.infotexts[processed.index_of_first_image :]
        # The WebUI adds none for masks: each picture of ours is to have its own.
        processed.infotexts += texts[-1:] * (len(processed.images) - len(processed.infotexts))
        for number, (_, maps) in enumerate(found):
            for name, picture in maps.items():
                processed.images.append(picture)
                processed.infotexts.append(f"{texts[min(number, len(texts) - 1)]}, DINO Tile map: {name}")
        # Behind the images' own texts, which are made by now.
        reports = {"DINO Tile report": [report and report.json() for report, _ in found]}
        processed.extra_generation_params = {**processed.extra_generation_params, **reports}

    def setup_prompts(self) -> None:
        """The WebUI's own, after which ControlNet makes its hints. Before it, Forge Neo rounds the size."""
        self._p.width, self._p.height = self._area.canvas
        own(self._p, "setup_prompts")()

    @in_one_line
    def init(self, all_prompts: list[str], all_seeds: list[int], all_subseeds: list[int]) -> None:
        """In place of `p.init`: everything that can go wrong before the first tile goes wrong here."""
        p, opts = self._p, shared.opts
        p.sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
        if getattr(p.sd_model, "cond_stage_key", None) != "edit":  # only InstructPix2Pix has it
            p.image_cfg_scale = None
        p.extra_generation_params["Denoising strength"] = p.denoising_strength
        if p.initial_noise_multiplier != 1.0:
            p.extra_generation_params["Noise multiplier"] = p.initial_noise_multiplier
        p.mask = p.nmask = p.mask_for_overlay = p.overlay_images = p.paste_to = None
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
        # Forge Neo keeps conditionings by a hash of it, made anew for every prompt.
        digest = hashlib.sha256(b"".join(source.tobytes() for source in self._sources)).digest()
        p.init_latent = torch.tensor(list(digest), dtype=torch.uint8).reshape(1, 1, 4, 8)
        if opts.img2img_color_correction and p.color_corrections is None:
            corrections = [processing.setup_color_correction(source) for source in self._sources]
            if self._area.mask is None:
                p.color_corrections = corrections * (p.batch_size // len(corrections))
            else:  # the WebUI would correct what is outside the mask, too
                self._corrections = corrections
        self._prepare()
        self._check_memory(self._sources[0].size)
        bars.expect(p.n_iter, p.batch_size)

    def _check_memory(self, source: tuple[int, int]) -> None:
        """DinotileError if the results of a batch of sources of (width, height) surely do not fit."""
        width, height = self._area.finished
        flow.check_memory(source, self._area.canvas, SAVING * width * height * self._p.batch_size)

    def _prepare(self) -> None:
        """Host and conditioner; DinotileError if something is not there, or does not fit."""
        p, opts = self._p, shared.opts
        if opts.sd_vae_encode_method != "Full":
            p.extra_generation_params["VAE Encoder"] = opts.sd_vae_encode_method
        if opts.sd_vae_decode_method != "Full":
            p.extra_generation_params["VAE Decoder"] = opts.sd_vae_decode_method
        self._host = make_host(p)
        self._host.check()
        plan = flow.make_plan(self._host, self._area.canvas, self._settings)
        self._conditioner = Conditioner.load(
            self._settings,
            self._host,
            installed_weights(folders.adapters()),
            folders.encoders(),
            folders.trained_heads(),
            trusted=False,
            store=folders.calibrated_heads(_getting_ready),
        )
        resolved = self._conditioner.resolved if self._conditioner else self._settings
        for key, value in resolved.infotext.items():  # in one order, whatever was automatic
            p.extra_generation_params.pop(key, None)
            p.extra_generation_params[key] = value
        if self._settings.adapter != NONE:
            self._host.check_residuals()
        if self._settings.order == "fused":
            self._host.check_fused()
        check_name("upscaler", self._settings.upscaler, self._host.upscalers())
        check_prompts(self._host, plan, self._settings)
        self._host.steps()  # tries the sampler

    @in_one_line
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
        p = self._p
        samples = self._paint(conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts)
        p.width, p.height = self._area.finished
        p.mask_for_overlay = self._area.shown_mask  # saved and shown where the WebUI is set up to
        return samples

    def _paint(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: list[int],
        subseeds: list[int],
        subseed_strength: float,
        prompts: list[str],
    ) -> list[Tensor]:
        p, host = self._p, self._host
        assert host is not None  # the WebUI calls `init` first
        results: list[Image.Image] = []
        self._painted = 0
        forget_samples(p)  # of the last batch
        notes: dict[str, list[str | None]] = {"DINO Tile painted": [], "DINO Tile notes": []}
        if self._settings.captions != NONE:
            notes["DINO Tile tile prompts"] = []
        self._check_letters()
        for number in range(len(seeds)):
            uncond = None if unconditional_conditioning is None else unconditional_conditioning[number]
            host.bind(prompts[number], p.negative_prompts[number], conditioning.batch[number], uncond, number)
            host.bars.begin(last=number == len(seeds) - 1)
            noise = NoiseField(seeds[number], host.channels, subseeds[number], subseed_strength)
            source = self._sources[number % len(self._sources)]
            try:
                result = self._upscale(host, source, noise)
            except flow.UnfinishedError as error:
                if isinstance(error.__cause__, DinotileError) and not results and not error.result.painted:
                    # There is nothing to tell but what stands against it. Not the cause itself: raised here, it would
                    # have the error that has it.
                    raise DinotileError(error.__cause__.detail, error.__cause__.status_code) from None
                # What is done of the batch is kept, too.
                done = results + ([self._area.finish(error.result.image, source)] if error.result.painted else [])
                where = keep(p, [*self._unsaved, *zip(done, seeds, prompts)])
                raise flow.UnfinishedError(error.__cause__ or error, error.result, where) from error.__cause__
            except DinotileError as error:  # before its first tile
                raise self._with_kept(error, results, seeds, prompts) from error
            maps = dict(result.maps)
            if SOURCE in maps:
                maps[SOURCE] = self._area.finish(maps[SOURCE], source)
            p.__dict__[FOUND].append((result.report, maps))
            self._painted += result.painted
            for line in result.report.lines:
                p.comment(f"DINO Tile: {line}")
            notes["DINO Tile painted"].append(None if result.complete else f"{result.painted} of {result.total}")
            notes["DINO Tile notes"].append("; ".join(result.report.lines) or None)
            if self._settings.captions != NONE:
                notes["DINO Tile tile prompts"].append(result.report.prompts or None)
            try:
                results.append(self._in_its_colours(self._area.finish(result.image, source), number))
            except Exception as error:  # memory may run out
                raise self._with_kept(error, [*results, result.image], seeds, prompts) from error
        # One entry per image of the batch; the WebUI leaves out what is None.
        p.extra_generation_params.update(notes)
        samples = processing.DecodedSamples()
        try:
            samples.extend(to_sample(image) for image in results)
        except Exception as error:
            raise self._with_kept(error, results, seeds, prompts) from error
        if not p.save_samples():
            self._unsaved += zip(results, seeds, prompts)
        return samples

    def _with_kept(
        self, error: Exception, done: Sequence[Image.Image], seeds: Sequence[int], prompts: Sequence[str]
    ) -> DinotileError:
        """The error with where what is done of the batch, and of earlier ones, is kept."""
        where = keep(self._p, [*self._unsaved, *zip(done, seeds, prompts)])
        return DinotileError(f"{one_line(error)}{where}", getattr(error, "status_code", 500))

    def _in_its_colours(self, image: Image.Image, number: int) -> Image.Image:
        """Image `number` of the batch, corrected within the mask by the WebUI's colour correction, if that is on."""
        if not self._corrections:
            return image
        corrected = processing.apply_color_correction(self._corrections[number % len(self._corrections)], image)
        return Image.composite(corrected, image, self._area.shown_mask)

    def _check_letters(self) -> None:
        """DinotileError for words of a region that one of the images does not have, but for the first: that is seen
        before its first tile."""
        if self._conditioner is not None and self._settings.region_words:
            for source in self._sources[1:]:
                regions = self._conditioner.regions(self._area.cut(source), self._area.canvas)
                check_letters(regions, self._settings.region_words)

    def _upscale(self, host: WebUIHost, source: Image.Image, noise: NoiseField) -> flow.Result:
        area = self._area
        fill = masking.fill if area.mask is not None and self._p.inpainting_fill == 0 else None
        width, height = area.canvas
        began = time.perf_counter()
        with (
            # The WebUI's own preview would show single tiles; the host shows the canvas.
            patched(shared.state, do_set_current_image=lambda: None, current_latent=None),
            patched(self._p, width=width, height=height),
        ):
            try:
                result = flow.upscale(
                    host,
                    area.cut(source),
                    self._settings,
                    noise,
                    self._conditioner,
                    size=area.canvas,
                    mask=area.mask,
                    fill=fill,
                )
            except flow.UnfinishedError as error:
                if not error.result.later or not isinstance(error.__cause__, Exception):
                    raise
                errors.report("DINO Tile: stopped by an error", exc_info=True)
                result = error.result
                result.report.note(f"all tiles are painted, but {result.later} failed: {one_line(error.__cause__)}")
                if self._settings.maps != "none":
                    result.report.note("maps: none, since the run was not finished")
        for line in self._notes:
            result.report.note(line)
        tiles, pixels = flow.workload(flow.make_plan(host, area.canvas, self._settings), self._settings)
        painted = pixels * result.painted / max(1, tiles) * (1 + (result.report.retried or 0))
        learn_speed(self._p.sd_model, time.perf_counter() - began, painted, host.steps())
        host.bars.end()  # also if it was stopped
        return result
