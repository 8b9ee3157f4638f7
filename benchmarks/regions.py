"""Are the regions that dinotile finds the true ones?

python benchmarks/regions.py [--dino NAME|FOLDER] [--root FOLDER ...] [--json]

In the closed world the truth is the class of each pixel; six photographs that the built-in encoder never saw were
segmented by hand (benchmarks/segmentations.json). dinotile runs at its defaults, beside it SLIC (Achanta et al. 2012),
with as many segments as dinotile found, and with as many as there truly are; and k-means of the colours of pixels
(CIELAB) with as many clusters as dinotile found.

The index is the adjusted Rand index of all pixels' labels (Hubert & Arabie 1985): 1 is agreement, 0 what chance gives.
Purity is the share of pixels whose region's commonest true label is their own: to split a region costs it nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from skimage.color import rgb2lab
from skimage.segmentation import slic
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.arms import interval
from benchmarks.judging import LABELLED, REPORT_SEED
from benchmarks.photographs import LANCZOS, installed
from benchmarks.world import WEIGHTS
from benchmarks.world.host import SETTINGS
from benchmarks.world.scenes import as_image, evaluation_scenes
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.dino.encoder import BUILT_IN, load_encoder
from lib_dinotile.dino.locks import models_folder
from lib_dinotile.settings import Settings
from tools.mini.images import HELD_OUT

SEGMENTATIONS: dict[str, Any] = json.loads(Path(__file__).with_name("segmentations.json").read_text(encoding="utf-8"))
"""By photo: `size` (width, height), `polygons` as (name, corners in pixels), and the name of the `rest`."""
TRUTH, DINOTILE, SLIC, INFORMED, COLOURS = "truth", "dinotile", "SLIC", "SLIC, true number", "colours"
Row = dict[str, dict[str, float]]
"""Of one picture: `regions`, `index` and `purity` of the truth and of each way to find regions."""


def rasterised(segmentation: dict[str, Any]) -> np.ndarray:
    """(height, width) uint8: one label for each name; later polygons lie over earlier ones. The rest is 0."""
    names = [*dict.fromkeys([segmentation["rest"], *(name for name, _ in segmentation["polygons"])])]
    image = Image.new("L", tuple(segmentation["size"]))
    for name, corners in segmentation["polygons"]:
        ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners], fill=names.index(name))
    return np.array(image)


def superpixels(image: np.ndarray, number: int) -> np.ndarray:
    """(H, W): SLIC's segments of an image (H, W, 3), at least so many. SLIC takes a number for a hint: of few segments
    it gives fewer still, and is asked again."""
    tries = (slic(image, asked) for asked in itertools.count(number))
    return next(labels for labels in tries if len(np.unique(labels)) >= number)


def colour_clusters(image: np.ndarray, number: int) -> np.ndarray:
    """(H, W): so many clusters of the colours of an image (H, W, 3)."""
    found = KMeans(number, n_init=4, random_state=0).fit_predict(rgb2lab(image).reshape(-1, 3))
    return found.reshape(image.shape[:2])


def agreement(truth: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of two labels for each pixel, (H, W)."""
    shared, index = (of(truth.ravel(), labels.ravel()) for of in (contingency_matrix, adjusted_rand_score))
    return {"regions": shared.shape[1], "index": float(index), "purity": float(shared.max(0).sum() / truth.size)}


def measure(conditioner: Conditioner, source: Image.Image, truth: np.ndarray) -> Row:
    """The figures of one source (RGB); truth: the label of each pixel of the canvas, (H, W)."""
    height, width = truth.shape
    cells = conditioner.regions(source, (width, height)).labels.numpy()
    rows, columns = ((2 * np.arange(side) + 1) * n // (2 * side) for side, n in zip(truth.shape, cells.shape))
    found, canvas = cells[np.ix_(rows, columns)], np.asarray(source.resize((width, height), LANCZOS))
    segments = {way: superpixels(canvas, len(np.unique(labels))) for way, labels in ((SLIC, found), (INFORMED, truth))}
    segments[COLOURS] = colour_clusters(canvas, len(np.unique(found)))
    return {way: agreement(truth, labels) for way, labels in {TRUTH: truth, DINOTILE: found, **segments}.items()}


def show(name: str, rows: Sequence[Row], sampled: bool = False) -> None:
    """Print a line of means; sampled: with intervals, as the pictures are some of very many."""
    line = f"{name:25}"
    for way in rows[0]:
        line += f" | {way} {np.mean([row[way]['regions'] for row in rows]):.1f}"
        for figure in ("index", "purity") if way != TRUTH else ():
            values = [row[way][figure] for row in rows]
            line += f", {np.mean(values):.3f}" + (" ({:.3f} to {:.3f})".format(*interval(values)) if sampled else "")
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dino", default=BUILT_IN, help="encoder for the photographs: its name, or a folder")
    parser.add_argument("--root", type=Path, action="append", default=[], help="where else unpacked packages lie")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    arguments = parser.parse_args()
    print("Regions, adjusted Rand index and purity; in brackets 95 % bootstrap intervals")
    world: dict[str, list[Row]] = {}
    for name in (LABELLED, "encoder-unlabelled"):
        conditioner, scenes = (
            Conditioner(SETTINGS, load_encoder(str(WEIGHTS / name))),
            evaluation_scenes(40, REPORT_SEED),
        )
        world[name] = [measure(conditioner, as_image(made.source), made.class_map) for made in scenes]
        show(f"world, {name}", world[name], sampled=True)
    conditioner = Conditioner(Settings(), load_encoder(arguments.dino, models_folder("encoders")))
    photos: dict[str, Row] = {}
    for name, photo in installed(HELD_OUT, arguments.root).items():
        photos[name] = measure(conditioner, photo, rasterised(SEGMENTATIONS[name]))
        show(name, [photos[name]])
    if photos:
        show(f"{len(photos)} photos, {conditioner.encoder.id}", [*photos.values()])
    if missing := [name for name in SEGMENTATIONS if name not in photos]:
        print(f"not installed, see --root: {', '.join(missing)}")
    if arguments.json:
        print(json.dumps({"encoder": conditioner.encoder.id, "world": world, "photos": photos}))


if __name__ == "__main__":
    main()
