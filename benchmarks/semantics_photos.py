"""benchmarks/semantics.py on a real checkpoint and photos: no truth about textures, but the photo itself."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image

from benchmarks import arms
from benchmarks.evidence import read_adapter
from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter_file import check_encoder, check_fit
from lib_dinotile.condition.conditioner import to_tensor
from lib_dinotile.condition.heads import heads_for
from lib_dinotile.dino.calibrated import Store
from lib_dinotile.dino.encoder import PatchEncoder, load_encoder
from lib_dinotile.dino.field import feature_field
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.images import endings, read_image
from lib_dinotile.settings import CALIBRATED, Generation, Settings


def likeness(eye: PatchEncoder, result: Image.Image, source: Image.Image) -> float:
    """Mean cosine of the patches of a result and of its source, in the eyes of an encoder."""
    first, second = (feature_field(eye, to_tensor(image), (1, 1)).features for image in (result, source))
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


def photos(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a table; the figures for the last line. DinotileError if something that is asked for cannot be had."""
    files = sorted(file for file in arguments.photos.iterdir() if file.suffix.lower() in endings())[: arguments.images]
    if not files:
        raise DinotileError(f"{arguments.photos} has no images")
    if arguments.dino == arguments.eye:
        raise DinotileError("--eye must be another encoder than --dino")
    host = load_host(
        Generation(model=arguments.model, config=arguments.config, denoise=arguments.denoise, steps=arguments.steps)
    )
    distance = None if arguments.lpips == "none" else perceptual(arguments.lpips)
    encoder, eye = (load_encoder(name, device=host.device) for name in (arguments.dino, arguments.eye))
    reader = None
    if arguments.adapter:
        name, reader = arguments.adapters.stem, read_adapter(arguments.adapters, host.device, host.dtype)
        check_fit(reader.adapter.config, name, host.base, host.shape)
        check_encoder(reader.adapter.config, name, encoder.id, encoder.width, encoder.depth)
    settings = Settings(scale=arguments.scale, tile=arguments.tile, overlap=min(64, arguments.tile // 2))
    heads = {CALIBRATED: heads_for(settings, encoder, {}, None, Store())}
    upscaler = arms.Upscaler(host, encoder, settings, heads)
    adapters = ("", arms.TRAINED) if reader else ("",)
    chosen = {name: arm for name, arm in arms.ARMS.items() if arm.heads in heads and arm.adapter in adapters}
    sources, truths = [], []
    for file in files:
        truth = read_image(file)
        size = [max(1, round(side / arguments.scale)) for side in truth.size]
        sources.append(truth.resize(size, Image.Resampling.LANCZOS))
        truths.append(truth.resize([round(side * arguments.scale) for side in size], Image.Resampling.LANCZOS))
    found: dict[str, dict[str, list[float]]] = {name: {"likeness": [], "lpips": []} for name in chosen}
    for number, (source, truth) in enumerate(zip(sources, truths)):
        for name, arm in chosen.items():
            result = upscaler.upscale(arm, source, number, sources[number - 1], reader if arm.adapter else None).image
            found[name]["likeness"].append(likeness(eye, result, source))
            if distance is not None:
                found[name]["lpips"].append(distance(to_tensor(result), to_tensor(truth)))
    print(f"{'':20} {'likeness to the source':>24}   {'LPIPS to the photo':>20}   ({len(files)} photos, 95 %)")
    for name, values in found.items():
        shown = [
            "{:.4f} ({:.4f} - {:.4f})".format(np.mean(v), *arms.interval(v)) if v else "-" for v in values.values()
        ]
        print(f"{name:20} {shown[0]:>24}   {shown[1]:>20}")
    for name in (arms.BOTH, arms.ADAPTER, arms.ALL):
        if name in found and len(files) > 1:
            gains = np.subtract(found[name]["likeness"], found[arms.PLAIN]["likeness"]).tolist()
            low, high = arms.interval(gains)
            print(f"{name} over plain: likeness {np.mean(gains):+.4f} ({low:+.4f} to {high:+.4f})")
    return {
        figure: {name: round(float(np.mean(values[figure])), 4) for name, values in found.items() if values[figure]}
        for figure in ("likeness", "lpips")
    }
