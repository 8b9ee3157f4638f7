"""Stand-ins of the WebUIs that the hosts run in: A1111, Forge, Forge Neo and reForge, with small models.

A module has what the WebUI's has, and nothing else: what is asked for in vain is not there here either.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tests import webui_models as models
from tests.stand_in import anew
from tests.webui_samplers import At, Sampler, calls, multicond

NEGATIVE = "blurry"


@dataclass(frozen=True)
class Kind:
    """A WebUI and the kind of checkpoint that it has loaded."""

    family: str
    """a1111, forge, neo or reforge."""
    channels: int = 4
    """Of the VAE's own cells, 8 pixels a side."""
    base: str = "sd15"
    film: bool = False
    """Latents (n, C, 1, h, w)."""
    packed: bool = False
    """Four cells of the VAE in one of the model's, 16 pixels a side."""

    @property
    def flow(self) -> bool:
        return self.base not in ("sd15", "sdxl")

    @property
    def chain(self) -> bool:
        """Whether it keeps its parts in `forge_objects`, ControlNets in a chain."""
        return self.family != "a1111"

    def __str__(self) -> str:
        return f"{self.family} {self.base}"


A1111, FORGE, NEO, REFORGE = (Kind(family) for family in ("a1111", "forge", "neo", "reforge"))
FLUX, KLEIN = Kind("neo", 16, "flux"), Kind("neo", 32, "flux2", packed=True)
QWEN = Kind("neo", 16, "qwenimage", film=True)
UNETS, TRANSFORMERS = (A1111, FORGE, NEO, REFORGE), (FLUX, KLEIN, QWEN)
KINDS = (*UNETS, *TRANSFORMERS)


class Patcher:
    """Forge's UnetPatcher: the UNet with the chain of its ControlNets."""

    controlnet_linked_list: Any = None

    def __init__(self, model: Any) -> None:
        self.model, self.model_options = model, {"transformer_options": {}}

    def clone(self) -> Patcher:
        other = Patcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.controlnet_linked_list = self.controlnet_linked_list
        return other

    def add_patched_controlnet(self, control: Any) -> None:
        control.set_previous_controlnet(self.controlnet_linked_list)
        self.controlnet_linked_list = control

    def add_conditioning_modifier(self, modifier: Any) -> None:
        self.model_options["conditioning_modifiers"] = [*self.model_options.get("conditioning_modifiers", ()), modifier]

    def list_controlnets(self) -> list[Any]:
        found, one = [], self.controlnet_linked_list
        while one is not None:
            found.append(one)
            one = one.previous_controlnet
        return found


class Objects:
    """Forge's ForgeObjects."""

    def __init__(self, unet: Patcher, vae: Any) -> None:
        self.unet, self.vae = unet, vae

    def shallow_copy(self) -> Objects:
        return Objects(self.unet, self.vae)


