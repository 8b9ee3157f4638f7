"""What benchmarks/regions.py holds regions against, and that it measures them."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from benchmarks.photographs import installed
from benchmarks.regions import (
    DINOTILE,
    INFORMED,
    SEGMENTATIONS,
    SLIC,
    TRUTH,
    agreement,
    measure,
    rasterised,
    superpixels,
)
from benchmarks.world import WEIGHTS
from benchmarks.world.host import SETTINGS
from benchmarks.world.scenes import as_image, evaluation_scenes
from lib_dinotile.condition.conditioner import Conditioner
from lib_dinotile.dino.encoder import load_encoder
from tools.mini.images import HELD_OUT


def square(left, upper, right, lower):
    return [[left, upper], [right, upper], [right, lower], [left, lower]]


def test_later_polygons_lie_over_earlier_ones_and_those_of_one_name_are_one_region():
    polygons = [["sky", square(0, 0, 9, 3)], ["tree", square(2, 2, 4, 7)], ["sky", square(8, 6, 9, 7)]]
    labels = rasterised({"size": [10, 8], "rest": "field", "polygons": polygons})
    assert labels.shape == (8, 10)
    field, sky, tree = labels[5, 0], labels[0, 0], labels[5, 3]
    assert len({field, sky, tree}) == len(np.unique(labels)) == 3
    assert labels[3, 3] == tree and labels[3, 5] == sky and labels[7, 9] == sky and labels[4, 9] == field


def test_segmentations_fit_the_photos_that_the_encoder_never_saw():
    assert set(SEGMENTATIONS) == {Path(photo.path).stem for photo in HELD_OUT}
    for segmentation in SEGMENTATIONS.values():
        for _, corners in segmentation["polygons"]:
            assert len(corners) >= 3
            assert (np.array(corners) >= 0).all() and (np.array(corners) <= segmentation["size"]).all()
        names = {segmentation["rest"], *(name for name, _ in segmentation["polygons"])}
        assert len(np.unique(rasterised(segmentation))) == len(names)  # none is hidden altogether
    photos = installed(HELD_OUT)
    assert photos and all(list(photo.size) == SEGMENTATIONS[name]["size"] for name, photo in photos.items())


def test_a_split_region_costs_the_index_and_not_the_purity():
    truth = np.repeat([[0, 0, 1, 1]], 4, axis=0)
    assert agreement(truth, 7 - truth) == {"regions": 2, "index": 1.0, "purity": 1.0}
    split = agreement(truth, np.repeat([[0, 1, 2, 2]], 4, axis=0))
    assert split["regions"] == 3 and split["purity"] == 1 > split["index"] > 0
    assert agreement(truth, np.zeros_like(truth)) == {"regions": 1, "index": 0.0, "purity": 0.5}


@pytest.mark.parametrize("number", [2, 3, 5])
def test_slic_gives_at_least_as_many_segments_as_asked_for(number):
    pixels = np.stack([*np.mgrid[0:60, 0:90], np.zeros((60, 90))], 2).astype(np.uint8)
    assert len(np.unique(superpixels(pixels, number))) >= number


def test_regions_of_a_picture_of_the_world_agree_better_than_as_many_segments_of_slic():
    made = list(evaluation_scenes(2, 23))[1]
    row = measure(Conditioner(SETTINGS, load_encoder(str(WEIGHTS / "encoder"))), as_image(made.source), made.class_map)
    assert row[TRUTH] == {"regions": len(np.unique(made.class_map)), "index": 1.0, "purity": 1.0}
    assert row[DINOTILE]["index"] > row[SLIC]["index"] and row[DINOTILE]["purity"] > 0.9
    assert row[SLIC]["regions"] >= row[DINOTILE]["regions"] and row[INFORMED]["regions"] >= row[TRUTH]["regions"]
