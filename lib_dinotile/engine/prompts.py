"""Prompts of single tiles."""

from __future__ import annotations

from lib_dinotile import DinotileError
from lib_dinotile.engine.host import Host, check_name
from lib_dinotile.engine.report import UNMASKED, Report
from lib_dinotile.settings import NONE, Settings, parse_lines
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, TilePlan


def check_prompts(host: Host, plan: TilePlan, settings: Settings) -> None:
    """DinotileError for lines that belong to no tile or cannot be read, and for interrogators that the host has not."""
    if settings.captions != NONE:
        check_name("captions", settings.captions, [NONE, *host.interrogators()])
    lines = parse_lines(settings.tile_prompts)
    beyond = [number for number in lines if number > len(plan)]
    if beyond:
        raise DinotileError(f"tile_prompts: there is no tile {beyond[0]}, this image has {len(plan)}")
    for line in [None, *lines.values()] if settings.prompts_by_tile else []:
        host.check_prompt(_told(host, settings, line))


def _told(host: Host, settings: Settings, own: str | None) -> str | None:
    """The prompt of a tile with these words of its own; None for the main prompt."""
    own = ", ".join(filter(None, (settings.tile_prompt, own)))
    if not own or settings.tile_prompt_mode == "replace":
        return own or None
    return ", ".join(filter(None, (host.prompt, own)))


class TilePrompts:
    """The prompt of every tile: its own line, else its caption, else the tile prompt, behind the main one or alone."""

    def __init__(self, host: Host, canvas: Canvas, plan: TilePlan, settings: Settings, report: Report) -> None:
        """Asks the interrogator, if it is wanted, for all tiles that have no line and are not outside the mask."""
        self._host, self._settings, self._report = host, settings, report
        self._tiles = report.tiles if settings.prompts_by_tile else []
        lines = parse_lines(settings.tile_prompts)
        for tile in self._tiles:
            tile.prompt = lines.get(tile.number)
        if settings.captions != NONE:
            ask = [tile for tile in self._tiles if tile.prompt is None and tile.state != UNMASKED]
            captions = host.caption([canvas.picture(tile.area) for tile in ask], settings.captions)
            for tile, caption in zip(ask, captions):
                tile.prompt = caption

    def of(self, area: Rect) -> str | None:
        """The prompt of a tile, or None for the main one; a tile of another plan has that of the nearest."""
        if not self._tiles:
            return None
        nearest = self._report.of(area) or min(self._tiles, key=lambda tile: _distance(tile.area, area))
        return _told(self._host, self._settings, nearest.prompt)


def _distance(one: Rect, other: Rect) -> int:
    across = 2 * (one.x - other.x) + one.width - other.width
    down = 2 * (one.y - other.y) + one.height - other.height
    return across**2 + down**2
