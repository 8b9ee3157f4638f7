"""An extension for a WebUI under test: makes the next generation fail at a chosen place, and tells what is left behind.

Link the folder `faults` into the WebUI's `extensions`, start it and run tests/live/test_faults.py. It adds routes only
to a WebUI that listens to this machine alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import hashlib
import importlib
import sys
import zlib
from collections.abc import Callable
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from modules import call_queue, script_callbacks, shared
from PIL import Image

ROUTE = "/dinotile-faults"
LOOPBACK = ("127.0.0.1", "localhost", "::1", None)


def _unet() -> torch.nn.Module:
    model = shared.sd_model
    return (
        model.forge_objects.unet.model.diffusion_model
        if hasattr(model, "forge_objects")
        else model.model.diffusion_model
    )


def _place(module: str, *names: str) -> Callable[[], Any]:
    def find() -> Any:
        return functools.reduce(getattr, names, importlib.import_module(module))

    return find


STAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "upscale": (_place("lib_dinotile.hosts.webui", "WebUIHost"), "upscale"),
    "encode": (_place("modules.sd_samplers_common"), "images_tensor_to_samples"),
    "sampler": (_place("modules.sd_samplers_kdiffusion", "KDiffusionSampler"), "sample_img2img"),
    "unet": (_unet, "forward"),
    "decode": (_place("modules.processing"), "decode_latent_batch"),
    "prompts": (_place("modules.processing", "StableDiffusionProcessing"), "setup_conds"),
    "encoder": (_place("lib_dinotile.dino.encoder", "PatchEncoder"), "several"),
    "positions": (_place("lib_dinotile.dino.encoder", "PatchEncoder"), "_positions"),
    "guidance": (_place("lib_dinotile.condition.guidance", "Guide"), "__call__"),
    "decoder": (_place("lib_dinotile.hosts.decoders"), "guidance_decoder"),
    "guard": (_place("lib_dinotile.condition.guard", "Guard"), "distances"),
    "adapter": (_place("lib_dinotile.condition.adapter", "Adapter"), "forward"),
    "maps": (_place("lib_dinotile.engine.flow"), "draw_maps"),
    "save": (lambda: Image.Image, "save"),
}
"""Where it can fail: the object, and which of its functions."""

FAULTS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: RuntimeError("the fault\nand what a second line says"),
    "memory": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "memory in words": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:83] err == 0. can't allocate memory"),
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
}
"""What happens there; besides these, `nan`: what it gives is not a number."""


def _spoilt(result: Any) -> Any:
    """The same with nothing but NaN in its tensors."""
    if isinstance(result, torch.Tensor):
        return torch.full_like(result, torch.nan) if result.is_floating_point() else result
    if isinstance(result, list):  # also of a kind of its own
        result[:] = [_spoilt(each) for each in result]
        return result
    return tuple(map(_spoilt, result)) if isinstance(result, tuple) else result


class Fault:
    """One that waits for its turn."""

    def __init__(self, stage: str, fault: str, after: int, times: int) -> None:
        """after: calls that go well first; times: calls that go wrong then."""
        find, self._name = STAGES[stage]
        self._target, self._stage, self._fault = find(), stage, fault
        self._good, self._bad = after, times
        self.fired = 0
        self._own = self._name in vars(self._target)
        self._real = vars(self._target)[self._name] if self._own else getattr(self._target, self._name)
        setattr(self._target, self._name, self._wrapped())

    def _wrapped(self) -> Callable[..., Any]:
        fault, real = self, self._real

        def call(*args: Any, **more: Any) -> Any:
            if fault._stage == "save" and not (len(args) > 1 and isinstance(args[1], str)):
                return real(*args, **more)  # not to a file
            if fault._stage == "sampler" and args[4] is None:
                return real(*args, **more)  # tried without prompts and model
            if fault._good > 0:
                fault._good -= 1
                return real(*args, **more)
            if fault._bad <= 0:
                return real(*args, **more)
            fault._bad -= 1
            fault.fired += 1
            if fault._fault == "nan":
                return _spoilt(real(*args, **more))
            if fault._stage == "save":
                with open(args[1], "wb") as file:
                    file.write(b"half of an image")
            raise FAULTS[fault._fault]()

        return functools.wraps(real)(call)

    def remove(self) -> None:
        if self._own:
            setattr(self._target, self._name, self._real)
        else:
            delattr(self._target, self._name)


_armed: Fault | None = None


def _disarm() -> int:
    global _armed
    fired = _armed.fired if _armed else 0
    if _armed:
        _armed.remove()
    _armed = None
    return fired


def _modules() -> dict[str, torch.nn.Module]:
    """The checkpoint's parts, and what dinotile has loaded."""
    model = shared.sd_model
    if hasattr(model, "forge_objects"):
        objects = model.forge_objects
        parts = {
            "unet": objects.unet.model,
            "vae": objects.vae.first_stage_model,
            "clip": objects.clip.cond_stage_model,
        }
    else:
        parts = {"model": model}
    conditioner = sys.modules.get("lib_dinotile.dino.encoder")
    encoders = [each for each in gc.get_objects() if conditioner and type(each) is conditioner.PatchEncoder]
    return {**parts, **{f"encoder {number}": each for number, each in enumerate(encoders)}}


