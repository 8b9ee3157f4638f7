"""The flow: upscale, look at the source, then tile by tile encode, sample, decode and blend. One for all hosts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from lib_dinotile import DinotileError, Handling, one_line
from lib_dinotile.condition.conditioner import Conditioner, Conditions
from lib_dinotile.dino.regions import Regions
from lib_dinotile.engine.host import Host, Interrupted, check_name
from lib_dinotile.engine.journal import Journal
from lib_dinotile.engine.memory import OutOfMemoryError, is_out_of_memory
from lib_dinotile.engine.passes import passes
from lib_dinotile.engine.prompts import check_letters, check_prompts
from lib_dinotile.engine.report import Report
from lib_dinotile.engine.retry import retries
from lib_dinotile.engine.run import Run
from lib_dinotile.engine.team import Team
from lib_dinotile.images import enough_memory
from lib_dinotile.settings import CONSISTENCY, MAX_SIDE, SEMANTIC, SOURCE, Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import Rect, TilePlan

MAP_SIDE = 2048
"""Longest side of a map, in pixels: larger pictures are shown smaller."""


@dataclass(frozen=True)
class Result:
    """A canvas with what was painted on it."""

    image: Image.Image
    """RGB, exactly the size asked for. Where no tile was painted it shows the upscaled source."""
    painted: int
    """Tiles painted, of all passes."""
    total: int
    """Tiles to paint; more than are painted if the run was stopped."""
    report: Report
    maps: Mapping[str, Image.Image] = field(default_factory=dict)
    """Pictures besides it, by name, as `Settings.maps` asks for them; none of an unfinished run."""

    later: str = ""
    """What was at work last, where all tiles of the first pass are painted: the guard or the seam fix."""

    @property
    def complete(self) -> bool:
        return self.painted == self.total


class UnfinishedError(DinotileError):
    """A run that broke off with an error; `result` keeps the tiles painted until then."""

    def __init__(self, error: BaseException, result: Result, kept: str = "") -> None:
        """kept: where the tiles painted can be found, once they are saved."""
        super().__init__(f"stopped after {result.painted} of {result.total} tiles{kept}: {one_line(error)}", 500)
        self.result = result


def canvas_size(size: tuple[int, int], settings: Settings, given: tuple[int, int] | None = None) -> tuple[int, int]:
    """(width, height) of the result for a source of this size, to the nearest pixel.

    given: what target `img2img size` stands for; where one of them is 0 it is in proportion to the other.
    """
    width, height = size
    if settings.target == "img2img size":
        if not given or not any(given):
            raise DinotileError("target: no size is given: give a width or a height, or choose scale or longest side")
        wide, high = given
        result = wide or max(1, round(width * high / height)), high or max(1, round(height * wide / width))
    else:
        scale = settings.scale if settings.target == "scale" else settings.longest / max(size)
        result = max(1, round(width * scale)), max(1, round(height * scale))
    if max(result) > MAX_SIDE:
        raise DinotileError(
            f"{settings.target}: the result would be {result[0]}x{result[1]}, but may have at most {MAX_SIDE} pixels a "
            "side"
        )
    return result


def make_plan(host: Host, size: tuple[int, int], settings: Settings) -> TilePlan:
    """The tiles for a canvas of (width, height) on this host. DinotileError as `plan_tiles`."""
    return plan_tiles(size, settings, host.base, host.factor)


def plan_tiles(size: tuple[int, int], settings: Settings, base: str, factor: int = 8) -> TilePlan:
    """The tiles for a canvas of (width, height) and a family of checkpoints; factor: pixels per latent cell.

    DinotileError if the overlap is too wide for them.
    """
    largest, least = settings.tile_sides(base)
    return TilePlan(*size, largest, settings.overlap, factor, settings.order, least)


def workload(plan: TilePlan, settings: Settings) -> tuple[int, int]:
    """(tiles, pixels of all of them) that are painted if none is left out."""
    grids = [tiles for tiles, *_ in passes(plan, settings)]
    return sum(map(len, grids)), sum(len(tiles) * math.prod(tiles.tile_size) for tiles in grids)


def upscale(
    host: Host,
    source: Image.Image,
    settings: Settings,
    noise: NoiseField,
    conditioner: Conditioner | None = None,
    size: tuple[int, int] | None = None,
    mask: Image.Image | None = None,
    fill: Callable[[Image.Image, Image.Image], Image.Image] | None = None,
    journal: Journal | None = None,
    team: Team | None = None,
) -> Result:
    """The source (RGB) made larger and painted tile by tile.

    size: of the result, if `settings` do not say it; mask (L, of any size, laid over the whole source): white where the
    result may change; fill: makes of the upscaled source and its mask what the tiles start from within the mask;
    journal: keeps painted tiles, and has those of an earlier run; team: the processes that share the work.

    DinotileError, before any work is done, for settings that this host cannot meet; UnfinishedError, with what is
    painted, for whatever breaks the run off later. If the user stops the host the result is not `complete`.
    """
    check_name("upscaler", settings.upscaler, host.upscalers())
    size = size or canvas_size(source.size, settings)
    plan = make_plan(host, size, settings)
    check_prompts(host, plan, settings)
    check_memory(source.size, size)
    with torch.no_grad():
        with _before_the_first_tile(size):
            image = host.upscale(source, plan.size, settings.upscaler)
            canvas, conditions, stopped = _canvas(host, image, plan, mask, fill), Conditions(), False
            enlarged = image if settings.shows(SOURCE) else None
            del image
            try:
                if conditioner:
                    conditions = conditioner.conditions(source, conditioner.features(source, size), canvas, plan)
                    check_letters(conditions.regions, settings.region_words)
            except Interrupted:
                stopped = True
            batches = settings.order != "fused" or settings.seams != "none" or bool(retries(settings))
            alone = host.batch_note() if settings.batch > 1 and batches else ""
            settings = dataclasses.replace(settings, batch=1) if alone else settings
            run = Run(host, settings, noise, canvas, plan, conditions, journal, team or Team())
            run.report.notes += [alone] if alone else []
        if stopped:
            return _result(run)
        maps: Mapping[str, Image.Image] = {}
        try:
            run.paint()
            if settings.maps != "none" and run.done == run.total:
                maps = _maps(settings, conditions, run, plan, enlarged)
        except Interrupted:
            pass
        except (Exception, KeyboardInterrupt) as error:
            raise UnfinishedError(error, _result(run)) from error
        return _result(run, maps)


def _before_the_first_tile(size: tuple[int, int]) -> Handling:
    """Whatever fails in it is told in one line; size: (width, height) of the result."""

    def tell(error: Exception) -> bool:
        if isinstance(error, DinotileError):
            return False
        if is_out_of_memory(error):
            raise _too_large(size) from error
        raise DinotileError(f"stopped before the first tile: {one_line(error)}", 500) from error

    return Handling(tell)


def _maps(
    settings: Settings, conditions: Conditions, run: Run, plan: TilePlan, enlarged: Image.Image | None
) -> Mapping[str, Image.Image]:
    """The maps that are asked for; none, and a note, if they cannot be drawn: the image is not to be lost for them."""
    try:
        return draw_maps(settings, conditions, run.canvas, plan, run.painted, enlarged)
    except Exception as error:
        run.report.note(f"maps: they cannot be drawn: {one_line(error)}")
        return {}


def draw_maps(
    settings: Settings,
    conditions: Conditions,
    canvas: Canvas,
    plan: TilePlan,
    tiles: Sequence[Rect],
    enlarged: Image.Image | None = None,
) -> dict[str, Image.Image]:
    """The maps that `settings` ask for, by name; consistency where these tiles are painted.

    enlarged: the upscaled source, of the canvas's size, which is shown as it is.
    """
    from lib_dinotile.engine import maps  # matplotlib takes long to load

    found, image = {SOURCE: enlarged} if enlarged else {}, canvas.preview(MAP_SIDE)
    if conditions.shown:
        found[SEMANTIC] = maps.semantic_map(image, conditions.shown, plan)
    if settings.shows(CONSISTENCY):
        assert conditions.guard is not None  # these maps ask for one
        found[CONSISTENCY] = maps.consistency_map(image, *maps.consistency(conditions.guard, canvas, plan, tiles))
    return found


def check_memory(source: tuple[int, int], size: tuple[int, int], later: int = 0) -> None:
    """DinotileError if a canvas of (width, height) for a source of such a size surely does not fit; later: bytes that
    the host needs when it is painted."""
    # Of the canvas: the upscaled image as Pillow has it, the base and the change. Of the source: what the encoder sees.
    now = (4 + 3 + 6) * size[0] * size[1] + (3 + 12) * source[0] * source[1]
    if not enough_memory(max(now, later)):
        raise _too_large(size)


def _too_large(size: tuple[int, int]) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"out of memory before the first tile: make the result smaller than {size[0]}x{size[1]}", 500
    )


def _canvas(
    host: Host,
    image: Image.Image,
    plan: TilePlan,
    mask: Image.Image | None,
    fill: Callable[[Image.Image, Image.Image], Image.Image] | None,
) -> Canvas:
    mask = mask and mask.resize(plan.size, Image.Resampling.BILINEAR)
    return Canvas(image, plan, mask, fill(image, mask) if fill and mask else None, host.device)


def preview(conditioner: Conditioner, source: Image.Image, plan: TilePlan) -> Image.Image:
    """The semantic map of a source (RGB) with the tiles of a plan, before anything is painted."""
    from lib_dinotile.engine import maps  # matplotlib takes long to load

    with torch.no_grad():
        field = conditioner.features(source, plan.size).shown
    assert field is not None  # a preview asks for that
    return maps.semantic_map(_shown(source, plan.size), field, plan)


def _shown(source: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A source as a map shows it, for a canvas of (width, height)."""
    return source.resize([max(1, round(side * map_scale(size))) for side in size], Image.Resampling.LANCZOS)


