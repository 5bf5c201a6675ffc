"""How well a RAC's latents stand in for its teacher's, and what is lost on the way there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coders.rac import RAC, decoding_solver
from ..errors import RacError
from ..flow import Solver, TimeGrid, integrate
from ..images import crop
from ..states import image_of


class LatentAgreement:
    """Per channel, over all images and places: what one coder's latents say of another's.

    Sums are kept in float64, so neither batches nor order matter.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def update(self, latent: Tensor, teacher_latent: Tensor) -> None:
        """Count in latents B c h w of the same images. Raises `RacError` if the shapes differ."""
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
        """1 - Var(latent - teacher_latent) / Var(teacher_latent) -> c, at most 1.

        1: equal up to a constant, which `offset` tells. 0: no better than the channel's mean. Below: worse than that.
        NaN where the teacher's channel is constant.
        """
        variance, error_variance = self._variances()
        return torch.where(variance > 0, 1 - error_variance / variance, torch.nan)

    def offset(self) -> Tensor:
        """Mean of latent - teacher_latent over the teacher's standard deviation -> c."""
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


def state_round_trip(
    coder: RAC, image: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None
) -> Tensor:
    """Image -> seed state -> image, B 3 H W: without contraction, so nothing is compressed.

    It tells how well the way back undoes the way there, and nothing about the coder as a coder.
    """
    back = coder.encode_trajectory(image, steps, solver)
    forwards = coder.solver_for(decoding_solver(solver))
    there = integrate(coder.field, back.end, TimeGrid.of(back.times).reversed(), forwards)
    return crop(image_of(there.end), (image.shape[-2], image.shape[-1]))
