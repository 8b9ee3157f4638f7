"""Whatever fails is told in one line, what is painted is kept, and nothing is left behind.

The faults come from the extension in tests/live/faults: link that folder into the WebUI's `extensions`, start it anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from adapters import Adapters
from client import BLIND, Reply, WebUI, difference, pixels
from PIL import Image

from lib_dinotile.tiling.plan import TilePlan

LINEAR = {"scale": 2.0, "tile": 64, "overlap": 0, "batch": 1, "order": "linear", "colour": "none"}
"""Four tiles that touch nowhere: what is painted first does not change any more."""
PLAN = TilePlan(128, 128, LINEAR["tile"], LINEAR["overlap"], order="linear")
TOLD = "the fault and what a second line says"
SAVING = {"save_images": True, "override_settings": {"samples_save": True}}


@dataclass(frozen=True)
class Case:
    """A fault, and what is to become of the run."""

    stage: str
    fault: str = "error"
    options: dict[str, Any] = field(default_factory=dict)
    after: int = 0
    """Calls that go well first."""
    times: int = 99
    """Calls that fail then."""
    painted: int = 0
    """Tiles painted until then."""
    total: int = len(PLAN)
    line: str = TOLD
    """What is said, in the error or, if the image is made all the same, in the notes; a regular expression."""
    adapter: bool = False

    def __str__(self) -> str:
        words = [self.stage, self.fault, self.options.get("order", ""), f"after {self.after}"]
        return " ".join(filter(None, [*words, "once" if self.times == 1 else ""]))


MEMORY = "out of memory with a single tile: give a smaller tile size, or guidance strength 0"
GUIDED, GUARDED = {**BLIND, "guidance": 0.5}, {**BLIND, "guard": "report"}
SEAMS = {"seams": "half tile"}
STOPPED = "all tiles are painted, but the guard failed"

BROKEN_OFF = [
    Case("upscale", line=f"stopped before the first tile: {TOLD}"),
    Case("upscale", "memory", line="out of memory before the first tile: make the result smaller than 128x128"),
    Case("decoder", options=GUIDED),
    Case("encode"),
    Case("encode", "memory in words", line=MEMORY),
    Case("sampler"),
    Case("sampler", after=3, painted=3),
    Case("unet", after=1),
    Case("unet", after=5, painted=2),
    Case("unet", "memory", after=5, painted=2, line=MEMORY),
    Case("unet", "memory in words", after=4, painted=2, line=MEMORY),
    Case("unet", options={"order": "fused"}, after=3),
    Case("unet", "disk", after=4, painted=2, line=r"\[Errno 28\] No space left on device"),
    Case("decode", after=2, painted=2),
    Case("decode", "memory", after=1, painted=1, line=MEMORY),
    Case("decode", options={"order": "fused"}),
    Case("prompts", options={"tile_prompts": "3: a cat"}, after=1, painted=2),
    Case("encoder", options=GUIDED, after=3, painted=1),
    Case("guidance", options=GUIDED),
    Case("guidance", options=GUIDED, after=4, painted=2),
    Case("guidance", "memory", options=GUIDED, after=5, painted=2, line=MEMORY),
    Case("guidance", options={**GUIDED, "order": "fused"}, after=2),
    Case("adapter", after=4, painted=2, adapter=True),
    Case("adapter", "memory", after=0, adapter=True, line=MEMORY),
    Case("adapter", options={"order": "fused"}, after=6, adapter=True),
]
MADE = [
    Case(
        "unet", "memory", options={"order": "chess", "batch": 4}, times=1, line="out of memory with 4 tiles .* with 2"
    ),
    Case("unet", "nan", after=3, times=1, line="tile 2 was done again in full precision: .*"),
    Case("unet", "nan", line="tile 4 shows the enlarged source: the model returned NaN"),
    Case("unet", "nan", options={"order": "fused"}, line="tile 4 shows the enlarged source: .*"),
    Case("decode", "nan", after=1, times=1, line="tile 2 was done again in full precision: .*"),
    Case("decode", "nan", line="tile 1 shows the enlarged source: .*"),
    Case("encode", "nan", line="the VAE returned NaN for the picture at 0, 0"),
    Case("encode", "nan", times=1, line="the picture at 0, 0 was encoded again in full precision: .*"),
    Case("adapter", "nan", after=2, adapter=True, line="tile 2 shows the enlarged source: .*"),
    Case("guidance", "nan", options=GUIDED, after=2, times=1, line="tile 2 was done again in full precision: .*"),
    Case("guard", "nan", options=GUARDED, line=r"guard: 4 of 4 tiles were in doubt \(still in doubt: 1-4\)"),
    Case("encoder", options=GUARDED, after=2, line=f"{STOPPED}: {TOLD}"),
    Case("positions", "nan", options=GUARDED, after=2, line=f"{STOPPED}: encoder: 'mini' returned NaN: .*"),
    Case("guard", options=GUARDED, after=3, line=f"{STOPPED}: {TOLD}"),
    Case("guard", "memory", options=GUARDED, after=3, line=f"{STOPPED}: {MEMORY}"),
    Case("guard", options={**GUARDED, "order": "fused"}, after=1, line=f"{STOPPED}: {TOLD}"),
    Case("maps", options={**GUARDED, "maps": "both"}, line=f"maps: they cannot be drawn: {TOLD}"),
]


class Faults:
    """The extension of the WebUI."""

    def __init__(self, url: str) -> None:
        self._url = f"{url.rstrip('/')}/dinotile-faults"
        self._session = requests.Session()
        self._session.trust_env = False

    @property
    def there(self) -> bool:
        return self._session.get(self._url, timeout=300).status_code == 200

    def arm(self, case: Case) -> None:
        body = {"stage": case.stage, "fault": case.fault, "after": case.after, "times": case.times}
        self._session.post(self._url, json=body, timeout=300).raise_for_status()

    def disarm(self) -> tuple[int, dict[str, Any]]:
        """How often it has struck, and what is left behind."""
        answer = self._session.get(self._url, timeout=300).json()
        return answer["fired"], answer["left"]

    def press(self, body: dict[str, Any]) -> str:
        """The HTML below the gallery, for a request as in the API."""
        return self._session.post(f"{self._url}/press", json=body, timeout=900).json()["html"]


@pytest.fixture(scope="module")
def faults(request: pytest.FixtureRequest) -> Faults:
    found = Faults(request.config.getoption("--webui"))
    if not found.there:
        pytest.skip(
            "this WebUI has no dinotile-faults: link tests/live/faults into its extensions, see README.md there"
        )
    return found


@pytest.fixture(scope="module")
def folder(webui: WebUI, faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the WebUI saves."""
    name = "outdir_img2img_samples"
    before = webui.get("sdapi/v1/options").json()[name]
    made = tmp_path_factory.mktemp("saved")
    webui.post("options", {name: str(made)}).raise_for_status()
    yield made
    webui.post("options", {name: before}).raise_for_status()


