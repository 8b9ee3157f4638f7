"""The benchmarks run; what they measure is not looked at here."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lib_dinotile.condition.conditioner import MINI, Conditioner
from lib_dinotile.hosts.diffusers import load_host


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    import engine

    monkeypatch.setattr(engine, "SETTINGS", replace(engine.SETTINGS, tile=64, overlap=16))
    return engine


def test_the_engine_costs_something_beside_the_model(engine):
    host = load_host(engine.GENERATION)
    conditioner = Conditioner.load(
        replace(engine.SETTINGS, adapter="mini"), host, {"mini": MINI / "adapter.safetensors"}
    )
    image = engine.source(32)
    assert engine.overhead(host, None, image) > 1
    assert engine.overhead(host, conditioner, image) > 1
    assert engine.per_tile(host, image, 2) > 0


def test_a_cut_is_a_seam(engine):
    import seams

    image = engine.source(seams.SIDE)
    edges = seams.Lines.of(range(0, seams.SIDE, 64), 64, seams.SIDE)
    table = seams.Table(["noise"])
    table.pool("cut", "noise").add(seams.cut(image, 64, 40, 0), image, (edges, edges))
    table.pool("same", "noise").add(image, image, (edges, edges))
    assert table.pool("cut", "noise").seam()[0] > 1.02 > table.pool("same", "noise").seam()[0]
