"""The WebUIs' samplers, CFGDenoiser, callbacks and ControlNets, as the stand-ins of the WebUIs have them."""

from __future__ import annotations

import itertools
import types
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import webui_models as models
from tests.webui_odd_samplers import ODD

At = namedtuple("At", ["end_at_step", "cond"])
"""A conditioning, and the step at which it ends."""
MARK = 100.0
"""What sd-webui-controlnet puts in front of the tokens that it has seen; negative for the negative prompt."""


class Interrupted(BaseException):
    """The user stopped the sampling."""


class Part:
    """A part of a prompt, between ANDs."""

    def __init__(self, schedules: list[At], weight: float) -> None:
        self.schedules, self.weight = schedules, weight


class Multicond:
    """Prompts of a batch, each a list of parts."""

    def __init__(self, shape: tuple[int, ...], batch: list[list[Part]]) -> None:
        self.shape, self.batch = shape, batch


def parts(text: str) -> list[tuple[str, float]]:
    """`a :2 AND b`: the texts between the ANDs, each with its weight."""
    found = [part.partition(":")[::2] for part in text.split(" AND ")]
    return [(text.strip(), float(weight or 1)) for text, weight in found]


def multicond(texts: list[str], size: tuple[int, int] | None = None) -> Multicond:
    batch = [[Part([At(99, models.words(part, size))], weight) for part, weight in parts(text)] for text in texts]
    return Multicond((len(texts),), batch)


def stacked(conds: list[Any]) -> Any:
    """Conditionings as a batch; the last token of short ones is repeated, as the WebUIs do."""
    if isinstance(conds[0], dict):
        return {name: stacked([cond[name] for cond in conds]) for name in conds[0]}
    if conds[0].ndim == 1:
        return torch.stack(conds)
    most = max(map(len, conds))
    return torch.stack([torch.cat([cond, cond[-1:].repeat(most - len(cond), 1)]) for cond in conds])


def calls(webui: Any) -> dict[str, Any]:
    """Content of `modules.script_callbacks`. An error in a callback is logged, and that is all."""
    lists = webui.callbacks

    def call(name: str, params: Any) -> None:
        for callback in list(lists[name]):
            try:
                callback(params)
            except Exception as error:
                webui.logged.append(error.with_traceback(None))

    def remove(callback: Callable[..., None]) -> None:
        for name in lists:
            lists[name] = [one for one in lists[name] if one is not callback]

    return {
        "CFGDenoiserParams": types.SimpleNamespace,
        "AfterCFGCallbackParams": types.SimpleNamespace,
        "on_cfg_denoiser": lambda callback: lists["denoiser"].append(callback),
        "on_cfg_after_cfg": lambda callback: lists["after"].append(callback),
        "remove_callbacks_for_function": remove,
        "call": call,
    }