def _weights(module: torch.nn.Module) -> int:
    """A checksum of all of them."""
    found = 0
    for weight in (*module.parameters(), *module.buffers()):
        found = zlib.crc32(f"{weight.dtype}{tuple(weight.shape)}".encode(), found)
        found = zlib.crc32(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), found)
    return found


def _patches() -> dict[str, Any]:
    """What is put into Forge's UNet, and around it."""
    objects = getattr(shared.sd_model, "forge_objects", None)
    if objects is None:
        return {}
    names = ("sd_samplers_kdiffusion", "sd_samplers_timesteps")
    return {
        "controls": [type(control).__name__ for control in objects.unet.list_controlnets()],
        "options": sorted(map(str, objects.unet.model_options)),
        "transformer options": sorted(map(str, objects.unet.model_options.get("transformer_options", {}))),
        "prepare": [importlib.import_module(f"modules.{name}").sampling_prepare.__module__ for name in names],
    }


def _leftovers() -> dict[str, Any]:
    """Everything that a run might leave behind, as JSON that can be compared."""
    gc.collect()
    modules = _modules()
    for module in modules.values():
        getattr(module, "_grids", {}).clear()  # an encoder's positions, which it keeps for images of the same size
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    tensors = []
    for each in gc.get_objects():
        with contextlib.suppress(Exception):  # proxies of any kind
            if type(each) in (torch.Tensor, torch.nn.Parameter):
                tensors.append(each)
    state = vars(shared.state)
    return {
        "hooks": {
            name: sum(len(getattr(each, kind)) for each in part.modules() for kind in kinds)
            for name, part in modules.items()
        },
        "weights": {name: _weights(part) for name, part in modules.items()},
        "replaced": {
            name: sorted(key for each in part.modules() for key in vars(each) if callable(vars(each)[key]))
            for name, part in modules.items()
        },
        "callbacks": {name: len(entries) for name, entries in script_callbacks.callback_map.items()},
        "state": {"own": sorted(state), "patched": sorted(name for name in state if callable(state[name]))},
        "options": hashlib.sha256(repr(sorted(shared.opts.data.items(), key=str)).encode()).hexdigest(),
        "patches": _patches(),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic],
        "tensors": len(tensors),
        "bytes": sum(each.nbytes for each in tensors),
    }


def _local(request: Request) -> None:
    if request.client is None or request.client.host not in LOOPBACK:
        raise HTTPException(403)


async def _arm(request: Request) -> dict[str, Any]:
    """{"stage": ..., "fault": ..., "after": n, "times": n} for the generations to come, until the next call or GET."""
    global _armed
    _local(request)
    _disarm()
    wanted = await request.json()
    _armed = Fault(wanted["stage"], wanted["fault"], wanted.get("after", 0), wanted.get("times", 1))
    return {}


def _look(request: Request) -> dict[str, Any]:
    """How often the fault has struck, which is over now; and what is left behind."""
    _local(request)
    return {"fired": _disarm(), "left": _leftovers()}


def _press(app: FastAPI) -> Callable[[Request], Any]:
    async def press(request: Request) -> dict[str, str]:
        """The HTML that stands under the gallery after a generation: what the WebUI's buttons make of an error."""
        from fastapi.concurrency import run_in_threadpool
        from modules.api import models

        _local(request)
        body = models.StableDiffusionImg2ImgProcessingAPI(**await request.json())
        generate = next(route.endpoint for route in app.routes if getattr(route, "path", "") == "/sdapi/v1/img2img")
        # Forge and its descendants have a thread for it.
        thread: Any = sys.modules.get("modules_forge.main_thread")
        run = thread.run_and_wait_result if thread else lambda work: work()
        button = call_queue.wrap_gradio_call(lambda: run(lambda: [generate(body), ""]), extra_outputs=[None])
        return {"html": (await run_in_threadpool(button))[-1]}

    return press


def _add_routes(_: Any, app: FastAPI) -> None:
    options = shared.cmd_opts
    if options.listen or options.share or getattr(options, "ngrok", None) or options.server_name not in LOOPBACK:
        print("dinotile faults: only for a WebUI that listens to this machine alone")
        return
    app.add_api_route(ROUTE, _arm, methods=["POST"])
    app.add_api_route(ROUTE, _look, methods=["GET"])
    # As the page's Interrupt does, where there is more than one job to do: it has no route of its own.
    app.add_api_route("/sdapi/v1/stop-generating", lambda: shared.state.stop_generating(), methods=["POST"])
    app.add_api_route(f"{ROUTE}/press", _press(app), methods=["POST"])


script_callbacks.on_app_started(_add_routes)
