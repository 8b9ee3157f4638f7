"""Sharp photographs for training, read from installed packages, and what a blurred source makes of them.

`PHOTOS` says which package ships a photograph, and under which licence; some also lie in lib_dinotile/photos.
Arrays are RGB, (H, W, 3) uint8, unless a docstring says otherwise.
"""

from __future__ import annotations

import bz2
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tools.mini.textures import texture_atlas


@dataclass(frozen=True)
class Photo:
    """Where a photograph is installed, and what its licence allows."""

    path: str
    """Relative to a root: a site-packages folder, or / for a Debian package."""

    package: str
    licence: str
    shrink: float = 1.0
    """How many times smaller it has to be made for a pixel to be sharp."""

    weight: float = 1.0
    """How often it is drawn, against the others."""

    @property
    def name(self) -> str:
        """The file's; KDE's wallpapers are all called by their size, so with the folder's."""
        file = Path(self.path)
        return f"{file.parts[-4]}/{file.name}" if "contents" in file.parts else file.name


def _skimage(name: str, licence: str, shrink: float = 1.0, weight: float = 1.0) -> Photo:
    return Photo(f"skimage/data/{name}", "scikit-image", licence, shrink, weight)


def _lomiri(name: str, licence: str, shrink: float, weight: float = 1.0) -> Photo:
    return Photo(f"usr/share/backgrounds/{name}", "Debian lomiri-wallpapers-16.04", licence, shrink, weight)


def _mate(name: str, author: str, shrink: float, weight: float = 1.0) -> Photo:
    return Photo(
        f"usr/share/backgrounds/mate/nature/{name}", "Debian mate-backgrounds", f"GPL-2+ ({author})", shrink, weight
    )


def _plasma(name: str, author: str, shrink: float, weight: float = 1.0) -> Photo:
    """Debian's copyright file states GPL-2+ for the whole package, metadata.json beside each photograph LGPLv3."""
    path = f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
    licence = f"GPL-2+, LGPLv3 in its metadata.json ({author})"
    return Photo(path, "Debian plasma-workspace-wallpapers", licence, shrink, weight)


def _tuxpaint(name: str, shrink: float, weight: float = 1.0) -> Photo:
    return Photo(
        f"usr/share/tuxpaint/templates/{name}", "Debian tuxpaint-data", "GPL-2+ (Bill Kendrick)", shrink, weight
    )


def _avatar(name: str, author: str, weight: float = 1.5) -> Photo:
    path = f"usr/share/plasma/avatars/photos/{name}"
    return Photo(path, "Debian plasma-workspace-data", f"CC0 ({author})", weight=weight)


