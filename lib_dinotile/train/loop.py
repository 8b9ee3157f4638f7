"""One training loop: accelerate, EMA, cosine rate, checkpoints that resume at the very next step."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

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


class _Endless(torch.utils.data.Sampler[int]):
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
) -> EMAModel:
    """Train `model` in place; returns the moving average of its parameters. Seed torch before making the model.

    With accelerate's launcher the processes share out the batches: a step sees as many more. `on_save(model, step)` is
    called after each checkpoint and `report` every so often, in the first process, the model holding the averaged
    parameters meanwhile. Raises FileNotFoundError if told to resume without a checkpoint, FloatingPointError where the
    loss is not a number. A run that is cancelled saves a checkpoint.
    """
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
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(rates, ema)
    first = 0
    schedule.out.mkdir(parents=True, exist_ok=True)
    if schedule.resume:
        folder = _checkpoint(schedule.out)
        accelerator.load_state(str(folder))
        first = json.loads((folder / "step.json").read_text())["step"]
    accelerator.init_trackers("tensorboard")

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
        new, folder = schedule.out / "checkpoint-new", schedule.out / "checkpoint"
        accelerator.save_state(str(new))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (new / "step.json").write_text(json.dumps({"step": step}))  # last: what has it is whole
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
            if on_save is not None:
                with averaged() as plain:
                    on_save(plain, step)
        accelerator.wait_for_everyone()

    def agreed(wish: bool) -> bool:
        """What the first process wishes: clocks differ."""
        return broadcast_object_list([wish])[0] if accelerator.num_processes > 1 else wish

    count, rank = accelerator.num_processes, accelerator.process_index
    each = schedule.batch * schedule.accumulate * count
    sampler = _Endless(first * each, schedule.steps * each, len(dataset))
    loader = accelerator.prepare(torch.utils.data.DataLoader(dataset, schedule.batch, sampler=sampler, drop_last=True))
    start = saved = time.monotonic()
    step, recent = first, []

    @contextlib.contextmanager
    def kept_if_cancelled() -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if count == 1:  # the others may be anywhere
                save(step)
            raise

    bar = tqdm(total=schedule.steps, initial=first, mininterval=10, disable=None if rank == 0 else True)
    with bar, (schedule.out / "log.jsonl").open("a") as log, kept_if_cancelled():
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
            recent.append(value.item())
            if not math.isfinite(recent[-1]):
                raise FloatingPointError(f"the loss is not a number at step {step + 1}")
            if not accelerator.sync_gradients:
                continue
            rates.step()
            ema.step(model.parameters())
            step += 1
            bar.update()
            if step % schedule.log_every == 0 and rank == 0:
                line = {"step": step, "loss": sum(recent) / len(recent), "rate": rates.get_last_lr()[0], **figures}
                log.write(json.dumps({**line, "seconds": round(time.monotonic() - start, 1)}) + "\n")
                log.flush()
                accelerator.log({f"train/{name}": value for name, value in line.items() if name != "step"}, step)
                recent = []
            if report is not None and rank == 0 and (step % schedule.report_every == 0 or step == schedule.steps):
                with averaged() as plain, torch.no_grad():
                    found, pictures = report(plain, step)
                log.write(json.dumps({"step": step, **found}) + "\n")
                accelerator.log({f"held out/{name}": value for name, value in found.items()}, step)
                tracker = accelerator.get_tracker("tensorboard")
                tracker.log_images(
                    {name: picture[None] for name, picture in pictures.items()}, step, dataformats="NHWC"
                )
            now = time.monotonic()
            if agreed(now - start > 60 * schedule.minutes):
                break
            if agreed(now - saved > schedule.save_every) and step < schedule.steps:
                save(step)
                saved = time.monotonic()
    save(step)
    accelerator.end_training()
    return ema


def _checkpoint(out: Path) -> Path:
    """The folder of the last whole checkpoint."""
    for name in ("checkpoint", "checkpoint-new"):  # the second where a run was killed between two moves
        if (out / name / "step.json").is_file():
            return out / name
    raise FileNotFoundError(f"nothing to resume in {out / 'checkpoint'}; leave out --resume to begin")
