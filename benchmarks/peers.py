"""dinotile against its peers in a running A1111: python benchmarks/peers.py --webui URL [--large] [--json]

Same checkpoint, source, steps, sampler, strength and size of what the UNet sees; one thing at a time on the machine.
Every figure is dinotile's time over the peer's, so less is better. Runs take turns after a warm-up run of each, and the
figure is the ratio of the medians. That both make the size asked for out of the same number of tiles is checked.

usdu_1024: over Ultimate SD Upscale, 256 -> 1024 x 1024: its tile 256 with padding 32, which it samples at 320, and tile
320 with overlap 64; 16 tiles each. Seconds from request to answer. Target: 0.9.

usdu_8192 (--large): the same, 1024 -> 8192 x 8192, 1024 tiles each. Neither is run on all of them. Of dinotile two
inpaint masks, squares in the middle of the source (INNER of its side), leave some; from both whole runs, encoding and
all else that comes with a tile in them,

    seconds of the smaller + (1024 - tiles of the smaller) * difference of the seconds / difference of the tiles

Ultimate SD Upscale paints every tile whatever the mask. It does the same for each, though: it is asked for its
progress ten times a second, interrupted after so many tiles (WARM and then MEASURED), and the whole is

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.webui import DINOTILE, TILED, ULTIMATE, Reply, Request, WebUI, inpaint

PHOTO = Path(__file__).parents[1] / "examples" / "photo.png"
TARGETS = {"usdu_1024": 0.9, "usdu_8192": 0.5, "tiled_diffusion": 0.9}
WARM, MEASURED = 4, 16
INNER = 0.1, 0.25
"""What of the large canvas is run."""

Look = dict[str, Any]


def dinotile_tiles(look: Look) -> tuple[int, int] | None:
    """Tiles done and to do, as the WebUI's progress tells; None as long as it does not."""
    found = re.search(r"DINO Tile: painting tiles: (\d+) of (\d+)", look.get("textinfo") or "")
    return (int(found[1]), int(found[2])) if found else None


def ultimate_tiles(look: Look) -> tuple[int, int] | None:
    """It makes every tile a job."""
    done, total = look["state"]["job_no"], look["state"]["job_count"]
    return (done, total) if total > 0 else None


@dataclass(frozen=True)
class Side:
    """One of two that are compared."""

    name: str
    request: Request
    tiles: Callable[[Look], tuple[int, int] | None] | None = None
    """None: it does not say."""


def source(side: int) -> Image.Image:
    return Image.open(PHOTO).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def check_size(name: str, reply: Reply, side: int) -> None:
    if reply.image.size != (side, side):
        sys.exit(f"{name} made {reply.image.size} and not {side} x {side}")


def check_tiles(name: str, found: int | None, expected: int) -> None:
    if found != expected:
        sys.exit(f"{name} made {found} tiles and not {expected}")


