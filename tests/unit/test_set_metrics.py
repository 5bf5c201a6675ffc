"""Distances of sets against closed forms and other implementations, on features that are made up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rac import RacError
from rac.evaluate.set_metrics import Gaussian, frechet, inception_score, kernel_distance, precision_recall


def features(count: int, width: int, rng_seed: int = 0, shift: float = 0.0) -> Tensor:
    """Correlated, like those of a network."""
    generator = torch.Generator().manual_seed(rng_seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    numbers = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return (numbers @ mix / width**0.5).relu() + shift


def test_frechet_of_known_gaussians() -> None:
    one, other = Gaussian(torch.zeros(2), torch.eye(2)), Gaussian(torch.tensor([3.0, 4.0]), 2 * torch.eye(2))
    assert frechet(one, one) == 0
    # |m|^2 + tr(I + 4 I - 2 * 2 I)
    assert frechet(one, other) == pytest.approx(27)


def test_frechet_against_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    one, other = features(90, 24).numpy(), features(70, 24, rng_seed=1, shift=0.2).numpy()
    root = linalg.sqrtm(np.cov(one, rowvar=False) @ np.cov(other, rowvar=False))
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(np.cov(one.T) + np.cov(other.T) - 2 * root.real)
    found = frechet(Gaussian.of(torch.from_numpy(one)), Gaussian.of(torch.from_numpy(other)))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_against_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    one, other = features(90, 24), features(70, 24, rng_seed=1, shift=0.2)
    identity = torch.nn.Identity()
    identity.num_features = 24
    metric = fid.FrechetInceptionDistance(feature=identity)
    metric.update(other, real=True)
    metric.update(one, real=False)
    assert frechet(Gaussian.of(one), Gaussian.of(other)) == pytest.approx(float(metric.compute()), rel=1e-8)


def test_frechet_keeps_its_digits_where_covariances_are_near_singular() -> None:
    """Features that all but repeat each other, far from 0: two halves of equal sets are equal."""
    base = features(60, 4)
    near = torch.cat([base, base + 1e-9 * features(60, 4, rng_seed=1)], dim=1) + 100
    assert frechet(Gaussian.of(near), Gaussian.of(near.flip(0))) < 1e-10


def test_frechet_wants_more_images_than_features() -> None:
    with pytest.raises(RacError, match="more than 8 images, not 8"):
        Gaussian.of(features(8, 8))
    assert math.isfinite(frechet(Gaussian.of(features(9, 8)), Gaussian.of(features(9, 8, 1))))


def test_kernel_distance_against_torchmetrics() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")
    one, other = features(40, 12), features(40, 12, rng_seed=1, shift=0.2)
    metric = kid.KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=40)
    metric.update(other, real=True)
    metric.update(one, real=False)
    # One subset of all images; torchmetrics has it in float32.
    assert kernel_distance(one, other) == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_kernel_distance_by_hand() -> None:
    one, other = features(7, 3), features(5, 3, rng_seed=1)

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return float(np.mean([(float(x @ y) / 3 + 1) ** 3 for x, y in pairs]))

    within = mean([(one[i], one[j]) for i in range(7) for j in range(7) if i != j])
    other_within = mean([(other[i], other[j]) for i in range(5) for j in range(5) if i != j])
    across = mean([(x, y) for x in one for y in other])
    assert kernel_distance(one, other) == pytest.approx(within + other_within - 2 * across, rel=1e-9)


def test_kernel_distance_of_equal_distributions_is_zero_on_average() -> None:
    found = [kernel_distance(features(40, 6, 2 * k), features(60, 6, 2 * k + 1)) for k in range(40)]
    assert min(found) < 0 < max(found)
    assert abs(np.mean(found)) < 3 * np.std(found) / 40**0.5


def brute_force(points: np.ndarray, others: np.ndarray, k: int) -> float:
    inside = 0
    for point in points:
        for j, other in enumerate(others):
            gaps = sorted(np.linalg.norm(other - others[i]) for i in range(len(others)) if i != j)
            if np.linalg.norm(point - other) <= gaps[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_brute_force(k: int) -> None:
    one, other = features(40, 6), features(30, 6, rng_seed=1, shift=0.3)
    found = precision_recall(one, other, k)
    assert found.precision == brute_force(one.numpy(), other.numpy(), k)
    assert found.recall == brute_force(other.numpy(), one.numpy(), k)
    assert 0 < found.precision < 1


def test_precision_tells_quality_and_recall_variety() -> None:
    reference = features(60, 6)
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference + 100, reference) == (0, 0)
    two_kinds = torch.cat([reference, reference + 100])
    assert precision_recall(reference, two_kinds) == (1, 0.5)
    assert precision_recall(two_kinds, reference) == (0.5, 1)
    with pytest.raises(RacError, match="more than 3 images"):
        precision_recall(reference[:3], reference)


def test_inception_score_against_torchmetrics() -> None:
    inception = pytest.importorskip("torchmetrics.image.inception")
    logits = 3 * features(50, 10)
    with pytest.warns(UserWarning, match="buffer"):
        metric = inception.InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(logits)
    with np.errstate(all="ignore"), pytest.warns(UserWarning, match="degrees of freedom"):
        expected = float(metric.compute()[0])
    assert inception_score(logits) == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_known_answers() -> None:
    assert inception_score(torch.zeros(8, 5)) == pytest.approx(1)
    assert inception_score(100 * torch.eye(5)) == pytest.approx(5)


def test_order_and_chunks_do_not_matter(monkeypatch) -> None:
    one, other = features(40, 6), features(30, 6, rng_seed=1, shift=0.3)

    def all_of(x: Tensor, y: Tensor) -> list[float]:
        distance = frechet(Gaussian.of(x), Gaussian.of(y))
        return [distance, kernel_distance(x, y), *precision_recall(x, y), inception_score(x)]

    expected = all_of(one, other)
    assert all_of(one.flip(0), other.roll(7, 0)) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("rac.evaluate.set_metrics.CHUNK", 7)
    assert all_of(one, other) == pytest.approx(expected, rel=1e-9)


def test_bad_features_are_told() -> None:
    good = features(10, 4)
    damaged = good.clone()
    damaged[3, 1] = math.nan
    with pytest.raises(RacError, match="NaN"):
        kernel_distance(good, damaged)
    with pytest.raises(RacError, match="features of one kind, not 4 and 5"):
        kernel_distance(good, features(10, 5))
    with pytest.raises(RacError, match="at least 2"):
        kernel_distance(good[:1], good)
    with pytest.raises(RacError, match="features of one kind"):
        frechet(Gaussian.of(good), Gaussian.of(features(10, 5)))
