"""Resampled distances: their first value is the plain one, and pairing cancels what sets share."""

from __future__ import annotations

import pytest
import torch

from rac.errors import RacError
from rac.evaluate.resampling import Estimate, FrechetDistances, KernelDistances, centred, resamples
from rac.evaluate.set_metrics import Gaussian, frechet, kernel_distance


def points(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_the_first_resample_is_the_set_itself() -> None:
    one, other = points(40, 5, 0, 0.3), points(50, 5, 1)
    weights, theirs = resamples(40, 9, 0, "one"), resamples(50, 9, 0, "other")
    assert float(KernelDistances(other, theirs)(one, weights)[0]) == pytest.approx(kernel_distance(one, other))
    whole = FrechetDistances(other, theirs, 5)(one, weights)[0]
    assert float(whole) == pytest.approx(frechet(Gaussian.of(one), Gaussian.of(other)))


def test_a_resample_is_the_distance_of_what_was_drawn() -> None:
    """A covariance counts an image as often as it was drawn; the kernel leaves out pairs of an image with itself."""
    one, other = points(12, 3, 0, 0.3), points(11, 3, 1)
    weights, theirs = resamples(12, 3, 0, "one"), resamples(11, 3, 0, "other")
    drawn, drawn_other = (
        points.repeat_interleave(rows[2].long(), dim=0) for points, rows in ((one, weights), (other, theirs))
    )
    found = FrechetDistances(other, theirs, 3)(one, weights)[2]
    assert float(found) == pytest.approx(frechet(Gaussian.of(drawn), Gaussian.of(drawn_other)))

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / 3 + 1) ** 3

    def within(x: torch.Tensor) -> torch.Tensor:
        different = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") > 0
        return kernel(x, x)[different].mean()

    expected = within(drawn) + within(drawn_other) - 2 * kernel(drawn, drawn_other).mean()
    assert float(KernelDistances(other, theirs)(one, weights)[2]) == pytest.approx(float(expected))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = points(12, 3, 0, 0.3), points(11, 3, 1)
    weights, theirs = resamples(12, 3, 0, "one"), resamples(11, 3, 0, "other")
    whole = KernelDistances(other, theirs)(one, weights)
    monkeypatch.setattr("rac.evaluate.resampling.CHUNK", 5)
    torch.testing.assert_close(KernelDistances(other, theirs)(one, weights), whole)


def test_fewer_axes_are_those_of_the_references() -> None:
    """Sets that differ along axes in which the references hardly vary come out alike."""
    scale = torch.tensor([3.0, 2.0, 1e-3, 1e-3], dtype=torch.float64)
    reference = points(60, 4, 0) * scale
    one, weights = points(60, 4, 1) * scale, resamples(60, 1, 0)
    moved = one + torch.tensor([0.0, 0.0, 5.0, 0.0], dtype=torch.float64)
    few, all_axes = FrechetDistances(reference, weights, 2), FrechetDistances(reference, weights, 4)
    assert float(few(moved, weights)[0]) == pytest.approx(float(few(one, weights)[0]), abs=1e-3)
    assert float((all_axes(moved, weights) - all_axes(one, weights))[0]) == pytest.approx(25, rel=0.05)


def test_resamples_vary_as_fresh_sets_do() -> None:
    """On average over sets: the deviation of the resamples is that of the distance, and their mean the distance."""
    reference, weights = points(200, 4, 0), resamples(200, 100, 0, "one")
    kernel = KernelDistances(reference, torch.ones(101, 200, dtype=torch.float64))
    values = torch.stack([kernel(points(200, 4, seed, 0.4), weights) for seed in range(1, 101)])
    assert float(values[:, 1:].std(dim=1).mean()) == pytest.approx(float(values[:, 0].std()), rel=0.25)
    assert float(values[:, 1:].mean()) == pytest.approx(float(values[:, 0].mean()), rel=0.05)


def test_an_estimate_is_the_first_value_within_its_interval() -> None:
    drawn = torch.linspace(1, 3, 101, dtype=torch.float64)
    estimate = Estimate.of(centred(torch.cat([torch.tensor([5.0], dtype=torch.float64), drawn])))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((5.0, 4.05, 5.95))


def test_draws_are_repeatable_and_refused() -> None:
    assert torch.equal(resamples(7, 3, 1, "a"), resamples(7, 3, 1, "a"))
    assert not torch.equal(resamples(7, 3, 1, "a"), resamples(7, 3, 1, "b"))
    assert (resamples(7, 3, 1).sum(dim=1) == 7).all()
    with pytest.raises(RacError, match="cannot be drawn"):
        resamples(1, 3, 0)
    with pytest.raises(RacError, match="5 axes cannot be taken from 5 images"):
        FrechetDistances(points(5, 8, 0), resamples(5, 1, 0), 5)