def files(folder: Path) -> list[Path]:
    """All files in a folder and below it."""
    return [file for file in folder.rglob("*") if file.is_file()]


@pytest.fixture(autouse=True)
def tidy(folder: Path) -> Iterator[None]:
    """What one test has the WebUI save is not there in the next."""
    yield
    for file in files(folder):
        file.unlink()


@pytest.fixture(scope="module")
def source(photo: Image.Image) -> Image.Image:
    return photo.resize((64, 64), Image.Resampling.LANCZOS)


Good = Callable[[dict[str, Any]], tuple[Reply, dict[str, Any]]]


@pytest.fixture(scope="module")
def good(webui: WebUI, source: Image.Image, adapters: Adapters, faults: Faults, folder: Path) -> Good:
    """What a run with some options gives if nothing fails, and what it leaves behind; the second such run's."""
    known: dict[str, tuple[Reply, dict[str, Any]]] = {}
    # What a source shows is remembered: let there be nothing new to remember.
    webui.img2img(source, {**LINEAR, **GUIDED, "guard": "report", "maps": "both", "adapter": adapters.random})

    def find(options: dict[str, Any]) -> tuple[Reply, dict[str, Any]]:
        key = repr(options)
        if key not in known:
            webui.img2img(source, options)  # it looks at the source, and loads what it needs
            known[key] = webui.img2img(source, options), faults.disarm()[1]
        return known[key]

    return find