# Sources and licences: the docstrings of skimage.data and scipy.misc.face; sklearn/datasets/images/README.txt; the
# copyright files of the Debian packages, the metadata.json of plasma-workspace-wallpapers, AUTHORS of tuxpaint-data,
# the .license files of plasma-workspace-data.
PHOTOS: tuple[Photo, ...] = (
    _skimage("astronaut.png", "public domain (NASA)", weight=2),
    _skimage("rocket.jpg", "public domain (SpaceX)", 1.25),
    _skimage("retina.jpg", "CC0 (Mikael Häggström)", 2.0, 0.3),
    _skimage("hubble_deep_field.jpg", "public domain (NASA)", 1.25, 0.5),
    _skimage("brick.png", "CC0 (CC0Textures)", weight=0.7),
    _skimage("grass.png", "CC0 (linolafett)", weight=1.5),
    _skimage("gravel.png", "CC0 (CC0Textures)", weight=0.7),
    _skimage("camera.png", "CC0 (Lav Varshney)", weight=0.7),
    _skimage("coins.png", "no known restrictions (Brooklyn Museum)", weight=0.5),
    _skimage("text.png", "public domain", weight=0.3),
    _skimage("page.png", "public domain", weight=0.3),
    Photo("sklearn/datasets/images/china.jpg", "scikit-learn", "CC BY 2.0 (danielbuechele)", 1.25, 2),
    Photo("sklearn/datasets/images/flower.jpg", "scikit-learn", "CC BY 2.0 (vultilion)", 1.25, 0.7),
    Photo("scipy/misc/face.dat", "scipy<1.12", "public domain (public-domain-image.com)", 1.25, 4),
    _lomiri("aitzgorri_by_Aitzol_Berasategi.jpg", "CC BY 4.0 (Aitzol Berasategi)", 2.5),
    _lomiri("friends_by_Aitzol_Berasategi.jpg", "CC BY 4.0 (Aitzol Berasategi)", 2.0, 2),
    _lomiri("life_by_Aitzol_Berasategi.jpg", "CC BY 4.0 (Aitzol Berasategi)", 2.0, 2),
    _lomiri("picosdeeuropa_by_Aitzol_Berasategi.jpg", "CC BY 4.0 (Aitzol Berasategi)", 2.5),
    _lomiri("sunset_by_Aitzol_Berasategi.jpg", "CC BY 4.0 (Aitzol Berasategi)", 3.0),
    _lomiri("Picture_0B_by_freespace.jpg", "CC BY 4.0 (Trevor 'Freespace')", 2.0),
    _lomiri("Picture_1A_by_freespace.jpg", "CC BY 4.0 (Trevor 'Freespace')", 1.5, 1.5),
    _lomiri("seeding_by_Clements_Engelhardt.jpg", "CC0 (Clemens Engelhardt)", 4.0),
    _lomiri("Wine_by_Jakkub_Mede.jpg", "CC BY 4.0 (Jakub Mede)", 2.5),
    _lomiri("Bridge_by_Sander_Klootwijk.jpg", "CC BY-SA 4.0 (Sander Klootwijk)", 3.0, 0.4),
    Photo(
        "usr/share/backgrounds/Kleiber_by_Lukas_Baubkus.jpg",
        "Debian lomiri-wallpapers-20.04",
        "CC BY-SA 3.0 (Lukas Baubkus)",
        3.0,
    ),
    _lomiri("Dragonfly_by_Bolly.jpg", "CC BY-SA 4.0 (Bolly)", 2.5, 2),
    _lomiri("free_by_Peter_Nerlich.jpg", "CC BY-SA 4.0 (Peter Nerlich)", 3.0, 0.4),
    _lomiri("greentock_by_Peter_Nerlich.jpg", "CC BY-SA 4.0 (Peter Nerlich)", 3.0, 0.5),
    _mate("Aqua.jpg", "Charles Barbin", 3.0, 0.4),
    _mate("Blinds.jpg", "Lennart Poettering, Andrea Cimitan", 2.0, 0.4),
    _mate("Dune.jpg", "Marco Cogoni, Hylke Bons", 1.25, 1.5),
    _mate("Garden.jpg", "Charles Barbin", 3.0, 0.5),
    _mate("GreenMeadow.jpg", "Timothy Schellhase, Lapo Calamandrei", 1.25),
    _mate("LadyBird.jpg", "Charles Barbin", 3.0, 0.6),
    _mate("RainDrops.jpg", "blackcombwhistler07", 2.0),
    _mate("TwoWings.jpg", "Charles Barbin, Hylke Bons", 2.0, 0.6),
    _mate("Wood.jpg", "Jean-François Fortin Tam", 2.0, 0.5),
    _mate("YellowFlower.jpg", "Charles Barbin", 3.0, 0.6),
    _plasma("BytheWater", "Maciej Wiklo", 2.0, 0.6),
    _plasma("ColdRipple", "Risto Saukonpää", 1.5, 0.7),
    _plasma("ColorfulCups", "Dmitri Popov", 3.0, 0.5),
    _plasma("EveningGlow", "Ian Hex", 1.5, 2),
    _plasma("FallenLeaf", "Martin Klapetek", 2.5, 0.6),
    _plasma("Grey", "Sigi Sagi", 2.5, 0.6),
    _plasma("OneStandsOut", "Risto Saukonpää", 1.5, 2),
    _plasma("Path", "Risto Saukonpää", 1.5, 2),
    _tuxpaint("burnt_bark.jpg", 1.25),
    _tuxpaint("cliff.jpg", 1.25, 1.5),
    _tuxpaint("corn_maze.jpg", 1.25, 1.5),
    _tuxpaint("lighthouse.jpg", 1.25, 1.5),
    _tuxpaint("mossy_bark.jpg", 1.5, 0.7),
    _tuxpaint("mossy_log.jpg", 1.5, 0.7),
    _tuxpaint("mudstone.jpg", 1.5, 0.5),
    _tuxpaint("ocean_splash.jpg", 1.5),
    _tuxpaint("ocean_waves.jpg", 1.5, 0.7),
    _tuxpaint("redwoods_above.jpg", 1.5),
    _tuxpaint("rocks.jpg", 1.25, 1.5),
    _tuxpaint("sheep.jpg", 1.25, 0.7),
    _tuxpaint("sun_behind_leaves.jpg", 1.5, 0.6),
    _tuxpaint("trees_at_dusk.jpg", 1.25, 0.7),
    _tuxpaint("wool_mill_machine.jpg", 1.0, 3),
    _avatar("Air Balloon.png", "Skitterphoto", 1),
    _avatar("Astronaut.png", "Pixabay"),
    _avatar("Books.png", "Pixabay"),
    _avatar("Brushes.png", "Pixabay", 1),
    _avatar("Bulb.png", "Skitterphoto", 0.5),
    _avatar("Car.png", "Pixabay", 0.7),
    _avatar("Cat.png", "Skitterphoto"),
    _avatar("Cocktail.png", "Public Domain Pictures", 1),
    _avatar("Dog.png", "Snapwire"),
    _avatar("Fish.png", "Skitterphoto", 1),
    _avatar("Gamepad.png", "Pixabay", 1),
    _avatar("Owl.png", "Pixabay"),
    _avatar("Pancakes.png", "Skitterphoto"),
    _avatar("Parrot.png", "Skitterphoto"),
    _avatar("Pencils.png", "Public Domain Pictures"),
    _avatar("Shuttle.png", "Pixabay"),
    _avatar("Sushi.png", "Skitterphoto", 0.7),
)

