"""From names in the settings to everything that uses DINO features: adapter, guidance and guard."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import Adapter, AdapterCondition
from lib_dinotile.condition.adapter_file import check_encoder, check_fit, load_adapter, read_config
from lib_dinotile.condition.guard import GUARD_LAYER, OTHER_LAYER, Guard, rehearsal_size, rehearse
from lib_dinotile.condition.guidance import CONTEXT as GUIDANCE_CONTEXT
from lib_dinotile.condition.guidance import Guidance
from lib_dinotile.condition.heads import ByLayer, FixedHeads, Heads, heads_for
from lib_dinotile.condition.names import check_names
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.dino.cache import FeatureCache
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.checkpoint import CONFIG, WEIGHTS, automatic_encoder, encoders, locate
from lib_dinotile.dino.encoder import BUILT_IN, Facet, PatchEncoder, encoder_dtype, load_encoder
from lib_dinotile.dino.field import FeatureField
from lib_dinotile.dino.head import Floor, RestorationHead, forget_heads, heads_in
from lib_dinotile.dino.locks import Progress, silent
from lib_dinotile.dino.regions import FINEST, Regions, find_regions
from lib_dinotile.dino.tile_features import TileFeatures
from lib_dinotile.settings import AUTOMATIC, DECODERS, LINEAR, NONE, SELF_SIMILARITY, SEMANTIC, Settings
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, TilePlan
from lib_dinotile.weights import Stamp, stamp

CPU = torch.device("cpu")
MINI = Path(__file__).parents[1] / "mini"
"""The built-in model's folder."""


class Model(Protocol):
    """The part of a `Host` that conditioning needs."""

    @property
    def base(self) -> str: ...
    @property
    def shape(self) -> UNetShape | None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def guidance_decoder(self, choice: str) -> tuple[str, Callable[[Tensor], Tensor]]: ...


def installed_weights(folder: Path) -> dict[str, Path]:
    """Names and files of the adapters, or heads, in a folder and below it."""
    files = (file for file in sorted(folder.rglob("*.safetensors")) if file.is_file())
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


_features = FeatureCache()


@functools.lru_cache(maxsize=1)
def _adapter(path: Path, state: Stamp | None, device: torch.device, dtype: torch.dtype) -> Adapter:
    return load_adapter(path, device, dtype)


@functools.lru_cache(maxsize=1)
def _encoder(
    name: str, folder: Path | None, found: tuple[object, ...], device: torch.device, dtype: torch.dtype
) -> PatchEncoder:
    """found: the checkpoint's folder and its files' stamps, so that an exchanged checkpoint is loaded again."""
    return load_encoder(name, folder, device=device, dtype=dtype, download=False)


@dataclass(frozen=True)
class Features:
    """Features of a source as fields over the canvas; None where nothing asks for them."""

    adapter: FeatureField | None
    guidance: FeatureField | None
    guard: FeatureField | None
    shown: FeatureField | None
    """For the semantic map: as the encoder sees the source, whatever the head says."""
    regions: Regions | None = None
    heads: ByLayer = dataclasses.field(default_factory=dict)
    """Through which those for guidance and guard were seen."""


@dataclass(frozen=True)
class Conditions:
    """Conditions of the tiles of one canvas."""

    adapted: Callable[[Sequence[Rect], tuple[int, int]], AdapterCondition] | None = None
    """Gives some tiles with this latent (h, w) their residuals."""
    guidance: Guidance | None = None
    guard: Guard | None = None
    shown: FeatureField | None = None
    """For the semantic map."""
    regions: Regions | None = None
    notes: Sequence[str] = ()
    """For the user."""