class Denoiser(nn.Module):
    """CFGDenoiser: x0 of noisy latents, or their noise, by classifier-free guidance."""

    need_last_noise_uncond = False
    mask_before_denoising = False

    def __init__(self, webui: Any, p: Any) -> None:
        super().__init__()
        self.webui, self.p, self.step, self.total_steps, self.last_noise_uncond = webui, p, 0, 0, None
        self.inner_model = types.SimpleNamespace(inner_model=webui.model)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        uncond: Any,
        cond: Any,
        cond_scale: float,
        s_min_uncond: float,
        image_cond: Any,
        model_options: dict[str, Any] | None = None,
    ) -> Tensor:
        webui, call = self.webui, self.webui.modules["modules.script_callbacks"].call
        state = webui.modules["modules.shared"].state
        if state.interrupted or state.skipped:
            raise Interrupted
        assert len(x) == len(sigma) == len(cond.batch) == len(image_cond)
        assert uncond is None or len(uncond) == len(x)
        noise = getattr(self, "classic_ddim_eps_estimation", False) or self.mask_before_denoising
        if noise:  # sigma is a timestep
            sigma = models.SIGMAS[sigma.long()]
            x = x * models.spread((sigma**2 + 1).sqrt(), x)
        level = models.spread(sigma, x)
        denoised, negative = (self._rows if webui.kind.chain is False else self._chain)(
            x, sigma, cond, uncond, cond_scale
        )
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):
            denoised = function({"denoised": denoised, "uncond_denoised": negative, "cond_scale": cond_scale})
        if self.need_last_noise_uncond:
            self.last_noise_uncond = (x - negative) / level
        early = noise and not webui.kind.chain  # A1111's callback gets the noise, too
        params = types.SimpleNamespace(x=(x - denoised) / level if early else denoised)
        call("after", params)
        assert params.x.shape == x.shape
        self.step += 1
        return (x - params.x) / level if noise and not early else params.x

    def _rows(self, x: Tensor, sigma: Tensor, cond: Any, uncond: Any, scale: float) -> tuple[Tensor, Tensor]:
        """A1111: conditional rows for each tile as many as it has parts, then the negative ones."""
        webui, count = self.webui, [len(entry) for entry in cond.batch]
        numbers = [number for number, many in enumerate(count) for _ in range(many)]
        rows = torch.cat([x[numbers], x])
        levels = torch.cat([sigma[numbers], sigma])
        params = types.SimpleNamespace(x=rows, denoiser=self)
        webui.modules["modules.script_callbacks"].call("denoiser", params)
        text = models.as_context(stacked([part.schedules[0].cond for entry in cond.batch for part in entry]))
        negative = models.as_context(stacked([entry[0].cond for entry in uncond]))
        split = len(numbers)
        if text.shape[1] == negative.shape[1] and webui.modules["modules.shared"].opts.batch_cond_uncond:
            out = webui.apply(rows, levels, torch.cat([text, negative]))
        else:
            out = torch.cat(
                [webui.apply(rows[:split], levels[:split], text), webui.apply(rows[split:], levels[split:], negative)]
            )
        base = out[split:]
        denoised = base.clone()
        for row, (number, part) in enumerate(zip(numbers, [part for entry in cond.batch for part in entry])):
            denoised[number] += (out[row] - base[number]) * (part.weight * scale)
        return denoised, base

    def _chain(self, x: Tensor, sigma: Tensor, cond: Any, uncond: Any, scale: float) -> tuple[Tensor, Tensor]:
        """Forge: whole copies of the tiles, for the negative prompts and for each part; the last comes first."""
        webui = self.webui
        entries = [
            {"cond": stacked([part.schedules[0].cond for part in column]), "strength": column[-1].weight}
            for column in zip(*cond.batch)
        ]
        options = webui.model.forge_objects.unet.model_options
        for modifier in options.get("conditioning_modifiers", ()):
            _, x, sigma, uncond, entries, scale, options, _ = modifier(
                webui.model, x, sigma, uncond, entries, scale, options, 7
            )
        edit = float(sum(entry["strength"] for entry in entries))
        runs = [(models.as_context(entry["cond"]), entry["strength"] * _everywhere(entry, x)) for entry in entries]
        if uncond is not None and scale != 1:
            runs.append((models.as_context(stacked([entry[0].cond for entry in uncond])), None))
        found: list[Tensor] = [x] * len(runs)
        lengths = {context.shape[1] for context, _ in runs}
        for length in lengths:
            chosen = [number for number, (context, _) in enumerate(runs) if context.shape[1] == length][::-1]
            rows, levels = x.repeat(len(chosen), *[1] * (x.ndim - 1)), sigma.repeat(len(chosen))
            head, control = webui.model.forge_objects.unet.controlnet_linked_list, None
            if head is not None:
                more = ({},) if webui.kind.family == "reforge" else ()
                control = head.get_control(rows, levels, {}, len(chosen), *more)
            out = webui.apply(rows, levels, torch.cat([runs[number][0] for number in chosen]), control)
            for number, part in zip(chosen, out.chunk(len(chosen))):
                found[number] = part
        weights = [weight for _, weight in runs if weight is not None]
        positive = sum(weight * part for weight, part in zip(weights, found)) / sum(weights)
        if len(found) == len(weights):
            return positive, positive
        return found[-1] + scale * edit * (positive - found[-1]), found[-1]


def _everywhere(entry: dict[str, Any], x: Tensor) -> Tensor:
    """How much a part of Forge's conditioning counts, of the shape of x: its mask, else one."""
    if "mask" not in entry:
        return torch.ones_like(x)
    assert entry["mask"].shape == (len(x), *x.shape[2:])
    return entry["mask"].unsqueeze(1).repeat(1, x.shape[1], 1, 1)


