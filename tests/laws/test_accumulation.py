"""A batch taken in parts trains as the whole batch does, noise included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_toy import AdversarialTask, ToyStream, ToyTask, one_layer

from rac.train import TrainConfig, fit, log, read_log

WHOLE = TrainConfig(iterations=3, batch=6, device="cpu", clip=0.5, log_every=1, tensorboard=False)


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the training here, and is no part of this law."""
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")


def trained(kind: type[ToyTask], directory: Path, parts: int) -> tuple[list[Tensor], list[dict]]:
    """Every weight that was trained, and what was logged."""
    task = kind(one_layer().double())
    fit(task, ToyStream(dtype=torch.float64), replace(WHOLE, accumulate=parts), directory)
    weights = [parameter for part in task.parts.values() for parameter in part.module.parameters()]
    return weights, [record["train"] for record in read_log(directory / "log.jsonl") if "train" in record]


@pytest.mark.parametrize("kind", [ToyTask, AdversarialTask])
@pytest.mark.parametrize("parts", [2, 4, 6])  # equal parts, unequal parts, single images
def test_accumulation_equals_one_batch(tmp_path: Path, parts: int, kind: type[ToyTask]) -> None:
    whole, whole_log = trained(kind, tmp_path / "whole", 1)
    split, split_log = trained(kind, tmp_path / "split", parts)
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(whole_log, split_log, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
