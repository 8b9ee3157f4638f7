"""Two judges, which nothing else uses, name the texture of each patch of a picture; and a check on the world.

The first judge is a small network, trained on an atlas and seeds of its own; it knows smooth patches and bad ones. The
second has no network: power spectra of 32-px windows and Gaussians of one covariance (linear discriminant analysis).
The classifier of windows says how much `WINDOW` px of the blurred picture tell of a patch, and no more.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.world import WEIGHTS
from benchmarks.world.scenes import NO_LABEL, PATCH, TEXTURE, Scene
from benchmarks.world.textures import CLASSES, LOWEST

NONE, GARBAGE = CLASSES, CLASSES + 1
"""No texture; noise, mixtures of textures, overshot contrast, what an undertrained denoiser draws."""
WINDOW = 2 * PATCH
"""Side of what the spectral judge and the classifier look at around the middle of each patch, in px."""


def read_tensors(name: str) -> dict[str, Tensor]:
    """The weights in that file, in float32."""
    return {key: tensor.float() for key, tensor in load_file(WEIGHTS / f"{name}.safetensors").items()}


class _Trained(nn.Sequential):
    """A network with its weights."""

    def __init__(self, name: str, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.load_state_dict(read_tensors(name))
        self.eval().requires_grad_(False)


class Judge(_Trained):
    """(n, 3, H, W) in 0..1 -> logits (n, CLASSES + 2, H / 16, W / 16); sees a patch and 6 px around it."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        widths, sides, strides = (3, 24, 48, 48, 96, 128, 128), (3, 3, 3, 3, 3, 2), (1, 2, 1, 2, 2, 2)
        for before, after, side, stride in zip(widths, widths[1:], sides, strides):
            layers += [nn.Conv2d(before, after, side, stride, int(side == 3)), nn.GELU()]
        super().__init__("judge", *layers, nn.Conv2d(128, CLASSES + 2, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels * 4 - 2)

    @torch.no_grad()
    def verdict(self, pixels: Tensor) -> np.ndarray:
        """(3, H, W) in 0..1 -> (H / 16, W / 16) int64: a class, NONE or GARBAGE."""
        return self(pixels[None]).argmax(1)[0].numpy()


class WindowClassifier(_Trained):
    """(n, 3, WINDOW, WINDOW) in 0..1 -> logits (n, CLASSES)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.AvgPool2d(2)]  # a blurred picture has nothing finer
        for before, after, stride in ((3, 48, 1), (48, 64, 1), (64, 96, 2), (96, 128, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GELU()]
        last = nn.Linear(128 * 16, 128), nn.GELU(), nn.Linear(128, CLASSES)
        super().__init__("windows", *layers, nn.Flatten(), *last)

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward((pixels - pixels.mean((2, 3), keepdim=True)) * 8)


def windows(made: Scene) -> tuple[Tensor, Tensor]:
    """The blurred picture around all patches that have a label, (n, 3, WINDOW, WINDOW), and those (n,)."""
    pixels = F.pad(made.blurred[None], ((WINDOW - PATCH) // 2,) * 4, mode="reflect")[0]
    found = pixels.unfold(1, WINDOW, PATCH).unfold(2, WINDOW, PATCH).permute(1, 2, 0, 3, 4).flatten(0, 1)
    labels = torch.from_numpy(made.labels).flatten()
    return found[labels != NO_LABEL], labels[labels != NO_LABEL]


def _spectra(pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(3, H, W) in 0..1 -> features (n, F) and contrast (n,), of all patches, rows first.

    Features: the logarithm of the power of the luminance, in cells of 2 x 2 frequencies above `LOWEST`, as shares of
    the whole. Contrast: the deviation of what is above `LOWEST`, 0..1.
    """
    grey = pixels.mean(0).numpy()
    margin = (WINDOW - PATCH) // 2
    grey = np.pad(grey, margin, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(grey, (WINDOW, WINDOW))[::PATCH, ::PATCH].reshape(
        -1, WINDOW, WINDOW
    )
    hann = np.hanning(WINDOW + 2)[1:-1]
    taper = hann[:, None] * hann
    mean = (windows * taper).sum((1, 2), keepdims=True) / taper.sum()
    power = np.abs(np.fft.rfft2((windows - mean) * taper)) ** 2
    fy, fx = np.abs(np.fft.fftfreq(WINDOW))[:, None], np.fft.rfftfreq(WINDOW)
    power = power * (np.maximum(fy, fx) > LOWEST)
    # Rows in the order of their frequency, without the highest column, so that cells of 2 x 2 fit.
    power = np.fft.fftshift(power, axes=1)[:, :, :-1]
    cells = power.reshape(len(power), WINDOW // 2, 2, WINDOW // 4, 2).sum((2, 4)).reshape(len(power), -1)
    total = cells.sum(1, keepdims=True)
    contrast = np.sqrt(2 * total[:, 0] / (taper**2).sum()) / WINDOW
    return np.log(cells / np.maximum(total, 1e-12) + 1e-3), contrast


class SpectralJudge:
    """Names the texture of each patch by linear discriminants of its spectrum."""

    def __init__(self) -> None:
        tensors = read_tensors("spectral")
        self.means, self.weights, self.offsets = (tensors[name].numpy() for name in ("means", "weights", "offsets"))

    def verdict(self, pixels: Tensor) -> np.ndarray:
        """(3, H, W) in 0..1 -> (H / 16, W / 16) int64: a class, or NONE with less than a quarter of the contrast."""
        features, contrast = _spectra(pixels)
        named = ((features - self.means) @ self.weights.T + self.offsets).argmax(1)
        grid = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
        return np.where(contrast < TEXTURE / 4, NONE, named).reshape(grid)
