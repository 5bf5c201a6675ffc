"""Station 2: raw latents, as a coder's network makes them, and latents, as the rest of the library uses them.

A latent is normalised: roughly zero mean and unit variance, B c h w with h = H / factor. The statistics belong to the
coder, never to a data set. They are buffers of it (`Statistics`), and its `LatentSpec` carries their hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import from_json
from .errors import RacError
from .tensors import check_dense, may_read

if TYPE_CHECKING:
    from typing_extensions import Self


class Statistics(nn.Module):
    """Shift and scale between raw latents and latents.

    latent = (raw - shift) * scale, and raw = latent / scale + shift.

    Both have the shape () for all channels alike, (c) for one number per channel, or (c, h, w) for one per channel and
    position; the last is interpolated bilinearly for a latent of another height and width.

    They are buffers that stay float32 where the coder is narrowed to half precision. They are not part of `state_dict`,
    which holds what is learned (checkpoints, averaged weights, hashes of weights); `Coder.save` writes them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        shift, scale = torch.broadcast_tensors(*(value.detach().to("cpu", torch.float32) for value in (shift, scale)))
        if shift.ndim not in (0, 1, 3):
            raise RacError(f"statistics have the shape (), (c) or (c, h, w), not {tuple(shift.shape)}")
        for name, values in (("shift", shift), ("scale", scale)):
            if not torch.isfinite(values).all():
                raise RacError(f"the {name} of a latent's statistics must be finite, not {_first(values)}")
        if (scale == 0).any():
            raise RacError(
                "scale 0 would make every latent zero; expected the teacher's scaling factor, such as 0.18215"
            )
        self.register_buffer("shift", shift.clone(), persistent=False)
        self.register_buffer("scale", scale.clone(), persistent=False)

    @classmethod
    def identity(cls) -> Self:
        """Returns the statistics that leave raw latents as they are."""
        return cls.of(0.0, 1.0)

    @classmethod
    def of(cls, shift: float | Sequence[float] | Tensor, scale: float | Sequence[float] | Tensor) -> Self:
        """Returns statistics of the given numbers, one or one per channel, or tensors of shape (), (c) or (c, h, w).

        Raises `RacError` for another shape, a value that is not finite, and a scale of 0.
        """
        return cls(*(torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (shift, scale)))

    @classmethod
    def scaled(
        cls,
        scale: float,
        shift: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Self:
        """Returns statistics in diffusers' terms: latent = ((raw - shift) * scale - mean) / std.

        - `scale`, `shift`: one number each, for all channels.
        - `mean`, `std`: one number per channel, in the units of the scaled latent; None: 0 and 1.

        Raises `RacError` for a scale of 0, a std that is not positive, and values that are not finite.
        """
        if std is not None and not min(std) > 0:
            raise RacError(f"std must be positive in every channel, not {min(std)}")
        if scale == 0:
            return cls.of(shift, scale)  # which says what is wrong
        means, stds = (torch.tensor(one, dtype=torch.float64, device="cpu") for one in (mean or 0.0, std or 1.0))
        return cls.of(shift + means / scale, scale / stds)

    def normalise(self, raw_latent: Tensor) -> Tensor:
        """Returns the latent of a raw latent, both B c h w: (raw - shift) * scale."""
        return (raw_latent - _fitted(self.shift, raw_latent)) * _fitted(self.scale, raw_latent)

    def denormalise(self, latent: Tensor) -> Tensor:
        """Returns the raw latent of a latent, both B c h w: latent / scale + shift, the inverse of `normalise`."""
        return latent / _fitted(self.scale, latent) + _fitted(self.shift, latent)

    def hash(self) -> str:
        """Returns 16 hexadecimal digits that are equal if and only if shapes and float32 values are."""
        digest = hashlib.sha256()
        for values in (self.shift, self.scale):
            numbers = values.detach().to("cpu", torch.float32) + 0.0  # no negative zero
            digest.update(f"{tuple(numbers.shape)}".encode())
            digest.update(numbers.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def copy(self) -> Statistics:
        """Returns a copy of the same values, on the CPU."""
        return Statistics(self.shift, self.scale)

    def extra_repr(self) -> str:
        """Returns the shape, or the two numbers, for the module's `repr`."""
        shape = tuple(self.shift.shape)
        return f"shape {shape}" if shape else f"shift {self.shift.item():.6g}, scale {self.scale.item():.6g}"

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in ("shift", "scale")}
        super()._apply(function, recurse)
        for name, values in before.items():
            if (moved := getattr(self, name)).dtype.itemsize < torch.float32.itemsize:
                setattr(self, name, values.to(moved.device))
        return self


class Moments:
    """Running mean and variance of raw latents, for each channel and position.

    They are those of all latents together, in float64, and so do not depend on how these come in batches, nor on their
    order (Chan, Golub and LeVeque, 1979).
    """

    def __init__(self) -> None:
        self.count = 0
        """Number of latents so far."""
        self.mean: Tensor = torch.zeros((), dtype=torch.float64)
        """Their mean, c h w."""
        self._squares: Tensor = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add(self, raw_latents: Tensor) -> None:
        """Adds raw latents B c h w. Raises `RacError` if they have another shape than those before."""
        added = raw_latents.detach().to("cpu", torch.float64)
        if self.count and added.shape[1:] != self.mean.shape:
            raise RacError(
                f"latents of {tuple(added.shape[1:])} cannot be added to those of {tuple(self.mean.shape)}; statistics "
                "for each position need images of one size"
            )
        if not len(added):
            return
        mean = added.mean(dim=0)
        total = self.count + len(added)
        apart = mean - self.mean
        self._squares = self._squares + (added - mean).square().sum(dim=0)
        self._squares = self._squares + apart.square() * (self.count * len(added) / total)
        self.mean = self.mean + apart * (len(added) / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """The variance of the latents so far, c h w."""
        return self._squares / max(1, self.count)


def _fitted(values: Tensor, latent: Tensor) -> Tensor:
    """Returns statistics of shape (), (c) or (c, h, w) in a shape that broadcasts against a latent B c h w."""
    if values.ndim == 0:
        return values
    values = values.to(latent.dtype)
    if values.ndim == 1:
        return values.view(-1, 1, 1)
    if values.shape[-2:] == latent.shape[-2:]:
        return values
    return F.interpolate(values[None], latent.shape[-2:], mode="bilinear", align_corners=False)[0]


def _first(values: Tensor) -> float:
    """Returns the first value that is not finite."""
    return float(values[~torch.isfinite(values)].flatten()[0])


@dataclass(frozen=True)
class LatentSpec:
    """The shape and statistics of a coder's latents, as two programs need them to exchange latents.

    Raises `RacError` for a number below 1.
    """

    factor: int
    """Downsampling factor f: an image of H x W has a latent of H/f x W/f."""
    channels: int
    """Number of latent channels c."""
    side: int | None = None
    """Height and width of a latent, for coders of one resolution; None: any height and width."""
    statistics: str | None = None
    """`Statistics.hash` of the coder's statistics; None if it is not known. A coder's own spec always has it."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.channels < 1:
            raise RacError(f"factor {self.factor} and channels {self.channels} of a latent must be at least 1")
        if self.side is not None and self.side < 1:
            raise RacError(f"side {self.side} of a latent must be at least 1, or None for any")

    def differences(self, other: LatentSpec) -> list[str]:
        """Returns in words how this spec differs from `other`, such as "channels 4, not 16".

        The list is empty if the two specs are compatible. Unknown statistics count as equal to any.
        """
        found = [
            f"{name} {getattr(self, name)}, not {getattr(other, name)}"
            for name in ("factor", "channels", "side")
            if getattr(self, name) != getattr(other, name)
        ]
        if None not in (self.statistics, other.statistics) and self.statistics != other.statistics:
            found.append(f"statistics {self.statistics}, not {other.statistics}")
        return found

    def compatible(self, other: LatentSpec) -> bool:
        """Returns whether latents of this spec can be used as latents of `other`, and the other way round."""
        return not self.differences(other)

    def check(self, latent: Tensor) -> None:
        """Raises `RacError` unless `latent` is a finite floating-point tensor B c h w that fits this spec.

        Values are looked at only on the CPU, and not while a function is compiled or transformed.
        """
        if not isinstance(latent, Tensor):
            raise RacError(f"a latent is a tensor B c h w, not {type(latent).__name__}; give what encode returned")
        check_dense(latent, "a latent")
        if latent.ndim != 4:
            raise RacError(f"a latent has 4 dimensions B c h w, not {latent.ndim} (shape {tuple(latent.shape)})")
        if not latent.is_floating_point():
            raise RacError(f"a latent holds floating-point numbers, not {latent.dtype}; give what encode returned")
        if latent.shape[1] != self.channels:
            raise RacError(
                f"the latent has {latent.shape[1]} channels, but this coder's latents have {self.channels}; decode it "
                "with the coder that encoded it, or with one trained on its latents"
            )
        sides = tuple(latent.shape[-2:])
        if 0 in sides or (self.side is not None and sides != (self.side, self.side)):
            wanted = "at least 1 x 1" if self.side is None else f"{self.side} x {self.side}"
            raise RacError(f"the latent is {sides[0]} x {sides[1]}, but this coder's latents are {wanted}")
        if may_read(latent) and not torch.isfinite(latent).all():
            bad = int((~torch.isfinite(latent)).sum())
            raise RacError(f"the latent holds {bad} values that are NaN or infinite; encode the image again")


# ------------------------------------------------------------------------------------------- the first version on disk


@dataclass(frozen=True)
class _NumberedSpec:
    """A spec of the first format version, which held the statistics as numbers."""

    factor: int
    channels: int
    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    range: tuple[float, float] = (-1.0, 1.0)


def read_spec(data: Any, source: str) -> tuple[LatentSpec, Statistics | None]:
    """Reads the JSON of a spec, of this format version or of the first, whose numbers give the statistics as well.

    Raises `RacError` naming `source` if the data does not fit.
    """
    if not isinstance(data, dict) or not {"scale", "shift", "mean", "std", "range"} & data.keys():
        return from_json(LatentSpec, data, source), None
    old = from_json(_NumberedSpec, data, source)
    statistics = Statistics.scaled(old.scale, old.shift, old.mean, old.std)
    return LatentSpec(old.factor, old.channels, statistics=statistics.hash()), statistics
