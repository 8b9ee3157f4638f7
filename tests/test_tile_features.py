"""What tiles show beside what the source shows; guidance towards it; the guard."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_dinotile.condition import guard as guards
from lib_dinotile.condition.conditioner import to_tensor as image_to_tensor
from lib_dinotile.condition.guard import Floor, Guard, rehearsal_size, rehearse
from lib_dinotile.condition.guidance import LENGTH, Guidance
from lib_dinotile.dino.encoder import load_encoder
from lib_dinotile.dino.field import FeatureField, feature_field
from lib_dinotile.dino.tile_features import TileFeatures
from lib_dinotile.settings import DISTANCES, PATCHES, SELF_SIMILARITY
from lib_dinotile.tiling.canvas import Canvas
from lib_dinotile.tiling.plan import Rect, TilePlan
from tests.test_tiling import random_image

SIZE = 192, 128
PLAN = TilePlan(*SIZE, tile=64, overlap=16, factor=2)
TRUE = Floor(0.0, 0.05)


class Colours:
    """An encoder whose features are the mean colours of a patch, less grey."""

    patch, width, depth, device = 4, 3, 2, torch.device("cpu")

    def __call__(self, pixels, layer=-1, facet="tokens"):
        return F.avg_pool2d(pixels, self.patch) - 0.5

    def several(self, pixels, wanted):
        return [self(pixels, *each) for each in wanted]


class Blind(Colours):
    """All features are nearly the same."""

    def __call__(self, pixels, layer=-1, facet="tokens"):
        return super().__call__(pixels, layer, facet) + 10


def colours(image):
    return FeatureField(feature_field(Colours(), to_tensor(image), SIZE, patches=24).features, SIZE)


def to_tensor(image):
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
        .float()
        / 255
    )


def tile_features(field, **more):
    return TileFeatures(Colours(), field, **{"size": PLAN.padded, **more})


SIDES = st.integers(40, 300)


@given(SIDES, SIDES, st.integers(16, 128), st.integers(1, 40), st.integers(0, 5))
def test_windows_lie_on_the_canvas_hold_their_tile_and_have_one_size(width, height, tile, patches, context):
    plan = TilePlan(width, height, tile, overlap=0, factor=4)
    rows = max(1, round(patches * height / max(width, height)))
    field = FeatureField(torch.zeros(3, rows, patches), (width, height))
    seen = TileFeatures(Colours(), field, plan.padded, context=context)
    windows = [seen.window(tile) for tile in plan.tiles]
    assert len({(window.width, window.height) for window in windows}) == 1
    for tile, window in zip(plan.tiles, windows):
        assert tile.intersection(window) == tile
        assert window.x >= 0 and window.y >= 0 and window.right <= plan.padded[0] and window.bottom <= plan.padded[1]
        rows, columns = seen.own(tile)
        grid = seen.grid(window)
        inner = tile.within(window)
        for part, cells, length, start, end in (
            (rows, grid[0], window.height, inner.y, inner.bottom),
            (columns, grid[1], window.width, inner.x, inner.right),
        ):
            centres = [(i + 0.5) * length / cells for i in range(cells)]
            wanted = [i for i, centre in enumerate(centres) if start <= centre <= end]
            assert 0 <= part.start < part.stop <= cells
            if wanted:
                assert wanted == list(range(part.start, part.stop))


def test_a_picture_is_like_itself_and_a_tile_is_judged_at_its_own_place():
    image = random_image(6, 4).resize(SIZE, Image.Resampling.BICUBIC)
    canvas = Canvas(image, PLAN)
    seen = tile_features(colours(image))
    tiles = PLAN.tiles
    own = torch.stack([canvas.source(tile) for tile in tiles])
    assert seen.similarity(canvas.crop, tiles, own).quantile(0.01) > 0.97
    moved = seen.similarity(canvas.crop, tiles[:1], own[1:2])[0]
    rows, columns = seen.own(tiles[0])
    assert moved[rows, columns].mean() < 0.9
    outside = torch.ones_like(moved, dtype=torch.bool)
    outside[max(rows.start - 1, 0) : rows.stop + 1, max(columns.start - 1, 0) : columns.stop + 1] = False
    assert moved[outside].quantile(0.02) > 0.97  # the surroundings are the canvas's


def guidance(image, **values):
    more = {"strength": 0.5, "start": 0.0, "end": 1.0, "every": 1, "views": 1, "distance": PATCHES, **values}
    return Guidance(tile_features(colours(image)), lambda latents: F.pixel_shuffle(latents, 2) / 2 + 0.5, **more)


def latents(pixels):
    return F.pixel_unshuffle(pixels * 2 - 1, 2)


def test_guidance_is_weaker_where_a_prompt_names_what_is_there():
    canvas, tiles = Canvas(random_image(*SIZE), PLAN), PLAN.tiles[:2]
    x0 = torch.stack([latents(Canvas(random_image(*SIZE, seed=5), PLAN).source(tile)) for tile in tiles])

    def moved(*named):
        guide = guidance(random_image(*SIZE)).of(canvas, tiles, lambda tile: latents(canvas.source(tile)), named=named)
        return (guide(x0, 0, 10) - x0).abs().mean(1)

    left = torch.zeros(x0.shape[2:])
    left[:, : left.shape[1] // 2] = 1
    free, half = moved(), moved(left, None)
    assert torch.equal(half[1], free[1]) and torch.equal(half[0][left == 0], free[0][left == 0])
    assert 0 < half[0][left == 1].mean() <= 0.26 * free[0][left == 1].mean()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_guidance_moves_x0_towards_the_source_and_by_no_more_than_asked_for(inference, distance):
    source, painted = random_image(*SIZE), random_image(*SIZE, seed=5)
    canvas, tiles = Canvas(source, PLAN), PLAN.tiles[:3]
    wrong = Canvas(painted, PLAN)
    start = latents(torch.stack([canvas.source(tile) for tile in tiles]))
    made = guidance(source, distance=distance)
    guide = made.of(canvas, tiles, lambda tile: latents(canvas.source(tile)[None])[0])
    with torch.inference_mode(inference):
        x0 = latents(torch.stack([wrong.source(tile) for tile in tiles]))
        moved = guide(x0, 0, 4)
    assert moved.shape == x0.shape and moved.isfinite().all()
    before, after = (
        made.tile_features.similarity(canvas.crop, tiles, F.pixel_shuffle(x, 2) / 2 + 0.5).mean() for x in (x0, moved)
    )
    if distance == PATCHES:
        assert after > before + 0.02
    change, reference = moved - x0, x0 - start
    ratio = change.square().mean((1, 2, 3)).sqrt() / reference.square().mean((1, 2, 3)).sqrt()
    if distance == PATCHES:
        assert (ratio > 0.1).all() and (ratio < LENGTH / 2 * 1.001).all()
    else:
        assert torch.allclose(ratio, torch.full((3,), LENGTH / 2), rtol=1e-3)  # strength 0.5, the first step


def test_the_steps_of_guidance_shrink_as_the_noise_does():
    source = random_image(*SIZE)
    canvas, tiles = Canvas(source, PLAN), PLAN.tiles[:1]
    made = guidance(source, distance=SELF_SIMILARITY)
    x0 = latents(Canvas(random_image(*SIZE, seed=5), PLAN).source(tiles[0])[None])

    def length(step):
        guide = made.of(canvas, tiles, lambda tile: latents(canvas.source(tile)[None])[0])
        return (guide(x0, step, 8) - x0).square().mean().sqrt()

    lengths = [float(length(step) / length(0)) for step in range(8)]
    assert lengths == pytest.approx([1 - step / 8 for step in range(8)], rel=1e-3)


def test_guidance_moves_nothing_by_much_that_is_not_worth_it():
    """An encoder that hardly sees any difference between the pictures: far from it a full step is not worth it."""
    source, wrong = random_image(*SIZE), Canvas(random_image(*SIZE, seed=5), PLAN)
    canvas, tiles = Canvas(source, PLAN), PLAN.tiles[:1]
    x0 = latents(wrong.source(tiles[0])[None])

    def moved(made):
        guide = made.of(canvas, tiles, lambda tile: latents(canvas.source(tile)[None])[0])
        return (guide(x0, 0, 4) - x0).square().mean().sqrt()

    made = guidance(source)
    blind = Blind()
    field = FeatureField(feature_field(blind, to_tensor(source), SIZE, patches=24).features, SIZE)
    assert moved(replace(made, tile_features=replace(made.tile_features, encoder=blind, field=field))) < 0.05 * moved(
        made
    )


def test_what_all_steps_agree_on_adds_up():
    """The second step goes on in the direction of the first where its own gradient is at odds with that."""
    source = random_image(*SIZE)
    canvas, tiles = Canvas(source, PLAN), PLAN.tiles[:1]
    made = guidance(source, distance=SELF_SIMILARITY)
    first, second = (latents(Canvas(random_image(*SIZE, seed=seed), PLAN).source(tiles[0])[None]) for seed in (5, 6))

    def guide():
        return made.of(canvas, tiles, lambda tile: latents(canvas.source(tile)[None])[0])

    going, fresh = guide(), guide()
    before = first - going(first, 0, 4)
    after, alone = second - going(second, 1, 4), second - fresh(second, 1, 4)
    along, across = (F.cosine_similarity(x.flatten(), before.flatten(), dim=0) for x in (after, alone))
    assert along > 0.4 and across < 0.3


def test_every_tile_is_guided_for_itself_whatever_the_batch_and_whichever_are_chosen():
    source, wrong = random_image(*SIZE), Canvas(random_image(*SIZE, seed=5), PLAN)
    canvas, tiles = Canvas(source, PLAN), PLAN.tiles[:4]
    made = guidance(source)
    x0 = latents(torch.stack([wrong.source(tile) for tile in tiles]))

    def encoded(tile):
        return latents(canvas.source(tile)[None])[0]

    together = made.of(canvas, tiles, encoded)(x0, 0, 4)
    for number, tile in enumerate(tiles):
        alone = made.of(canvas, [tile], encoded)(x0[number : number + 1], 0, 4)
        assert torch.allclose(together[number], alone[0], atol=1e-5)
    some = made.of(canvas, tiles, encoded)(x0[[3, 1]], 0, 4, [3, 1])
    assert torch.allclose(some, together[[3, 1]], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_guidance_computes_in_float32_and_returns_what_it_was_given(dtype):
    source, wrong = random_image(*SIZE), Canvas(random_image(*SIZE, seed=5), PLAN)
    canvas, tiles = Canvas(source, PLAN), PLAN.tiles[:2]
    x0 = latents(torch.stack([wrong.source(tile) for tile in tiles])).to(dtype)

    def moved(x0):
        return guidance(source).of(canvas, tiles, lambda tile: latents(canvas.source(tile)[None])[0].to(dtype))(
            x0, 0, 4
        )

    half, full = moved(x0), moved(x0.float())
    assert half.dtype == dtype and torch.equal(half, full.to(dtype)) and not torch.equal(half, x0)


@pytest.mark.parametrize(
    "values, steps",
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"every": 3}, [0, 3, 6]),
        ({"start": 0.25, "every": 2}, [2, 4, 6]),
        ({"end": 0.5}, [0, 1, 2, 3]),
        ({"start": 0.5, "end": 0.5}, []),
        ({"strength": 0.0}, []),
    ],
)
def test_guidance_is_at_work_at_its_own_steps_only(values, steps):
    source = random_image(*SIZE)
    canvas = Canvas(source, PLAN)
    guide = guidance(source, **values).of(canvas, PLAN.tiles[:1], lambda tile: latents(canvas.source(tile)[None])[0])
    x0 = latents(torch.rand(1, 3, 64, 64))
    assert [step for step in range(8) if guide(x0, step, 8) is not None] == steps


def test_a_picture_without_a_gradient_is_left_as_it_is():
    source = random_image(*SIZE)
    canvas = Canvas(source, PLAN)

    def blind(latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3) * 0

    made = replace(guidance(source), decode=blind)
    x0 = latents(torch.rand(1, 3, 64, 64))
    moved = made.of(canvas, PLAN.tiles[:1], lambda tile: latents(canvas.source(tile)[None])[0])(x0, 0, 1)
    assert torch.equal(moved, x0)


@given(SIDES, SIDES, st.integers(16, 128), st.integers(1, 40), st.floats(0, 0.99), st.floats(0, 0.99))
def test_shifted_windows_lie_on_the_canvas_beside_the_grid_and_have_one_size(width, height, tile, patches, x, y):
    plan = TilePlan(width, height, tile, overlap=0, factor=4)
    rows = max(1, round(patches * height / max(width, height)))
    seen = tile_features(FeatureField(torch.zeros(3, rows, patches), (width, height)), size=plan.padded).shifted(x, y)
    windows = [seen.window(tile) for tile in plan.tiles]
    assert len({(window.width, window.height) for window in windows}) == 1
    for tile, window in zip(plan.tiles, windows):
        assert window.x >= 0 and window.y >= 0 and window.right <= plan.padded[0] and window.bottom <= plan.padded[1]
        share = seen.share(tile)
        assert share.shape == seen.grid(window) and share.max() > 0 and share.min() >= 0


def test_views_look_at_other_places_from_step_to_step():
    source, wrong = random_image(*SIZE), Canvas(random_image(*SIZE, seed=5), PLAN)
    canvas, tile = Canvas(source, PLAN), PLAN.tiles[4]
    x0 = latents(wrong.source(tile)[None])

    def guide(**values):
        return guidance(source, **values).of(canvas, [tile], lambda tile: latents(canvas.source(tile)[None])[0])

    first, second = guide()(x0, 0, 4), guide()(x0, 1, 4)
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(guide()(x0, 1, 4), second)  # no chance in it
    assert not torch.allclose(guide(views=2)(x0, 0, 4), first, atol=1e-3)


def test_keys_of_the_real_encoder_are_another_facet_and_take_gradients():
    encoder = load_encoder("mini")
    pixels = torch.rand(1, 3, 28, 42, requires_grad=True)
    tokens, keys = (encoder(pixels, -1, facet) for facet in ("tokens", "keys"))
    assert keys.shape == tokens.shape == (1, 192, 2, 3) and not torch.allclose(keys, tokens, atol=1e-2)
    apart = encoder.several(pixels, [(-1, "keys"), (0, "tokens"), (-1, "tokens")])
    assert torch.equal(apart[0], keys) and torch.equal(apart[1], encoder(pixels, 0)) and torch.equal(apart[2], tokens)
    (gradient,) = torch.autograd.grad(keys.square().sum(), pixels)
    assert gradient.abs().sum() > 0
    with pytest.raises(ValueError, match="layer"):
        encoder(pixels, 0, "values")


def painted_guard(relative=False):
    source = random_image(*SIZE)
    canvas = Canvas(source, PLAN)
    return Guard(tile_features(colours(source)), canvas, TRUE, 3.0, relative), canvas


def spoiled(canvas, tile, area):
    """A tile with something else in a part of it."""
    pixels = canvas.source(tile).clone()
    pixels[(slice(None), *area.slices)] = 1 - pixels[(slice(None), *area.slices)]
    return pixels


def test_what_is_something_else_is_in_doubt_and_nothing_besides():
    guard, canvas = painted_guard()
    tile, area = PLAN.tiles[4], Rect(16, 24, 24, 16)
    distances = guard.distances([tile, tile], torch.stack([canvas.source(tile), spoiled(canvas, tile, area)]))
    assert not guard.doubt(tile, distances[0]).any() and guard.score(tile, distances[0]) > 0.99
    doubt = guard.doubt(tile, distances[1])
    assert guard.score(tile, distances[1]) < 0
    shown = guard.area(tile, doubt)[0]
    inner = torch.zeros(64, 64, dtype=torch.bool)
    inner[area.slices] = True
    assert (shown[inner] > 0.4).all() and (shown[~inner] > 0.9).float().mean() < 0.1


def test_a_single_patch_is_no_doubt_and_neither_is_what_the_tile_may_not_change():
    guard, canvas = painted_guard()
    tile = PLAN.tiles[4]
    distances = guard.distances([tile], canvas.source(tile)[None])[0]
    rows, columns = guard.own(tile, distances).nonzero().T
    worse = distances.clone()
    worse[rows[10], columns[10]] = 1.0
    assert not guard.doubt(tile, worse).any()
    spoiled_one = guard.distances([tile], spoiled(canvas, tile, Rect(0, 0, 32, 64))[None])[0]
    free = torch.ones(64, 64)
    assert guard.doubt(tile, spoiled_one, free).any()
    free[:, :40] = 0
    assert not guard.doubt(tile, spoiled_one, free).any()


def test_what_is_not_a_number_is_in_doubt():
    guard, canvas = painted_guard()
    tile = PLAN.tiles[0]
    distances = guard.distances([tile], canvas.source(tile)[None])[0]
    assert guard.doubt(tile, distances * torch.nan).any()


def test_the_plain_source_is_asked_for_only_where_there_is_doubt():
    guard, canvas = painted_guard(relative=True)
    tile, asked = PLAN.tiles[4], []

    def plain():
        asked.append(True)
        return guard.plain(tile)

    good = guard.distances([tile], canvas.source(tile)[None])[0]
    assert not guard.doubt(tile, good, plain=plain).any() and not asked
    bad = guard.distances([tile], spoiled(canvas, tile, Rect(16, 16, 32, 32))[None])[0]
    assert guard.doubt(tile, bad, plain=plain).any() and asked
    assert not guard.doubt(tile, bad, plain=lambda: bad).any()  # no worse than the plain source


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_blocks_are_all_two_by_two_and_only_they(height, width, data):
    flat = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    patches = torch.tensor(flat).view(height, width)
    h, w = min(2, height), min(2, width)
    wanted = torch.zeros_like(patches)
    for y in range(height - h + 1):
        for x in range(width - w + 1):
            if patches[y : y + h, x : x + w].all():
                wanted[y : y + h, x : x + w] = True
    assert torch.equal(guards._blocks(patches), wanted)


def test_the_floor_is_robust():
    values = torch.cat([torch.full((60,), 0.1) + torch.linspace(-0.01, 0.01, 60), torch.full((20,), 9.0)])
    floor = Floor.of(values)
    assert abs(floor.median - 0.1) < 0.02 and floor.spread < 0.02
    assert floor.limit(3) == pytest.approx(floor.median + 3 * floor.spread)
    assert Floor.of(torch.zeros(5)).spread > 0


def test_a_rehearsal_tells_how_much_sharpness_changes():
    """The same photo at full resolution passes where a turned one does not, though both are sharper than the source."""
    encoder = load_encoder("mini")
    truth = Image.open("examples/photo.png").convert("RGB").resize((384, 256), Image.Resampling.LANCZOS)
    source = truth.resize((192, 128), Image.Resampling.LANCZOS)
    plan = TilePlan(384, 256, tile=128, overlap=32, factor=2)
    canvas = Canvas(source.resize(truth.size, Image.Resampling.LANCZOS), plan)

    def seen(image):
        return TileFeatures(encoder, feature_field(encoder, to_tensor(image), truth.size, patches=32), plan.padded)

    shrunk = source.resize(rehearsal_size(source.size, truth.size), Image.Resampling.LANCZOS)
    guard = Guard(seen(source), canvas, rehearse(seen(source).field, seen(shrunk).field), 6.0, relative=True)
    sharp, turned = (Canvas(image, plan) for image in (truth, truth.transpose(Image.Transpose.ROTATE_180)))

    def doubted(shown):
        shares = []
        for tile in plan.tiles:
            distances = guard.distances([tile], shown.source(tile)[None])[0]
            shares.append(guard.doubt(tile, distances).float().mean().item())
        return sum(shares) / len(shares)

    assert doubted(sharp) < 0.02 < 0.1 < doubted(turned)


def test_pixels_are_float32_whatever_torchs_default_is():
    source = random_image(*SIZE)
    canvas = Canvas(source, PLAN, mask=Image.new("L", SIZE, 128))
    preview = canvas.preview(64)
    torch.set_default_dtype(torch.float16)
    try:
        assert image_to_tensor(source).dtype == torch.float32
        assert canvas.preview(64).tobytes() == preview.tobytes()
    finally:
        torch.set_default_dtype(torch.float32)
