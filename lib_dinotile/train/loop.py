"""One training loop: accelerate, EMA, cosine rate, checkpoints that resume at the very next step."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from lib_dinotile.engine.team import GRACE

Loss = Callable[[nn.Module, Any, torch.Generator], tuple[Tensor, dict[str, float]]]
"""(model, batch, generator of this step) -> loss to descend, figures to log."""
Report = Callable[[nn.Module, int], tuple[Mapping[str, float], Mapping[str, np.ndarray]]]
"""(model, step) -> figures and pictures (H, W, 3) uint8 to log."""


@dataclass
class Schedule:
    """How long, how fast, how often."""

    out: Path
    """Folder of the checkpoint (`checkpoint/`) and of the logs (`log.jsonl`, `tensorboard/`)."""

    steps: int
    """Training stops there."""

    schedule_steps: int | None = None
    """End of the cosine; None: where training stops."""

    minutes: float = float("inf")
    """Training also stops, with a checkpoint, after this much time."""

    batch: int = 16
    """Of one process."""

    accumulate: int = 1
    """Batches whose gradients make one step."""

    rate: float = 4e-4
    warmup: int = 150
    decay: float = 0.999
    """EMA decay per step, reached gradually."""

    save_every: float = 180.0
    """Seconds between checkpoints."""

    log_every: int = 20

    report_every: int = 500
    """Steps between reports."""

    seed: int = 0
    precision: str = "bf16"
    resume: bool = False

    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Everything that must be the same when a run is resumed, for JSON."""


class CheckpointError(Exception):
    """There is no checkpoint to go on from; says why in one line."""