def tiled_count(infotext: str, side: int) -> int:
    """Tiles of Tiled Diffusion for what its infotext says, by its own formula (split_bboxes)."""
    tile, overlap = (int(re.search(rf"{key}\D*(\d+)", infotext)[1]) for key in ("Tile tile width", "Tile Overlap"))
    return math.ceil((side // 8 - overlap) / (tile - overlap)) ** 2


def compare(
    webui: WebUI, sides: tuple[Side, Side], expected: int, runs: int, small: int = 256, large: int = 1024
) -> float:
    """The ratio of the medians of whole runs."""
    image, seconds = source(small), {side.name: [] for side in sides}
    for side in sides:
        if side.tiles is None:
            reply = webui.img2img(image, side.request)
            counted = tiled_count(reply.infotext, large)
        else:
            job = webui.start(image, side.request)
            seen = [side.tiles(look) for _, look in job.looks()]
            reply, counted = job.reply(), next((total for _, total in filter(None, reversed(seen))), None)
        check_size(side.name, reply, large)
        check_tiles(side.name, counted, expected)
    for _ in range(runs):
        for side in sides:
            reply = webui.img2img(image, side.request)
            check_size(side.name, reply, large)
            seconds[side.name].append(reply.seconds)
    return report(seconds, {side.name: expected for side in sides})


def report(seconds: dict[str, list[float]], tiles: dict[str, int]) -> float:
    """Prints both sides; the ratio of the first to the second."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        each = f"{medians[name] / tiles[name]:.3f} s a tile"
        print(f"  {name:<24} {medians[name]:9.1f} s  {each}  ({min(values):.1f} to {max(values):.1f})")
    first, second = medians.values()
    return first / second


def beginning(webui: WebUI, side: Side, image: Image.Image, expected: int, size: int) -> float:
    """Seconds that a whole run would take, from its first tiles."""
    job, last, ends, stopped = webui.start(image, side.request), 0, {}, 0.0
    began = None
    for now, look in job.looks():
        began = began or now
        known = side.tiles(look)
        if known is None or stopped:
            continue
        done, total = known
        if done:
            check_tiles(side.name, total, expected)
        if done > last:
            ends[done], last = now, done
        if done >= WARM + MEASURED:
            webui.call("interrupt", {})
            stopped = now
    reply = job.reply()
    check_size(side.name, reply, size)
    finished = began + reply.seconds
    warm = next(done for done in sorted(ends) if done >= WARM)
    each = (ends[last] - ends[warm]) / (last - warm)
    start, end = ends[warm] - began - warm * each, finished - stopped
    print(f"    {side.name:<22} {each:.3f} s a tile, start {start:.1f} s, end {end:.1f} s")
    return start + expected * each + end


def through_masks(webui: WebUI, side: Side, image: Image.Image, expected: int, size: int) -> float:
    """Seconds that a whole run would take, from two on parts of the canvas."""
    runs = []
    for part in INNER:
        margin = round(image.width * (1 - part) / 2)
        mask = Image.new("L", image.size)
        mask.paste(255, (margin, margin, image.width - margin, image.height - margin))
        job = webui.start(image, {**side.request, **inpaint(mask)})
        total = max((known[1] for known in (side.tiles(look) for _, look in job.looks()) if known), default=0)
        reply = job.reply()
        check_size(side.name, reply, size)
        runs.append((total, reply.seconds))
    (few, short), (many, long) = runs
    if not 0 < few < many < expected:
        sys.exit(f"{side.name} made {few} and {many} tiles through masks, of {expected}")
    each = (long - short) / (many - few)
    print(f"    {side.name:<22} {each:.3f} s a tile, {short:.1f} s for {few} and {long:.1f} s for {many} of them")
    return short + (expected - few) * each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--webui", required=True, metavar="URL", help="an A1111 with --api and both peers installed")
    parser.add_argument("--large", action="store_true", help="also 8192 x 8192; takes some minutes more")
    parser.add_argument("--runs", type=int, default=3, help="of each, after a warm-up")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--denoise", type=float, default=0.4, help="4 steps at 0.4 are two UNet steps a tile")
    parser.add_argument("--json", action="store_true", help="one last line of JSON")
    arguments = parser.parse_args()

    webui = WebUI(arguments.webui, arguments.steps, arguments.denoise)
    webui.need(DINOTILE, ULTIMATE, TILED)
    tiles, figures = {"tile": 320, "overlap": 64, "batch": 4, "order": "chess"}, {}

    def ultimate(scale: float) -> tuple[Side, Side]:
        peer = webui.ultimate(scale, 256, 32, "chess")
        return (
            Side("dinotile", webui.dinotile(scale=scale, **tiles), dinotile_tiles),
            Side("Ultimate SD Upscale", peer, ultimate_tiles),
        )

    def show(key: str) -> None:
        print(f"  {key}: {figures[key]:.3f} (target: at most {TARGETS[key]})", flush=True)

    print(f"{webui.call('options')['sd_model_checkpoint']}, {arguments.steps} steps at {arguments.denoise}")
    print("1024 x 1024, 16 tiles of 320")
    figures["usdu_1024"] = compare(webui, ultimate(4.0), 16, arguments.runs)
    show("usdu_1024")
    fused = (
        Side(
            "dinotile, fused", webui.dinotile(scale=4.0, tile=256, overlap=64, batch=4, order="fused"), dinotile_tiles
        ),
        Side("Tiled Diffusion", webui.tiled(4.0, 256, 64, 4)),
    )
    print("1024 x 1024, 25 tiles of 256 advancing together")
    figures["tiled_diffusion"] = compare(webui, fused, 25, arguments.runs)
    show("tiled_diffusion")
    if arguments.large:
        print("8192 x 8192, 1024 tiles of 320, extrapolated")
        image, sides = source(1024), ultimate(8.0)
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(max(1, arguments.runs - 2)):
            for side, measure in zip(sides, (through_masks, beginning)):
                seconds[side.name].append(measure(webui, side, image, 1024, 8192))
        figures["usdu_8192"] = report(seconds, {side.name: 1024 for side in sides})
        show("usdu_8192")
    if arguments.json:
        print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
