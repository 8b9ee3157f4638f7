"""dinotile against its peers in a running A1111: python benchmarks/peers.py --webui URL [--only NAME]

The peers: https://github.com/Coyote-A/ultimate-upscale-for-automatic1111 and
https://github.com/pkuliyi2015/multidiffusion-upscaler-for-automatic1111.

Same checkpoint, source, steps, sampler and strength; one thing at a time on the machine. Every figure is dinotile's
time over the peer's, so less is better. Runs take turns after a warm-up run of each, and the figure is the ratio of the
medians. That both make the size asked for out of as many tiles as expected is checked, and what each of them paints is
printed: tiles, pixels, and for dinotile what the guard painted again.

But for usdu_1024_shipped dinotile runs plain, without guidance and guard, and the UNet sees as much at once in both.

usdu_1024: over Ultimate SD Upscale, 256 -> 1024 x 1024: its tile 256 with padding 32, which it samples at 320, and tile
320 with overlap 64; 16 tiles each. Seconds from request to answer. Target: 0.85.

usdu_1024_shipped: the same with all options of both as they are by default: dinotile with guidance, guard and automatic
tiles; Ultimate SD Upscale with its tile 512 and padding 32, in linear order. How much the guard paints again depends on
the checkpoint, up to the retry budget. Target: 1.3.

usdu_8192: the same, 1024 -> 8192 x 8192, 1024 tiles each. Neither is run on all of them. Of dinotile two
inpaint masks, squares in the middle of the source (INNER of its side), leave some; from both whole runs, encoding and
all else that comes with a tile in them,

    seconds of the smaller + (1024 - tiles of the smaller) * difference of the seconds / difference of the tiles

Ultimate SD Upscale paints every tile whatever the mask. It does the same for each, though: it is asked for its
progress twenty times a second, interrupted after so many tiles (WARM and then MEASURED), and the whole is

    start + tiles * seconds per tile + end

per tile: from the end of the WARMth tile to the end of the last one measured. start: from the request to the end of the
WARMth tile, less what so many tiles take: upscaling, and what else is done once. end: from the interrupt to the answer:
the finished image, and its PNG; it takes in what is left of the tile that was broken off. Target: 0.5.

tiled_diffusion: order "fused" over Tiled Diffusion's MultiDiffusion, 256 -> 1024 x 1024, tiles of 32 x 32 latent cells
(256 pixels) with overlap 8 (64), batch 4; 25 tiles each. Target: 0.9.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.photographs import example
from lib_dinotile.settings import Settings
from tests.live import client

Image.MAX_IMAGE_PIXELS = None
ULTIMATE, TILED = "ultimate sd upscale", "tiled diffusion"
RESAMPLER = "Lanczos"
TARGETS = {"usdu_1024": 0.85, "usdu_1024_shipped": 1.3, "usdu_8192": 0.5, "tiled_diffusion": 0.9}
PADDING = 32
"""Ultimate SD Upscale's, as it is by default."""
WARM, MEASURED = 4, 16
INNER = 0.1, 0.25
"""Shares of the large canvas that are painted."""

Request = Mapping[str, Any]
"""Arguments of the client's `img2img` and `start` besides the source."""


def dinotile(**options: Any) -> Request:
    return {"options": {"upscaler": RESAMPLER, **options}}


def shipped(**options: Any) -> Request:
    """All other options as they are by default: the client sends some that are not."""
    defaults = {name: getattr(Settings(), name) for name in client.BLIND}
    return dinotile(**defaults, **options)


def ultimate(webui: client.WebUI, scale: float, tile: int = 512, order: int = 0) -> Request:
    """Ultimate SD Upscale without a seam pass; order: 0 is linear, 1 chess. Else as it is by default."""
    # width and height of a tile, its mask blur and padding; the seam pass's width, strength and padding; the upscaler
    first = [None, tile, tile, 8, PADDING, 64, 0.25, 16, webui.names("upscalers").index(RESAMPLER)]
    # save, order, save after the seam pass, its mask blur, none of its types, size: by scale
    last = [False, order, False, 4, 0, 2, 0, 0, scale]
    return {"script_name": ULTIMATE, "script_args": [*first, *last]}


def ultimate_side(tile: int) -> int:
    """Pixels along a side of what it samples for a tile (`setup_redraw` of its USDURedraw)."""
    return math.ceil((tile + PADDING) / 64) * 64


