"""The table of options of `python -m lib_dinotile train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lib_dinotile.options import Options, option
from lib_dinotile.settings import AUTOMATIC, PREDICTIONS

DEFAULT_ENCODER = "facebook/dinov2-small"
PRECISIONS = ("bf16", "fp16", "no")


@dataclass(frozen=True)
class Training(Options):
    """How an adapter, or a restoration head, is trained."""

    base: str = option(
        "", "Base", "Checkpoint that the adapter is for: a file, a diffusers folder, a Hugging Face id, or mini."
    )
    config: str = option(
        "", "Configuration", "Folder with the diffusers configuration for a checkpoint file; empty: from the Hub."
    )
    prediction: str = option(
        AUTOMATIC,
        "Prediction",
        "What the checkpoint's UNet predicts. Automatic: what the file or its configuration says, else epsilon.",
        choices=PREDICTIONS,
    )
    encoder: str = option(
        AUTOMATIC,
        "DINO encoder",
        f"Looks at the source: an id, a folder, or mini. Automatic: mini for the base mini, else {DEFAULT_ENCODER}.",
        flag="dino",
    )
    layer: int = option(
        1, "Layer", "Of the encoder, that the adapter reads; counted from the end.", minimum=1, maximum=40, step=1
    )
    patches: int = option(
        64, "DINO patches", "Patches along a picture's longer side, as in use.", minimum=8, maximum=256, step=1
    )
    tile: int = option(
        0, "Tile size", "Side of a tile in pixels; 0: 512, 1024 for SDXL, 64 for mini.", minimum=0, maximum=2048, step=8
    )
    longest: int = option(
        2048,
        "Longest side",
        "Larger pictures are shrunk to this many pixels, but no side below a tile.",
        minimum=64,
        maximum=16384,
        step=1,
    )
    variants: int = option(
        2, "Variants", "Ways in which each picture is cropped, mirrored and degraded.", minimum=1, maximum=1000, step=1
    )
    scale_low: float = option(1.5, "Least scale", "Sources are at least so much smaller.", minimum=1.0, maximum=16.0)
    scale_high: float = option(4.0, "Greatest scale", "And at most so much.", minimum=1.0, maximum=16.0)
    severity: float = option(
        0.5, "Severity", "Of blur, noise and JPEG: 0 is none, 1 is Real-ESRGAN's.", minimum=0.0, maximum=1.0
    )
    denoise_low: float = option(0.2, "Least denoising strength", "That it is to be good at.", minimum=0.01, maximum=1.0)
    denoise_high: float = option(
        0.6, "Greatest denoising strength", "That it is to be good at.", minimum=0.01, maximum=1.0
    )
    restoration: float = option(
        0.5,
        "Restoration",
        "Share of the tiles that come from the degraded picture, as img2img's do; the others are sharp ones.",
        minimum=0.0,
        maximum=1.0,
    )
    drop_prompt: float = option(
        0.3, "Prompts dropped", "Share of the tiles that are trained with an empty prompt.", minimum=0.0, maximum=1.0
    )
    drop_condition: float = option(
        0.05, "Conditions dropped", "Share of the tiles whose features are zeros.", minimum=0.0, maximum=1.0
    )
    width: int = option(256, "Width", "Channels of the adapter's maps.", minimum=8, maximum=2048, step=8)
    blocks: int = option(2, "Blocks", "Residual blocks of its multi-scale part.", minimum=0, maximum=32, step=1)
    hidden: int = option(256, "Hidden width", "Of the restoration head.", minimum=8, maximum=8192, step=1)
    steps: int = option(20000, "Steps", "Trained up to this step.", minimum=1, maximum=10_000_000, step=1)
    batch: int = option(4, "Batch", "Tiles at once, in each process.", minimum=1, maximum=4096, step=1)
    accumulate: int = option(4, "Accumulate", "Batches that make one step.", minimum=1, maximum=4096, step=1)
    rate: float = option(2e-4, "Learning rate", "The highest; it falls as a cosine.", minimum=1e-7, maximum=1.0)
    warmup: int = option(
        200,
        "Warm-up",
        "Steps until it is that high, but at most a tenth of all.",
        minimum=0,
        maximum=1_000_000,
        step=1,
    )
    gamma: float = option(
        5.0, "Min-SNR gamma", "Bounds the weight of steps with little noise.", minimum=0.1, maximum=1000.0
    )
    decay: float = option(0.999, "EMA decay", "Of the averaged weights, per step.", minimum=0.0, maximum=0.99999)
    precision: str = option("bf16", "Precision", "Of the frozen checkpoint and of autocast.", choices=PRECISIONS)
    checkpointing: bool = option(False, "Gradient checkpointing", "Computes parts of the UNet twice, to spare memory.")
    held_out: int = option(
        16, "Held out", "Pictures that are not trained on, to measure on.", minimum=2, maximum=10_000, step=1
    )
    report_every: int = option(
        500, "Report every", "Steps between measurements and sample tiles.", minimum=1, maximum=1_000_000, step=1
    )
    save_every: float = option(10.0, "Save every", "Minutes between checkpoints.", minimum=0.0, maximum=1440.0)
    seed: int = option(0, "Seed", "Of everything that is drawn at random.", minimum=0, maximum=2**31 - 1)
    cache: str = option("", "Cache", "Folder for latents and features; empty: beside OUT, with .cache in its name.")

    def conflicts(self, called: Callable[[str], str] = str) -> Iterator[tuple[tuple[str, ...], str]]:
        if 0 < self.tile < 64:
            yield ("tile",), f"{called('tile')}: {self.tile} is not allowed, give 0 or at least 64"
        for low, high in (("scale_low", "scale_high"), ("denoise_low", "denoise_high")):
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                beside = f"{called(high)} {most:g}"
                yield (low, high), f"{called(low)}: {least:g} is not allowed with {beside}, give at most {most:g}"
