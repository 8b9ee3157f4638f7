"""What single tiles are told instead of the main prompt."""

from __future__ import annotations

from lib_dinotile import DinotileError
from lib_dinotile.hosts.base import Host, check_name
from lib_dinotile.report import UNMASKED, Report
from lib_dinotile.settings import NONE, Settings, parse_lines
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, TilePlan


def check_prompts(host: Host, plan: TilePlan, settings: Settings) -> None:
    """DinotileError for lines that belong to no tile, and for interrogators that the host has not."""
    if settings.captions != NONE:
        check_name("captions", settings.captions, [NONE, *host.interrogators()])
    beyond = [number for number in parse_lines(settings.tile_prompts) if number > len(plan)]
    if beyond:
        raise DinotileError(f"tile_prompts: there is no tile {beyond[0]}, this image has {len(plan)}")


class TilePrompts:
    """The prompt of every tile: its own line, else its caption, else the tile prompt, behind the main one or alone."""

    def __init__(self, host: Host, canvas: Canvas, plan: TilePlan, settings: Settings, report: Report) -> None:
        """Asks the interrogator, if it is wanted, for all tiles that have no line and are not outside the mask."""
        self._main, self._mode = host.prompt, settings.tile_prompt_mode
        self._common, self._tiles = settings.tile_prompt, report.tiles if settings.prompts_by_tile else []
        lines = parse_lines(settings.tile_prompts)
        for tile in self._tiles:
            tile.prompt = lines.get(tile.number)
        if settings.captions != NONE:
            ask = [tile for tile in self._tiles if tile.prompt is None and tile.state != UNMASKED]
            captions = host.caption([canvas.picture(tile.area) for tile in ask], settings.captions)
            for tile, caption in zip(ask, captions):
                tile.prompt = caption

    def of(self, area: Rect) -> str | None:
        """What a tile there is told, or None for the main prompt; one of another plan has the words of the nearest."""
        if not self._tiles:
            return None
        nearest = min(self._tiles, key=lambda tile: _distance(tile.area, area))
        own = ", ".join(filter(None, (self._common, nearest.prompt)))
        if not own:
            return None
        return own if self._mode == "replace" else ", ".join(filter(None, (self._main, own)))


def _distance(one: Rect, other: Rect) -> int:
    across = 2 * (one.x - other.x) + one.width - other.width
    down = 2 * (one.y - other.y) + one.height - other.height
    return across**2 + down**2
