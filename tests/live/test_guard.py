"""What the guard costs, what it does where it is of no use, and what the progress says meanwhile."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from client import SLACK, Progress, WebUI, difference
from conftest import TILES
from PIL import Image
from plots import Plot

AGAIN = {**TILES, "encoder": "mini", "guard": "retry", "guard_strictness": -5.0, "guard_budget": 1.0, "batch": 1}
"""Every tile is in doubt. Of two tiles the guard does not say that this is hopeless, and paints them again."""
MOST = 1.6
"""How much longer a run with the default guard may take."""
RUNS = 2


def seconds(webui: WebUI, source: Image.Image, **options) -> float:
    began = time.perf_counter()
    webui.img2img(source.resize((128, 96)), {"tile": 80, "overlap": 16, **options}, steps=16)
    return time.perf_counter() - began


def test_the_default_guard_costs_at_most_its_budget(webui: WebUI, photo: Image.Image):
    """Twelve tiles; on a checkpoint of random weights, too, where it doubts them all. The fastest of several runs:
    other work on the machine only ever makes one slower."""
    runs = [[seconds(webui, photo, guard=guard) for guard in ("off", "retry")] for _ in range(RUNS)]
    off, on = (min(times) for times in zip(*runs))
    print(f"without guard {off:.1f} s, with {on:.1f} s: {on / off:.2f} times")
    assert on < MOST * off


def test_where_most_is_in_doubt_nothing_is_painted_again_and_a_line_says_so(webui: WebUI, source: Image.Image):
    reply = webui.img2img(source, AGAIN)
    report = reply.extra["DINO Tile report"][0]
    assert all(tile["retries"] == 0 and tile["doubt_before"] > 0 for tile in report["tiles"]) and report["retried"] == 0
    (line,) = [note for note in report["notes"] if "doubts most tiles" in note]
    assert line.startswith("the guard doubts most tiles (6 of 6) and paints none of them again: use a lower denoising")
    assert line in reply.fields["DINO Tile notes"]
    blended = webui.img2img(source, {**AGAIN, "guard": "blend back"})
    assert difference(reply.image, blended.image) == 0


def test_retries_stay_within_the_budget(webui: WebUI, small: Image.Image):
    for budget, retries in ((0.0, 0), (0.5, 1), (1.0, 2)):
        reply = webui.img2img(small, {**AGAIN, "guard_budget": budget, "guard_weaker": 0, "guard_seeds": 1})
        report = reply.extra["DINO Tile report"][0]
        assert sum(tile["retries"] for tile in report["tiles"]) <= retries
        assert report["retried"] <= budget + 1e-6 and (report["retried"] > 0) == (retries > 0)


def looks(job) -> list[Progress]:
    return [look for look in job.looks() if look.running and look.text.startswith("DINO Tile: ")]


def check(seen: list[Progress]) -> list[str]:
    """That the bar never falls and comes to its end; the texts, one after the other."""
    shares = [look.share for look in seen]
    assert all(later >= earlier - SLACK for earlier, later in itertools.pairwise(shares)), shares
    assert shares[0] < 0.3 and shares[-1] > 0.8
    return [text for text, _ in itertools.groupby(look.text.removeprefix("DINO Tile: ") for look in seen)]


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
@pytest.mark.parametrize("seams", ["none", "half tile"])
def test_the_bar_never_falls_and_the_text_says_what_happens(webui: WebUI, small: Image.Image, order: str, seams: str):
    job = webui.start(small, {**AGAIN, "order": order, "seams": seams}, steps=20)
    texts = check(looks(job))
    report = job.reply().extra["DINO Tile report"][0]
    assert any(tile["retries"] for tile in report["tiles"])
    assert re.fullmatch(r"painting tiles: 0 of \d", texts[0]) or "together" in texts[0], texts
    kinds = ("painting tiles", "painting 2 tiles together, step") if order == "fused" else ("painting tiles",)
    for kind in (*kinds, "repainting 2 doubtful tiles"):
        assert any(text.startswith(kind) for text in texts), texts
    counts = [int(text.split()[2]) for text in texts if text.startswith("painting tiles: ")]
    assert counts == sorted(counts)


def test_several_images(webui: WebUI, small: Image.Image):
    job = webui.start(small, AGAIN, steps=10, n_iter=2, batch_size=2, override_settings={"return_grid": False})
    texts = check(looks(job))
    assert len(job.reply().images) == 4
    assert sum(text == "painting tiles: 0 of 2" for text in texts) >= 3, texts


def test_a_plot_whose_cells_have_different_work(webui: WebUI, plot: Plot, small: Image.Image):
    args = plot.args(x=("Retry budget", [0, 1.0]), y=("Tile overlap", [0, 16]))
    job = webui.start(small, AGAIN, steps=20, script_name="x/y/z plot", script_args=args)
    check(looks(job))
    assert len(job.reply().images) == 5
