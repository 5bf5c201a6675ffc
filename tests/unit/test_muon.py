"""Muon agrees with torch's own for matrices, and with AdamW for everything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_toy import ToyStream, ToyTask, contents

from rac.train import TrainConfig, fit, log
from rac.train.muon import Muon, matrices, orthogonalised

LR, BETAS, DECAY = 1e-2, (0.9, 0.99), 0.1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(12, 32), nn.Embedding(40, 16))


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], iterations: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(iterations):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_singular_values_come_out_near_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator))[0] for side in shape)
    values = torch.linspace(0.2, 3.0, min(shape))
    found = orthogonalised(left[:, : len(values)] @ values.diag() @ right[: len(values)])
    inner = left[:, : len(values)].T @ found @ right[: len(values)].T
    assert inner.diagonal().min() > 0.6
    assert inner.diagonal().max() < 1.3
    torch.testing.assert_close(inner, inner.diagonal().diag(), rtol=0, atol=1e-4)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalised(torch.zeros(9, 12)).any()


def test_matrices_are_the_weights_of_layers_between_many_channels() -> None:
    layers = network()
    assert [id(weight) for weight in matrices(layers)] == [id(layers[1].weight), id(layers[2].weight)]


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_matrices_are_trained_as_by_torch(shape: tuple[int, int]) -> None:
    """The peer computes in bfloat16, so updates agree to a few per cent of their size."""
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    peer = torch.optim.Muon([theirs], LR, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    (expected,) = train(peer, [theirs])
    (found,) = train(Muon([ours], [ours], LR, BETAS), [ours])
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert float(expected.square().mean().sqrt()) > LR / 10


def test_a_kernel_is_the_matrix_of_its_outputs_in_any_layout() -> None:
    kernel = torch.randn(16, 12, 3, 3)
    flat, plain = nn.Parameter(kernel.flatten(1)), nn.Parameter(kernel.clone())
    last = nn.Parameter(kernel.clone().to(memory_format=torch.channels_last))
    (expected,) = train(Muon([flat], [flat], LR, BETAS, DECAY), [flat])
    for own in (plain, last):
        (found,) = train(Muon([own], [own], LR, BETAS, DECAY), [own])
        torch.testing.assert_close(found.flatten(1), expected)


def test_everything_else_is_trained_as_by_adamw() -> None:
    layers, peers = network(), network()
    expected = train(torch.optim.AdamW(peers.parameters(), LR, BETAS, weight_decay=DECAY), list(peers.parameters()))
    found = train(Muon(layers.parameters(), matrices(layers), LR, BETAS, DECAY), list(layers.parameters()))
    kept = {id(weight) for weight in matrices(layers)}
    for parameter, own, other in zip(layers.parameters(), found, expected, strict=True):
        if id(parameter) in kept:
            assert (own - other).abs().max() > LR / 10
        else:
            torch.testing.assert_close(own, other)


def test_a_run_broken_off_and_resumed_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def module() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 3, 1))

    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    settings = TrainConfig(
        iterations=4, batch=4, device="cpu", tensorboard=False, optimizer="muon", channels_last=True, bf16=True
    )
    fit(ToyTask(module()), ToyStream(), settings, tmp_path / "whole")
    fit(ToyTask(module()), ToyStream(), settings, tmp_path / "broken", stop_at=2)
    fit(ToyTask(module()), ToyStream(), settings, tmp_path / "broken", resume=True)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    fit(ToyTask(module()), ToyStream(), replace(settings, optimizer="adamw"), tmp_path / "adamw")
    model = "00000004/model.safetensors"
    assert contents(tmp_path / "adamw")[model] != contents(tmp_path / "whole")[model]
