"""The second judge: power spectra of 32-px windows and Gaussians of one covariance (LDA), no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.world.scenes import JUDGE_ATLAS, NO_LABEL, PATCH, TEXTURE, scene
from benchmarks.world.textures import CLASSES, LOWEST

WINDOW = 2 * PATCH
"""Side of what is looked at around the middle of each patch, in px."""

NONE = CLASSES
"""The verdict on a window with less than a quarter of the usual contrast."""


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
    """Names the texture of each patch."""

    def __init__(self, means: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> None:
        """means (F,): of all features; weights (CLASSES, F), offsets (CLASSES,): of the discriminants."""
        self.means, self.weights, self.offsets = means, weights, offsets

    def verdict(self, pixels: Tensor) -> np.ndarray:
        """(3, H, W) in 0..1 -> (H / 16, W / 16) int64: a class or NONE."""
        features, contrast = _spectra(pixels)
        named = ((features - self.means) @ self.weights.T + self.offsets).argmax(1)
        grid = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
        return np.where(contrast < TEXTURE / 4, NONE, named).reshape(grid)

    def save(self, folder: Path) -> None:
        tensors = {
            name: torch.from_numpy(getattr(self, name)).half().contiguous() for name in ("means", "weights", "offsets")
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "spectral.safetensors")

    @classmethod
    def load(cls, folder: Path) -> SpectralJudge:
        tensors = load_file(folder / "spectral.safetensors")
        return cls(*(tensors[name].float().numpy() for name in ("means", "weights", "offsets")))


def fit_spectral(export: Path, scenes: int = 150, seed: int = 6) -> None:
    """Linear discriminant analysis on pictures of the judges' atlas."""
    features, labels = [], []
    for i in range(scenes):
        made = scene(np.random.default_rng((seed, i, 6)), JUDGE_ATLAS)
        label = made.labels.flatten()
        features.append(_spectra(made.sharp)[0][label != NO_LABEL])
        labels.append(label[label != NO_LABEL])
    x, y = np.concatenate(features), np.concatenate(labels)
    middle = x.mean(0)
    means = np.stack([x[y == label].mean(0) for label in range(CLASSES)]) - middle
    rest = x - middle - means[y]
    covariance = rest.T @ rest / len(rest)
    covariance += 0.02 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weights = np.linalg.solve(covariance, means.T).T
    SpectralJudge(middle, weights, -0.5 * (weights * means).sum(1)).save(export)
