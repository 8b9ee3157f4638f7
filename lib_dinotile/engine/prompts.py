"""Prompts of single tiles, and of the regions that they show."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.dino.regions import Regions
from lib_dinotile.engine.host import Host, Prompt, check_name
from lib_dinotile.engine.report import UNMASKED, RegionShare, Report, TileReport
from lib_dinotile.lines import parse_tile_prompts
from lib_dinotile.settings import NONE, Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, TilePlan


def check_prompts(host: Host, plan: TilePlan, settings: Settings) -> None:
    """DinotileError for lines that belong to no tile or cannot be read, and for interrogators that the host has not."""
    if settings.captions != NONE:
        check_name("captions", settings.captions, [NONE, *host.interrogators()])
    lines = parse_tile_prompts(settings.tile_prompts)
    beyond = [number for number in lines if number > len(plan)]
    if beyond:
        raise DinotileError(f"tile_prompts: there is no tile {beyond[0]}, this image has {len(plan)}")
    words = settings.region_words.values()
    for line in [None, *lines.values(), *words] if settings.prompts_by_tile else []:
        host.check_prompt(_with_main(host, settings, line))


def check_letters(regions: Regions | None, words: Mapping[str, str]) -> None:
    """DinotileError for words of a region that the image does not have."""
    letters = regions.letters if regions else ""
    beyond = [letter for letter in words if letter not in letters]
    if beyond:
        there = f"{len(letters)} ({letters[0]} to {letters[-1]})" if letters else "none"
        raise DinotileError(
            f"region_prompts: there is no region {beyond[0]}, this image has {there}; the preview in img2img shows "
            "them, and analyze on the command line"
        )


def _with_main(host: Host, settings: Settings, own: str | None) -> str | None:
    """The prompt of a tile, or a region, with these words of its own; None for the main prompt."""
    own = ", ".join(filter(None, (settings.tile_prompt, own)))
    if not own or settings.tile_prompt_mode == "replace":
        return own or None
    return ", ".join(filter(None, (host.prompt, own)))


class TilePrompts:
    """The prompts of every tile: its own line, else the words of the regions that it shows, else its caption, else the
    tile prompt; behind the main prompt or alone."""

    def __init__(
        self,
        host: Host,
        canvas: Canvas,
        plan: TilePlan,
        settings: Settings,
        report: Report,
        regions: Regions | None = None,
    ) -> None:
        """Asks the interrogator, if it is wanted, for all tiles that have no words and are not outside the mask."""
        self._host, self._settings, self._report, self._regions = host, settings, report, regions
        self._words = settings.region_words if regions else {}
        self._tiles = report.tiles if settings.prompts_by_tile else []
        self._lines = parse_tile_prompts(settings.tile_prompts)
        for tile in self._tiles:
            tile.prompt = self._lines.get(tile.number)
            if tile.prompt is None:
                tile.regions = self._shown(tile.area)
        if settings.captions != NONE:
            ask = [
                tile
                for tile in self._tiles
                if tile.prompt is None and not _named(tile.regions) and tile.state != UNMASKED
            ]
            captions = host.caption([canvas.picture(tile.area) for tile in ask], settings.captions)
            for tile, caption in zip(ask, captions):
                tile.prompt = caption

    def of(self, area: Rect) -> list[Prompt]:
        """The prompts of a tile; one of another plan has the line or the caption of the nearest."""
        if not self._tiles:
            return [Prompt()]
        nearest, named = self._about(area)
        if not named:
            return [Prompt(self._prompt(nearest.prompt))]
        if not self._host.regional:
            return [Prompt(self._prompt(", ".join(dict.fromkeys(each.words for each in named))))]
        masks = self._masks(area, named)
        if len(masks) == 1:
            return [Prompt(text) for text in masks]
        total = sum(masks.values())
        return [Prompt(text, mask / total) for text, mask in masks.items()]

    def _about(self, area: Rect) -> tuple[TileReport, list[RegionShare]]:
        """The tile that is nearest, and the regions whose words an area is told: none where that has its own line."""
        nearest = self._report.of(area) or min(self._tiles, key=lambda tile: _distance(tile.area, area))
        if nearest.number in self._lines:
            return nearest, []
        return nearest, _named(nearest.regions if nearest.area == area else self._shown(area))

    def named(self, area: Rect) -> Tensor | None:
        """(h, w) in [0, 1]: how much of each latent cell of a tile is told by a region's words; None if nothing is."""
        found = self._about(area)[1] if self._words else []
        if self._regions is None or not found:
            return None
        letters = [self._regions.letters.index(each.letter) for each in found]
        return self._shares(area)[letters].sum(0).clamp(max=1)

    def _shares(self, area: Rect) -> Tensor:
        """(regions, h, w): how much of each latent cell of a tile they cover."""
        assert self._regions is not None
        factor = self._host.factor
        return self._regions.shares([area], (area.height // factor, area.width // factor))[0]

    def _prompt(self, own: str | None) -> str | None:
        return _with_main(self._host, self._settings, own)

    def _shown(self, area: Rect) -> list[RegionShare]:
        """The regions whose share of a tile is large enough, the largest first; those of one name count as one."""
        if not self._words or self._regions is None:
            return []
        shares = self._shares(area).mean((1, 2)).tolist()
        found = [RegionShare(*each, self._words.get(each[0], "")) for each in zip(self._regions.letters, shares)]
        together: dict[str, float] = {}
        for each in found:
            name = each.words or each.letter
            together[name] = together.get(name, 0.0) + each.share
        least = self._settings.region_share
        shown = [each for each in found if each.share > 0 and together[each.words or each.letter] >= least]
        return sorted(shown, key=lambda each: -each.share)

    def _masks(self, area: Rect, named: list[RegionShare]) -> dict[str | None, Tensor]:
        """Where each prompt counts in a tile, (h, w), by the prompt; more than zero everywhere.

        Where regions have no words it is the main prompt, if they are large enough together.
        """
        assert self._regions is not None
        letters, shares = self._regions.letters, self._shares(area)
        masks: dict[str | None, Tensor] = {}
        for each in named:
            text, mask = self._prompt(each.words), shares[letters.index(each.letter)]
            masks[text] = masks.get(text, 0) + mask
        rest = 1 - sum(masks.values())
        if rest.mean() >= max(self._settings.region_share, 1e-6):
            text = self._prompt(None)
            masks[text] = masks.get(text, 0) + rest
        # What is left out is filled by what there is, as much of it as there is in the tile.
        return {text: mask.clamp(min=0) + 1e-4 * mask.mean() for text, mask in masks.items()}


def _named(regions: list[RegionShare]) -> list[RegionShare]:
    return [each for each in regions if each.words]


def _distance(one: Rect, other: Rect) -> int:
    across = 2 * (one.x - other.x) + one.width - other.width
    down = 2 * (one.y - other.y) + one.height - other.height
    return across**2 + down**2