class Job:
    """An img2img processing object."""

    def __init__(self, webui: WebUI, sampler: str, denoise: float) -> None:
        self._webui, self.sd_model = webui, webui.model
        self.sampler_name, self.cfg_scale, self.steps, self.denoising_strength = sampler, 3.0, 6, denoise
        self.distilled_cfg_scale, self.initial_noise_multiplier, self.inpainting_fill = 2.5, 1.0, 1
        self.all_seeds, self.batch_size, self.iteration, self.rng = [7], 1, 0, None
        self.width, self.height = 96, 64
        self.prompts, self.negative_prompts, self.c, self.uc = ["a cat"], [NEGATIVE], None, None
        self.tiling, self.seed_resize_from_w, self.seed_resize_from_h = None, -1, -1
        self.scripts: Any = None
        self.extra_generation_params: dict[str, Any] = {}
        self.modified_noise: Tensor | None = None
        self.init_latent: Tensor | None = torch.zeros(1, 3, 8, 8)
        self.sampler = Sampler(webui, self)
        self.sees = False
        """Whether the checkpoint looks at the picture."""

    def setup_conds(self) -> None:
        size = (self.width, self.height) if self._webui.kind.base == "sdxl" else None
        if self._webui.kind.family == "neo":  # it keeps conditionings by the pixels that they may refer to
            self.init_latent.cpu().float().sum().item()
            model, args = self.sd_model, self._webui.args
            args.ref_latents = [*model.ref_latents, *([] if model.ini_latent is None else [model.ini_latent])]
            model.ini_latent = None
        self.c = multicond(self.prompts, size)
        self.uc = [[At(self.steps, models.words(text, size))] for text in self.negative_prompts]

    def img2img_image_conditioning(self, pixels: Tensor, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.sees:
            return latents.new_zeros(len(latents), 5, 1, 1)
        # As of an inpainting checkpoint, which looks at the mask and what it leaves of the picture.
        mask = torch.ones_like(pixels[:, :1]) if mask is None else mask
        latent = self._webui.vae.encode(pixels * (1 - mask.round()))
        return torch.cat([F.interpolate(mask, size=latents.shape[-2:]), latent], 1)

    def get_token_merging_ratio(self) -> float:
        return 0.0


class Scripts:
    """The runner of scripts: those that are always on may change what is sampled."""

    def __init__(self, *scripts: Any) -> None:
        self.alwayson_scripts = list(scripts)

    def process_before_every_sampling(self, p: Job, **more: Any) -> None:
        for script in self.alwayson_scripts:
            if hasattr(script, "process_before_every_sampling"):
                script.process_before_every_sampling(p, **more)


class WebUI:
    """One of its kind, with a checkpoint loaded and its modules to be imported."""

    def __init__(self, kind: Kind, half: bool = False) -> None:
        """half: weights, and all that is computed, in bfloat16."""
        self.kind, self.dtype = kind, torch.bfloat16 if half else torch.float32
        self._folder = tempfile.TemporaryDirectory()
        self.models = Path(self._folder.name)
        """The folder of preview decoders' files; empty ones, it is only asked whether they are there."""
        self.jobs: list[Job] = []
        self.merged: list[Any] = []
        """Models whose tokens were merged."""
        self.downloads: list[str] = []
        self.log: list[str] = []
        self.logged: list[Exception] = []
        """What callbacks raised."""
        self.seen: list[tuple[int, ...]] = []
        """Shapes for which the WebUI made room in memory."""
        self.loaded: Any = None
        """The UNet that was loaded last."""
        self.modules: dict[str, types.ModuleType] = {}
        self.args: Any = types.SimpleNamespace(ref_latents=[], is_referencing=False, pid=False, wan=False)
        self.callbacks: dict[str, list[Any]] = {"denoiser": [], "after": []}
        torch.manual_seed(1)
        self.vae = models.Vae(kind.channels, kind.film, kind.packed, kind.family == "neo", kind.family == "neo")
        latents = kind.channels * (4 if kind.packed else 1)
        transformer = models.Transformer(latents, kind.film, lambda: self.args.ref_latents)
        self.unet: nn.Module = transformer if kind.flow else models.UNet(latents)
        with torch.inference_mode(kind.family == "neo"):  # it loads weights when they are first needed
            for module in (self.vae, self.unet):
                for owner in module.modules():
                    for name, weight in owner._parameters.items():
                        value = nn.Parameter(weight.detach().clone().to(self.dtype), requires_grad=False)
                        owner._parameters[name] = value
        self.vae._dtype = self.dtype
        self.levels: Any = models.Flow() if kind.flow else models.Discrete()
        self.model = self._checkpoint(latents)
        self._modules()

    def module(self, name: str, **content: Any) -> types.ModuleType:
        found = self.modules.setdefault(name, types.ModuleType(name))
        vars(found).update(content)
        return found

    def job(self, sampler: str = "Euler", denoise: float = 0.6) -> Job:
        self.jobs.append(Job(self, sampler, denoise))  # a host does not keep it alive
        return self.jobs[-1]

    def host(self, p: Job) -> Any:
        """The host for a job, which has the main prompt's conditionings."""
        if self.kind.chain:
            from lib_dinotile.hosts.forge import ForgeHost as Host
        else:
            from lib_dinotile.hosts.a1111 import A1111Host as Host
        host = Host(p)
        p.setup_conds()
        host.bind(p.prompts[0], NEGATIVE, p.c.batch[0], None if p.uc is None else p.uc[0])
        return host

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """As the WebUI calls what it calls."""
        return torch.inference_mode() if self.kind.chain else torch.no_grad()

    # The checkpoint ---------------------------------------------------------------------------------------------------

    def _checkpoint(self, latents: int) -> Any:
        kind, vae, dtype = self.kind, self.vae, self.dtype
        weight, bias = vae.factors()
        form = types.SimpleNamespace(
            process_in=vae.process_in, process_out=vae.process_out, latent_channels=latents,
            latent_rgb_factors=weight.tolist(), latent_rgb_factors_bias=bias.tolist(), taesd_decoder_name="tiny",
            latent_rgb_factors_reshape=(lambda latents: F.pixel_shuffle(latents, 2)) if kind.packed else None,
        )  # fmt: skip
        marks = {"is_sd1": kind.base == "sd15", "is_sdxl": kind.base == "sdxl"}
        if kind.family != "neo":
            marks |= {"is_sd2": False, "is_sd3": False}
        name = {"flux": "Flux", "flux2": "Flux2", "qwenimage": "QwenImage"}.get(kind.base, "Checkpoint")
        model = type(name, (), {})()
        vars(model).update(marks, cond_stage_key="crossattn", alphas_cumprod=models.ALPHAS.clone())
        model.encode_first_stage, model.decode_first_stage = self._encode, self._decode
        model.get_first_stage_encoding = lambda latents: latents
        if not kind.chain:
            vae.process_in = vae.process_out = None  # it has none
            model.model = types.SimpleNamespace(diffusion_model=self.unet, conditioning_key="crossattn")
            model.first_stage_model, model.latent_channels, model.scale_factor = vae, latents, vae.SCALE
            return model
        inner = types.SimpleNamespace(diffusion_model=self.unet, predictor=self.levels)
        if kind.family == "reforge":
            vae.process_in = vae.process_out = None
            inner.manual_cast_dtype, inner.model_config = dtype, types.SimpleNamespace(latent_format=form)
            model.latent_channels = latents
        else:
            inner.computation_dtype = dtype
            model.is_webui_legacy_model = lambda: not kind.flow
        if kind.family == "neo":
            model.model_config = types.SimpleNamespace(latent_format=form)
            model.ini_latent, model.ref_latents = None, []
            model.set_shift = lambda shift: kind.flow and setattr(self.levels, "shift", shift)
        parts = types.SimpleNamespace(first_stage_model=vae, vae_dtype=dtype, latent_channels=latents)
        if kind.family == "neo":
            parts.latent_dim = 3 if kind.film else 2
        model.forge_objects = Objects(Patcher(inner), parts)
        model.forge_objects_after_applying_lora = model.forge_objects.shallow_copy()
        return model

    @property
    def _vae_dtype(self) -> torch.dtype:
        return self.model.forge_objects.vae.vae_dtype if self.kind.chain else self.modules["modules.devices"].dtype_vae

    def _encode(self, pixels: Tensor) -> Tensor:
        latents = models.Vae.process_in(self.vae, self.vae.encode(pixels.to(self._vae_dtype)).float())
        if self.kind.family == "neo":  # editing models take it for a picture that the prompt refers to
            self.model.ini_latent = latents.cpu()
            self.model.ref_latents.append(latents.cpu())
            self.args.ref_latents.append(latents.cpu())
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        dtype = self._vae_dtype if self.kind.chain else self.vae.dtype
        pixels = self.vae.decode(models.Vae.process_out(self.vae, latents).to(dtype)).float()
        return pixels.movedim(2, 1) if self.kind.film else pixels

    def apply(self, x: Tensor, sigma: Tensor, context: Tensor, control: Any = None) -> Tensor:
        """The picture x0 that the model predicts for noisy latents (n, ...) at noise levels (n,)."""
        level, dtype = models.spread(sigma, x), self.compute_dtype
        found = self.unet(
            self.levels.scaled(x, level).to(dtype), self.levels.timestep(sigma), context.to(dtype), control=control
        )
        return x - level * found.to(x)

    @property
    def compute_dtype(self) -> torch.dtype:
        if not self.kind.chain:
            return self.modules["modules.devices"].dtype_unet
        inner = self.model.forge_objects.unet.model
        return inner.manual_cast_dtype if self.kind.family == "reforge" else inner.computation_dtype

    # Modules ----------------------------------------------------------------------------------------------------------

    def _modules(self) -> None:
        from tests import webui_previews

        neo = self.kind.family == "neo"
        self.module("modules").__path__ = []
        devices = self.module(
            "modules.devices", device=torch.device("cpu"), dtype=self.dtype, dtype_vae=self.dtype,
            dtype_unet=self.dtype, dtype_inference=self.dtype, unet_needs_upcast=False, force_fp16=False, fp8=False,
            autocast=contextlib.nullcontext, without_autocast=contextlib.nullcontext, torch_gc=lambda: None,
        )  # fmt: skip
        if not neo:
            devices.NansException = type("NansException", (Exception,), {})
        stops = dict.fromkeys(
            ("interrupted", "skipped", "stopping_generation", "processing_has_refined_job_count"), False
        )
        shared = self.module(
            "modules.shared", device=devices.device, sd_model=self.model,
            state=types.SimpleNamespace(
                **stops, job_no=0, job_count=1, textinfo="", images=[], jobs=[], begin=lambda *_, **__: None,
                end=lambda: None,
            ),
            opts=types.SimpleNamespace(
                img2img_fix_steps=False, live_previews_enable=True, show_progress_every_n_steps=2,
                show_progress_type="Full", batch_cond_uncond=True, data_labels={},
            ),
            total_tqdm=types.SimpleNamespace(update=lambda: None, updateTotal=lambda count: None),
        )  # fmt: skip
        shared.state.assign_current_image = shared.state.images.append
        shared.sd_upscalers = [self._upscaler(name) for name in (() if neo else ("None", "Lanczos", "Nearest"))]
        shared.sd_upscalers.append(self._upscaler("ESRGAN", path="esrgan.pth"))
        if not neo:
            interrogate = lambda image: f"a picture of {image.width}\nby a clip"  # noqa: E731
            shared.interrogator = types.SimpleNamespace(interrogate=interrogate, load=lambda: None)
            booru = types.SimpleNamespace(running=0, asked=0, tag_multi=lambda image: f"{image.height}, tags")
            booru.start = lambda: setattr(booru, "running", booru.running + 1)
            booru.stop = lambda: setattr(booru, "running", booru.running - 1)
            self.module("modules.deepbooru", model=booru).__spec__ = types.SimpleNamespace(name="modules.deepbooru")
        self.module("modules.errors", report=lambda line, exc_info=False: self.log.append(line))
        # Forge Neo rounds to multiples of a step that is one of its settings.
        self.module("modules.ui", **({"sRound": lambda side: math.floor(side / 16 + 0.5) * 16} if neo else {}))
        reload = {"forge_model_reload": lambda: (self.model, False)} if self.kind.family in ("forge", "neo") else {}
        self.module("modules.sd_models", **reload)
        self.module("modules.sd_unet", get_unet_option=lambda: None)
        self.module("modules.prompt_parser", MulticondLearnedConditioning=type(multicond([""])))
        self.module("modules.script_callbacks", **calls(self))
        prepare = {"sampling_prepare": self._make_room} if self.kind.chain else {}
        self.module("modules.sd_samplers_kdiffusion", **prepare)
        self.module("modules.sd_samplers_timesteps", **prepare)
        self.module(
            "modules.processing", opt_f=16 if self.kind.packed else 8, decode_latent_batch=self._decode_batch,
            apply_token_merging=lambda model, ratio: self.merged.append(model),
        )  # fmt: skip
        webui_previews.install(self)
        if self.kind.family in ("forge", "neo"):
            self.module("backend").__path__ = []
            self.module("backend.args", **({"dynamic_args": self.args} if neo else {}))
        for name, module in self.modules.items():
            if "." in name:
                package, _, last = name.rpartition(".")
                setattr(self.modules[package], last, module)

    def _upscaler(self, name: str, path: str | None = None) -> Any:
        def upscale(image: Image.Image, scale: float, path: str | None) -> Image.Image:
            size = [int(side * scale) // 8 * 8 for side in image.size]
            return image.resize(size, Image.Resampling.BOX)

        data = types.SimpleNamespace(name=name, data_path=path, scaler=types.SimpleNamespace(upscale=upscale))
        if self.kind.family != "neo":
            data.local_data_path = path
        return data

    def _decode_batch(self, model: Any, batch: Tensor, target_device: Any = None, check_for_nans: bool = False) -> Any:
        if hasattr(self.modules["modules.devices"], "NansException") and not self.kind.chain and check_for_nans:
            assert batch.isfinite().any()
        return list(model.decode_first_stage(batch).to(target_device))

    def _make_room(self, unet: Patcher, x: Tensor) -> None:
        assert x.ndim == (5 if self.kind.film else 4)
        self.loaded = unet
        self.seen.append(tuple(x.shape))
        head = unet.controlnet_linked_list
        if head is not None:
            assert head.inference_memory_requirements(torch.float16) >= 0 and isinstance(head.get_models(), list)
            if self.kind.family == "reforge":
                assert isinstance(head.get_extra_hooks(), list)
        for control in unet.list_controlnets():
            control.pre_run(unet.model, lambda percent: 1 - percent)
            if self.kind.family == "reforge":
                assert control.extra_hooks is None


@contextlib.contextmanager
def webui(kind: Kind, **more: Any) -> Iterator[WebUI]:
    """Within, the modules of a WebUI of that kind can be imported, and this extension's hosts are imported anew."""
    made = WebUI(kind, **more)
    with anew():
        sys.modules.update(made.modules)
        try:
            yield made
        finally:
            for name in made.modules:
                sys.modules.pop(name, None)
