"""Residuals into a real ldm UNet, called in every way in which A1111's CFGDenoiser calls it."""

import types

import pytest
import torch

from lib_dinotile import DinotileError
from lib_dinotile.condition.adapter import AdapterCondition, AdapterConfig
from lib_dinotile.condition.shape import UNetShape
from lib_dinotile.hosts.ldm import LdmResiduals, cfg_rows
from tests.test_adapter import random_adapter

openaimodel = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel")
TILES, LATENT = 3, (16, 12)


def sigma(timestep):
    return 0.05 + timestep / 100


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = openaimodel.UNetModel(
        image_size=16,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        attention_resolutions=[1, 2],
        num_res_blocks=2,
        channel_mult=[1, 2, 2],
        num_heads=4,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=16,
        use_checkpoint=False,
        legacy=False,
    )
    # ldm starts its last layers at zero: everything must count here.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return {
        "x": torch.randn(TILES, 4, *LATENT),
        "t": torch.full((TILES,), 321.0),
        "features": torch.randn(TILES, 12, 4, 3),
        "conds": [torch.randn(7, 16), torch.randn(7, 16)],
        "uncond": torch.randn(7, 16),
        "short": torch.randn(5, 16),
    }


def condition(unet, features):
    config = AdapterConfig("sd15", UNetShape.of_ldm(unet), "tiny", features=12, width=16, blocks=1)
    return AdapterCondition(random_adapter(config), features, LATENT)


def controlled(unet, x, t, context, residuals):
    """ControlNet's way (arXiv 2302.05543), written out: residuals are added to the skips and after the middle block."""
    residuals, skips = list(residuals), []
    emb = unet.time_embed(openaimodel.timestep_embedding(t, unet.model_channels))
    h = x
    for block in unet.input_blocks:
        h = block(h, emb, context)
        skips.append(h)
    h = unet.middle_block(h, emb, context) + residuals.pop()
    for block in unet.output_blocks:
        h = block(torch.cat([h, skips.pop() + residuals.pop()], dim=1), emb, context)
    return unet.out(h)


def alone(unet, inputs, tile, context):
    """What row of `tile` with this context must give: the tile by itself, in a batch of one."""
    residuals = condition(unet, inputs["features"][tile : tile + 1]).residuals(sigma(float(inputs["t"][0])), 0.0)
    one = slice(tile, tile + 1)
    return controlled(unet, inputs["x"][one], inputs["t"][one], context[None], residuals)[0]