def tiled(scale: float, tile: int, overlap: int, batch: int) -> Request:
    """Tiled Diffusion's MultiDiffusion; tile and overlap in pixels."""
    cells = [tile // 8, tile // 8, overlap // 8]
    arguments = [True, "MultiDiffusion", False, True, 0, 0, *cells, batch, RESAMPLER, scale]
    return {"alwayson_scripts": {TILED: {"args": arguments}}}


def dinotile_tiles(look: client.Progress) -> tuple[int, int] | None:
    """Tiles done and to do, as the WebUI's progress tells; None as long as it does not."""
    found = re.search(r"DINO Tile: painting tiles: (\d+) of (\d+)", look.text)
    return (int(found[1]), int(found[2])) if found else None


def ultimate_tiles(look: client.Progress) -> tuple[int, int] | None:
    """It makes every tile a job."""
    return look.jobs if look.running else None


@dataclass(frozen=True, eq=False)
class Side:
    """One of two that are compared, making an image of so many pixels a side in so many tiles."""

    name: str
    request: Request
    size: int
    expected: int
    tile: tuple[int, int]
    """(width, height) of what is sampled for a tile."""
    tiles: Callable[[client.Progress], tuple[int, int] | None] | None = None
    """None: it does not say."""

    def painted(self, reply: client.Reply) -> str:
        """Its tiles and pixels in words, and what was painted again."""
        width, height = self.tile
        again = sum(report.get("retried", 0.0) for report in reply.extra.get("DINO Tile report") or [])
        more = f", and {again:.0%} again" if again else ""
        return (
            f"{self.expected} tiles of {width} x {height}, {self.expected * width * height / 1e6:.2f} megapixels{more}"
        )

    def check(self, reply: client.Reply, tiles: int | None) -> client.Reply:
        """The same, if size and tiles are right."""
        made = reply.images[-1].size  # a script that returns several returns the finished one last
        if made != (self.size, self.size) or tiles != self.expected:
            sys.exit(f"{self.name} made {made} in {tiles} tiles, not {self.size} x {self.size} in {self.expected}")
        return reply

    def run(self, webui: client.WebUI, image: Image.Image, **more: Any) -> tuple[client.Reply, int | None]:
        """One run, and how many tiles it said that it had to do."""
        job = webui.start(image, **self.request, **more)
        if self.tiles is None:
            reply = job.reply()
            return reply, tiled_count(reply.infotexts[0], self.size)
        total = max((known[1] for known in map(self.tiles, job.looks(preview=False)) if known), default=None)
        return job.reply(), total


def tiled_count(infotext: str, side: int) -> int:
    """Tiles of Tiled Diffusion for what its infotext says, by its own formula (split_bboxes)."""
    tile, overlap = (int(re.findall(rf"{key}\D*(\d+)", infotext)[0]) for key in ("Tile tile width", "Tile Overlap"))
    return math.ceil((side // 8 - overlap) / (tile - overlap)) ** 2


def compare(webui: client.WebUI, sides: tuple[Side, Side], runs: int) -> float:
    """The ratio of the medians of whole runs."""
    image = example(256)
    seconds: dict[Side, list[float]] = {side: [] for side in sides}
    for side in sides:
        print(f"  {side.name:<24} {side.painted(side.check(*side.run(webui, image)))}", flush=True)
    for _ in range(runs):
        for side in sides:
            reply = webui.img2img(image, **side.request)
            seconds[side].append(side.check(reply, side.expected).seconds)
    return report(seconds)


def report(seconds: dict[Side, list[float]]) -> float:
    """Prints both sides; the ratio of the first to the second."""
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    for side, values in seconds.items():
        each = f"{medians[side] / side.expected:.3f} s a tile"
        print(f"  {side.name:<24} {medians[side]:9.1f} s  {each}  ({min(values):.1f} to {max(values):.1f})")
    first, second = medians.values()
    return first / second


def beginning(webui: client.WebUI, side: Side, image: Image.Image) -> float:
    """Seconds that a whole run would take, from its first tiles."""
    job, last, began, stopped = webui.start(image, **side.request), 0, 0.0, 0.0
    ends: dict[int, float] = {}
    total: int | None = None
    for look in job.looks(preview=False):
        began = began or look.when
        known = side.tiles(look) if side.tiles else None
        if known is None or stopped:
            continue
        done, total = known
        if done > last:
            ends[done], last = look.when, done
        if done >= WARM + MEASURED:
            webui.post("interrupt")
            stopped = look.when
    finished = began + side.check(job.reply(), total).seconds
    warm = next(done for done in sorted(ends) if done >= WARM)
    each = (ends[last] - ends[warm]) / (last - warm)
    start, end = ends[warm] - began - warm * each, finished - stopped
    print(f"    {side.name:<22} {each:.3f} s a tile, start {start:.1f} s, end {end:.1f} s")
    return start + side.expected * each + end


def through_masks(webui: client.WebUI, side: Side, image: Image.Image) -> float:
    """Seconds that a whole run would take, from two on parts of the canvas."""
    runs = []
    for part in INNER:
        margin = round(image.width * (1 - part) / 2)
        mask = Image.new("L", image.size)
        mask.paste(255, (margin, margin, image.width - margin, image.height - margin))
        inpaint = {"mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}  # starts from what is there
        reply, total = side.run(webui, image, mask=client.encode(mask), **inpaint)
        runs.append((total or 0, side.check(reply, side.expected).seconds))
    (few, short), (many, long) = runs
    if not 0 < few < many < side.expected:
        sys.exit(f"{side.name} made {few} and {many} tiles through masks, of {side.expected}")
    each = (long - short) / (many - few)
    print(f"    {side.name:<22} {each:.3f} s a tile, {short:.1f} s for {few} and {long:.1f} s for {many} of them")
    return short + (side.expected - few) * each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--webui", required=True, metavar="URL", help="an A1111 with --api, dinotile and both peers")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(TARGETS),
        default=[name for name in TARGETS if name != "usdu_8192"],
        metavar="NAME",
        help="these of the comparisons above; by default all but usdu_8192, which takes long",
    )
    parser.add_argument("--runs", type=int, default=3, help="of each, after a warm-up")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--denoise", type=float, default=0.4, help="4 steps at 0.4 are two UNet steps a tile")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    arguments = parser.parse_args()

    webui = client.WebUI(arguments.webui)
    there = map(str.lower, webui.get("sdapi/v1/scripts").json()["img2img"])
    if missing := {client.SCRIPT, ULTIMATE, TILED}.difference(there):
        sys.exit(f"{arguments.webui}: not installed there: {', '.join(sorted(missing))}")
    common = {"steps": arguments.steps, "denoising_strength": arguments.denoise}
    figures: dict[str, float] = {}

    def with_ultimate(scale: float, size: int, expected: int) -> tuple[Side, Side]:
        own = {**common, **dinotile(scale=scale, tile=320, overlap=64, batch=4, order="chess")}
        peer, seen = {**common, **ultimate(webui, scale, tile=256, order=1)}, (320, 320)
        return (
            Side("dinotile", own, size, expected, seen, dinotile_tiles),
            Side("Ultimate SD Upscale", peer, size, expected, seen, ultimate_tiles),
        )

    def as_shipped(scale: float, size: int) -> tuple[Side, Side]:
        plan = webui.dinotile("plan", {"width": size, "height": size, "options": {"scale": 1}}).json()
        own, peer = {**common, **shipped(scale=scale)}, {**common, **ultimate(webui, scale)}
        tile, seen = plan["tiles"][0], ultimate_side(512)
        return (
            Side("dinotile", own, size, plan["painted"], (tile["width"], tile["height"]), dinotile_tiles),
            Side("Ultimate SD Upscale", peer, size, math.ceil(size / 512) ** 2, (seen, seen), ultimate_tiles),
        )

    def plain() -> float:
        print("1024 x 1024, 16 tiles of 320")
        return compare(webui, with_ultimate(4.0, 1024, 16), arguments.runs)

    def by_default() -> float:
        print("1024 x 1024, both as they are by default")
        return compare(webui, as_shipped(4.0, 1024), arguments.runs)

    def together() -> float:
        print("1024 x 1024, 25 tiles of 256 advancing together")
        own, seen = {**common, **dinotile(scale=4.0, tile=256, overlap=64, batch=4, order="fused")}, (256, 256)
        fused = Side("dinotile, fused", own, 1024, 25, seen, dinotile_tiles)
        peer = Side("Tiled Diffusion", {**common, **tiled(4.0, 256, 64, 4)}, 1024, 25, seen)
        return compare(webui, (fused, peer), arguments.runs)

    def large() -> float:
        print("8192 x 8192, 1024 tiles of 320, extrapolated")
        sides = with_ultimate(8.0, 8192, 1024)
        seconds: dict[Side, list[float]] = {side: [] for side in sides}
        for _ in range(max(1, arguments.runs - 2)):
            for side, measure in zip(sides, (through_masks, beginning)):
                seconds[side].append(measure(webui, side, example(1024)))
        return report(seconds)

    comparisons = {
        "usdu_1024": plain,
        "usdu_1024_shipped": by_default,
        "tiled_diffusion": together,
        "usdu_8192": large,
    }
    model = webui.get("sdapi/v1/options").json()["sd_model_checkpoint"]
    print(f"{model}, {arguments.steps} steps at {arguments.denoise}")
    for key in arguments.only:
        figure = comparisons[key]()
        figures[key] = round(figure, 4)
        print(f"  {key}: {figure:.3f} (target: at most {TARGETS[key]})", flush=True)
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