class Sampler:
    """Its methods are those of a KDiffusionSampler; by name what it steps with."""

    def __init__(self, webui: Any, p: Any) -> None:
        self.webui, self.name = webui, p.sampler_name
        self.model_wrap_cfg = Denoiser(webui, p)
        self.func = ODD.get(self.name)
        self.by_function = self.name == "Euler CFG++" and webui.kind.family in ("neo", "reforge")
        self.model_wrap_cfg.need_last_noise_uncond = self.name == "Euler CFG++" and not self.by_function
        if webui.kind.chain:
            self.model_wrap_cfg.classic_ddim_eps_estimation = self.name == "DDIM"
        else:
            self.model_wrap_cfg.mask_before_denoising = self.name == "DDIM"
        self.last_latent: Tensor | None = None
        self.seen: list[Any] = []
        """(p.width, p.height) and conditionings by the image of each sampling."""
        self.sampler_extra_args: dict[str, Any] = {}

    def create_noise_sampler(self, x: Tensor, sigmas: Tensor, p: Any) -> Any:
        raise AssertionError("noise of the whole picture, seeded for each image")

    def sample_img2img(
        self,
        p: Any,
        x: Tensor,
        noise: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Any = None,
    ) -> Tensor:
        webui, kind = self.webui, self.webui.kind
        module = webui.modules[f"modules.sd_samplers_{'timesteps' if self.name == 'DDIM' else 'kdiffusion'}"]
        unet = webui.model.forge_objects.unet if kind.chain else None
        if kind.chain:
            module.sampling_prepare(unet, x=x)
        steps, last = webui.modules["modules.sd_samplers_common"].setup_img2img_steps(p, steps)
        x = x.to(noise)
        self.last_latent = x
        assert p.batch_size == len(p.all_seeds) == len(x) and p.iteration == 0
        self.seen.append(((p.width, p.height), image_conditioning))
        denoiser = self.model_wrap_cfg
        denoiser.step, denoiser.total_steps = 0, last + 1
        self.sampler_extra_args = {
            "cond": conditioning, "uncond": unconditional_conditioning, "cond_scale": p.cfg_scale, "s_min_uncond": 0.0,
            "image_cond": image_conditioning,
        }  # fmt: skip
        sigmas = webui.levels.sigmas(steps)[steps - last - 1 :]
        draw = p.rng.next
        if self.name == "DPM++ SDE":
            noise_sampler = self.create_noise_sampler(x, sigmas, p)
            draw = lambda: noise_sampler(None, None)  # noqa: E731
        try:
            return self._run(x, noise, sigmas, draw)
        except Interrupted:
            return self.last_latent
        finally:
            for control in unet.list_controlnets() if unet is not None else ():
                control.cleanup()

    def callback_state(self, seen: dict[str, Any]) -> None:
        self.webui.modules["modules.shared"].total_tqdm.update()

    def _run(self, x: Tensor, noise: Tensor, sigmas: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        if self.func is not None:

            def whole(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
                return self.model_wrap_cfg(x, sigma.expand(len(x)), **extra)

            x, extra = self.webui.levels.noisy(x, noise, sigmas[0]), self.sampler_extra_args
            return self.func(whole, x, sigmas, extra_args=extra, callback=self.callback_state, disable=False)
        negative: Tensor | None = None

        def keep(args: dict[str, Any]) -> Tensor:
            nonlocal negative
            negative = args["uncond_denoised"]
            return args["denoised"]

        extra = {"model_options": {"sampler_post_cfg_function": [keep]}} if self.by_function else {}

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            self.webui.modules["modules.shared"].total_tqdm.update()
            return self.model_wrap_cfg(x, sigma.expand(len(x)), **self.sampler_extra_args, **extra)

        if self.name == "DDIM":  # its noise levels are timesteps, and its x is scaled down
            times = self.webui.levels.timestep(sigmas[:-1])
            alphas = torch.cat([models.ALPHAS[times.long()], torch.ones(1)])
            x = alphas[0].sqrt() * x + (1 - alphas[0]).sqrt() * noise
            for number, time in enumerate(times):
                eps = model(x, time)
                x0 = (x - (1 - alphas[number]).sqrt() * eps) / alphas[number].sqrt()
                x = alphas[number + 1].sqrt() * x0 + (1 - alphas[number + 1]).sqrt() * eps
            return x
        x = self.webui.levels.noisy(x, noise, sigmas[0])
        for sigma, after in itertools.pairwise(sigmas):
            x0 = model(x, sigma)
            if self.name == "Euler CFG++":
                known = (x - negative) / sigma if self.by_function else self.model_wrap_cfg.last_noise_uncond
                x = x0 + known * after
                continue
            down, up = (after, 0.0) if self.name == "Euler" else ancestral(sigma, after)
            x = x + (x - x0) / sigma * (down - sigma)
            if up:
                x = x + draw().to(x) * up
        return x


def ancestral(sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(level that a step goes down to, noise that it adds), as in k-diffusion."""
    up = (after**2 * (sigma**2 - after**2) / sigma**2).sqrt().minimum(after)
    return (after**2 - up**2).sqrt(), up


# ControlNets ---------------------------------------------------------------------------------------------------------


def of_hint(hint: Tensor, unet: nn.Module, latent: tuple[int, int]) -> list[Tensor]:
    """Residuals, the middle one last, of hints (n, 3, H, W) for latents of that (h, w)."""
    sizes = [(models.WIDTH, 1), (models.WIDTH, 1), (models.WIDTH, 2), (2 * models.WIDTH, 2), (2 * models.WIDTH, 2)]
    grey = hint.mean(1, keepdim=True)
    return [
        F.adaptive_avg_pool2d(grey, [-(-side // scale) for side in latent]).repeat(1, width, 1, 1) * 0.3
        for width, scale in sizes
    ]


class Control:
    """A ControlNet of Forge's chain."""

    extra_hooks = None
    previous_controlnet: Any = None
    cond_hint: Tensor | None = None

    def __init__(self, webui: Any, hint: Tensor) -> None:
        self.webui, self.cond_hint_original = webui, hint
        self.advanced_mask_weighting: Tensor | None = None
        self.cropped: list[Tensor] = []

    def set_previous_controlnet(self, previous: Any) -> None:
        self.previous_controlnet = previous

    def pre_run(self, model: Any, percent_to_sigma: Any) -> None:
        pass

    def cleanup(self) -> None:
        self.cond_hint = None

    def get_models(self) -> list[Any]:
        return [self]

    def get_extra_hooks(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        return 7

    def get_control(self, x: Tensor, t: Tensor, cond: Any, copies: int, *options: Any) -> dict[str, list[Any]]:
        assert len(options) == (self.webui.kind.family == "reforge")
        if self.cond_hint is None:  # made of the hint once for all steps
            size = [side * 8 for side in x.shape[-2:]]
            self.cond_hint = F.interpolate(self.cond_hint_original, size=size, mode="nearest-exact")
        hint = self.cond_hint.to(x)
        mask = (
            1.0 if self.advanced_mask_weighting is None else self.advanced_mask_weighting.mean((1, 2, 3), keepdim=True)
        )
        found = of_hint(hint, self.webui.unet, x.shape[-2:])
        found = [(residual * mask).repeat(len(x) // len(residual), 1, 1, 1) for residual in found]
        return {"input": [], "middle": found[-1:], "output": [*found[:-1]]}


class Network:
    """What sd-webui-controlnet does to A1111's UNet: a forward of its own, with a hint for each row. hires: that of
    hires fix (1, 3, H, W), which it tells by the size of what is denoised."""

    def __init__(self, webui: Any, hint: Tensor, hires: Tensor | None = None) -> None:
        params = types.SimpleNamespace(hint_cond=hint, hr_hint_cond=hires, effective_region_mask=None)
        unet, self.control_params, self.in_hires_fix = webui.unet, [params], set[bool]()
        inner = unet.forward

        def forward(x: Tensor, timesteps: Tensor, context: Tensor, control: Any = None) -> Tensor:
            assert (context[:, 0].abs() == MARK).all(), "a prompt that went past the extension"
            hint, larger, height = params.hint_cond, params.hr_hint_cond, x.shape[-2] * 8
            high = larger is not None and abs(height - hint.shape[-2]) >= abs(height - larger.shape[-2])
            self.in_hires_fix.add(high)
            found = of_hint(larger if high else hint, unet, x.shape[-2:])
            assert {len(residual) for residual in found} == {len(x)}
            return inner(x, timesteps, context[:, 1:], {"middle": found[-1:], "output": found[:-1]})

        unet.forward = forward


def mark_prompt_context(entry: Any, positive: bool) -> Any:
    """As sd-webui-controlnet marks what goes through `p.sample`."""
    if isinstance(entry, list):
        for number, one in enumerate(entry):
            entry[number] = mark_prompt_context(one, positive)
        return entry
    if isinstance(entry, Part):
        entry.schedules = mark_prompt_context(entry.schedules, positive)
        return entry
    token = torch.full_like(entry.cond[:1], MARK if positive else -MARK)
    return At(entry.end_at_step, torch.cat([token, entry.cond]))