def options_of(case: Case, adapters: Adapters) -> dict[str, Any]:
    return {**LINEAR, **case.options, **({"adapter": adapters.random} if case.adapter else {})}


@pytest.mark.parametrize("case", BROKEN_OFF, ids=str)
def test_a_run_that_breaks_off(
    webui: WebUI, source: Image.Image, adapters: Adapters, faults: Faults, folder: Path, good: Good, case: Case
):
    options = options_of(case, adapters)
    whole, clean = good(options)
    faults.arm(case)
    answer = webui.post("img2img", webui.body(source, options, **SAVING))
    fired, left = faults.disarm()
    assert fired and answer.status_code == 500, (fired, answer.text[:2000])
    line = answer.json()["detail"]
    assert "\n" not in line
    if case.painted:
        found = re.fullmatch(rf"stopped after (\d+) of {case.total} tiles \(kept in (.+)\): {case.line}", line)
        assert found and int(found[1]) == case.painted, line
        kept = Path(found[2])
        assert folder in kept.parents and kept.stem.endswith("-unfinished")
        with Image.open(kept) as image:
            check_painted(image, whole.image, source, case.painted)
        kept.unlink()
    else:
        assert re.fullmatch(rf"(stopped after 0 of {case.total} tiles: )?{case.line}", line), line
    assert not files(folder)
    check_left(left, clean)
    assert difference(webui.img2img(source, options).image, whole.image) == 0
    assert faults.disarm()[1] == clean


def check_left(left: dict[str, Any], clean: dict[str, Any]) -> None:
    """No more is left behind than by a run that was good; less, where the run did not get as far."""
    for name in ("tensors", "bytes"):
        assert left[name] <= clean[name]
    assert {**left, "tensors": 0, "bytes": 0} == {**clean, "tensors": 0, "bytes": 0}


def check_painted(image: Image.Image, whole: Image.Image, source: Image.Image, painted: int) -> None:
    """The first tiles are those of the whole image, the rest is the upscaled source."""
    upscaled = source.resize(image.size, Image.Resampling.LANCZOS)
    ours, done, bare = (pixels(each) for each in (image, whole, upscaled))
    first = np.zeros(ours.shape[:2], dtype=bool)
    for tile in PLAN.tiles[:painted]:
        first[tile.slices] = True
    assert abs(ours - done)[first].max() == 0
    assert abs(done - bare)[first].max() > 1
    if painted < len(PLAN):
        assert abs(ours - bare)[~first].max() <= 1


@pytest.mark.parametrize("case", MADE, ids=str)
def test_an_image_that_is_made_all_the_same_says_so(
    webui: WebUI, source: Image.Image, adapters: Adapters, faults: Faults, good: Good, case: Case
):
    options = options_of(case, adapters)
    whole, clean = good(options)
    faults.arm(case)
    reply = webui.img2img(source, options)
    fired, left = faults.disarm()
    notes = reply.fields["DINO Tile notes"].split("; ")
    assert fired and any(re.fullmatch(case.line, note) for note in notes), (fired, notes)
    check_left(left, clean)
    if case.stage in ("unet", "decode") and case.fault == "nan" and case.times > 1:  # then nothing was painted
        upscaled = source.resize(whole.image.size, Image.Resampling.LANCZOS)
        assert difference(reply.images[0], upscaled) <= 1
    again = webui.img2img(source, options)
    assert difference(again.images[0], whole.images[0]) == 0
    assert again.infotexts == whole.infotexts


def test_a_seam_pass_that_breaks_off_costs_no_image(webui: WebUI, source: Image.Image, faults: Faults, good: Good):
    options = {**LINEAR, **SEAMS}
    whole, clean = good(options)
    plain, _ = good(LINEAR)
    faults.arm(Case("encode", after=1))
    reply = webui.img2img(source, options)
    fired, left = faults.disarm()
    assert fired and f"all tiles are painted, but the seam fix failed: {TOLD}" in reply.fields["DINO Tile notes"]
    painted, _, total = reply.fields["DINO Tile painted"].partition(" of ")
    assert painted == "4" and int(total) > 4
    assert difference(reply.image, plain.image) == 0
    check_left(left, clean)
    assert difference(webui.img2img(source, options).image, whole.image) == 0


