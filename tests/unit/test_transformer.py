"""Transformers over patches: published values, sizes, and what conditions do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rac.errors import RacError
from rac.evaluate.cost import count
from rac.fields import SiTField, SiTFieldConfig, sit
from rac.fields.transformer import (
    Block,
    Modulation,
    Patches,
    SwiGLU,
    positions,
    rotated,
    rotation,
    unpatchify,
    waves,
)

LIKE = torch.zeros(())


def small(**changes: object) -> SiTField:
    torch.manual_seed(0)
    field = SiTFieldConfig(**{"depth": 3, "width": 16, "heads": 2, "classes": 3, **changes}).build(5)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return field


def test_position_of_the_second_token_is_the_published_one():
    expected = torch.tensor([0.8415, 0.0100, 0.5403, 0.99995, 0, 0, 1, 1])
    torch.testing.assert_close(positions(2, 2, 8, LIKE)[1], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (3, 7)])
def test_positions_equal_their_formula_on_every_grid(height, width):
    table = positions(height, width, 12, LIKE)
    for row in range(height):
        for column in range(width):
            for k in range(3):
                w = 10000 ** (-k / 3)
                told = table[row * width + column]
                expected = [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)]
                assert told[[k, 3 + k, 6 + k, 9 + k]].tolist() == pytest.approx(expected, abs=1e-5)


def test_waves_begin_with_the_published_values():
    found = waves(torch.tensor([0.5]))
    assert found.shape == (1, 256)
    assert found[0, :2].tolist() == pytest.approx([0.87758, 0.89369], abs=5e-6)
    assert found[0, 128].item() == pytest.approx(math.sin(0.5))
    # Half precision does not round the angle.
    assert waves(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32


def test_patches_come_back_where_they_were():
    state, p = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6), 2
    tokens = F.unfold(state, p, stride=p).transpose(1, 2)  # N c p q
    tokens = tokens.view(2, 6, 3, p * p).transpose(2, 3).flatten(2)  # N p q c
    assert torch.equal(unpatchify(tokens, 2, 3, p), state)


def test_patches_lie_row_by_row():
    state = torch.randn(1, 3, 4, 6)
    embed = Patches(3, 8, 2)
    expected = embed.weight.flatten(1) @ state[0, :, 0:2, 4:6].flatten() + embed.bias
    torch.testing.assert_close(embed(state)[0, 2], expected)


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2730), (1152, 3072), (2048, 5461)])
def test_gated_networks_have_the_published_sizes(width, hidden):
    with torch.device("meta"):
        assert Block(width, 16, "rms").mlp.out.in_features == hidden


def test_rotated_products_depend_on_the_difference_of_places_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turn = rotation(4, 5, 8, query)
    turned = [rotated(one.expand(1, 1, 20, 8), turn)[0, 0] for one in (query, key)]
    product = (turned[0] @ turned[1].T).view(4, 5, 4, 5)
    torch.testing.assert_close(product[0, 0, 2, 1], product[1, 3, 3, 4])
    assert abs(product[0, 0, 2, 1] - product[0, 0, 1, 2]) > 1e-3
    # Row first: the first half of a head's channels does not know the column.
    assert torch.equal(turn[1].view(4, 5, 8)[:, 0, :4], turn[1].view(4, 5, 8)[:, 3, :4])


def test_one_condition_for_each_token_is_the_same_as_one_for_all_if_all_are_equal():
    torch.manual_seed(0)
    block = Block(16, 2, "rms", condition=6)
    nn.init.normal_(block.modulation[1].weight)
    x, condition = torch.randn(2, 5, 16), torch.randn(2, 6)
    torch.testing.assert_close(block(x, condition), block(x, condition[:, None].expand(-1, 5, -1)))


def test_gated_network_is_what_it_says():
    torch.manual_seed(0)
    network, x = SwiGLU(4, 6), torch.randn(1, 2, 4)
    gate, value = (x @ network.gate.weight.T + network.gate.bias).split(6, dim=-1)
    expected = (gate * torch.sigmoid(gate) * value) @ network.out.weight.T + network.out.bias
    torch.testing.assert_close(network(x), expected)


# Parameters with the table of positions, and 10^9 MACs at 256 pixels, as published.
SIZES = [
    ("S", 2, 4, 32, 32_957_200, 6.06, 5.450),
    ("B", 2, 4, 32, 130_500_112, 23.0, 21.794),
    ("L", 2, 4, 32, 458_086_416, 80.7, 77.472),
    ("XL", 2, 4, 32, 675_111_184, 118.6, 114.4),
    ("S", 1, 32, 16, 32_969_504, 6.06, 5.453),
    ("B", 1, 32, 16, 130_524_704, 23.0, 21.800),
    ("L", 1, 32, 16, 458_119_200, 80.7, 77.481),
    ("XL", 1, 32, 16, 675_148_064, 118.6, 114.4),
]


@pytest.mark.parametrize(("size", "patch", "channels", "side", "parameters", "gmacs", "without"), SIZES)
def test_sizes_are_the_published_ones(size, patch, channels, side, parameters, gmacs, without):
    with torch.device("meta"):
        field = sit(size, patch).build(channels)
    cost = count(field, (1, channels, side, side), (1,))
    assert cost.parameters + (side // patch) ** 2 * field.config.width == parameters
    assert cost.gmacs == pytest.approx(gmacs, abs=0.06)
    assert cost.gmacs_without_attention == pytest.approx(without, abs=0.02)


@pytest.mark.parametrize(
    ("size", "patch", "width", "parameters"),
    [("B", 4, 768, 131_214_400), ("B", 2, 768, 131_288_080), ("L", 2, 1024, 459_399_184), ("XL", 2, 1152, 676_735_504)],
)
def test_sizes_with_an_interval_are_those_of_mean_flows(size, patch, width, parameters):
    with torch.device("meta"):
        field = sit(size, patch, interval=True).build(4)
    assert sum(one.numel() for one in field.parameters()) + (32 // patch) ** 2 * width == parameters


def test_sizes_for_small_machines():
    with torch.device("meta"):
        found = {size: sum(one.numel() for one in sit(size, 1).build(32).parameters()) for size in ("XXS", "XS")}
    assert found["XXS"] < 5e6 < found["XS"] < 11e6


def test_it_begins_as_sit_does():
    torch.manual_seed(0)
    field = SiTFieldConfig(depth=2, width=64, heads=4, classes=1000).build(4)
    state, time = torch.randn(2, 4, 8, 8), torch.rand(2)
    assert not field(state, time).any()
    tapped = field.tapped(state, time, after=1)
    torch.testing.assert_close(tapped.tokens, field.patches(state) + positions(4, 4, 64, state))
    assert field.label.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert field.time[0].weight.std().item() == pytest.approx(0.02, rel=0.03)
    bound = math.sqrt(6 / (64 + 16))
    assert field.patches.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert field.blocks[0].attention.qkv.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 256), rel=0.02)
    biases = [one for name, one in field.named_parameters() if name.endswith("bias")]
    assert not any(one.any() for one in biases)
    assert not any(one[1].weight.any() for one in field.modules() if isinstance(one, Modulation))


def test_labels_matter_and_none_is_the_null_label():
    field = small()
    state, time = torch.randn(3, 5, 4, 6), torch.rand(3)
    bare = field(state, time)
    null = torch.full((3,), field.null)
    assert field.null == 3
    assert torch.equal(bare, field(state, time, condition=null))
    labelled = field(state, time, condition=torch.tensor([0, 3, 2]))
    assert torch.equal(labelled[1], bare[1]) or torch.allclose(labelled[1], bare[1])
    assert not torch.allclose(labelled[0], bare[0])


def test_tokens_after_a_block_come_from_the_same_evaluation():
    field = small()
    state, time, label = torch.randn(2, 5, 4, 6), torch.rand(2), torch.tensor([0, 1])
    tapped = field.tapped(state, time, condition=label, after=2)
    assert tapped.tokens.shape == (2, 6, 16)
    torch.testing.assert_close(tapped.velocity, field(state, time, condition=label))
    seen: list[torch.Tensor] = []
    field.blocks[1].register_forward_hook(lambda module, given, out: seen.append(out))
    field(state, time, condition=label)
    torch.testing.assert_close(tapped.tokens, seen[0])
    with pytest.raises(RacError, match="no block 4"):
        field.tapped(state, time, after=4)


def test_reduced_precision_leaves_the_state_its_type():
    field = small()
    state, time = torch.randn(2, 5, 4, 6), torch.rand(2)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = field(state, time)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, field(state, time), rtol=0.1, atol=0.1)
    assert field.bfloat16()(state.bfloat16(), time.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 0}, "depth 0"),
        ({"width": 18}, "multiple of 4"),
        ({"width": 16, "heads": 3}, "heads, 3"),
        ({"classes": -1}, "classes -1"),
        ({"width": 12, "heads": 2, "style": "rms"}, "cannot be rotated"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes, words):
    with pytest.raises(RacError, match=words):
        small(**changes)


def test_unknown_sizes_are_refused():
    with pytest.raises(RacError, match="no SiT of size 'H'; sizes are XXS, XS, S, B, L, XL"):
        sit("H")