class Conditioner:
    """Looks at a source once: what an adapter is given, what guidance aims at and what the guard compares with."""

    def __init__(
        self,
        settings: Settings,
        encoder: PatchEncoder,
        adapter: Adapter | None = None,
        heads: Heads | None = None,
        decoder: tuple[str, Callable[[Tensor], Tensor]] | None = None,
        adapter_head: RestorationHead | None = None,
        on_cpu: Callable[[], PatchEncoder] | None = None,
    ) -> None:
        """heads: restoration heads for guidance and guard; decoder: name and function of what guidance sees the latents
        through; adapter_head: what the adapter reads the features through; on_cpu: loads the same encoder on the CPU in
        float32, where it is another."""
        self._on_cpu = on_cpu
        self._settings, self.encoder, self._adapter = settings, encoder, adapter
        self._heads, self._decoder, self._adapter_head = heads or FixedHeads(), decoder, adapter_head
        self._rests = False
        """Whether guidance has nothing to aim at."""

    @classmethod
    def load(
        cls,
        settings: Settings,
        host: Model,
        adapters: Mapping[str, Path],
        encoders: Path | None = None,
        heads: Mapping[str, Path] | None = None,
        trusted: bool = True,
        store: Store | None = None,
    ) -> Conditioner | None:
        """As `settings` ask for it, or None if nothing in them uses DINO features.

        adapters, heads: names and files to choose from; encoders: folder of installed encoders; store: of calibrated
        heads. Unless `trusted`, an encoder is one of those or a published one, never a path. DinotileError, before a
        tile is painted, if anything is not there or does not fit the host's checkpoint or the encoder.
        """
        check_names(settings, adapters, heads or {}, encoders, trusted)
        if settings.adapter == NONE:
            _adapter.cache_clear()
        if not settings.looks:
            _encoder.cache_clear()
            forget_heads()
            return None
        config, device = None, torch.device(host.device)
        if settings.adapter != NONE:
            name = settings.adapter
            config = read_config(adapters[name])
            if host.shape is None:
                raise DinotileError(
                    f"adapter {name!r}: adapters do not work with this checkpoint's model; set Adapter to {NONE}"
                )
            check_fit(config, name, host.base, host.shape)
        dtype = encoder_dtype(device, host.dtype)
        store = store or Store()
        named = config.encoder if config else None
        encoder = _encoder_for(settings, named, encoders, device, dtype, store.progress)
        if settings.guidance and settings.layer > encoder.depth:
            raise DinotileError(f"layer: encoder {encoder.id!r} has {encoder.depth} layers, give at most that")
        adapter, head, own = None, None, None
        if config:
            check_encoder(config, name, encoder.id, encoder.width, encoder.depth)
            own = adapters[name]
            adapter = _adapter(own, stamp(own), device, host.dtype)
            if config.restored:
                head = heads_in(own, encoder).get(config.layer)
                if head is None:
                    raise DinotileError(f"{own.name} is damaged: it has no head for the layer that it reads")
        decoder = host.guidance_decoder(settings.decoder) if settings.guidance else None
        found = heads_for(settings, encoder, heads or {}, own, store)
        return cls(settings, encoder, adapter, found, decoder, head, _on_cpu(settings, named, encoders))

    @classmethod
    def without_model(
        cls,
        settings: Settings,
        heads: Mapping[str, Path] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        adapters: Mapping[str, Path] | None = None,
        encoders: Path | None = None,
        trusted: bool = True,
        store: Store | None = None,
    ) -> Conditioner:
        """Only looks: for maps. Of an adapter only the encoder that it names is taken; all else as in `load`."""
        check_names(settings, adapters or {}, heads or {}, encoders, trusted)
        store = store or Store()
        own = None if settings.adapter == NONE else (adapters or {})[settings.adapter]
        named = read_config(own).encoder if own else None
        encoder = _encoder_for(settings, named, encoders, torch.device(device), dtype, store.progress)
        found = heads_for(settings, encoder, heads or {}, own, store)
        on_cpu = _on_cpu(settings, named, encoders)
        return cls(dataclasses.replace(settings, guidance=0.0), encoder, heads=found, on_cpu=on_cpu)

    @property
    def resolved(self) -> Settings:
        """The settings for PNG info, with what Automatic stood for: on another machine it may stand for something else.

        A head that stays Automatic is the one in the adapter's file.
        """
        stood_for: dict[str, Any] = {"encoder": self.encoder.id, "head": self._heads.name}
        if self._decoder and self._decoder[0] in DECODERS:
            stood_for["decoder"] = self._decoder[0]
        automatic = {name: value for name, value in stood_for.items() if getattr(self._settings, name) == AUTOMATIC}
        return dataclasses.replace(self._settings, **automatic)

    @property
    def notes(self) -> list[str]:
        """Notes for the user: encoder, heads and decoder in use."""
        notes = [f"encoder: {self.encoder.id}"]
        # Also where it was named, or PNG info would not give itself again.
        if self.encoder.id == BUILT_IN and self._adapter is None:
            notes = ["encoder: the small built-in one; install a DINOv2 for better results, see DINO encoder"]
        if self._steers or self._settings.judges:
            notes += self._heads.notes
        if self._rests:
            notes.append(f"guidance is off: it needs a restoration head; set Restoration head to {AUTOMATIC}")
        elif self._decoder:
            name = self._decoder[0]
            coarse = " (too coarse for fine textures, TAESD is better)"
            notes.append(f"guidance decoder: {name}{coarse if name == LINEAR else ''}")
        return notes

    @property
    def _steers(self) -> bool:
        """Whether guidance is wanted that compares tokens, and so needs a head."""
        return bool(self._settings.guidance) and self._guided[1] == "tokens"

    def features(self, source: Image.Image, size: tuple[int, int]) -> Features:
        """The source's (RGB) features as fields over a canvas of (width, height)."""
        settings = self._settings
        wanted: dict[str, tuple[int, Facet] | None] = {
            "adapter": (self._adapter.config.layer, "tokens") if self._adapter else None,
            "guidance": self._guided if settings.guidance else None,
            "guard": (self._guarded, "tokens") if settings.judges else None,
            "shown": (-1, "tokens") if settings.shows(SEMANTIC) else None,
        }
        asked = {name: each for name, each in wanted.items() if each}
        fields: dict[str, FeatureField | None] = dict.fromkeys(wanted)
        fine = {name: self._patches(size, compared=name in ("guidance", "guard")) for name in asked}
        for patches in dict.fromkeys(fine.values()):  # one, but for small canvases
            names = [name for name in asked if fine[name] == patches]
            fields.update(zip(names, self._fields(source, size, [asked[name] for name in names], patches)))
        through = [name for name in ("guidance", "guard") if name in asked and asked[name][1] == "tokens"]
        heads = self._heads.of(source.size, size, [asked[name][0] for name in through]) if through else {}
        for name in through:
            fields[name] = _through(heads.get(asked[name][0]), fields[name])
        self._rests = self._steers and not heads
        if self._rests:
            fields["guidance"] = None
        fields["adapter"] = _through(self._adapter_head, fields["adapter"])
        return Features(**fields, regions=self.regions(source, size) if settings.region_words else None, heads=heads)

    def regions(self, source: Image.Image, size: tuple[int, int]) -> Regions:
        """The regions of a source (RGB), laid over a canvas of (width, height).

        They are as the encoder sees it, whatever the head says; on the CPU in float32, so that they are the same on all
        devices and in any precision; and no finer than regions are.
        """
        same = self.encoder.device.type == "cpu" and self.encoder.dtype == torch.float32
        encoder = self.encoder if same or self._on_cpu is None else self._on_cpu()
        field = _features.field(encoder, to_tensor(source), size, min(self._settings.patches, FINEST))
        return find_regions(field, self._settings.region_count)

    def _fields(
        self, source: Image.Image, size: tuple[int, int], wanted: Sequence[tuple[int, Facet]], patches: int
    ) -> list[FeatureField]:
        windows = self._settings.windows
        return _features.fields(self.encoder, to_tensor(source), size, patches, windows, wanted)

    def _patches(self, size: tuple[int, int], compared: bool) -> int:
        """Along the longer side of what the encoder sees; compared: with what is painted, where a patch shows no less
        than as many pixels of the canvas of (width, height)."""
        patches, finest = self._settings.patches, max(size) // (self._settings.windows * self.encoder.patch)
        return max(1, min(patches, finest)) if compared else patches

    @property
    def _guided(self) -> tuple[int, Facet]:
        """(layer, facet) that guidance looks at."""
        return -self._settings.layer, "keys" if self._settings.distance == SELF_SIMILARITY else "tokens"

    @property
    def _guarded(self) -> int:
        """The layer that the guard looks at: another than guidance, which would please the judge otherwise."""
        steered = self._settings.guidance and self._guided[0] == GUARD_LAYER and self.encoder.depth >= -OTHER_LAYER
        return OTHER_LAYER if steered else GUARD_LAYER

    def _condition(
        self, adapter: Adapter, field: FeatureField, tiles: Sequence[Rect], latent: tuple[int, int]
    ) -> AdapterCondition:
        """The adapter's condition of a batch of tiles with this latent (h, w)."""
        settings, crops = self._settings, field.crop(tiles, adapter.grid(latent))
        return AdapterCondition(adapter, crops, latent, settings.strength, settings.start, settings.end)

    def conditions(self, source: Image.Image, features: Features, canvas: Canvas, plan: TilePlan) -> Conditions:
        """Adapter, guidance and guard for the tiles of a canvas."""
        settings = self._settings
        adapted, guidance, guard = None, None, None
        if self._adapter and features.adapter:
            adapted = functools.partial(self._condition, self._adapter, features.adapter)
        if features.guidance and self._decoder:
            layer, facet = self._guided
            guidance = Guidance(
                TileFeatures(self.encoder, features.guidance, plan.padded, layer, facet, GUIDANCE_CONTEXT),
                self._decoder[1],
                settings.guidance,
                settings.guidance_start,
                settings.guidance_end,
                settings.every,
                settings.views,
                settings.distance,
            )
        if features.guard:
            guard = self._guard(source, features.guard, features.heads, canvas, plan)
        return Conditions(adapted, guidance, guard, features.shown, features.regions, self.notes)

    def _guard(self, source: Image.Image, field: FeatureField, heads: ByLayer, canvas: Canvas, plan: TilePlan) -> Guard:
        size, layer = (plan.width, plan.height), self._guarded
        tile_features = TileFeatures(self.encoder, field, plan.padded, layer)
        head, strictness = heads.get(layer), self._settings.guard_strictness
        if head is not None and head.floor[1] > 0:
            return Guard(tile_features, canvas, Floor(*head.floor.tolist()), strictness, relative=False)
        shrunk = source.resize(rehearsal_size(source.size, size), Image.Resampling.LANCZOS)
        floor = rehearse(field, self._fields(shrunk, size, [(layer, "tokens")], self._patches(size, True))[0])
        return Guard(tile_features, canvas, floor, strictness, relative=True)


