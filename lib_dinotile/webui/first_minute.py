"""The line at the top of the accordion that names the encoder in use, and the button that gets it ready."""

from __future__ import annotations

import collections
import contextlib
import functools
import html
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr
import torch
from gradio.context import Context
from modules import call_queue, devices, errors, shared

from lib_dinotile import DinotileError, one_line
from lib_dinotile.condition.adapter_file import read_config
from lib_dinotile.condition.conditioner import installed_weights
from lib_dinotile.dino.checkpoint import BUILT_IN, automatic_encoder, encoders, install, installed
from lib_dinotile.dino.encoder import encoder_dtype, load_encoder
from lib_dinotile.dino.locks import Progress
from lib_dinotile.dino.state import FIRST, EncoderState, marked, megabytes, state_of, summary
from lib_dinotile.settings import AUTOMATIC, NONE, Settings
from lib_dinotile.webui import folders

SCALE = 2.0
"""That is calibrated for: the default option's."""
PAUSE = 0.5
"""Seconds between two looks at how far it is."""


PAIRS = isinstance(gr.Dropdown(["a"], render=False).choices[0], tuple)
"""Whether a list of this gradio can show other words than its values, as from 4 on."""


def listed() -> dict[str, Any]:
    """What the list of encoders shows of them: what is installed, and how large the others are to download.

    Values stay plain names. A page is built without the marks: the WebUI looks for the user's default among the words.
    """
    folder, option = folders.encoders(), Settings.option("encoder")
    names = encoders(folder)
    if PAIRS:
        return {"choices": [(AUTOMATIC, AUTOMATIC), *((marked(name, folder), name) for name in names)]}
    return {"choices": [AUTOMATIC, *names], "info": f"{option.help} {summary(folder)}"}


class Stopped(Exception):
    """The user has stopped it."""


class Job:
    """One piece of work for all pages: it runs in a thread of its own, and they look how far it is."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.text, self.share = "", 0.0
        self.failure = ""
        """Why the last one failed, in a line."""

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[Progress], None]) -> None:
        """Unless one is under way."""
        if self.running:
            return
        self._stop.clear()
        self.text, self.share, self.failure = "", 0.0, ""
        self._thread = threading.Thread(target=self._run, args=(work,), name="dinotile-first-minute", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def progress(self, text: str, share: float) -> None:
        """Stopped, if the user has stopped it."""
        if self._stop.is_set():
            raise Stopped
        self.text, self.share = text, share

    def _run(self, work: Callable[[Progress], None]) -> None:
        try:
            work(self.progress)
        except Stopped:
            pass
        except DinotileError as error:
            self.failure = str(error)
        except Exception as error:
            errors.report("DINO Tile: the encoder could not be prepared", exc_info=True)
            self.failure = f"the encoder could not be prepared: {one_line(error)}"

    @property
    def stopping(self) -> bool:
        return self.running and self._stop.is_set()


job = Job()
"""There is one for the whole WebUI."""


def get_ready(name: str, progress: Progress) -> None:
    """Downloads an encoder if it is not there, and calibrates it. DinotileError if that fails."""
    folder = folders.encoders()
    if name not in installed(folder):
        install(name, folder, progress)
    while not call_queue.queue_lock.acquire(blocking=False):
        progress("waiting for the current generation to finish", 0.0)
        time.sleep(PAUSE)
    try:
        device = torch.device(devices.device)
        dtype = encoder_dtype(device, devices.dtype)
        encoder = load_encoder(name, folder, device=device, dtype=dtype, download=False)
        store = folders.calibrated_heads(progress)
        store.heads(encoder, SCALE)
        if store.kept(encoder, SCALE) is None:
            raise DinotileError("; ".join(store.notes))
    finally:
        call_queue.queue_lock.release()


def current(encoder: str, adapter: str) -> EncoderState:
    """Of the encoder that these options choose."""
    folder = folders.encoders()
    if encoder == AUTOMATIC and adapter != NONE:
        with contextlib.suppress(DinotileError, KeyError):  # said when it is used
            encoder = read_config(installed_weights(folders.adapters())[adapter]).encoder
    name = automatic_encoder(folder) if encoder == AUTOMATIC else encoder
    return state_of(name, folder, folders.calibrated_heads())


def offered(state: EncoderState, encoder: str) -> tuple[str, str, str]:
    """(line, words on the button or none, encoder that it gets ready); encoder: the option's value."""
    if state.name == BUILT_IN and encoder == AUTOMATIC:
        line = "No DINOv2 is installed: the small built-in encoder looks at your image, and it sees much less."
        return line, _download(FIRST), FIRST
    if state.missing:
        return f"{state.missing[0].upper()}{state.missing[1:]}.", "", state.name
    line = f"Looks at your image: {state.line}."
    if not state.installed:
        return line, _download(state.name), state.name
    return line, "" if state.calibrated else "Calibrate now", state.name