def map_scale(size: tuple[int, int]) -> float:
    """Pixels of a map for one of a canvas of (width, height)."""
    return min(1.0, MAP_SIDE / max(size))


def draw_regions(source: Image.Image, regions: Regions, plan: TilePlan, words: Mapping[str, str]) -> Image.Image:
    """The map of a source's (RGB) regions over the canvas of a plan, with its tiles and the regions' words."""
    from lib_dinotile.engine import maps

    return maps.region_map(_shown(source, plan.size), regions, plan, words)


def analyze(
    conditioner: Conditioner,
    source: Image.Image,
    settings: Settings,
    size: tuple[int, int],
    result: Image.Image | None = None,
) -> dict[str, Image.Image]:
    """The maps that `settings` ask for, of a source (RGB) and its result of (width, height); without one, of the source
    itself enlarged by Lanczos."""
    plan = plan_tiles(size, settings, "sd15")
    check_memory(source.size, size)
    with torch.no_grad():
        features = conditioner.features(source, size)
        canvas = Canvas(source.resize(size, Image.Resampling.LANCZOS), plan)
        conditions = conditioner.conditions(source, features, canvas, plan)
        if result is not None:
            whole = Rect(0, 0, *plan.padded)
            canvas.add(whole, Canvas(result, plan).source(whole) - canvas.source(whole))
        return draw_maps(settings, conditions, canvas, plan, plan.tiles)


def _result(run: Run, maps: Mapping[str, Image.Image] | None = None) -> Result:
    return Result(run.canvas.finish(), run.done, run.total, run.report, maps or {}, run.later)
