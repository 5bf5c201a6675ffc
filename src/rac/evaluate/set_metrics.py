"""Distances between two sets of images, computed from their features, N D each.

All of it in float64, over all images at once and without random subsets, so that neither the order of the images nor
their batches matter. `suite` gives a distance its name (FID, FID-768).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RacError

CHUNK = 2048
"""Number of rows of a matrix of pairs that are held at once."""


class Gaussian(NamedTuple):
    """A normal distribution over D features."""

    mean: Tensor
    """Mean, D."""
    root: Tensor
    """Root of the covariance, K D: root^T root = covariance."""

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Returns the distribution with the mean and the covariance (over N - 1) of features N D.

        Raises `RacError` unless N > D: the covariance of fewer has directions without any variance, and distances to
        it say more about N than about the images.
        """
        (features,) = _checked(features)
        count, width = features.shape
        require_more_images(count, width)
        mean = features.mean(dim=0)
        # The triangle of a QR decomposition is a root of the covariance that never squares its condition number.
        return cls(mean, torch.linalg.qr((features - mean) / (count - 1) ** 0.5, mode="r").R)

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """Returns the distribution with mean D and covariance D D, which may be singular; in float64.

        Raises `RacError` for other shapes, values that are not finite, and a matrix that is not a covariance: not
        symmetric, or with negative variances beyond rounding.
        """
        mean, covariance = mean.detach().cpu().double(), covariance.detach().cpu().double()
        width = len(mean) if mean.ndim == 1 else 0
        if not width or covariance.shape != (width, width):
            raise RacError(
                f"moments are a mean D and a covariance D D, not {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise RacError("the moments hold NaN or infinite values; the file that they are from is damaged")
        scale = float(covariance.abs().max())
        if float((covariance - covariance.T).abs().max()) > 1e-5 * scale:
            raise RacError("the covariance is not symmetric; the file that it is from is damaged")
        variances, axes = torch.linalg.eigh((covariance + covariance.T) / 2)
        if float(variances[0]) < -1e-4 * scale:
            raise RacError(
                f"the covariance has a negative variance, {float(variances[0]):.3g}; the file that it is from is "
                "damaged"
            )
        # Of a singular covariance the smallest variances come out at plus or minus a rounding error.
        return cls(mean, variances.clamp_min(0).sqrt()[:, None] * axes.T)


def require_more_images(count: int, width: int) -> None:
    """Raises `RacError` unless there are more images (`count`) than features (`width`)."""
    if count <= width:
        raise RacError(
            f"a Frechet distance over {width} features needs more than {width} images, not {count}; give more, cut "
            "them into tiles, or use the kernel distance, which suits any number"
        )


def frechet(one: Gaussian, other: Gaussian) -> float:
    """Returns the Frechet distance of two normal distributions: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2).

    Heusel et al. (arXiv 1706.08500), equation 6. tr((C1 C2)^1/2) is the sum of the singular values of R1 R2^T, where C
    = R^T R. So no square root of a matrix is taken, which loses half the digits where covariances are close to
    singular.
    """
    if one.mean.shape != other.mean.shape:
        raise RacError(f"distances need features of one kind, not {len(one.mean)} and {len(other.mean)} features")
    means = (one.mean - other.mean).square().sum()
    traces = one.root.square().sum() + other.root.square().sum()
    shared = torch.linalg.svdvals(one.root @ other.root.T).sum()
    # Equal distributions may come out at minus a rounding error.
    return max(float(means + traces - 2 * shared), 0.0)


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Returns the KID: the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, of N D and M D features.

    The unbiased estimator, so it may be negative, and is comparable at any N. Over all pairs, where others average over
    random subsets: the expectation is the same. Reconstructions are no independent draw: beside their originals they
    come out lower by a term of order 1 / N, for every coder alike. Binkowski et al. (arXiv 1801.01401), equation 4.
    """
    features, reference = _checked(features, reference)
    n, m = len(features), len(reference)
    within = _kernel_sum(features, features) - _kernel(features, features, paired=True).sum()
    within_reference = _kernel_sum(reference, reference) - _kernel(reference, reference, paired=True).sum()
    across = _kernel_sum(features, reference)
    return float(within / (n * (n - 1)) + within_reference / (m * (m - 1)) - 2 * across / (n * m))


class PrecisionRecall(NamedTuple):
    """Precision and recall of a set of images, both in [0, 1]."""

    precision: float
    """Share of the images that lie among the references: quality."""
    recall: float
    """Share of the references that lie among the images: variety."""


def precision_recall(features: Tensor, reference: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Returns improved precision and recall of N D and M D features.

    Kynkaanniemi et al. (arXiv 1904.06991), equation 1. A point lies among others if it is no further from one of them
    than that one's k-th nearest neighbour of its own kind, itself not counted. Raises `RacError` unless both sets have
    more than `neighbours` images.
    """
    features, reference = _checked(features, reference)
    if min(len(features), len(reference)) <= neighbours:
        raise RacError(
            f"precision and recall over {neighbours} neighbours need more than {neighbours} images a set, "
            f"not {len(features)} and {len(reference)}"
        )
    precision = _inside(features, reference, _radii(reference, neighbours))
    recall = _inside(reference, features, _radii(features, neighbours))
    return PrecisionRecall(float(precision.double().mean()), float(recall.double().mean()))


def inception_score(logits: Tensor) -> float:
    """Returns exp of the mean divergence of p(class | image) from p(class), for logits N K: 1 to K, higher is better.

    Salimans et al. (arXiv 1606.03498), section 4; over all images as one split (the literature's ten splits of
    5,000 give a slightly lower score), so that it does not depend on their order.
    """
    (logits,) = _checked(logits)
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    return float((p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp())


def _checked(*features: Tensor) -> list[Tensor]:
    """Returns features as float64 on the CPU. Raises `RacError` for one image, unequal widths, NaN, other shapes."""
    for each in features:
        if each.ndim != 2 or len(each) < 2:
            raise RacError(f"features of a set are N D with N at least 2, not of shape {tuple(each.shape)}")
        if each.shape[1] != features[0].shape[1]:
            raise RacError(
                f"distances need features of one kind, not {features[0].shape[1]} and {each.shape[1]} features"
            )
        if not torch.isfinite(each).all():
            raise RacError("the features hold NaN or infinite values; the images or the weights are damaged")
    return [each.detach().cpu().double() for each in features]


def _kernel(x: Tensor, y: Tensor, paired: bool = False) -> Tensor:
    products = (x * y).sum(dim=1) if paired else x @ y.T
    return (products / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([_kernel(part, y).sum() for part in x.split(CHUNK)]).sum()


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Returns the distance of each point to its k-th nearest neighbour among the others."""
    # The nearest of all is the point itself, at a distance of 0.
    parts = [_distances(part, points).kthvalue(neighbours + 1, dim=1).values for part in points.split(CHUNK)]
    return torch.cat(parts)


def _inside(points: Tensor, others: Tensor, radii: Tensor) -> Tensor:
    return torch.cat([(_distances(part, others) <= radii).any(dim=1) for part in points.split(CHUNK)])


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Exact differences where they are affordable; products lose a few digits of small distances.
    exact = len(y) * x.shape[1] <= 2**22
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist")
