"""What every coder offers."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..latents import LatentSpec


class Coder(Protocol):
    """image <-> latent. Every coder is an `nn.Module` as well."""

    @property
    def spec(self) -> LatentSpec:
        """What one must know to use its latents."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Image B 3 H W in [-1, 1] -> latent B c h w.

        Sides that are no multiple of the factor are padded by reflection at the bottom and the right.
        """
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Latent B c h w -> image B 3 h*f w*f, about [-1, 1], not clamped."""
        ...

    def reconstruct(self, image: Tensor) -> Tensor:
        """decode(encode(image)), cropped to the image's own size."""
        ...

    def save(self, directory: str | Path) -> None:
        """Write config.json and safetensors to `directory`, whole or not at all."""
        ...
