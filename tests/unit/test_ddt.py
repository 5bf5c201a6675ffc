"""DiT^DH: published sizes, the velocity by its formula, and what the wide head is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rac.errors import RacError
from rac.evaluate.cost import count
from rac.fields import DDTField, DDTFieldConfig, ddt
from rac.fields.transformer import positions
from rac.flow import TimeGrid
from rac.flow.times import dimension_shift
from rac.recipes import RECIPES

SMALL = {"depth": 2, "width": 16, "heads": 2, "head_depth": 2, "head_width": 24, "head_heads": 2, "classes": 3}


def small(lively: float = 0.2, channels: int = 5, **changes: object) -> DDTField:
    torch.manual_seed(0)
    field = DDTFieldConfig(**{**SMALL, **changes}).build(channels)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(lively * torch.randn_like(parameter))
    return field.double()


# Parameters with the table of positions and the frequencies, and 10^9 MACs at 256 pixels, as published.
SIZES = [
    ("S", False, 16, 196_455_764, 48.5, 47.3),
    ("B", False, 16, 294_295_892, 65.7, 63.9),
    ("L", False, 16, 621_744_436, 123.6, None),
    ("XL", False, 16, 838_675_796, 161.6, 156.8),
    ("XL", False, 32, 838_675_796, 702.8, 626.6),
    ("S", True, 16, 196_800_852, None, None),
    ("B", True, 16, 295_280_724, None, None),
    ("L", True, 16, 623_319_604, None, None),
    ("XL", True, 16, 840_595_284, None, None),
]


@pytest.mark.parametrize(("size", "interval", "side", "parameters", "gmacs", "without"), SIZES)
def test_sizes_are_the_published_ones(size, interval, side, parameters, gmacs, without):
    with torch.device("meta"):
        field = ddt(size, interval=interval).build(768)
    own = sum(one.numel() for one in (*field.parameters(), *field.buffers()))
    assert own + 16**2 * field.config.width == parameters
    if gmacs is not None:
        cost = count(field, (1, 768, side, side), (1,))
        assert cost.gmacs == pytest.approx(gmacs, abs=0.06)
        if without is not None:
            assert cost.gmacs_without_attention == pytest.approx(without, abs=0.06)


def test_the_size_for_small_machines_is_as_wide_as_its_latents():
    recipe = RECIPES["dit-dh-128"][1]
    assert recipe.channels <= recipe.field.width
    with torch.device("meta"):
        field = recipe.field.build(recipe.channels)
    assert sum(one.numel() for one in field.parameters()) < 11e6


def recomputed(field: DDTField, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The velocity by the published formulas, patches of one number a channel."""
    w, config = dict(field.state_dict()), field.config
    batch, channels, height, width = x.shape

    def apply(name: str, v: Tensor) -> Tensor:
        return v @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def silu(v: Tensor) -> Tensor:
        return v / (1 + torch.exp(-v))

    def normed(name: str, v: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def rotate(v: Tensor) -> Tensor:
        half, place = v.shape[-1] // 2, torch.arange(height * width, dtype=torch.float64)
        rate = 10000 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        angles = torch.cat([(place // width)[:, None] * rate, (place % width)[:, None] * rate], dim=1)
        pairs = torch.view_as_complex(v.reshape(*v.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def block(name: str, v: Tensor, given: Tensor, heads: int) -> Tensor:
        chunks = apply(f"{name}.modulation.1", silu(given)).chunk(6, dim=-1)
        inner = normed(f"{name}.before_attention", v) * (1 + chunks[1]) + chunks[0]
        qkv = apply(f"{name}.attention.qkv", inner).reshape(batch, height * width, 3, heads, -1)
        q, k, value = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q), rotate(k)
        mixed = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ value
        v = v + chunks[2] * apply(f"{name}.attention.out", mixed.transpose(1, 2).flatten(2))
        inner = normed(f"{name}.before_mlp", v) * (1 + chunks[4]) + chunks[3]
        gate, value = apply(f"{name}.mlp.gate", inner).chunk(2, dim=-1)
        return v + chunks[5] * apply(f"{name}.mlp.out", silu(gate) * value)

    angles = 2 * torch.pi * t[:, None] * w["time.frequencies"]
    time = apply("time.2", silu(apply("time.0", torch.cat([angles.sin(), angles.cos()], dim=1))))[:, None]
    given = silu(time + w["label.weight"][labels][:, None])
    tokens = x.flatten(2).mT
    body = apply("patches", tokens) + positions(height, width, config.width, x)
    for number in range(config.depth):
        body = block(f"blocks.{number}", body, given, config.heads)
    bridged = apply("bridge", silu(time + body))
    head = apply("head_patches", tokens)
    for number in range(config.head_depth):
        head = block(f"head_blocks.{number}", head, bridged, config.head_heads)
    shift, scale = apply("head.modulation.1", silu(bridged)).chunk(2, dim=-1)
    out = apply("head.out", normed("head.norm", head) * (1 + scale) + shift)
    return out.mT.reshape(batch, channels, height, width)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 6)])
def test_the_velocity_is_that_of_the_formula_on_any_grid(height, width):
    field = small()
    x, t = torch.randn(2, 5, height, width, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    labels = torch.tensor([1, 3])
    # Positions are computed in single precision.
    torch.testing.assert_close(field(x, t, condition=labels), recomputed(field, x, t, labels), rtol=1e-5, atol=1e-5)


def test_it_begins_at_zero_and_as_a_velocity():
    torch.manual_seed(0)
    field = DDTFieldConfig(**SMALL, interval=True).build(5)
    state, time = torch.randn(2, 5, 4, 4), torch.rand(2)
    assert not field(state, time).any()
    with torch.no_grad():
        field.head.out.weight.normal_()
    assert torch.equal(field(state, time), field(state, time, torch.full((2,), 0.5)))
    assert field.label.weight.std().item() == pytest.approx(0.02, rel=0.3)
    # Linear layers as torch makes them, with biases.
    qkv = field.blocks[0].attention.qkv
    assert qkv.weight.abs().max().item() == pytest.approx(1 / math.sqrt(16), rel=0.05)
    assert qkv.bias.any()


def test_the_head_decides_how_many_directions_the_velocity_has():
    """Of n channels, a head of width d < n reaches d: the others keep the variance of their noise, (n - d) / n."""
    channels = 20
    for head_width, reached in ((8, 8), (24, 20)):
        field = small(channels=channels, head_width=head_width)
        state, time = torch.randn(8, channels, 4, 4, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
        out = field(state, time).movedim(1, -1).flatten(0, 2)
        found = torch.linalg.svdvals(out - field.head.out.bias)
        assert int((found > 1e-9 * found[0]).sum()) == reached


def test_frequencies_are_saved_and_never_trained():
    field = DDTFieldConfig(**SMALL).build(5)
    assert "time.frequencies" in field.state_dict()
    assert "time.frequencies" not in dict(field.named_parameters())
    assert field.state_dict()["time.frequencies"].std().item() == pytest.approx(1, abs=0.2)


def test_labels_matter_and_none_is_the_null_label():
    field = small()
    state, time = torch.randn(2, 5, 4, 4, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    bare = field(state, time)
    torch.testing.assert_close(bare, field(state, time, condition=torch.full((2,), field.null)))
    assert not torch.allclose(bare, field(state, time, condition=torch.tensor([0, 1])))


def test_shifts_follow_the_size_of_the_latents():
    assert dimension_shift(768, 16, 16) == pytest.approx(6.9282, abs=5e-5)
    assert dimension_shift(768, 32, 32) == pytest.approx(13.8564, abs=5e-5)
    assert dimension_shift(4, 16, 16) == 1.0
    assert TimeGrid.shifted(2, dimension_shift(768, 16, 16)).nodes[1] == pytest.approx(0.126132, abs=1e-6)
    for name in ("dit-dh-s", "dit-dh-b", "dit-dh-l", "dit-dh-xl", "dit-dh-128"):
        recipe = RECIPES[name][1]
        side = recipe.data.size // recipe.factor
        assert recipe.objective.shift == recipe.sampling.shift == dimension_shift(recipe.channels, side, side)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_depth": 0}, "head_depth 0"),
        ({"width": 20, "heads": 2}, "multiple of 4 times its heads, 2"),
        ({"head_width": 30}, "width 30"),
        ({"classes": -1}, "classes -1"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes, words):
    with pytest.raises(RacError, match=words):
        small(**changes)


def test_unknown_sizes_are_refused():
    with pytest.raises(RacError, match="no DiT\\^DH of size 'H'; sizes are XS, S, B, L, XL"):
        ddt("H")
