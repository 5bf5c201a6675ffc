"""Metrics of how well a coder's latents replace its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RacError
from ..tensors import check_dense


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
