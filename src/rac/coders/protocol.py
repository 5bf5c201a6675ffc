"""What every coder is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import RacError
from ..flow import Solver, TimeGrid, Trajectory
from ..images import crop
from ..latents import LatentSpec


class Coder(nn.Module, ABC):
    """image <-> latent.

    Nothing is detached: gradients flow through `encode` and `decode`, to a frozen coder's inputs too.
    """

    spec: LatentSpec
    """What one must know to use its latents."""
    teacher: str | None = None
    """Name or directory of the coder that it was trained to imitate, if any."""

    @abstractmethod
    def encode(self, image: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """Image B 3 H W in [-1, 1] -> latent B c ceil(H/f) ceil(W/f).

        Sides that are no multiple of the factor are padded by reflection at the bottom and the right. `steps` and
        `solver` are for coders with a flow; others raise `RacError` if they are given.
        """

    @abstractmethod
    def decode(self, latent: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """Latent B c h w -> image B 3 h*f w*f, about [-1, 1], not clamped.

        `steps` and `solver` as for `encode`. Raises `RacError` as `LatentSpec.check`.
        """

    def reconstruct(self, image: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None) -> Tensor:
        """decode(encode(image)), cropped to the image's own size: B 3 H W, not clamped. Arguments as for `encode`."""
        latent = self.encode(image, steps, solver)
        return crop(self.decode(latent, steps, solver), (image.shape[-2], image.shape[-1]))

    def trajectory(
        self, latent: Tensor, steps: int | TimeGrid | None = None, solver: Solver | None = None
    ) -> Trajectory:
        """The states B C h*f w*f on the way from the latent B c h w. Raises `RacError` for a coder without a flow."""
        raise RacError(f"a {type(self).__name__} decodes at once and has no trajectory; load a RAC for one")

    @abstractmethod
    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and safetensors (floats as `dtype`, if given) to `directory`, whole or not at all."""
