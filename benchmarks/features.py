"""Which features tell the true picture from a wrong one? python benchmarks/features.py [--dino NAME] [--photos FOLDER]

Photos are shrunk and enlarged again; that is the source. True is the photo itself; wrong is another place of the photo
in the colours of this one, down to shapes of some 32 pixels: what colour correction leaves of a tile that shows
something else.

auc: how surely a patch's distance from the source's features is smaller for the true picture than for the wrong one,
by layer, by what the source's features are made from (the whole source at once, windows of it, the tile's own region
alone) and by how many patches around a tile are seen with it.
doubt: the share of patches that the guard doubts in the true picture and in the same one upside down, when the floor is
the plain enlarged source beside the source, and when it is the rehearsal that the guard makes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.data import data_dir
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.arms import auc, to_pixels
from benchmarks.photographs import LANCZOS, middle
from lib_dinotile.condition.guard import GUARD_LAYER, Floor, Guard, rehearsal_size, rehearse
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.tile_features import TileFeatures
from lib_dinotile.images import read_image
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.colour import correct
from lib_dinotile.tiling.plan import TilePlan

SIDE, TILE, SCALE = 512, 256, 2
"""Of the photo as it is used, of a tile, in pixels; how much smaller the source is."""
PATCHES = 32
FIELDS = ("whole", "windows 2", "tile alone")
CONTEXTS = (0, 1, 2, 4)


@dataclass(frozen=True)
class Case:
    """A photo, its source, and a picture that only looks like it from afar."""

    source: Image.Image
    true: Image.Image
    wrong: Image.Image


def photos(folder: Path | None) -> Iterator[Image.Image]:
    """Squares of SIDE pixels."""
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    files = folder.iterdir() if folder else [Path(data_dir) / name for name in names]
    for file in sorted(file for file in files if file.suffix.lower() in (".png", ".jpg")):
        image = read_image(file)
        yield middle(image, min(image.size), min(image.size)).resize((SIDE, SIDE), LANCZOS)


def case(photo: Image.Image) -> Case:
    source = photo.resize((SIDE // SCALE, SIDE // SCALE), LANCZOS)
    base = to_pixels(source.resize(photo.size, LANCZOS))
    elsewhere = to_pixels(photo).roll((SIDE // 2, SIDE // 3), (1, 2))
    wrong = (correct(elsewhere, base, "wavelet") * 255).round().byte().permute(1, 2, 0).numpy()
    return Case(source, photo, Image.fromarray(wrong))


def field(encoder: PatchEncoder, source: Image.Image, kind: str, layer: int, plan: TilePlan) -> FeatureField:
    """The source's features, made in one of the ways of FIELDS."""
    pixels, size = to_pixels(source), (SIDE, SIDE)
    if kind == "whole":
        return feature_field(encoder, pixels, size, PATCHES, layer=layer)
    if kind == "windows 2":
        return feature_field(encoder, pixels, size, PATCHES // 2, windows=2, layer=layer)
    whole = feature_field(encoder, pixels, size, PATCHES, layer=layer).features.clone()
    cell = SIDE // PATCHES
    for tile in plan.tiles:
        part = pixels[(slice(None), *tile.shrink(SCALE).slices)]
        seen = feature_field(encoder, part, (TILE, TILE), TILE // cell, layer=layer).features
        whole[(slice(None), *tile.shrink(cell).slices)] = seen
    return FeatureField(whole, size)


def distances(tile_features: TileFeatures, image: Image.Image, around: Image.Image, plan: TilePlan) -> Tensor:
    """Of the tiles' own patches, when each tile shows the image and its surroundings another."""
    canvas, shown, found = Canvas(around, plan), Canvas(image, plan), []
    for tile in plan.tiles:
        cosines = tile_features.similarity(canvas.crop, [tile], shown.source(tile)[None])[0]
        found.append(1 - cosines[tile_features.own(tile)].flatten())
    return torch.cat(found)


def doubt(encoder: PatchEncoder, each: Case, plan: TilePlan) -> dict[str, tuple[float, float]]:
    """Floor -> (share of the true picture's patches in doubt, of those of the picture upside down)."""
    plain, settings = each.source.resize(each.true.size, LANCZOS), Settings()
    canvas = Canvas(plain, plan)
    tile_features = TileFeatures(
        encoder, field(encoder, each.source, "whole", GUARD_LAYER, plan), plan.padded, GUARD_LAYER
    )
    shrunk = each.source.resize(rehearsal_size(each.source.size, each.true.size), LANCZOS)
    rehearsal = rehearse(tile_features.field, field(encoder, shrunk, "whole", GUARD_LAYER, plan))
    floors = {"plain": (Floor.of(distances(tile_features, plain, plain, plan)), False), "rehearsal": (rehearsal, True)}
    found = {}
    for name, (floor, relative) in floors.items():
        guard, shares = Guard(tile_features, canvas, floor, settings.guard_strictness, relative), []
        for picture in (each.true, each.true.transpose(Image.Transpose.ROTATE_180)):
            shown, doubted = Canvas(picture, plan), []
            for tile in plan.tiles:
                seen = guard.distances([tile], shown.source(tile)[None])[0]
                doubted.append(guard.doubt(tile, seen)[tile_features.own(tile)].flatten())
            shares.append(float(torch.cat(doubted).float().mean()))
        found[name] = shares[0], shares[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dino", default="mini", help="encoder, as for dinotile's command line")
    parser.add_argument("--photos", type=Path, help="folder of photos (default: four of scikit-image's)")
    parser.add_argument("--layers", type=int, default=4, help="how many layers, from the last")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    arguments = parser.parse_args()
    encoder, plan = load_encoder(arguments.dino), TilePlan(SIDE, SIDE, TILE, overlap=0, factor=8)
    cases = [case(photo) for photo in photos(arguments.photos)]
    layers = [-1 - number for number in range(min(arguments.layers, encoder.depth))]
    figures: dict[str, float] = {}
    print(f"AUC, encoder {encoder.id}, {len(cases)} photos, tiles of {TILE} pixels, {PATCHES} patches a side")
    print(f"{'layer':>5}  {'source seen as':14}" + "".join(f"  context {context}" for context in CONTEXTS))
    for layer, kind in itertools.product(layers, FIELDS):
        aucs = []
        for context in CONTEXTS:
            good, bad = [], []
            for each in cases:
                tile_features = TileFeatures(
                    encoder, field(encoder, each.source, kind, layer, plan), plan.padded, layer, context=context
                )
                plain = each.source.resize(each.true.size, LANCZOS)
                good.append(-distances(tile_features, each.true, plain, plan).numpy())
                bad.append(-distances(tile_features, each.wrong, plain, plan).numpy())
            aucs.append(auc(good, bad))
            figures[f"{layer} {kind} {context}"] = round(aucs[-1], 4)
        print(f"{layer:5}  {kind:14}" + "".join(f"  {each:9.3f}" for each in aucs), flush=True)
    print("share of the patches in doubt, of the true picture / upside down")
    doubts = [doubt(encoder, each, plan) for each in cases]
    for name in doubts[0]:
        true, turned = (float(np.mean([one[name][which] for one in doubts])) for which in range(2))
        print(f"  floor: {name:10} {true:.3f} / {turned:.3f}", flush=True)
        figures |= {f"doubt {name}": round(true, 4), f"doubt {name}, upside down": round(turned, 4)}
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    with torch.no_grad():
        main()
