"""The WebUI's samplers: the noise that they draw, and what they can do, tried out without the model."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from modules import devices, sd_samplers_common, sd_samplers_kdiffusion, sd_samplers_timesteps, shared
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lib_dinotile import DinotileError
from lib_dinotile.hosts.patched import patched
from lib_dinotile.hosts.post_cfg import KEY

MOST = 60
"""With more steps than these no sampler is tried."""
ALIKE = 1e-5
"""Two results that differ by a smaller share are one: sums are rounded."""
SIDE = 8
"""Latent cells a side of what a sampler is tried with."""

Draw = Callable[[], Tensor]


class DrawnNoise(TorchFunctionMode):
    """While open, normal noise of the latents' shape is not drawn from torch's generators but by `draw`.

    The WebUIs replace only the `randn_like` of one module; samplers of other modules, and those that use `randn`, would
    give each batch noise of its own, which overlapping tiles do not share.
    """

    def __init__(self, shape: torch.Size, draw: Draw) -> None:
        super().__init__()
        self._shape, self._draw = shape, draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like and args and args[0].shape == self._shape:
            return self._draw().to(args[0])
        if func is torch.randn and _size(args, kwargs) == self._shape:
            return self._draw().to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        return func(*args, **kwargs)

    def without(self, work: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`work`, which draws its noise as ever. It is not slowed down either."""

        def outside(*args: Any, **more: Any) -> Tensor:
            self.__exit__(None, None, None)
            try:
                return work(*args, **more)
            finally:
                self.__enter__()

        return outside


def _size(args: Any, kwargs: Any) -> tuple[int, ...]:
    """What `torch.randn` is asked for: a size, or its sides one by one."""
    size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return tuple(size)


class DrawnRNG:
    """In place of `p.rng`: `next()` gives what `draw` draws."""

    def __init__(self, draw: Draw) -> None:
        self._draw: Draw | None = draw

    def next(self) -> Tensor:
        assert self._draw is not None
        return self._draw()

    def close(self) -> None:
        """Lets the noise and the processing object go: the samplers' module keeps this until the next sampling."""
        self._draw = None


@contextlib.contextmanager
def noise_from(sampler: Any, shape: torch.Size, draw: Draw, **more: Any) -> Iterator[DrawnNoise]:
    """While open, all noise of the latents' shape that the sampler adds comes from `draw`.

    more: what its function is given besides.
    """
    values: dict[str, Any] = {"create_noise_sampler": lambda *_: lambda *_, **__: draw()}
    func = getattr(sampler, "func", None)
    if func is not None:
        takes = "noise_sampler" in inspect.signature(func).parameters

        @functools.wraps(func)  # the WebUIs look at its parameters
        def given(*args: Any, **own: Any) -> Any:
            # Without one some make a Brownian tree of the whole batch.
            if takes and own.get("noise_sampler") is None:
                own["noise_sampler"] = lambda *_, **__: draw()
            return func(*args, **{**own, **more})

        values["func"] = given
    with patched(sampler, **values), DrawnNoise(shape, draw) as drawn:
        yield drawn


@dataclass(frozen=True)
class Steps:
    """How many steps a sampler takes at a denoising strength."""

    sampler: str
    asked: int
    """By the WebUI's own count."""
    taken: int
    """More where the sampler cannot do so few."""

    @property
    def told(self) -> int | None:
        """What the sampler is told; None: it counts itself."""
        return None if self.taken == self.asked else self.taken

    @property
    def note(self) -> str:
        if self.taken == self.asked:
            return ""
        return f"{self.taken} sampling steps instead of {self.asked}: {self.sampler} cannot do fewer"


def steps_asked(p: Any) -> int:
    """How many steps img2img takes by the WebUI's own count, which goes by its settings, too."""
    return sd_samplers_common.setup_img2img_steps(p)[1] + 1


class Rehearsal:
    """A sampler run without the model, on a few latent cells: does it work with so many steps, and tile by tile?

    Samplers fail with few steps, each in a way of its own: one divides by what only a second step makes, one wants as
    many steps as its order, one takes none at all and leaves the noise in. They are only asked for so few where a pass
    has little denoising strength.
    """

    def __init__(self, p: Any, channels: int, frames: bool) -> None:
        """p: the processing object, with the denoising strength in question."""
        self._p, self._size = p, (channels, *(1,) * frames, SIDE, SIDE)

    def works(self, steps: int | None) -> bool:
        """Whether an image comes out; steps: if not as many as the WebUI takes by itself."""
        try:
            return bool(self._run(1, steps).isfinite().all())
        except DinotileError:
            raise
        except Exception:
            return False

    def steps(self) -> Steps:
        """The fewest steps that work, but no less than the WebUI takes; that is as many if none do, since then it is
        not for the number of steps."""
        asked = steps_asked(self._p)
        tried = range(asked + 1, MOST + 1) if not self.works(None) else ()
        return Steps(self._p.sampler_name, asked, next(filter(self.works, tried), asked))

    def alone(self, steps: int | None) -> bool:
        """Whether a tile comes out otherwise, or not at all, where another is in its batch."""
        try:
            one = self._run(1, steps)[0]
        except Exception:
            return False
        try:
            two = self._run(2, steps)[0]
        except Exception:
            return True
        return bool((one - two).abs().max() > ALIKE * one.abs().max())

    def _run(self, count: int, steps: int | None) -> Tensor:
        """The latents of so many tiles, the first the same whatever is beside it."""
        p, device = self._p, devices.device
        generator, sampler = torch.Generator().manual_seed(0), p.sampler
        denoiser, calls = sampler.model_wrap_cfg, list[int]()
        latents = torch.zeros(count, *self._size, device=device)

        def noise() -> Tensor:
            drawn = torch.randn(self._size, generator=generator).to(device)
            return torch.stack([drawn * (1 + 2 * number) for number in range(count)])

        def model(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            if x.shape != latents.shape:
                raise other_sizes(p)
            calls.append(1)
            x0 = x.tanh()  # of x alone, and not in proportion: steps of another length then lead elsewhere
            denoiser.last_noise_uncond = torch.zeros_like(x)
            for function in (extra.get("model_options") or {}).get(KEY, ()):
                function({"denoised": x0, "cond_denoised": x0, "uncond_denoised": x0, "sigma": sigma, "input": x})
            return x0

        start, rng = noise(), DrawnRNG(noise)
        values = {
            "batch_size": count,
            "all_seeds": [p.all_seeds[0]] * count,
            "iteration": 0,
            "rng": rng,
            "extra_generation_params": dict(p.extra_generation_params),
        }
        nothing = dict.fromkeys(("sampling_prepare", "sampling_cleanup", "extra_noise_callback"), lambda *_, **__: None)
        with contextlib.closing(rng), contextlib.ExitStack() as stack:
            for module in (sd_samplers_kdiffusion, sd_samplers_timesteps):
                stack.enter_context(patched(module, **nothing))
            stack.enter_context(patched(p, **values))
            stack.enter_context(patched(sampler, callback_state=lambda *_: None))
            stack.enter_context(patched(shared.total_tqdm, update=lambda: None))
            drawn = stack.enter_context(noise_from(sampler, latents.shape, noise, disable=True))
            stack.enter_context(patched(denoiser, forward=drawn.without(model)))
            made = sampler.sample_img2img(p, latents, start, None, None, steps=steps)
        if not calls:
            raise ValueError("it never asks the model")
        return made


def other_sizes(p: Any) -> DinotileError:
    """For samplers that give the model latents of another size, as SMEA does."""
    return DinotileError(f"the sampler {p.sampler_name} changes the size of tiles: choose another")
