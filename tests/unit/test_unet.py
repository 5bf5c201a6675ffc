"""ADM's U-Net: its size at the published widths, its layers against formulas, sides that no stride divides."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from rac.errors import RacError
from rac.evaluate.cost import count
from rac.fields import UNet, UNetConfig
from rac.fields.unet import UNetAttention, UNetBlock, noise_level_waves

TINY = UNetConfig(width=8, multiples=(1, 2, 2), blocks=1, norm_groups=4)


def alive(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64, its weights of zero moved."""
    torch.manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(
    ("width", "parameters", "gmacs"),
    [(128, 122_925_315, 476.2), (192, 276_486_531, 1070.8), (256, 491_446_787, 1903.0)],
    ids=["B", "M", "L"],
)
def test_published_sizes_exactly(width: int, parameters: int, gmacs: float) -> None:
    with torch.device("meta"):
        network = UNet(UNetConfig(width=width), 3 + 4, 3)
    cost = count(network, (1, 7, 256, 256), (1,))
    assert cost.parameters == parameters
    assert cost.gmacs == pytest.approx(gmacs, abs=0.05)


def test_it_begins_at_zero_and_every_block_at_its_skip() -> None:
    network = UNet(TINY, 5, 3)
    state, time = torch.randn(2, 5, 16, 16), torch.tensor([0.1, 0.7])
    assert not network(state, time).any()
    x, embedded = torch.randn(2, 8, 6, 6), torch.randn(2, 32)
    assert torch.equal(UNetBlock(8, 8, 32, 4)(x, embedded), x)
    assert torch.equal(UNetBlock(8, 8, 32, 4, "down")(x, embedded), F.avg_pool2d(x, 2))
    assert torch.equal(UNetBlock(8, 8, 32, 4, "up")(x, embedded, (12, 12)), F.interpolate(x, scale_factor=2))
    assert torch.equal(UNetAttention(8, 4)(x), x)


def test_a_block_is_its_formula() -> None:
    block = alive(UNetBlock(8, 12, 16, 4, "down"))
    x, embedded = torch.randn(2, 8, 6, 4).double(), torch.randn(2, 16).double()
    y = F.silu(F.group_norm(x, 4, block.norm.weight, block.norm.bias, eps=1e-5))
    y = F.conv2d(F.avg_pool2d(y, 2), block.first.weight, block.first.bias, padding=1)
    scale, shift = F.linear(F.silu(embedded), block.modulation.weight, block.modulation.bias).chunk(2, dim=1)
    y = F.group_norm(y, 4, block.second_norm.weight, block.second_norm.bias, eps=1e-5)
    y = F.silu(y * (1 + scale[..., None, None]) + shift[..., None, None])
    y = F.conv2d(y, block.second.weight, block.second.bias, padding=1)
    torch.testing.assert_close(block(x, embedded), block.skip(F.avg_pool2d(x, 2)) + y)


def test_attention_has_one_head_over_all_places() -> None:
    layer, x = alive(UNetAttention(8, 4)), torch.randn(2, 8, 3, 5).double()
    query, key, value = layer.query_key_value(layer.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(8), dim=-1)
    attended = (value @ weights.transpose(1, 2)).view(x.shape)
    torch.testing.assert_close(layer(x), x + layer.out(attended))


def test_times_are_embedded_as_noise_levels_of_up_to_1000() -> None:
    waves = noise_level_waves(torch.tensor([1.0, 0.75, 0.0]), 6)
    for row, level in zip(waves, (0.0, 250.0, 1000.0), strict=True):
        angles = [level * 10_000 ** (-k / 3) for k in range(3)]
        expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-4, rtol=0)
    assert noise_level_waves(torch.tensor([0.5], dtype=torch.bfloat16), 4).dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 14), (5, 7), (1, 3)])
def test_any_side(height: int, width: int) -> None:
    network = alive(UNet(TINY, 4, 3))
    state, time = torch.randn(1, 4, height, width).double(), torch.tensor([0.3]).double()
    velocity = network(state, time)
    assert velocity.shape == (1, 3, height, width)
    assert float(velocity.detach().abs().max()) > 1e-3


def test_an_odd_side_is_as_if_its_last_row_were_there_twice() -> None:
    """What a stride does not divide is averaged over what there is: the same as repeating the edge, before pooling."""
    x = torch.randn(1, 3, 5, 6)
    pooled = F.avg_pool2d(x, 2, ceil_mode=True)
    assert torch.equal(pooled, F.avg_pool2d(F.pad(x, (0, 0, 0, 1), mode="replicate"), 2))
    assert torch.equal(
        F.interpolate(pooled, size=(5, 6), mode="nearest"), F.interpolate(pooled, scale_factor=2)[..., :5, :]
    )


def test_every_parameter_learns() -> None:
    network = alive(UNet(TINY, 4, 3))
    network(torch.randn(2, 4, 8, 8).double(), torch.tensor([0.2, 0.9]).double()).square().sum().backward()
    assert not [name for name, one in network.named_parameters() if one.grad is None or not one.grad.any()]


def test_a_copy_without_values_has_the_same_shapes() -> None:
    abstract = copy.deepcopy(UNet(TINY, 4, 3)).to("meta")
    assert abstract(torch.empty(2, 4, 9, 8, device="meta"), torch.empty(2, device="meta")).shape == (2, 3, 9, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width must be at least 1"),
        ({"width": 100}, "even and divide into norm_groups 32"),
        ({"width": 9, "norm_groups": 3}, "must be even"),
        ({"multiples": ()}, "one positive width per stride"),
        ({"multiples": (1, 0)}, "one positive width per stride"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"norm_groups": -1}, "norm_groups must be at least 1"),
    ],
)
def test_bad_shapes_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RacError, match=message):
        UNetConfig(**settings)