def test_shape_is_read_off_the_real_skips(unet, inputs):
    shape, sizes = UNetShape.of_ldm(unet), []
    hooks = [block.register_forward_hook(lambda m, a, out: sizes.append(tuple(out.shape[1:]))) for block in
             (*unet.input_blocks, unet.middle_block)]  # fmt: skip
    unet(inputs["x"], inputs["t"], inputs["uncond"].expand(TILES, -1, -1))
    for hook in hooks:
        hook.remove()
    assert sizes == [(channels, -(-16 // scale), -(-12 // scale)) for channels, scale in shape.slots]


def calls(mode, k):
    """[(conditionings per tile), is the uncond there] and the row counts of the calls that CFGDenoiser makes."""
    return {
        "together": (1, True, [2 * k]),
        "batch_cond_uncond off": (1, True, [k, k]),
        "AND": (2, True, [3 * k]),
        "AND, batch_cond_uncond off": (2, True, [k, k, k]),
        "uncond skipped": (1, False, [k]),
        "AND, uncond skipped": (2, False, [2 * k]),
        "other length": (1, True, [k, k]),
        "AND, other length": (2, True, [2 * k, k]),
    }[mode]


MODES = ["together", "batch_cond_uncond off", "AND", "AND, batch_cond_uncond off", "uncond skipped",
         "AND, uncond skipped", "other length", "AND, other length"]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_row_gets_its_own_tiles_residuals(unet, inputs, mode):
    parts, with_uncond, counts = calls(mode, TILES)
    uncond = inputs["short" if "length" in mode else "uncond"]
    # Stacked as CFGDenoiser does: for every tile its AND parts, then the unconditional rows.
    rows = [(tile, inputs["conds"][part]) for tile in range(TILES) for part in range(parts)]
    announced = len(rows) + TILES  # the callback comes before the uncond may be skipped
    rows += [(tile, uncond) for tile in range(TILES)] * with_uncond

    with LdmResiduals(unet, condition(unet, inputs["features"]), sigma) as residuals:
        residuals.step(cfg_rows([parts] * TILES, announced), 0.0)
        outputs, start = [], 0
        for count in counts:
            batch = rows[start : start + count]
            start += count
            x = torch.stack([inputs["x"][tile] for tile, _ in batch])
            outputs += unet(x, inputs["t"][:1].expand(count), torch.stack([context for _, context in batch]))
    assert start == len(rows)
    for (tile, context), output in zip(rows, outputs):
        assert torch.allclose(output, alone(unet, inputs, tile, context), atol=2e-5)


def test_untrained_and_absent_residuals_change_no_bit(unet, inputs):
    context = inputs["uncond"].expand(TILES, -1, -1)
    plain = unet(inputs["x"], inputs["t"], context)
    zero = types.SimpleNamespace(
        residuals=lambda s, p: [
            torch.zeros(TILES, c, -(-16 // d), -(-12 // d)) for c, d in UNetShape.of_ldm(unet).slots
        ]
    )
    for condition_ in (zero, types.SimpleNamespace(residuals=lambda s, p: None)):
        with LdmResiduals(unet, condition_, sigma) as residuals:
            residuals.step(range(TILES), 0.0)
            assert torch.equal(unet(inputs["x"], inputs["t"], context), plain)


def test_nothing_stays_behind_not_even_after_an_error(unet, inputs):
    context = inputs["uncond"].expand(TILES, -1, -1)
    plain = unet(inputs["x"], inputs["t"], context)
    with pytest.raises(RuntimeError), LdmResiduals(unet, condition(unet, inputs["features"]), sigma) as residuals:
        residuals.step(range(TILES), 0.0)
        assert not torch.allclose(unet(inputs["x"], inputs["t"], context), plain, atol=1e-3)
        raise RuntimeError
    assert torch.equal(unet(inputs["x"], inputs["t"], context), plain)
    hooks = [m for m in unet.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_works_when_another_extension_replaces_the_forward(unet, inputs):
    """sd-webui-controlnet puts its own loop over the same blocks in place of `forward`, and adds its own residuals."""
    torch.manual_seed(2)
    other = [torch.randn(1, c, -(-16 // d), -(-12 // d)) for c, d in UNetShape.of_ldm(unet).slots]
    context, ours = inputs["uncond"].expand(TILES, -1, -1), condition(unet, inputs["features"])
    unet.forward = lambda x, timesteps=None, context=None: controlled(unet, x, timesteps, context, other)
    try:
        with LdmResiduals(unet, ours, sigma) as residuals:
            residuals.step(range(TILES), 0.0)
            both = unet(inputs["x"], timesteps=inputs["t"], context=context)
    finally:
        del unet.forward
    summed = [a + b for a, b in zip(other, ours.residuals(sigma(321.0), 0.0))]
    assert torch.allclose(both, controlled(unet, inputs["x"], inputs["t"], context, summed), atol=2e-5)


def test_more_rows_than_announced_are_an_error_not_a_guess(unet, inputs):
    with (
        pytest.raises(DinotileError, match="3 rows where 2 were announced"),
        LdmResiduals(unet, condition(unet, inputs["features"]), sigma) as residuals,
    ):
        residuals.step(range(2), 0.0)
        unet(inputs["x"], inputs["t"], inputs["uncond"].expand(TILES, -1, -1))


def test_rows_that_cannot_be_told_apart_are_an_error():
    assert cfg_rows([1, 1], 4) == [0, 1, 0, 1]
    assert cfg_rows([2, 2], 6) == [0, 0, 1, 1, 0, 1]
    assert cfg_rows([1, 2], 5) == [0, 1, 1, 0, 1]
    assert cfg_rows([1, 1], 6) == [0, 1, 0, 1, 0, 1]
    for parts, rows in (([1, 1], 5), ([2, 1], 4), ([2, 2], 3)):
        with pytest.raises(DinotileError):
            cfg_rows(parts, rows)
