"""Passes, masks, fused sampling, prompts by tile, and what goes wrong on the way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lib_dinotile import DinotileError
from lib_dinotile.engine.denoisers import MultiDiffusion
from lib_dinotile.engine.flow import UnfinishedError, canvas_size, make_plan, upscale
from lib_dinotile.engine.host import Batch, Prompt
from lib_dinotile.engine.memory import BatchSize
from lib_dinotile.engine.team import Team
from lib_dinotile.settings import Settings
from lib_dinotile.tiling.noise import NoiseField
from lib_dinotile.tiling.plan import TilePlan
from lib_dinotile.tiling.seams import seam_passes
from tests.test_engine import StubHost, noisy
from tests.test_regions import Shows, columns
from tests.test_tiling import random_image

PLAIN = {"tile": 64, "overlap": 16, "colour": "none"}
SOURCE, EVEN = random_image(100, 70), random_image(128, 96)
PHOTO = Path(__file__).parents[1] / "examples" / "photo.png"


def run(host, source=SOURCE, noise=5, **more):
    keywords = {
        name: more.pop(name) for name in ("size", "mask", "fill", "journal", "team", "conditioner") if name in more
    }
    return upscale(host, source, Settings(**{**PLAIN, **more}), NoiseField(noise, 4), **keywords)


def pixels(image):
    return np.asarray(image).astype(int)


def upscaled(source=SOURCE, size=(200, 140)):
    return source.resize(size, Image.Resampling.LANCZOS)


def white(latents, noise):
    return torch.ones_like(latents)


@pytest.mark.parametrize(
    "settings, given, expected",
    [
        ({"scale": 2.0}, None, (2560, 1440)),
        ({"scale": 1.7}, None, (2176, 1224)),
        ({"target": "longest side", "longest": 1999}, None, (1999, 1124)),
        ({"target": "longest side", "longest": 640}, None, (640, 360)),
        ({"target": "img2img size"}, (1921, 1081), (1921, 1081)),
        ({"target": "img2img size"}, (1000, 0), (1000, 562)),
        ({"target": "img2img size"}, (0, 1000), (1778, 1000)),
    ],
)
def test_the_target_size_is_exact(settings, given, expected):
    assert canvas_size((1280, 720), Settings(**settings), given) == expected


def test_a_size_that_is_not_given_is_asked_for():
    for given in (None, (0, 0)):
        with pytest.raises(DinotileError, match="target: no size is given"):
            canvas_size((8, 8), Settings(target="img2img size"), given)


def test_none_of_the_tiles_is_only_the_upscaler():
    host = StubHost(white)
    result = run(host, order="none")
    assert host.sampled == [] and result.complete and result.total == 0
    assert result.image.tobytes() == upscaled().tobytes()


@pytest.mark.parametrize("more", [{"seams": "half tile"}, {"order": "fused"}, {"mask": Image.new("L", (100, 70), 90)}])
def test_the_enlarged_source_is_shown_as_the_tiles_found_it(more):
    """To compare the result with; no DINO looks for it."""
    settings = {"maps": "source", "guidance": 0.0, "guard": "off"}
    result = run(StubHost(white), **settings, **more)
    assert list(result.maps) == ["source"] and result.maps["source"].tobytes() == upscaled().tobytes()
    assert result.image.size == upscaled().size and result.image.tobytes() != upscaled().tobytes()
    assert not Settings(**settings).looks
    assert run(StubHost(white), **{**settings, "maps": "none"}, **more).maps == {}


@pytest.mark.parametrize("seams", ["bands", "half tile", "half tile + crossings"])
@pytest.mark.parametrize("order", ["none", "chess", "fused"])
def test_the_seam_pass_paints_its_bands_with_its_own_denoising_strength(seams, order):
    plain, host = run(StubHost(), order=order), StubHost(white)
    host._sample = lambda latents, noise: torch.ones_like(latents) if host.denoised[-1] == 0.15 else latents
    result = run(host, order=order, seams=seams, seam_width=16, seam_denoise=0.15)
    assert result.complete and set(host.denoised) <= {None, 0.15}
    plan = make_plan(host, (200, 140), Settings(**PLAIN))
    bands = np.zeros((144, 200))
    for grid, blend in seam_passes(plan, seams, 16):
        for tile in grid.tiles:
            assert tile.x % 8 == tile.y % 8 == 0 and tile.right <= 200 and tile.bottom <= 144
            bands[tile.slices] = np.maximum(bands[tile.slices], blend.weight(tile).numpy())
    changed = (pixels(result.image) != pixels(plain.image)).any(2)
    assert changed.any() and not changed[bands[:140] == 0].any()
    # On the borders themselves, the middles of what tiles share, nothing of before is left.
    left, right = plan.columns[:2]
    assert (pixels(result.image)[:, (right + left + 64) // 2 - 1] > 230).all()


def test_the_weights_of_bands_sum_to_one_at_most():
    for width, tile in ((8, 64), (64, 64), (1024, 128)):
        plan = make_plan(StubHost(), (300, 220), Settings(tile=tile, overlap=24))
        for seams in ("bands", "half tile + crossings"):
            for grid, blend in seam_passes(plan, seams, width):
                total = torch.zeros(plan.padded[::-1])
                for tile_ in grid.tiles:
                    total[tile_.slices] += blend.weight(tile_)
                assert total.max() <= 1 + 1e-5


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_fused_a_pixelwise_model_gives_what_it_gives_for_the_whole(batch):
    """Every tile sees its own part of one noisy canvas, and outputs that agree are blended to the same."""
    host = StubHost(model=lambda x: x * 0.5 + 0.25)
    result = run(host, order="fused", batch=batch)
    wanted = (pixels(upscaled()) / 255 * 0.5 + 0.25) * 255
    assert abs(pixels(result.image) - wanted).max() <= 1 and result.painted == 12
    assert max(len(seen.tiles) for seen in host.batches) == min(batch, 12)
    assert sum(len(seen.tiles) for seen in host.batches) == 12


def test_fused_tiles_that_disagree_are_blended_with_weights_that_sum_to_one():
    calls = []

    def model(x):
        calls.append(len(x))
        return torch.full_like(x, len(calls) / 20)

    # Neighbours differ by 1/20, and share two cells: a quarter and three quarters of it.
    image = pixels(run(StubHost(model=model), order="fused", batch=1).image)
    assert calls == [1] * 12 and image.min() >= 12 and image.max() <= 192
    assert abs(np.diff(image[20, :, 0])).max() <= 255 / 20 / 2 + 1


def mask_over(size, box):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
@pytest.mark.parametrize("seams", ["none", "bands"])
def test_outside_the_mask_not_a_bit_changes_and_tiles_that_miss_it_are_not_run(order, seams):
    host = StubHost(white, model=lambda x: torch.ones_like(x))
    mask = mask_over((100, 70), (10, 10, 30, 30))
    result = run(host, order=order, seams=seams, mask=mask)
    outside = np.asarray(mask.resize((200, 140), Image.Resampling.BILINEAR)) == 0
    assert (pixels(result.image)[outside] == pixels(upscaled())[outside]).all()
    assert (pixels(result.image)[24:58, 24:58] == 255).all()
    numbers = result.report.numbers("painted")
    assert 1 in numbers and 12 not in numbers and len(numbers) < 8 and result.complete
    assert set(result.report.numbers("outside the mask")) == set(range(1, 13)) - set(numbers)


def test_within_the_mask_tiles_may_start_from_something_else():
    def fill(image, mask):
        assert image.size == mask.size == (200, 140)
        return Image.new("RGB", image.size, "red")

    mask = mask_over((100, 70), (20, 20, 60, 50))
    result = run(StubHost(), mask=mask, fill=fill)
    changed = np.asarray(mask.resize((200, 140), Image.Resampling.BILINEAR))
    assert (pixels(result.image)[changed == 255] == [255, 0, 0]).all()
    assert (pixels(result.image)[changed == 0] == pixels(upscaled())[changed == 0]).all()


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_flat_tiles_keep_the_source_and_are_named(order):
    source = Image.new("RGB", (100, 70), (90, 120, 200))
    source.paste(random_image(30, 70), (0, 0))
    result = run(StubHost(white, model=lambda x: torch.ones_like(x)), source, flat=1.5, order=order)
    assert result.report.numbers("flat") and result.report.numbers("painted")
    assert result.report.lines == ["flat tiles skipped: 3-4, 7-8, 11-12"]
    assert (pixels(result.image)[:, 150:] == pixels(upscaled(source))[:, 150:]).all()
    assert run(StubHost(white), source).report.numbers("flat") == []


@pytest.mark.parametrize("colour", ["AdaIN", "wavelet"])
@pytest.mark.parametrize("order", ["chess", "fused"])
@pytest.mark.parametrize("kind", ["photo", "blobs"])
def test_colours_stay_those_of_the_source(colour, order, kind):
    blobs = random_image(25, 18).resize((100, 70), Image.Resampling.BICUBIC)
    source = Image.open(PHOTO).convert("RGB").resize((100, 70)) if kind == "photo" else blobs

    def tint(x):
        return (x * 0.8 + torch.tensor([0.15, 0.0, 0.05])[:, None, None]).clamp(0, 1)

    def shift(**more):
        host = StubHost(lambda latents, noise: tint(latents))
        result, plan = run(host, source, order=order, **more), make_plan(host, (200, 140), Settings(**PLAIN))
        change = pixels(result.image) - pixels(upscaled(source))
        return max(abs(change[tile.slices].mean((0, 1))).max() for tile in plan.tiles)

    assert shift() > 10
    assert shift(colour=colour) < 1


def test_prompts_by_tile():
    def told(**more):
        host = StubHost(model=lambda x: x)
        report = run(host, batch=2, **more).report
        return {
            f"{tile.x},{tile.y}": one.text for batch in host.batches for tile, (one,) in zip(batch.tiles, batch.prompts)
        }, report

    assert set(told()[0].values()) == {None}
    assert set(told(tile_prompt="fur")[0].values()) == {"main, fur"}
    assert set(told(tile_prompt="fur", tile_prompt_mode="replace", order="fused")[0].values()) == {"fur"}
    prompts, report = told(tile_prompts="1: ear\n\n 12 : tail ")
    assert prompts["0,0"] == "main, ear" and prompts["136,80"] == "main, tail"
    assert sorted(filter(None, prompts.values())) == ["main, ear", "main, tail"]
    assert report.prompts == "1: ear\n12: tail"
    prompts, report = told(captions="Stub", tile_prompt="sharp", tile_prompts="2: whiskers", tile_prompt_mode="replace")
    assert prompts["0,0"] == "sharp, caption of 64" and prompts["40,0"] == "sharp, whiskers"
    assert report.prompts.split("\n")[:2] == ["1: caption of 64", "2: whiskers"]
    again, _ = told(tile_prompts=report.prompts, tile_prompt="sharp", tile_prompt_mode="replace")
    assert again == prompts
    seams, _ = told(tile_prompts="1: ear", order="none", seams="bands")
    assert set(seams.values()) == {None, "main, ear"}


STRIPES = columns("A" * 13 + "B" * 7 + "C" * 5, (200, 140))
"""Regions, 8 pixels a column: the tiles at 0 and 40 show A, the one at 88 B and some A, the one at 136 C and some B."""


def region_prompts(words="A: fur\nB: wall\nC: sky", shown=STRIPES, **more):
    """({tile: what it is told}, result) of a run with prompts by region."""
    host = StubHost(model=lambda x: x)
    result = run(host, batch=2, conditioner=Shows(shown), region_prompts=words, **more)
    return {
        tile: [one.text for one in prompts]
        for batch in host.batches
        for tile, prompts in zip(batch.tiles, batch.prompts)
    }, result


@pytest.mark.parametrize("order", ["chess", "linear", "fused"])
def test_every_tile_is_told_of_the_regions_that_it_shows(order):
    told, result = region_prompts(order=order)
    wanted = {
        0: ["main, fur"],
        40: ["main, fur"],
        88: ["main, wall", "main, fur"],
        136: ["main, sky", "main, wall"],
    }
    assert result.complete and len(told) == 12
    assert all(prompts == wanted[tile.x] for tile, prompts in told.items())
    lines = "region prompts: A in tiles 1-2, 5-6, 9-10; A, B in tiles 3, 7, 11; B, C in tiles 4, 8, 12"
    assert result.report.lines == [lines]
    tiles = result.report.json()["tiles"]
    assert [(each["letter"], each["words"]) for each in tiles[2]["regions"]] == [("B", "wall"), ("A", "fur")]
    assert [each["share"] for each in tiles[3]["regions"]] == pytest.approx([5 / 8, 3 / 8], abs=0.02)
    assert result.report.prompts == ""


def test_a_line_of_a_tile_s_own_comes_in_place_of_its_regions():
    told, result = region_prompts(tile_prompts="2: whiskers", captions="Stub")
    own = {(tile.x, tile.y): prompts for tile, prompts in told.items()}
    assert own[40, 0] == ["main, whiskers"] and own[40, 40] == ["main, fur"]
    assert result.report.prompts == "2: whiskers"
    assert result.report.lines[0].startswith("region prompts: A in tiles 1, 5-6, 9-10; ")


@pytest.mark.parametrize("order", ["none", "chess"])
def test_the_seam_pass_is_told_of_the_regions_that_its_bands_show(order):
    told, result = region_prompts(order=order, seams="bands", seam_width=16)
    plan = make_plan(StubHost(), (200, 140), Settings(**PLAIN))
    bands = [tile for grid, _ in seam_passes(plan, "bands", 16) for tile in grid.tiles]
    assert result.complete and set(bands) <= set(told)
    texts = {"A": "main, fur", "B": "main, wall", "C": "main, sky"}
    for band in bands:
        shares = STRIPES.shares([band]).flatten().tolist()
        shown = [letter for share, letter in sorted(zip(shares, "ABC"), key=lambda each: -each[0]) if share >= 0.1]
        assert told[band] == [texts[letter] for letter in shown]
    assert len({tuple(told[band]) for band in bands}) > 2


@pytest.mark.parametrize("order", ["chess", "fused"])
def test_words_of_a_region_that_the_image_does_not_have_are_refused_before_any_tile_is_sampled(order):
    host = StubHost()
    with pytest.raises(DinotileError) as error:
        run(host, conditioner=Shows(STRIPES), region_prompts="A: fur\nD: sea", order=order)
    assert (
        str(error.value)
        == "region_prompts: there is no region D, this image has 3 (A to C); the preview in img2img shows them, and "
        "analyze on the command line"
    )
    assert error.value.status_code == 422 and host.sampled == [] and host.seen == []


def test_without_words_regions_change_nothing():
    told, result = region_prompts("")
    assert set(map(tuple, told.values())) == {(None,)} and result.report.lines == []


def test_a_prompt_of_a_region_that_the_model_would_not_read_all_of_is_refused_before_any_tile_is_sampled():
    class Short(StubHost):
        def check_prompt(self, prompt):
            if prompt and len(prompt) > 12:
                raise DinotileError(f"prompt: {prompt} is too long")

    host = Short()
    with pytest.raises(DinotileError, match="prompt: main, a very long wall is too long"):
        run(host, conditioner=Shows(STRIPES), region_prompts="A: fur\nB: a very long wall")
    assert host.sampled == []


@pytest.mark.parametrize(
    "more, line",
    [
        ({"tile_prompts": "whiskers"}, "tile_prompts: 'whiskers' is not a line like \"3: whiskers\""),
        ({"tile_prompts": "0: whiskers"}, "tile_prompts: '0: whiskers' is not a line like \"3: whiskers\""),
        ({"tile_prompts": "1: a\n1: b"}, "tile_prompts: tile 1 has two lines, give it one"),
        ({"tile_prompts": "13: a"}, "tile_prompts: there is no tile 13, this image has 12"),
        ({"captions": "BLIP"}, "captions: 'BLIP' is not installed, give one of None, Stub"),
    ],
)
def test_prompts_that_cannot_be_are_refused_before_any_work(more, line):
    host = StubHost()
    with pytest.raises(DinotileError) as error:
        run(host, **more)
    assert str(error.value) == line and host.sampled == []


def out_of_memory_above(limit):
    def model(x):
        if len(x) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return x * 0.5 + 0.25

    return model


@pytest.mark.parametrize("order", ["chess", "fused"])
@pytest.mark.parametrize("limit", [1, 3])
def test_out_of_memory_halves_the_batch_and_loses_nothing(order, limit):
    host = StubHost(model=out_of_memory_above(limit))
    settings = {"order": order, "overlap": 0, "tile": 64, "batch": 16}  # one wave of 12 tiles
    result = run(host, EVEN, **settings)
    assert result.complete and host.freed
    assert result.report.lines[0] == "out of memory with 12 tiles at once, went on with 6"
    assert result.report.lines[-1].endswith(f"went on with {limit}")
    whole = run(StubHost(model=lambda x: x * 0.5 + 0.25), EVEN, **settings)
    assert result.image.tobytes() == whole.image.tobytes()


def test_out_of_memory_with_one_tile_says_what_to_do():
    with pytest.raises(
        UnfinishedError, match="out of memory with a single tile: give a smaller tile size, or guidance strength 0"
    ):
        run(StubHost(model=out_of_memory_above(0)))


@pytest.mark.parametrize("after", [0, 2, 12, 13])
def test_an_error_after_the_first_pass_tells_that_all_tiles_are_painted(after):
    class Broken(StubHost):
        def sample(self, *arguments, **more):
            if len(self.sampled) == after:
                raise RuntimeError("broken")
            return super().sample(*arguments, **more)

    with pytest.raises(UnfinishedError, match=rf"stopped after {after} of \d+ tiles: broken") as caught:
        run(Broken(white), EVEN, overlap=0, batch=1, seams="half tile")
    result = caught.value.result
    assert result.later == ("the seam fix" if after >= 12 else "") and not result.complete
    if result.later:
        assert pixels(result.image).min() == 255


def test_a_pass_that_takes_more_steps_than_it_asked_for_says_so():
    class Needy(StubHost):
        def steps_note(self, denoise=None):
            return "4 sampling steps instead of 1" if denoise == 0.03 else ""

    notes = run(Needy(), seams="bands", seam_denoise=0.03).report.notes
    assert notes == ["seam fix: 4 sampling steps instead of 1"]
    assert run(Needy(), seams="bands", seam_denoise=0.2).report.notes == []


def test_where_tiles_of_a_batch_are_not_what_they_are_alone_they_are_painted_one_by_one():
    class Alone(StubHost):
        def batch_note(self):
            return "tiles are sampled one by one"

    host = Alone()
    result = run(host, EVEN, overlap=0, batch=4)
    assert set(host.sampled) == {1} and result.report.notes == ["tiles are sampled one by one"]
    assert run(Alone(), EVEN, overlap=0, batch=1).report.notes == []
    for guard, seams, batches in (("off", "none", False), ("off", "bands", True), ("retry", "none", True)):
        notes = run(Alone(), EVEN, overlap=0, batch=4, order="fused", guard=guard, seams=seams).report.notes
        assert notes == ["tiles are sampled one by one"] * batches, (guard, seams)


def broken_at(x, mended=lambda: False):
    """A model that gives NaN for red tiles, unless it is mended."""
    bad = x[:, 0].mean((1, 2)) > 0.8
    return torch.where(bad[:, None, None, None], torch.nan if not mended() else x, x)


@pytest.mark.parametrize("order", ["chess", "fused"])
@pytest.mark.parametrize("mended", [False, True])
def test_a_tile_that_is_not_a_number_is_done_again_then_kept_from_the_source(order, mended):
    source = Image.new("RGB", (96, 32), "blue")
    source.paste((255, 0, 0), (32, 0, 64, 32))
    host = StubHost(model=lambda x: 1 - broken_at(x, lambda: mended and host.precise))
    result = run(host, source, overlap=0, order=order)
    outcome = "was done again in full precision" if mended else "shows the enlarged source"
    assert result.complete and result.report.lines == [f"tile 2 {outcome}: the model returned NaN"]
    middle = (0, 255, 255) if mended else (255, 0, 0)
    assert result.image.getpixel((96, 30)) == middle and result.image.getpixel((10, 10)) == (255, 255, 0)
    assert not host.precise


def test_a_tile_is_kept_from_the_source_if_the_memory_does_not_hold_full_precision():
    class Small(StubHost):
        def full_precision(self):
            raise MemoryError

    source = Image.new("RGB", (96, 32), "blue")
    source.paste((255, 0, 0), (32, 0, 64, 32))
    result = run(Small(model=lambda x: 1 - broken_at(x)), source, overlap=0)
    assert result.complete and result.report.lines == ["tile 2 shows the enlarged source: the model returned NaN"]


def test_a_later_tile_holds_on_to_what_is_painted_and_starts_from_the_source_elsewhere():
    """So that what two tiles share is denoised once: a model that adds to what it sees adds it once."""
    source = Image.new("RGB", (80, 60), (100, 100, 100))
    host = StubHost(lambda latents, noise: latents + 0.1)
    for order in ("chess", "linear"):
        image = pixels(run(host, source, order=order, overlap=32).image)
        assert abs(image - 125.5).max() <= 1


def test_the_noise_of_a_run_that_is_fused_is_the_same_field():
    chess, fused = (run(StubHost(noisy), order=order, overlap=0) for order in ("chess", "fused"))
    assert abs(pixels(chess.image) - pixels(fused.image)).max() <= 1


def test_a_fused_tile_that_is_not_a_number_does_not_spread():
    plan = TilePlan(80, 32, tile=32, overlap=8, order="fused")  # three in a row
    tiles = plan.tiles
    fused = MultiDiffusion(
        plan, tiles, 8, lambda some: Batch(some, [[Prompt()]] * len(some), None), BatchSize(2, None, None), Team()
    )

    def model(x, batch):
        bad = torch.tensor([tile == tiles[1] for tile in batch.tiles])
        return torch.where(bad[:, None, None, None], torch.nan, x.mean((1, 2, 3), keepdim=True).expand_as(x) + 1)

    known = torch.full((1, 1, 4, 10), 7.0)
    x = torch.zeros_like(known)
    for step in (1, 2):
        x = fused(x, model, lambda: known)
        assert x.isfinite().all() and fused.lost == {tiles[1]}
        assert (x[..., :4] == step).all() and (x[..., 6:] == step).all() and (x[..., 4:6] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_outputs_are_blended_in_float32_and_come_in_the_models_dtype(dtype):
    """Also where a host's sampler is in half precision, as those of the WebUIs are."""
    plan = TilePlan(80, 32, tile=32, overlap=8, order="fused")
    size = BatchSize(2, None, None)
    fused = MultiDiffusion(plan, plan.tiles, 8, lambda some: Batch(some, [[Prompt()]] * len(some), None), size, Team())
    x = torch.randn(1, 4, 4, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    output = fused(x, lambda tiles, batch: tiles * 1, lambda: x)
    assert output.dtype == dtype
    assert torch.equal(output, x)