class _Items(torch.utils.data.Sampler[int]):
    """Items first, first + 1, ... last - 1, wrapped to the dataset's length: a resumed run goes on where it stopped."""

    def __init__(self, first: int, last: int, length: int) -> None:
        self.first, self.last, self.length = first, last, length

    def __iter__(self) -> Iterator[int]:
        return (i % self.length for i in range(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def fit(
    model: nn.Module,
    dataset: torch.utils.data.Dataset,
    loss: Loss,
    schedule: Schedule,
    on_save: Callable[[nn.Module, int], None] | None = None,
    report: Report | None = None,
) -> None:
    """Train `model` in place. Seed torch before making the model.

    With accelerate's launcher the processes share out the batches: a step sees as many more. `on_save(model, step)` is
    called after each checkpoint and `report` every so often, in the first process, the model holding the averaged
    parameters meanwhile. A run that is cancelled finishes its step, saves a checkpoint and raises KeyboardInterrupt.
    CheckpointError: none to resume; OSError: it cannot be written; FloatingPointError: the loss is no number.
    """
    folder = check_resume(schedule)
    accelerator = Accelerator(
        mixed_precision=schedule.precision,
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=schedule.accumulate,
        log_with="tensorboard",
        project_dir=schedule.out,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    rates = get_cosine_schedule_with_warmup(optimizer, schedule.warmup, schedule.schedule_steps or schedule.steps)
    ema = EMAModel(model.parameters(), decay=schedule.decay, use_ema_warmup=True, power=0.75)
    model = model.to(memory_format=torch.channels_last)  # far faster on a CPU
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(rates, ema)
    first = 0
    schedule.out.mkdir(parents=True, exist_ok=True)
    if folder is not None:
        accelerator.load_state(str(folder))
        accelerator.step = 0  # checkpoints are made between steps, whatever has become of `accumulate`
        first = _told(folder)["step"]
        accelerator.wait_for_everyone()
        if folder.name == "checkpoint-new" and accelerator.is_main_process:
            _put(folder, schedule.out)  # else the next one would be written over it
    ema.to(accelerator.device)  # what was loaded is on the CPU
    accelerator.init_trackers("tensorboard")
    count, rank = accelerator.num_processes, accelerator.process_index

    @contextlib.contextmanager
    def averaged() -> Iterator[nn.Module]:
        plain = accelerator.unwrap_model(model)
        ema.store(plain.parameters())
        ema.copy_to(plain.parameters())
        try:
            yield plain.eval()
        finally:
            ema.restore(plain.parameters())

    def save(step: int) -> None:
        new = schedule.out / "checkpoint-new"
        try:
            if rank == 0:
                shutil.rmtree(new, ignore_errors=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(new))
            accelerator.wait_for_everyone()
            if rank == 0:
                state = {"step": step, "recipe": schedule.recipe}
                (new / "step.json").write_text(json.dumps(state))  # last: what has it is whole
                _put(new, schedule.out)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError
            shutil.rmtree(new, ignore_errors=True)
            raise OSError(str(error).splitlines()[0]) from error
        if rank == 0 and on_save is not None:
            with averaged() as plain:
                on_save(plain, step)
        accelerator.wait_for_everyone()

    def agreed(wish: bool) -> bool:
        """The first process's decision: clocks differ."""
        return broadcast_object_list([wish])[0] if count > 1 else wish

    each = schedule.batch * schedule.accumulate * count
    sampler = _Items(first * each, schedule.steps * each, len(dataset))
    loader = accelerator.prepare(torch.utils.data.DataLoader(dataset, schedule.batch, sampler=sampler, drop_last=True))
    start = saved = time.monotonic()
    step, recent, fresh = first, [], []
    bar = tqdm(total=schedule.steps, initial=first, mininterval=10, disable=None if rank == 0 else True)
    with bar, (schedule.out / "log.jsonl").open("a") as log, _cancelling() as cancelled:
        for number, batch in enumerate(loader, first * schedule.accumulate):
            model.train()
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    value, figures = loss(model, batch, step_generator(schedule.seed, number * count + rank))
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            fresh.append(value.detach())
            if not accelerator.sync_gradients:
                continue
            rates.step()
            ema.step(model.parameters())
            step += 1
            bar.update()
            recent.append(torch.stack(fresh).float().mean().item())
            fresh.clear()
            if not math.isfinite(recent[-1]):
                raise FloatingPointError(f"the loss is not a number at step {step}")
            if (step % schedule.log_every == 0 or step == schedule.steps) and rank == 0:
                line = {"step": step, "loss": sum(recent) / len(recent), "rate": rates.get_last_lr()[0], **figures}
                log.write(json.dumps({**line, "seconds": round(time.monotonic() - start, 1)}) + "\n")
                log.flush()
                accelerator.log({f"train/{name}": value for name, value in line.items() if name != "step"}, step)
                recent.clear()
            if report is not None and rank == 0 and (step % schedule.report_every == 0 or step == schedule.steps):
                with averaged() as plain, torch.no_grad():
                    found, pictures = report(plain, step)
                log.write(json.dumps({"step": step, **found}) + "\n")
                bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
                accelerator.log({f"held out/{name}": value for name, value in found.items()}, step)
                shown = {name: picture[None] for name, picture in pictures.items()}
                accelerator.get_tracker("tensorboard").log_images(shown, step, dataformats="NHWC")
            now = time.monotonic()
            if agreed(bool(cancelled)):
                save(step)
                raise KeyboardInterrupt
            if agreed(now - start > 60 * schedule.minutes):
                break
            if agreed(now - saved > schedule.save_every) and step < schedule.steps:
                save(step)
                saved = time.monotonic()
    save(step)
    if accelerator.num_processes > 1:
        time.sleep(GRACE)
    accelerator.end_training()


@contextlib.contextmanager
def _cancelling() -> Iterator[list[int]]:
    """While open, the first Ctrl+C only fills the list; the next breaks off at once."""
    wanted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield wanted
        return

    def cancel(number: int, frame: Any) -> None:
        if wanted:
            signal.default_int_handler(number, frame)
        wanted.append(number)

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield wanted
    finally:
        signal.signal(signal.SIGINT, before)


def _put(new: Path, out: Path) -> None:
    """The new checkpoint in the place of the old one; whenever it is killed, a whole one is left."""
    folder, old = out / "checkpoint", out / "checkpoint-old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "step.json").read_text())


def last_checkpoint(out: Path) -> Path | None:
    """The folder of the last whole checkpoint, if there is any."""
    names = ("checkpoint", "checkpoint-new", "checkpoint-old")  # the others where a run was killed between two moves
    return next((out / name for name in names if (out / name / "step.json").is_file()), None)


def check_resume(schedule: Schedule) -> Path | None:
    """The checkpoint to go on from, if that is asked for. CheckpointError if there is none, or another recipe's."""
    if not schedule.resume:
        return None
    folder = last_checkpoint(schedule.out)
    if folder is None:
        raise CheckpointError(f"nothing to resume in {schedule.out}; leave out --resume to begin")
    recipe = json.loads(json.dumps(schedule.recipe))
    before = _told(folder).get("recipe", {})
    odd = sorted(name for name in recipe.keys() | before.keys() if recipe.get(name) != before.get(name))
    if odd:
        then, now = before.get(odd[0]), recipe.get(odd[0])
        raise CheckpointError(f"{odd[0]}: the checkpoint in {schedule.out} is of a run with {then}, not {now}")
    return folder
