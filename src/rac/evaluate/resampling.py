"""Distances of resampled sets of images, for intervals of their differences.

A resample is a row of weights: how often each image was drawn. Sets that are resampled by the same rows stay paired, so
that what two of them share cancels in their difference. The first row of all is the set itself, every weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RacError
from ..runtime import generator

AT_ONCE = 64
"""Number of resamples whose covariances are held at once."""

CHUNK = 2048
"""Number of rows of a matrix of pairs that are held at once."""


def resamples(count: int, number: int, rng_seed: int, *stream: str) -> Tensor:
    """Returns weights (number + 1) x count, float64: a first row of ones, then draws of `count` with replacement.

    They are a function of the arguments alone; `stream` names what is drawn.
    """
    if count < 2 or number < 1:
        raise RacError(f"{number} resamples of {count} images cannot be drawn; give at least 1 of at least 2 images")
    draws = torch.randint(count, (number, count), generator=generator(rng_seed, "resample", *stream))
    weights = torch.zeros(number, count, dtype=torch.float64)
    weights.scatter_add_(1, draws, torch.ones(number, count, dtype=torch.float64))
    return torch.cat([torch.ones(1, count, dtype=torch.float64), weights])


class KernelDistances:
    """Kernel distances (KID) of sets to one reference, for many resamples of both.

    An image that was drawn twice makes no pair with itself, so that the estimator stays unbiased in a resample.
    """

    def __init__(self, reference: Tensor, weights: Tensor) -> None:
        """Prepares the reference: features M D, and weights R M."""
        self._reference, self._weights = reference.double(), weights
        self._within = _within(self._reference, weights)

    def __call__(self, features: Tensor, weights: Tensor) -> Tensor:
        """Returns the distances, R, of features N D with weights R N; the first is `kernel_distance`."""
        features = features.double()
        across = _kernel_sum(features, self._reference, weights, self._weights)
        pairs = features.shape[0] * self._reference.shape[0]
        return _within(features, weights) + self._within - 2 * across / pairs


class FrechetDistances:
    """Frechet distances of sets to one reference along the reference's first principal axes, for many resamples.

    A covariance over all features needs more images than features; one over a few axes needs few, and its distances
    can be resampled. They are smaller than those over all features, and comparable for the same axes alone.
    """

    def __init__(self, reference: Tensor, weights: Tensor, axes: int) -> None:
        """Prepares the reference: features M D, weights R M, and the number of axes, at most D and below M."""
        reference = reference.double()
        if not 1 <= axes <= reference.shape[1] or axes >= len(reference):
            raise RacError(
                f"{axes} axes cannot be taken from {len(reference)} images with {reference.shape[1]} features; give "
                "more images"
            )
        centred = reference - reference.mean(dim=0)
        self._axes = torch.linalg.svd(centred, full_matrices=False).Vh[:axes].T
        self._moments = [_moments(reference @ self._axes, part) for part in weights.split(AT_ONCE)]
        self._roots = [_root(covariance) for _, covariance in self._moments]

    def __call__(self, features: Tensor, weights: Tensor) -> Tensor:
        """Returns the distances, R, of features N D with weights R N."""
        points = features.double() @ self._axes
        found = []
        for part, root, (mean, covariance) in zip(weights.split(AT_ONCE), self._roots, self._moments, strict=True):
            own_mean, own_covariance = _moments(points, part)
            shared = torch.linalg.eigvalsh(root @ own_covariance @ root).clamp_min(0).sqrt().sum(dim=-1)
            traces = (covariance + own_covariance).diagonal(dim1=-2, dim2=-1).sum(dim=-1)
            found.append((own_mean - mean).square().sum(dim=-1) + traces - 2 * shared)
        return torch.cat(found)


@dataclass(frozen=True)
class Estimate:
    """A value, and the interval that holds it with a probability of 95 %."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Returns the estimate of values R: the first, and the 2.5 % and 97.5 % quantiles of the others."""
        drawn = values[1:][torch.isfinite(values[1:])]
        if not torch.isfinite(values[0]) or not len(drawn):
            return cls(float(values[0]), float("nan"), float("nan"))
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
        return cls(float(values[0]), low, high)


def centred(values: Tensor) -> Tensor:
    """Returns values R, those of resamples shifted so that their mean is the first, the value of the set itself.

    A resample holds fewer different images than the set, and its Frechet distance is larger for that alone.
    """
    drawn = values[1:]
    return torch.cat([values[:1], drawn - drawn.mean() + values[0]])


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor, x_weights: Tensor, y_weights: Tensor) -> Tensor:
    """Returns the sums of the kernel over all pairs of N D and M D points, R, with weights R N and R M."""
    parts = zip(x.split(CHUNK), x_weights.split(CHUNK, dim=1), strict=True)
    return torch.stack(
        [((weights @ _kernel(part @ y.T, y.shape[1])) * y_weights).sum(dim=1) for part, weights in parts]
    ).sum(dim=0)


def _within(points: Tensor, weights: Tensor) -> Tensor:
    """Returns the mean kernel of pairs of two different images, R."""
    own = weights.square() @ _kernel(points.square().sum(dim=1), points.shape[1])
    pairs = len(points) ** 2 - weights.square().sum(dim=1)
    return (_kernel_sum(points, points, weights, weights) - own) / pairs


def _moments(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the means R K and the covariances R K K (over N - 1) of points N K with weights R N."""
    mean = weights @ points / len(points)
    second = torch.stack([points.T @ (row[:, None] * points) for row in weights])
    return mean, (second - len(points) * mean[:, :, None] * mean[:, None, :]) / (len(points) - 1)


def _root(covariance: Tensor) -> Tensor:
    """Returns the symmetric roots of covariances R K K."""
    variances, axes = torch.linalg.eigh(covariance)
    return (axes * variances.clamp_min(0).sqrt()[:, None, :]) @ axes.transpose(-2, -1)
