"""Station 2: raw latents, as a coder's network makes them, and latents, as everyone else sees them.

A latent is normalised: roughly zero mean and unit variance, B c h w with h = H / factor. The statistics belong to the
coder, never to a data set, and travel with it in its `LatentSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RacError


@dataclass(frozen=True)
class LatentSpec:
    """What one must know of a coder to use its latents.

    `latent = ((raw_latent - shift) * scale - mean) / std`, the last two per channel where given. This covers SD
    (scale 0.18215), FLUX and SD3 (scale and shift) and the VAEs that publish per-channel statistics.

    Raises `RacError` for a factor or channels below 1, scale 0, statistics of another number of channels, a std that
    is not positive, and an empty range.
    """

    factor: int
    """Downsampling factor f: an image of H x W has a latent of H/f x W/f."""
    channels: int
    """Latent channels c."""
    scale: float = 1.0
    """Factor of the raw latent, less its shift: diffusers' `scaling_factor`."""
    shift: float = 0.0
    """Taken off the raw latent first: diffusers' `shift_factor`."""
    mean: tuple[float, ...] | None = None
    """One value per channel, of the scaled latent; None: 0."""
    std: tuple[float, ...] | None = None
    """One value per channel, of the scaled latent; None: 1."""
    range: tuple[float, float] = (-1.0, 1.0)
    """Pixel range the coder's own network works in. Its adapter converts; images outside are always [-1, 1]."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.channels < 1:
            raise RacError(f"factor {self.factor} and channels {self.channels} of a latent must be at least 1")
        if self.scale == 0:
            raise RacError(
                "scale 0 would make every latent zero; expected the teacher's scaling factor, such as 0.18215"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise RacError(
                    f"{name} has {len(values)} values for {self.channels} latent channels; give one per channel"
                )
        if self.std is not None and min(self.std) <= 0:
            raise RacError(f"std must be positive in every channel, not {min(self.std)}")
        if not self.range[0] < self.range[1]:
            raise RacError(f"range {self.range} must be (low, high) with low < high")

    def check(self, latent: Tensor) -> None:
        """Raise `RacError` unless `latent` is a finite B c h w tensor of this coder."""
        if latent.ndim != 4:
            raise RacError(f"a latent has 4 dimensions B c h w, not {latent.ndim} (shape {tuple(latent.shape)})")
        if latent.shape[1] != self.channels:
            raise RacError(
                f"the latent has {latent.shape[1]} channels, this coder's have {self.channels}; "
                "decode it with the coder (or the teacher) it was encoded with"
            )
        if not torch.isfinite(latent).all():
            bad = int((~torch.isfinite(latent)).sum())
            raise RacError(f"the latent holds {bad} values that are NaN or infinite; encode the image again")


def normalise(raw_latent: Tensor, spec: LatentSpec) -> Tensor:
    """Raw latent -> latent, both B c h w: ((raw - shift) * scale - mean) / std."""
    latent = (raw_latent - spec.shift) * spec.scale
    if spec.mean is not None:
        latent = latent - _per_channel(spec.mean, latent)
    if spec.std is not None:
        latent = latent / _per_channel(spec.std, latent)
    return latent


def denormalise(latent: Tensor, spec: LatentSpec) -> Tensor:
    """Latent -> raw latent, as the coder's own network takes it, both B c h w; the inverse of `normalise`."""
    if spec.std is not None:
        latent = latent * _per_channel(spec.std, latent)
    if spec.mean is not None:
        latent = latent + _per_channel(spec.mean, latent)
    return latent / spec.scale + spec.shift


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
