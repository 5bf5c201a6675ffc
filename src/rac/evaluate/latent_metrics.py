"""Metrics of latents: how well a coder's replace its teacher's, and how far generated ones are from encoded ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RacError
from ..tensors import check_dense
from .set_metrics import Gaussian, frechet


class LatentAgreement:
    """Agreement of two coders' latents, per channel, over all images and places.

    Sums are kept in float64, so neither batches nor order matter.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def update(self, latent: Tensor, teacher_latent: Tensor) -> None:
        """Adds latents B c h w of the same images to the sums. Raises `RacError` if the shapes differ."""
        for tensor, what in ((latent, "the latent"), (teacher_latent, "the latent of the teacher")):
            check_dense(tensor, what)
        if latent.shape != teacher_latent.shape or latent.ndim != 4:
            raise RacError(
                f"compare latents of one shape B c h w, not {tuple(latent.shape)} and {tuple(teacher_latent.shape)}; "
                "give the teacher that the coder was trained on"
            )
        teacher, error = teacher_latent.detach().cpu().double(), (latent - teacher_latent).detach().cpu().double()
        terms = (torch.ones_like(teacher), teacher, teacher.square(), error, error.square())
        sums = torch.stack([term.sum(dim=(0, 2, 3)) for term in terms])
        self._sums = sums if self._sums is None else self._sums + sums

    def explained_variance(self) -> Tensor:
        """Returns 1 - Var(latent - teacher_latent) / Var(teacher_latent), c, at most 1.

        1: equal up to a constant, which `offset` gives. 0: no better than the channel's mean. Below: worse than that.
        NaN where the teacher's channel is constant.
        """
        variance, error_variance = self._variances()
        return torch.where(variance > 0, 1 - error_variance / variance, torch.nan)

    def offset(self) -> Tensor:
        """Returns the mean of latent - teacher_latent over the teacher's standard deviation, c."""
        variance, _ = self._variances()
        return self._totals()[3] / self._totals()[0] / variance.sqrt()

    def _variances(self) -> tuple[Tensor, Tensor]:
        count, teacher, teacher_squares, error, error_squares = self._totals()
        variance = teacher_squares / count - (teacher / count).square()
        # A constant channel leaves a rounding error instead of 0.
        variance = torch.where(variance > 1e-12 * teacher_squares / count, variance, 0)
        return variance, (error_squares / count - (error / count).square()).clamp_min(0)

    def _totals(self) -> Tensor:
        if self._sums is None:
            raise RacError("no latents to compare; update with at least one batch")
        return self._sums


@dataclass(frozen=True)
class LatentDistance:
    """Frechet distance of generated latents from encoded ones, and of encoded ones from others at equal number."""

    value: float
    floor: float
    """The distance between two sets of encoded latents, each as many as the generated ones."""
    count: int
    """Number of latents of each set."""
    shape: tuple[int, int, int]
    """Channels, height and width of the latents that were compared."""

    @property
    def name(self) -> str:
        """Name of the metric, with the shape that was compared."""
        return f"latent FD, {' x '.join(map(str, self.shape))}"


def latent_distance(generated: Tensor, encoded: Tensor) -> LatentDistance:
    """Returns the Frechet distance of generated latents N c h w from encoded ones M c h w, beside its floor.

    Both distances are of equal numbers of latents, at most N and half of M. Latents of more numbers than that are
    averaged over squares of places first, of the smallest side that makes them fewer. Raises `RacError` for latents of
    another shape, and for too few of them.
    """
    if generated.ndim != 4 or generated.shape[1:] != encoded.shape[1:]:
        raise RacError(
            f"compare latents of one shape, not {tuple(generated.shape[1:])} and {tuple(encoded.shape[1:])}; give "
            "those of one coder and one size"
        )
    count = min(len(generated), len(encoded) // 2)
    _, channels, height, width = generated.shape
    square = 1
    while channels * -(-height // square) * -(-width // square) >= count and square < max(height, width):
        square *= 2
    if channels * -(-height // square) * -(-width // square) >= count:
        raise RacError(
            f"a distance of latents of {channels} channels needs more than {channels} latents, and twice as many "
            f"encoded ones, not {len(generated)} and {len(encoded)}; give more"
        )

    def gaussian(latents: Tensor) -> tuple[Gaussian, tuple[int, int, int]]:
        pooled = F.avg_pool2d(latents.double(), square, ceil_mode=True)
        return Gaussian.of(pooled.flatten(1)), (pooled.shape[1], pooled.shape[2], pooled.shape[3])

    reference, shape = gaussian(encoded[:count])
    floor = frechet(gaussian(encoded[count : 2 * count])[0], reference)
    return LatentDistance(frechet(gaussian(generated[:count])[0], reference), floor, count, shape)
