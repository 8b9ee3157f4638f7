"""benchmarks/semantics.py on a real checkpoint and photos: no truth about textures, but the photo itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.arms import ADAPTER, ADAPTER_OTHER, ADAPTER_SHUFFLED, ALL, ARMS, BOTH, PLAIN, Arms, interval, to_pixels
from benchmarks.evidence import read_adapter
from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter_file import check_encoder, check_fit
from lib_dinotile.condition.heads import heads_for
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.field import feature_field
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.images import endings, read_image
from lib_dinotile.settings import Generation, Settings


def likeness(eye: PatchEncoder, result: Image.Image, source: Image.Image) -> float:
    """Mean cosine of the patches of a result and of its source, in the eyes of an encoder."""
    first, second = (feature_field(eye, to_pixels(image), (1, 1)).features for image in (result, source))
    return float(F.cosine_similarity(first, second, dim=0).mean())


def perceptual(network: str) -> Any:
    """LPIPS (arXiv 1801.03924) between two pictures (3, H, W) in [0, 1]; DinotileError if it cannot be had."""
    try:
        import lpips

        model = lpips.LPIPS(net=network, verbose=False)
    except Exception as error:  # not installed, or its network's weights cannot be downloaded
        line = str(error).splitlines()[0]
        raise DinotileError(f"lpips: cannot be loaded ({line}): pip install '.[bench]', or --lpips none") from error
    return lambda first, second: float(model(first[None] * 2 - 1, second[None] * 2 - 1))


def photos(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Prints a table; the figures for the last line."""
    kinds = endings()
    files = sorted(file for file in Path(arguments.photos).iterdir() if file.suffix.lower() in kinds)
    files = files[: arguments.images] if arguments.images else files
    if not files or arguments.dino == arguments.eye:
        print(f"{arguments.photos} has no images" if not files else "--eye must be another encoder than --dino")
        return None
    try:
        generation = Generation(
            model=arguments.model, config=arguments.config, denoise=arguments.denoise, steps=arguments.steps
        )
        host = load_host(generation)
        distance = None if arguments.lpips == "none" else perceptual(arguments.lpips)
        encoder, eye = (load_encoder(name, device=host.device) for name in (arguments.dino, arguments.eye))
        reader = None
        if arguments.adapter:
            reader = read_adapter(arguments.adapters, host.device, host.dtype)
            check_fit(reader.adapter.config, arguments.adapters.stem, host.base, host.shape)
            check_encoder(reader.adapter.config, arguments.adapters.stem, encoder.id, encoder.width, encoder.depth)
    except DinotileError as error:
        print(error)
        return None
    settings = Settings(scale=arguments.scale, tile=arguments.tile, overlap=min(64, arguments.tile // 2))
    arms = Arms(host, encoder, settings, heads_for(settings, encoder, {}, None, Store()), reader)
    ways = (*ARMS, *((ADAPTER, ALL, ADAPTER_OTHER, ADAPTER_SHUFFLED) if reader else ()))
    sources, truths = [], []
    for file in files:
        truth = read_image(file)
        size = [max(1, round(side / arguments.scale)) for side in truth.size]
        sources.append(truth.resize(size, Image.Resampling.LANCZOS))
        truths.append(truth.resize([round(side * arguments.scale) for side in size], Image.Resampling.LANCZOS))
    found: dict[str, dict[str, list[float]]] = {arm: {"likeness": [], "lpips": []} for arm in ways}
    for number, (source, truth) in enumerate(zip(sources, truths)):
        for arm in ways:
            result = arms.upscale(arm, source, number, sources[number - 1]).image
            found[arm]["likeness"].append(likeness(eye, result, source))
            if distance is not None:
                with torch.no_grad():
                    found[arm]["lpips"].append(distance(to_pixels(result), to_pixels(truth)))
    print(f"{'':20} {'likeness to the source':>24}   {'LPIPS to the photo':>20}   ({len(files)} photos, 95 %)")
    for arm, values in found.items():
        shown = [
            f"{np.mean(v):.4f} ({interval(v)[0]:.4f} - {interval(v)[1]:.4f})" if v else "-" for v in values.values()
        ]
        print(f"{arm:20} {shown[0]:>24}   {shown[1]:>20}")
    for arm in (BOTH, *((ADAPTER, ALL) if reader else ())) if len(files) > 1 else ():
        gains = [b - a for a, b in zip(found[PLAIN]["likeness"], found[arm]["likeness"])]
        print("{} over plain: likeness {:+.4f} ({:+.4f} to {:+.4f})".format(arm, np.mean(gains), *interval(gains)))
    return {
        name: {arm: round(float(np.mean(values[name])), 4) for arm, values in found.items() if values[name]}
        for name in ("likeness", "lpips")
    }