HELD_OUT: tuple[Photo, ...] = (
    _skimage("chelsea.png", "CC0 (Stéfan van der Walt)"),
    _skimage("coffee.png", "CC0 (Rachel Michetti)"),
    Photo("matplotlib/mpl-data/sample_data/grace_hopper.jpg", "matplotlib", "public domain (United States Navy)"),
    _avatar("Chameleon.png", "Pixabay"),
    _avatar("Soccer.png", "Pixabay"),
    _avatar("Sunflower.png", "Snapwire"),
)
"""Never trained on."""


def package_roots(extra: Sequence[Path] = ()) -> list[Path]:
    """The folders that a `Photo.path` is looked up in: `extra` first, then site-packages, then /."""
    roots = [Path(root) for root in extra]
    for name in ("skimage", "sklearn", "scipy", "matplotlib"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            roots.append(Path(spec.origin).parents[1])
    return [*dict.fromkeys(roots), Path("/")]


def read_photo(photo: Photo, roots: Sequence[Path]) -> np.ndarray | None:
    """The photograph, shrunk until sharp, or None where its package isn't installed."""
    for root in roots:
        file = root / photo.path
        if not file.is_file():
            continue
        if file.suffix == ".dat":  # scipy's raccoon: bz2 of the raw pixels
            image = Image.fromarray(np.frombuffer(bz2.decompress(file.read_bytes()), np.uint8).reshape(768, 1024, 3))
        else:
            image = Image.open(file).convert("RGB")
        if photo.shrink != 1.0:
            size = (round(image.width / photo.shrink), round(image.height / photo.shrink))
            image = image.resize(size, Image.Resampling.LANCZOS)
        return np.asarray(image)
    return None


@dataclass
class Pool:
    """Sharp images to crop from, with the chance of each."""

    images: list[np.ndarray]
    chances: np.ndarray
    """Sums to one."""

    missing: list[str]
    """Photographs of `PHOTOS` that are not installed."""

    @classmethod
    def load(cls, extra_roots: Sequence[Path] = (), textures: float = 0.2, variants: int = 4, side: int = 384) -> Pool:
        """All installed `PHOTOS`, and procedural textures that get the share `textures` (0..1) of the draws."""
        roots, images, weights, missing = package_roots(extra_roots), [], [], []
        for photo in PHOTOS:
            image = read_photo(photo, roots)
            if image is None:
                missing.append(f"{photo.path} ({photo.package})")
                continue
            images.append(image)
            weights.append(photo.weight * float(np.sqrt(image.shape[0] * image.shape[1])))
        chances = np.asarray(weights) / max(sum(weights), 1e-9) * (1.0 - textures if textures else 1.0)
        if textures or not images:
            atlas = [image for group in texture_atlas(variants, side) for image in group]
            share = (textures or 1.0) if images else 1.0
            images += atlas
            chances = np.concatenate([chances, np.full(len(atlas), share / len(atlas))])
        return cls(images, chances / chances.sum(), missing)

    def crop(self, rng: np.random.Generator, size: int, tries: int = 3, widest: float = 2.0) -> np.ndarray:
        """A random square of `size` px, shrunk by 1..`widest` at random, flipped, turned, of varied colour.

        Mostly the liveliest of `tries` places is taken: a third of most photographs is out of focus.
        """
        image = self.images[rng.choice(len(self.images), p=self.chances)]
        height, width = image.shape[:2]
        shrink = 1.0 if rng.random() < 0.6 else rng.uniform(1.0, widest)
        side = min(round(size * shrink), height, width)
        best, best_score = image, -1.0
        for _ in range(tries if rng.random() < 0.75 else 1):
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            square = image[top : top + side, left : left + side]
            grey = square[::2, ::2, 1].astype(np.int16)
            score = float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())
            if score > best_score:
                best, best_score = square, score
        if side != size:
            best = np.asarray(Image.fromarray(best).resize((size, size), Image.Resampling.LANCZOS))
        return jitter(rng, np.rot90(best, int(rng.integers(4)))[:, :: rng.choice((-1, 1))])


