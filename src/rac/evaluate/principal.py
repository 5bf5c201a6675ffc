"""Principal component analysis: latents as colours, trajectories as lines in a plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RacError

COLOUR_SPREAD = 2.5
"""Standard deviations to either side of the mean that colours distinguish."""


@dataclass(frozen=True)
class PrincipalAxes:
    """Principal axes of points: the directions in which points of dimension D vary most, in falling order."""

    mean: Tensor
    """Mean of the points, D."""
    axes: Tensor
    """The axes, k D, orthonormal. The sign, which is arbitrary, is such that an axis's largest entry is positive."""
    deviations: Tensor
    """Standard deviation along each axis, k."""
    shares: Tensor
    """Share of all variance along each axis, k."""

    @classmethod
    def fit(cls, points: Tensor, count: int) -> PrincipalAxes:
        """Returns the first `count` axes (fewer if there are not so many) of points N D.

        Raises `RacError` below 2 points.
        """
        if points.ndim != 2 or len(points) < 2:
            raise RacError(f"principal axes need at least 2 points N D, not shape {tuple(points.shape)}")
        points = points.detach().float().cpu()
        mean = points.mean(dim=0)
        _, scales, axes = torch.linalg.svd(points - mean, full_matrices=False)
        variances = scales.square() / (len(points) - 1)
        shares = variances / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)
        axes = axes[:count]
        signs = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
        return cls(mean, axes * signs, variances[:count].sqrt(), shares[:count])

    def project(self, points: Tensor) -> Tensor:
        """Returns the coordinates ... k of points ... D."""
        return (points.detach().float().cpu() - self.mean) @ self.axes.T


def latent_axes(latents: Sequence[Tensor]) -> PrincipalAxes:
    """Returns the first three axes of the channels of latents, each B c h w of any size, over all images and places."""
    return PrincipalAxes.fit(torch.cat([_places(latent) for latent in latents]), 3)


def latent_colours(latent: Tensor, axes: PrincipalAxes, factor: int) -> Tensor:
    """Returns a latent 1 c h w as an image 3 h*f w*f in [-1, 1]: red, green and blue are its first three axes.

    Grey is the mean, full colour `COLOUR_SPREAD` standard deviations of the latents the axes were fitted to.
    """
    scaled = axes.project(_places(latent)) / (COLOUR_SPREAD * axes.deviations.clamp_min(1e-12))
    colours = torch.zeros(len(scaled), 3)
    colours[:, : scaled.shape[1]] = scaled.clamp(-1, 1)
    height, width = latent.shape[-2:]
    image = colours.T.reshape(3, height, width)
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _places(latent: Tensor) -> Tensor:
    """Reshapes latents B c h w to points B*h*w c."""
    return latent.movedim(1, -1).flatten(0, -2)