def _download(name: str) -> str:
    return f"Download {name.split('/')[-1]} ({megabytes(name)} MB)"


def start(encoder: str, adapter: str) -> Iterator[list[Any]]:
    """Gets ready what is offered; shows how far it is."""
    name = offered(current(encoder, adapter), encoder)[2]
    job.start(functools.partial(get_ready, name))
    yield from follow(encoder, adapter, started=True)


def follow(encoder: str, adapter: str, started: bool = False) -> Iterator[list[Any]]:
    """Updates of line, button, Stop and list of encoders: the progress, and at last the encoder in use."""
    while job.running:
        started = True
        yield [gr.update(value=_bar(job)), gr.update(visible=False), gr.update(visible=not job.stopping), gr.update()]
        time.sleep(PAUSE)
    line, words, _ = offered(current(encoder, adapter), encoder)
    shown = f"<p>{html.escape(line)}</p>"
    if started and job.failure:
        shown = f"<div class='error'>{html.escape(job.failure)}</div>{shown}"
    button = gr.update(value=words or "Calibrate now", visible=bool(words))
    yield [gr.update(value=shown), button, gr.update(visible=False), gr.update(**listed())]


def _bar(job: Job) -> str:
    text = "stopping" if job.stopping else job.text or "getting ready"
    text = text[0].upper() + text[1:]
    return f"<p>{html.escape(text)}</p><progress value='{job.share:.3f}'></progress>"


def _stop() -> Any:
    job.stop()
    return gr.update(visible=False)


def add(prefix: str) -> tuple[Any, Any, Any]:
    """Line, button and Stop, where the page is now; prefix: of their ids."""
    line = gr.HTML(elem_id=f"{prefix}encoder_line")
    button = gr.Button("Calibrate now", size="sm", variant="primary", visible=False, elem_id=f"{prefix}get_ready")
    stop = gr.Button("Stop", size="sm", visible=False, elem_id=f"{prefix}stop")
    return line, button, stop


def connect(line: Any, button: Any, stop: Any, components: Mapping[str, Any]) -> None:
    """components: the options' controls, by name."""
    wiring = {
        "inputs": [components["encoder"], components["adapter"]],
        "outputs": [line, button, stop, components["encoder"]],
        "show_progress": False,
    }
    # By default gradio 4 lets one page wait for the other. (Forge hides what the events themselves take.)
    if "default_concurrency_limit" in inspect.signature(gr.Blocks.queue).parameters:
        wiring["concurrency_limit"] = None
    button.click(fn=_shown(start), **wiring)
    stop.click(fn=_stop, inputs=[], outputs=[stop], show_progress=False)
    for name in ("encoder", "adapter"):
        components[name].change(fn=_shown(follow), **wiring)
    Context.root_block.load(fn=_shown(follow), **wiring)


def _shown(steps: Callable[[str, str], Iterator[list[Any]]]) -> Callable[[str, str], Any]:
    """As gradio takes it: without its queue it shows only what comes last."""
    if not getattr(shared.cmd_opts, "no_gradio_queue", False):
        return steps
    return lambda encoder, adapter: collections.deque(steps(encoder, adapter), maxlen=1)[0]