def test_what_is_painted_is_kept_also_where_nothing_was_to_be_saved(
    webui: WebUI, source: Image.Image, faults: Faults, folder: Path, good: Good
):
    """As is the API's default: with an error there is no image in the answer."""
    whole, _ = good(LINEAR)
    faults.arm(Case("decode", after=2))
    answer = webui.post("img2img", webui.body(source, LINEAR, save_images=False))
    assert faults.disarm()[0] and answer.status_code == 500
    found = re.fullmatch(rf"stopped after 2 of 4 tiles \(kept in (.+)\): {TOLD}", answer.json()["detail"])
    assert found and [Path(found[1])] == [file for file in files(folder) if file.suffix == ".png"], answer.text
    with Image.open(found[1]) as image:
        check_painted(image, whole.image, source, 2)


def test_of_a_batch_what_is_done_is_kept(webui: WebUI, source: Image.Image, faults: Faults, folder: Path, good: Good):
    whole, _ = good(LINEAR)
    faults.arm(Case("decode", after=len(PLAN) + 1))
    answer = webui.post("img2img", webui.body(source, LINEAR, batch_size=2, **SAVING))
    assert faults.disarm()[0]
    found = re.fullmatch(rf"stopped after 1 of 4 tiles \(kept in (.+), (.+)\): {TOLD}", answer.json()["detail"])
    assert found, answer.text
    with Image.open(found[1]) as first:
        assert difference(first, whole.image) == 0


def test_where_nothing_can_be_saved_the_fault_is_told_all_the_same(
    webui: WebUI, source: Image.Image, faults: Faults, folder: Path, good: Good
):
    _, clean = good(LINEAR)
    (folder / "file").write_text("no folder")
    webui.post("options", {"outdir_img2img_samples": str(folder / "file" / "x")}).raise_for_status()
    try:
        faults.arm(Case("decode", after=2))
        answer = webui.post("img2img", webui.body(source, LINEAR, **SAVING))
    finally:
        webui.post("options", {"outdir_img2img_samples": str(folder)}).raise_for_status()
        (folder / "file").unlink()
    fired, left = faults.disarm()
    assert fired
    check_left(left, clean)
    line = answer.json()["detail"]
    assert re.fullmatch(
        rf"stopped after 2 of 4 tiles \(they could not be saved: .*Not a directory.*\): {TOLD}", line
    ), line


def test_a_disk_that_is_full_leaves_no_half_image(
    webui: WebUI, source: Image.Image, faults: Faults, folder: Path, good: Good
):
    """The finished image is saved by the WebUI itself; what is said then is its own."""
    whole, clean = good(LINEAR)
    faults.arm(Case("save", "disk"))
    answer = webui.post("img2img", webui.body(source, LINEAR, **SAVING))
    fired, left = faults.disarm()
    assert fired and answer.status_code == 500
    told = answer.json()
    assert "No space left on device" in told.get("errors", told.get("message", "")), told
    assert not [file for file in files(folder) if file.suffix == ".png"]
    check_left(left, clean)
    assert difference(webui.img2img(source, LINEAR).image, whole.image) == 0


@pytest.mark.parametrize(
    "stage, after, line",
    [("unet", 4, r"stopped after 2 of 4 tiles \(kept in .*\): "), ("upscale", 0, "stopped before the first tile: ")],
)
def test_below_the_gallery_stands_the_line(
    webui: WebUI, source: Image.Image, faults: Faults, folder: Path, good: Good, stage: str, after: int, line: str
):
    _, clean = good(LINEAR)
    faults.arm(Case(stage, after=after))
    html = faults.press(webui.body(source, LINEAR, **SAVING))
    check_left(faults.disarm()[1], clean)
    assert re.search(rf"<div class='error'>DINO Tile: {line}{TOLD}</div>", html), html
