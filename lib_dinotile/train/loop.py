"""One training loop: accelerate, EMA, cosine rate, checkpoints that resume at the very next step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

Loss = Callable[[nn.Module, Any, torch.Generator], tuple[Tensor, dict[str, float]]]
"""(model, batch, generator of this step) -> loss to descend, figures to log."""


@dataclass
class Schedule:
    """How long, how fast, how often."""

    out: Path
    """Folder of checkpoints (`checkpoint/`) and of the log (`log.jsonl`)."""

    steps: int
    """Training stops there."""

    schedule_steps: int | None = None
    """End of the cosine; None: where training stops."""

    minutes: float = float("inf")
    """Training also stops, with a checkpoint, after this much time."""

    batch: int = 16
    rate: float = 4e-4
    warmup: int = 150
    decay: float = 0.999
    """EMA decay per step, reached gradually."""

    save_every: float = 180.0
    """Seconds between checkpoints."""

    log_every: int = 20
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
) -> EMAModel:
    """Train `model` in place; returns the moving average of its parameters. Seed torch before making the model.

    `on_save(model, step)` is called after each checkpoint, the model holding the averaged parameters meanwhile.
    Raises FileNotFoundError if told to resume without a checkpoint.
    """
    accelerator = Accelerator(mixed_precision=schedule.precision, cpu=not torch.cuda.is_available())
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    rates = get_cosine_schedule_with_warmup(optimizer, schedule.warmup, schedule.schedule_steps or schedule.steps)
    ema = EMAModel(model.parameters(), decay=schedule.decay, use_ema_warmup=True, power=0.75)
    model = model.to(memory_format=torch.channels_last)  # far faster on a CPU
    model, optimizer = accelerator.prepare(model, optimizer)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(rates, ema)
    folder, first = schedule.out / "checkpoint", 0
    schedule.out.mkdir(parents=True, exist_ok=True)
    if schedule.resume:
        if not folder.is_dir():
            raise FileNotFoundError(f"nothing to resume in {folder}; leave out --resume to begin")
        accelerator.load_state(str(folder))
        first = json.loads((folder / "step.json").read_text())["step"]

    def save(step: int) -> None:
        accelerator.save_state(str(folder))
        (folder / "step.json").write_text(json.dumps({"step": step}))
        if on_save is not None:
            plain = accelerator.unwrap_model(model)
            ema.store(plain.parameters())
            ema.copy_to(plain.parameters())
            on_save(plain, step)
            ema.restore(plain.parameters())

    sampler = _Endless(first * schedule.batch, schedule.steps * schedule.batch, len(dataset))
    loader = torch.utils.data.DataLoader(dataset, schedule.batch, sampler=sampler, drop_last=True)
    start = saved = time.monotonic()
    step, recent = first, []
    with (schedule.out / "log.jsonl").open("a") as log:
        for batch in tqdm(loader, initial=first, total=schedule.steps, mininterval=10, disable=None):
            model.train()
            with accelerator.autocast():
                value, figures = loss(model, batch, step_generator(schedule.seed, step))
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(model.parameters())
            step += 1
            recent.append(value.item())
            if step % schedule.log_every == 0:
                line = {"step": step, "loss": sum(recent) / len(recent), "rate": rates.get_last_lr()[0], **figures}
                log.write(json.dumps({**line, "seconds": round(time.monotonic() - start, 1)}) + "\n")
                log.flush()
                recent = []
            now = time.monotonic()
            if now - start > 60 * schedule.minutes:
                break
            if now - saved > schedule.save_every:
                save(step)
                saved = time.monotonic()
    save(step)
    return ema
