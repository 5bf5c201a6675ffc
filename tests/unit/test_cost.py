"""Parameters and MACs of known networks: the figures of the papers and of the public code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rac.evaluate.cost import MacCounter, count, parameters, reference_rows

# name: parameters, GMACs, GMACs without attention (None: not stated)
KNOWN = {
    "SD-VAE f8d4 encoder": (34_163_592, 136.4, None),
    "SD-VAE f8d4 decoder": (49_490_179, 311.1, 310.0),
    "IN-VAE, VA-VAE f16d32 encoder": (28_413_248, 69.0, None),
    "IN-VAE, VA-VAE f16d32 decoder": (41_417_603, 126.1, None),
    "FLUX, SD3 VAE f8d16 encoder": (34_274_208, 136.5, None),
    "FLUX, SD3 VAE f8d16 decoder": (49_545_475, 311.2, None),
    "TAESD f8d4 encoder": (1_222_532, 15.3, 15.3),
    "TAESD f8d4 decoder": (1_222_531, 17.7, 17.7),
}
WHOLE = {"SD-VAE f8d4": (83_653_863, "40.84 %"), "IN-VAE, VA-VAE f16d32": (69_836_067, "40.69 %")}
SCALED = {0.1: 31.3, 0.2: 62.3, 0.3: 93.7}


@pytest.fixture(scope="module")
def rows():  # type: ignore[no-untyped-def]
    return {row.name: row for row in reference_rows()}


@pytest.mark.parametrize("name", KNOWN)
def test_known_networks(rows, name: str) -> None:  # type: ignore[no-untyped-def]
    expected, gmacs, without = KNOWN[name]
    assert rows[name].parameters == expected
    assert rows[name].cost.gmacs == pytest.approx(gmacs, abs=0.051)
    if without is not None:
        assert rows[name].cost.gmacs_without_attention == pytest.approx(without, abs=0.051)


@pytest.mark.parametrize("name", WHOLE)
def test_what_dropping_the_encoder_saves(rows, name: str) -> None:  # type: ignore[no-untyped-def]
    expected, saved = WHOLE[name]
    assert rows[f"{name} whole"].parameters == expected
    assert saved in rows[f"{name} whole"].note


@pytest.mark.parametrize("fraction", SCALED)
def test_scaled_decoders(rows, fraction: float) -> None:  # type: ignore[no-untyped-def]
    row = rows[f"SD-VAE decoder at {fraction:.2f}"]
    assert row.parameters == pytest.approx(fraction * 49_490_179, rel=0.005)
    assert row.parameters >= fraction * 49_490_179
    assert row.cost.gmacs == pytest.approx(SCALED[fraction], abs=0.05)


def test_nano_field(rows) -> None:  # type: ignore[no-untyped-def]
    assert rows["RAC nano field"].parameters == 1_369_988
    assert rows["RAC nano field"].cost.gmacs == pytest.approx(17.86, abs=0.005)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.project(tokens)
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_attention_by_hand_and_run_for_real() -> None:
    module = _Attention()
    projection, products = 16 * 8 * 8, 2 * 16 * 16 * 8
    cost = count(module, (1, 2, 8, 8))
    assert (cost.parameters, cost.macs, cost.attention_macs) == (64, projection + 2 * 2 * 8 * 8 * 8, 2 * 2 * 8 * 8 * 8)
    with MacCounter() as counter, torch.no_grad():
        module(torch.randn(1, 1, 16, 8))
    assert (counter.macs, counter.attention_macs) == (projection + products, products)


def test_counting_leaves_the_module_alone() -> None:
    module = nn.Conv2d(3, 4, 3, padding=1)
    cost = count(module, (1, 3, 10, 10))
    assert cost.macs == 10 * 10 * 3 * 9 * 4
    assert parameters(module) == cost.parameters == 3 * 9 * 4 + 4
    assert module.weight.device.type == "cpu"
    assert module.training
