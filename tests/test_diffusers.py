"""The headless host, on tiny random Stable Diffusion 1.5 and XL pipelines."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import AdapterCondition, AdapterConfig
from lib_dinotile.condition.conditioner import Conditions
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.engine.flow import upscale
from lib_dinotile.engine.host import Batch, Prompt
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.settings import Generation, Settings
from lib_dinotile.tiling.noise import NoiseField, TileNoise
from lib_dinotile.tiling.plan import Rect
from tests.test_adapter import Adapter, random_adapter
from tests.test_regions import Shows, columns
from tests.test_tiling import random_image

SETTINGS = Settings(tile=64, overlap=16, scale=2.0)
SOURCE = random_image(70, 45)


def _tokenizer(folder):
    """CLIP's kind, with letters for a vocabulary."""
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def _text(width, kind):
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=width,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=width,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return kind(config)


def _parts(context, **more):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=context,
        attention_head_dim=8,
        norm_num_groups=8,
        **more,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return {"unet": unet, "vae": vae, "scheduler": scheduler}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15")
    pipeline = StableDiffusionPipeline(
        **_parts(768),
        text_encoder=_text(768, CLIPTextModel),
        tokenizer=_tokenizer(folder / "words"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 1024,
    }
    tokenizer = _tokenizer(folder / "words")
    pipeline = StableDiffusionXLPipeline(
        **_parts(2048, **added),
        text_encoder=_text(1024, CLIPTextModel),
        text_encoder_2=_text(1024, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return str(folder / "model")


class Fixed:
    """A conditioner with the features of an adapter test: random, but those of the tile's place."""

    def __init__(self, adapter, seed=0):
        self._adapter = adapter
        self._noise = NoiseField(seed, adapter.config.features)

    def features(self, source, size):
        return True

    def conditions(self, source, features, canvas, plan):
        return Conditions(adapted=self.condition)

    def condition(self, tiles, latent):
        areas = [tile.shrink(8) for tile in tiles]
        crops = torch.nn.functional.adaptive_avg_pool2d(self._noise.crop(areas, 0), self._adapter.grid(latent))
        return AdapterCondition(self._adapter, crops, latent)


def run(model, batch=4, conditioner=None, mask=None, settings=None, **generation):
    given = Generation(**{"model": model, "prompt": "a cat", "steps": 4, "denoise": 0.5, "seed": 1, **generation})
    host = load_host(given)
    chosen = Settings(**{**SETTINGS.__dict__, "batch": batch, **(settings or {})})
    result = upscale(host, SOURCE, chosen, NoiseField(given.seed, host.channels), conditioner, mask=mask)
    return np.asarray(result.image).astype(int)


def adapters(model):
    host = load_host(Generation(model=model))
    config = AdapterConfig(host.base, host.shape, "tiny", features=12, width=16, blocks=1)
    return Adapter(config), random_adapter(config)


@pytest.mark.parametrize("family, cfg", [("sd15", 1.0), ("sdxl", 5.0)])
def test_untrained_adapter_changes_no_bit_and_a_random_one_conditions_every_tile_by_its_own(family, cfg, request):
    model = request.getfixturevalue(family)
    untrained, random = adapters(model)
    plain = run(model, cfg=cfg)
    assert (run(model, cfg=cfg, conditioner=Fixed(untrained)) == plain).all()
    adapted = run(model, cfg=cfg, conditioner=Fixed(random))
    assert abs(adapted - plain).mean() > 0.5
    # One tile a batch cannot mix tiles up; four must give the same.
    assert abs(run(model, 1, cfg=cfg, conditioner=Fixed(random)) - adapted).max() <= 1
    assert abs(run(model, 1, cfg=cfg) - plain).max() <= 1


def test_the_family_and_the_shape_are_read_off_the_checkpoint(sd15, sdxl):
    for model, base in ((sd15, "sd15"), (sdxl, "sdxl")):
        host = load_host(Generation(model=model))
        assert (host.base, host.factor, host.channels) == (base, 8, 4)
        assert host.shape == UNetShape(((32, 1), (32, 1), (32, 2), (64, 2), (64, 2)))


def test_residual_slots_are_those_of_the_real_unet(sd15):
    """The shape is computed from the configuration: hold it against what the blocks really put out."""
    host, sizes = load_host(Generation(model=sd15)), []
    unet = host.unet

    def down(module, arguments, output):
        sizes.extend(tuple(skip.shape[1:]) for skip in output[1])

    hooks = [block.register_forward_hook(down) for block in unet.down_blocks]
    hooks.append(unet.mid_block.register_forward_hook(lambda m, a, out: sizes.append(tuple(out.shape[1:]))))
    unet(torch.randn(1, 4, 9, 7), 5, torch.randn(1, 77, 768))
    assert [(32, 9, 7), *sizes] == [(c, -(-9 // d), -(-7 // d)) for c, d in host.shape.slots]
    for hook in hooks:
        hook.remove()


def test_prompt_strength_and_seed_count(sd15):
    plain = run(sd15)
    for other in ({"prompt": "pebbles"}, {"negative": "cloth"}, {"seed": 2}, {"cfg": 2.0}, {"steps": 6}):
        assert abs(run(sd15, **other) - plain).max() > 0, other


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_fused_every_tile_has_its_own_condition_and_any_batch_gives_the_same(family, request):
    model, fused = request.getfixturevalue(family), {"order": "fused"}
    untrained, random = adapters(model)
    plain = run(model, settings=fused)
    assert abs(plain - run(model)).max() > 1
    assert abs(run(model, 1, settings=fused) - plain).max() <= 1
    assert (run(model, conditioner=Fixed(untrained), settings=fused) == plain).all()
    adapted = run(model, conditioner=Fixed(random), settings=fused)
    assert abs(adapted - plain).mean() > 0.5
    assert abs(run(model, 1, conditioner=Fixed(random), settings=fused) - adapted).max() <= 1


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_a_tile_is_told_its_own_prompt(sd15, order):
    told = run(sd15, prompt="a cat, fur", settings={"order": order})
    plain = run(sd15, settings={"order": order})
    assert abs(told - plain).max() > 0
    assert (run(sd15, settings={"order": order, "tile_prompt": "fur"}) == told).all()
    replaced = {"order": order, "tile_prompt": "a cat, fur", "tile_prompt_mode": "replace"}
    assert (run(sd15, prompt="pebbles", settings=replaced) == told).all()
    corner = run(sd15, settings={"order": order, "tile_prompts": "1: fur", "overlap": 0, "colour": "none"})
    bare = run(sd15, settings={"order": order, "overlap": 0, "colour": "none"})
    change = abs(corner - bare)
    # A little of it spreads: from tile to tile that sees it, and fused through the decoder.
    assert change[:56, :56].mean() > 3 * change[72:, 72:].mean()


# Of the 140 pixels of the result, 8 a column: the tiles at 0, 40 and 76 show A, both, and B.
HALVES = columns("A" * 9 + "B" * 9, (144, 90))
NAMED = {"region_prompts": "A: fur\nB: pebbles", "colour": "none"}


class ShowsAndAdapts(Fixed):
    """A conditioner with regions, and the features of an adapter test."""

    def conditions(self, source, features, canvas, plan):
        return Conditions(adapted=self.condition, regions=HALVES)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_tiles_of_one_batch_get_the_image_that_each_gets_alone_with_its_words(sd15, cfg):
    # Two tiles and no overlap: what one shows says nothing of the other.
    told, more = {"overlap": 0, "tile": 72, "colour": "none"}, {"cfg": cfg}
    both = run(sd15, conditioner=Shows(HALVES), settings=NAMED | told, **more)
    left = run(sd15, 1, prompt="a cat, fur", settings=told, **more)
    right = run(sd15, 1, prompt="a cat, pebbles", settings=told, **more)
    assert abs(both[:72, :68] - left[:72, :68]).max() <= 1 and abs(both[:72, 72:] - right[:72, 72:]).max() <= 1
    assert abs(left - right)[:72, :68].max() > 1 and abs(left - right)[:72, 72:].max() > 1


@pytest.mark.parametrize(
    "family, cfg, order",
    [("sd15", 1.0, "fused"), ("sd15", 5.0, "chess"), ("sd15", 5.0, "fused"), ("sdxl", 5.0, "chess")],
)
def test_tiles_with_one_prompt_or_several_give_the_same_image_in_any_batch(family, cfg, order, request):
    model, chosen = request.getfixturevalue(family), NAMED | {"order": order}
    told = run(model, conditioner=Shows(HALVES), cfg=cfg, settings=chosen)
    for batch in (1, 3):
        assert abs(run(model, batch, Shows(HALVES), cfg=cfg, settings=chosen) - told).max() <= 1
    # Every tile has its own words: they are not those of all.
    for words in ("a cat", "a cat, fur", "a cat, pebbles"):
        other = run(model, prompt=words, cfg=cfg, settings={"order": order, "colour": "none"})
        assert abs(told - other).max() > 1, words


def test_every_prompt_of_a_tile_has_the_condition_of_that_tile(sd15):
    adapter = adapters(sd15)[1]
    told = run(sd15, conditioner=ShowsAndAdapts(adapter), cfg=5.0, settings=NAMED)
    assert abs(told - run(sd15, conditioner=Shows(HALVES), cfg=5.0, settings=NAMED)).mean() > 0.5
    assert abs(run(sd15, 1, ShowsAndAdapts(adapter), cfg=5.0, settings=NAMED) - told).max() <= 1
    # Where all are told the same it is the image of that prompt.
    same = {"region_prompts": "A: fur\nB: fur", "colour": "none"}
    one = run(sd15, conditioner=Fixed(adapter), prompt="a cat, fur", cfg=5.0, settings={"colour": "none"})
    assert (run(sd15, conditioner=ShowsAndAdapts(adapter), cfg=5.0, settings=same) == one).all()


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_equal_words_of_all_regions_are_the_tile_prompt(sd15, order):
    same = {"region_prompts": "A: fur\nB: fur", "order": order}
    told = run(sd15, conditioner=Shows(HALVES), cfg=5.0, settings=same)
    assert (run(sd15, cfg=5.0, settings={"tile_prompt": "fur", "order": order}) == told).all()


def predicted(host, prompts):
    """(latents, prediction for them) of two tiles with these prompts, at the first of the steps."""
    seen = []

    def tiled(x, model, known):
        seen.append((x, model(x, Batch(tiles, prompts, None))))
        return seen[-1][1]

    tiled.begin = None
    tiles = [Rect(0, 0, 64, 48), Rect(64, 0, 64, 48)]
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(3))
    noise = TileNoise(NoiseField(1, 4), [tile.shrink(8) for tile in tiles])
    with torch.no_grad():
        host.sample(latents, tiled, noise, (128, 48))
    return seen[0]


def by_hand(host, x, prompt, cfg):
    """The guided prediction for one tile (1, C, h, w) with one prompt."""
    timestep = host._solver.begin(1.0, 1)[0].timestep
    embeddings = host._text(host.prompt if prompt is None else prompt)
    with torch.no_grad():
        positive, negative = (host.predict(x, timestep, words) for words in (embeddings[::2], embeddings[1::2]))
    return torch.lerp(negative, positive, cfg)


def left_half(share=1.0):
    mask = torch.zeros(6, 8)
    mask[:, :4] = share
    return mask


@pytest.mark.parametrize("family, cfg", [("sd15", 1.0), ("sd15", 5.0), ("sdxl", 5.0)])
def test_a_prediction_is_blended_of_those_of_a_tile_s_prompts_as_their_masks_say(family, cfg, request):
    model = request.getfixturevalue(family)
    host = load_host(Generation(model=model, prompt="a cat", negative="cloth", steps=1, denoise=1.0, cfg=cfg))
    fur, pebbles, wall = "fur", "pebbles", "a wall"
    halves = [Prompt(fur, left_half()), Prompt(pebbles, 1 - left_half())]
    for prompts, blends in (
        ([halves, [Prompt(wall)]], [{fur: left_half(), pebbles: 1 - left_half()}, {wall: 1}]),
        ([[Prompt()], halves[::-1]], [{None: 1}, {fur: left_half(), pebbles: 1 - left_half()}]),
        (
            [halves, [Prompt(wall, left_half(0.75)), Prompt(None, 1 - left_half(0.75))]],
            [{fur: left_half(), pebbles: 1 - left_half()}, {wall: left_half(0.75), None: 1 - left_half(0.75)}],
        ),
    ):
        x, found = predicted(host, prompts)
        for number, blend in enumerate(blends):
            own = x[number : number + 1]
            wanted = sum(mask * by_hand(host, own, prompt, cfg) for prompt, mask in blend.items())
            assert torch.allclose(found[number : number + 1], wanted, atol=1e-4)
    # And the prompts matter: another is told apart.
    assert (by_hand(host, x[:1], fur, cfg) - by_hand(host, x[:1], pebbles, cfg)).abs().max() > 1e-3


@pytest.mark.parametrize("cfg, most", [(1.0, 2), (5.0, 4)])
def test_the_unet_is_given_no_more_rows_at_once_for_regions(sd15, cfg, most):
    host, rows = load_host(Generation(model=sd15, prompt="a cat", steps=1, denoise=1.0, cfg=cfg)), list[int]()
    hook = host.unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    predicted(host, [[Prompt("fur", left_half()), Prompt("pebbles", 1 - left_half())]] * 2)
    hook.remove()
    assert max(rows) == most and sum(rows) == (4 if cfg == 1 else 6)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_several_prompts_of_equal_words_are_one(sd15, cfg):
    host = load_host(Generation(model=sd15, prompt="a cat", steps=1, denoise=1.0, cfg=cfg))
    share = torch.full((6, 8), 0.3)
    split = [
        [Prompt("fur", share), Prompt("fur", 1 - share)],
        [Prompt(None, left_half()), Prompt(None, 1 - left_half())],
    ]
    _, several = predicted(host, split)
    _, one = predicted(host, [[Prompt("fur")], [Prompt()]])
    assert torch.allclose(several, one, atol=1e-5)


def test_a_model_without_words_has_none_for_regions_either():
    assert not load_host(Generation(steps=1)).regional


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_outside_the_mask_nothing_changes(sd15, order):
    mask = Image.new("L", SOURCE.size)
    mask.paste(255, (10, 10, 30, 30))
    masked = run(sd15, mask=mask, settings={"order": order})
    plain = np.asarray(SOURCE.resize((140, 90), Image.Resampling.LANCZOS)).astype(int)
    outside = np.asarray(mask.resize((140, 90), Image.Resampling.BILINEAR)) == 0
    assert (masked[outside] == plain[outside]).all() and (masked != plain).any()


def test_what_overflows_in_half_precision_is_done_again_in_full(sd15, monkeypatch):
    host = load_host(Generation(model=sd15, prompt="a cat", steps=4, denoise=0.5))
    host.unet.to(torch.bfloat16)
    host._codec.to(torch.bfloat16)
    host.dtype = torch.bfloat16
    text = host._text
    host._text = lambda prompt: tuple(rows.to(host.dtype) for rows in text(prompt))
    weights = {name: tensor.clone() for name, tensor in host.unet.state_dict().items()}
    forward, seen = host.unet.forward, []

    def overflows(x, *arguments, **more):
        seen.append(x.dtype)
        output = forward(x, *arguments, **more)
        return output if x.dtype == torch.float32 else (output[0] * torch.nan,)

    monkeypatch.setattr(host.unet, "forward", overflows)
    result = upscale(host, SOURCE, Settings(tile=128, overlap=16, scale=1.0), NoiseField(1, 4))
    assert result.report.lines == ["tile 1 was done again in full precision: the model returned NaN"]
    assert set(seen) == {torch.bfloat16, torch.float32} and host.dtype == torch.bfloat16
    for name, tensor in host.unet.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, weights[name])
    assert np.asarray(result.image).std() > 1


def test_denoise_0_only_goes_through_the_codec(sd15):
    assert (run(sd15, denoise=0.0) == run(sd15, denoise=0.0, seed=9, prompt="x")).all()


@pytest.mark.parametrize(
    "model, says",
    [
        ("no-such-file.safetensors", "there is no file no-such-file.safetensors"),
        ("not/a/model/at/all", "there is no file or folder not/a/model/at/all"),
    ],
)
def test_a_model_that_is_not_there_is_refused_with_one_line(model, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DinotileError, match=says) as error:
        load_host(Generation(model=model))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_checkpoint_is_refused_with_one_line(tmp_path):
    for name in ("text.safetensors", "model.ckpt"):
        (tmp_path / name).write_text("no tensors in here")
        with pytest.raises(
            DinotileError, match=r"is not a \.safetensors file|cannot be read as a safetensors"
        ) as error:
            load_host(Generation(model=str(tmp_path / name)))
        assert "\n" not in str(error.value)


def test_progress_goes_on_step_by_step_and_never_back():
    told = []
    host = load_host(Generation(steps=4, denoise=0.5), lambda share, text: told.append((share, text)))
    settings = Settings(tile=64, overlap=0, guidance=0.0, guard="off", seams="bands", batch=1)
    upscale(host, SOURCE, settings, NoiseField(3, host.channels))
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1) and len(set(shares)) > 2 * 6
    count = told[0][1].removeprefix("painting tiles: 0 of ")
    assert int(count) > 6 and told[-1][1] == f"painted {count} tiles"


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_the_way_from_upscale_to_the_unet_is_short(sd15, order):
    host, frames = load_host(Generation(model=sd15, prompt="a cat", steps=2, denoise=0.5)), []

    def count(*_):
        names, frame = [], sys._getframe()
        while frame is not None and "upscale" not in names:
            if "lib_dinotile" in frame.f_code.co_filename:
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        frames.append(names[::-1])

    host.unet.register_forward_pre_hook(count)
    settings = Settings(tile=64, overlap=16, scale=1.0, order=order, guidance=0.0, guard="off")
    upscale(host, SOURCE, settings, NoiseField(1, host.channels))
    assert frames and max(map(len, frames)) <= 9, frames[0]