def _through(head: RestorationHead | None, field: FeatureField | None) -> FeatureField | None:
    """The features as the head says that they would be if the source were sharp."""
    if head is None or field is None:
        return field
    with torch.inference_mode(False), torch.no_grad():
        return FeatureField(head(field.features[None])[0], field.canvas)


def _encoder_for(
    settings: Settings,
    named: str | None,
    folder: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
    keep: bool = True,
) -> PatchEncoder:
    """The encoder that `settings` ask for; named: the one that the adapter was trained with; keep: for the next time.

    Only one that they name is downloaded, with progress, or looked for at a path.
    """
    chosen = settings.encoder != AUTOMATIC
    wanted = settings.encoder if chosen else named or automatic_encoder(folder)
    if not chosen and wanted not in encoders(folder):
        raise DinotileError(
            f"adapter {settings.adapter!r} reads encoder {wanted!r}: install it, and choose that encoder"
        )
    _, place = locate(wanted, folder, download=chosen, progress=progress)
    if not keep:
        return load_encoder(wanted, folder, device=device, dtype=dtype, download=False)
    return _encoder(wanted, folder, (place, stamp(place / CONFIG), stamp(place / WEIGHTS)), device, dtype)


def _on_cpu(settings: Settings, named: str | None, folder: Path | None) -> Callable[[], PatchEncoder]:
    """Gives that encoder on the CPU in float32, loaded when it is first asked for."""
    load = functools.partial(_encoder_for, settings, named, folder, CPU, torch.float32, keep=False)
    return functools.cache(load)  # as long as its conditioner lives


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