def jitter(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Contrast, brightness, saturation and white balance varied a little; one in ten goes grey."""
    pixels = image.astype(np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    saturation = 0.0 if rng.random() < 0.1 else rng.uniform(0.6, 1.3)
    pixels = grey + (pixels - grey) * saturation
    gain = rng.uniform(0.75, 1.2) * rng.uniform(0.92, 1.08, 3)
    mean = pixels.mean()
    pixels = (pixels - mean) * gain + mean * rng.uniform(0.8, 1.15) + rng.uniform(-12, 12)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


_KERNELS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


def degrade(rng: np.random.Generator, image: np.ndarray, factor: float | None = None) -> np.ndarray:
    """`image` as a plain upscaler makes it from a small copy: shrunk, noisy, JPEG-coded, Lanczos back to its size.

    `factor` is how many times smaller the copy is (default: 2 in half of the cases, else 1.5..4). Classical
    first-order degradation, as in Real-ESRGAN (arXiv 2107.10833), kept mild. Size and dtype stay.
    """
    height, width = image.shape[:2]
    if factor is None:
        factor = 2.0 if rng.random() < 0.5 else float(np.exp(rng.uniform(np.log(1.5), np.log(4.0))))
    size = (max(round(width / factor), 4), max(round(height / factor), 4))
    small = Image.fromarray(image).resize(size, _KERNELS[rng.integers(len(_KERNELS))])
    if rng.random() < 0.4:
        sigma = rng.uniform(0.5, 5.0)
        noise = rng.normal(0.0, sigma, (size[1], size[0], 3 if rng.random() < 0.5 else 1))
        small = Image.fromarray(np.clip(np.asarray(small) + noise + 0.5, 0, 255).astype(np.uint8))
    if rng.random() < 0.35:
        coded = io.BytesIO()
        small.save(coded, "JPEG", quality=int(rng.integers(60, 97)))
        small = Image.open(coded)
    return np.asarray(small.resize((width, height), Image.Resampling.LANCZOS))


def sharpen(image: np.ndarray, amount: float = 0.25, sigma: float = 1.0) -> np.ndarray:
    """Unsharp mask, float32 out, not clipped: what Real-ESRGAN (arXiv 2107.10833, 3.2) trains towards."""
    from scipy.ndimage import gaussian_filter

    pixels = image.astype(np.float32)
    return pixels + amount * (pixels - gaussian_filter(pixels, (sigma, sigma, 0)))


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) in 0..255 to (3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0


class RestorePairs(torch.utils.data.Dataset):
    """Item i is the same pair in every run: (degraded, sharp), each (3, size, size) in -1..1.

    Pairs are kept once made (24 kB each at 64 px): making one takes longer than training on it should.
    """

    def __init__(self, pool: Pool, length: int, size: int = 64, seed: int = 0, sharpening: float = 0.25):
        self.pool, self.length, self.size, self.seed, self.sharpening = pool, length, size, seed, sharpening
        self._made: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index not in self._made:
            self._made[index] = self._make(index)
        degraded, sharp = self._made[index]
        return to_tensor(degraded), to_tensor(sharp)

    def _make(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, index))
        margin = 8  # what the kernels do at a border is no part of the task
        crop = self.pool.crop(rng, self.size + 2 * margin)
        inside = slice(margin, margin + self.size)
        target = np.clip(sharpen(crop, self.sharpening) + 0.5, 0, 255).astype(np.uint8)
        return degrade(rng, crop)[inside, inside], target[inside, inside]
