"""Station 3: images and latents as points of one space, the state, B C H W.

The image state is the end of the flow (t = 1), the seed state its beginning (t = 0). Each function stands beside its
left inverse:

    image_of(image_state(image)) == image          contract(expand(latent)) == latent

RAC (arXiv 2603.05925), equations 1, 3 and 7; the other spreads go beyond the paper's `nearest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import RacError
from .tensors import check_dense

PAD = 0.5
"""Constant value of every channel and site that carries neither image nor latent (RAC, equations 1 and 3)."""

RGB = 3

Spread = Literal["nearest", "centre", "shuffle", "beside"]


@dataclass(frozen=True)
class StateSpec:
    """Layout of a latent of c channels and factor f in a state of C channels.

    - `nearest`: the latent, padded to C channels, each value repeated over its f x f block (the paper). Inverse: the
      block's mean.
    - `centre`: each value at its block's centre site, `PAD` at the other f*f - 1. Inverse: that site.
    - `shuffle`: the c values of a block in c of its C*f*f sub-pixel slots, `PAD` in the others. Inverse: those slots.
    - `beside`: like `shuffle`, in the C - 3 channels beside the image's. Anywhere between the ends of the flow the
      state then shows the latent and the growing image apart, each scaled by the time, where the other spreads add
      them up.

    Raises `RacError` where the latent does not fit: `nearest` and `centre` need C >= max(4, c), `shuffle` C >= 3 and
    C*f*f >= c, `beside` (C - 3)*f*f >= c.
    """

    factor: int
    latent_channels: int
    state_channels: int
    spread: Spread = "nearest"

    def __post_init__(self) -> None:
        if self.state_channels < RGB:
            raise RacError(f"state_channels {self.state_channels} cannot hold an image; give at least {RGB}")
        if self.factor < 1 or self.latent_channels < 1:
            raise RacError(f"factor {self.factor} and latent_channels {self.latent_channels} must be at least 1")
        if self.spread not in get_args(Spread):
            raise RacError(f"spread {self.spread!r} is not known; expected {', '.join(get_args(Spread))}")
        blocks = -(-self.latent_channels // self.factor**2)
        least = {"shuffle": max(RGB, blocks), "beside": RGB + blocks}.get(
            self.spread, max(RGB + 1, self.latent_channels)
        )
        if self.state_channels < least:
            raise RacError(
                f"{self.latent_channels} latent channels do not fit {self.state_channels} state channels with spread "
                f"{self.spread}; give state_channels of at least {least}, or a denser spread (shuffle is the densest)"
            )

    def slots(self) -> list[int]:
        """Returns the pixel-unshuffled channels, out of C*f*f, that carry the latent in every spread but `nearest`."""
        area = self.factor**2
        if self.spread == "centre":
            middle = self.factor // 2
            return [channel * area + middle * self.factor + middle for channel in range(self.latent_channels)]
        # Evenly over all slots, so that no state channel holds more of the latent than another.
        first = RGB if self.spread == "beside" else 0
        room = (self.state_channels - first) * area
        return [first * area + k * room // self.latent_channels for k in range(self.latent_channels)]


def image_state(image: Tensor, state_channels: int) -> Tensor:
    """Returns the image state B C H W of an image B 3 H W: the image, then C - 3 channels of `PAD`.

    RAC, equation 1.
    """
    check_dense(image, "an image")
    if image.ndim != 4 or image.shape[1] != RGB:
        raise RacError(f"expected an image B 3 H W, not shape {tuple(image.shape)}")
    return _pad_channels(image, state_channels)


def image_of(state: Tensor) -> Tensor:
    """Returns the image B 3 H W in an image state B C H W; the left inverse of `image_state`."""
    return state[:, :RGB]


def expand(latent: Tensor, spec: StateSpec | None = None, fill: Tensor | None = None, **args: Any) -> Tensor:
    """Expands a latent B c h w to a seed state B C h*f w*f (RAC, equations 3 and 7).

    - `latent`: the latent.
    - `spec`: the layout, a `StateSpec`. In its place its fields may be given by name:
      `expand(latent, factor=8, state_channels=4, spread="centre")` (`latent_channels` is read off the latent).
    - `fill`: a state B C h*f w*f whose values are taken where the latent leaves channels and sites free; None: `PAD`.
    """
    spec = _one_spec(latent, spec, "latent_channels", args)
    if latent.shape[1] != spec.latent_channels:
        raise RacError(f"expected a latent B {spec.latent_channels} h w, not shape {tuple(latent.shape)}")
    if spec.spread == "nearest":
        if fill is not None:
            carried = latent.repeat_interleave(spec.factor, dim=-2).repeat_interleave(spec.factor, dim=-1)
            return torch.cat([carried, fill[:, spec.latent_channels :]], dim=1)
        padded = _pad_channels(latent, spec.state_channels)
        return padded.repeat_interleave(spec.factor, dim=-2).repeat_interleave(spec.factor, dim=-1)
    batch, _, height, width = latent.shape
    if fill is None:
        blocks = latent.new_full((batch, spec.state_channels * spec.factor**2, height, width), PAD)
    else:
        blocks = F.pixel_unshuffle(fill, spec.factor).clone()
    blocks[:, spec.slots()] = latent
    return F.pixel_shuffle(blocks, spec.factor)


def contract(state: Tensor, spec: StateSpec | None = None, **args: Any) -> Tensor:
    """Contracts a seed state B C H W to a latent B c H/f W/f; the left inverse of `expand`.

    Give a `StateSpec`, or its fields by name: `contract(state, factor=8, latent_channels=4, spread="centre")`
    (`state_channels` is read off the state). Raises `RacError` if H or W is not a multiple of f.
    """
    spec = _one_spec(state, spec, "state_channels", args)
    if state.shape[1] != spec.state_channels:
        raise RacError(f"expected a state B {spec.state_channels} H W, not shape {tuple(state.shape)}")
    if state.shape[-2] % spec.factor or state.shape[-1] % spec.factor:
        raise RacError(
            f"state sides {tuple(state.shape[-2:])} must be multiples of the factor {spec.factor}; pad the image first"
        )
    if spec.spread == "nearest":
        return _block_mean(state[:, : spec.latent_channels], spec.factor)
    return F.pixel_unshuffle(state, spec.factor)[:, spec.slots()]


def _one_spec(tensor: Tensor, spec: StateSpec | None, own: str, args: dict[str, Any]) -> StateSpec:
    check_dense(tensor, "a latent or a state")
    if tensor.ndim != 4:
        raise RacError(
            f"expected a tensor of 4 dimensions, batch, channels, height and width, not {tuple(tensor.shape)}"
        )
    if spec is None:
        return StateSpec(**{own: tensor.shape[1], **args})
    if args:
        raise RacError(f"give a StateSpec or its fields by name, not both (got {', '.join(args)} as well)")
    return spec


def _block_mean(state: Tensor, factor: int) -> Tensor:
    """Returns the mean of each f x f block, exact where the block is constant.

    A plain mean of f*f equal floats may round; the mean of the differences to the block's first site does not.
    """
    first = state[:, :, ::factor, ::factor]
    blocks = F.pixel_unshuffle(state, factor).unflatten(1, (state.shape[1], factor**2))
    return first + (blocks - first.unsqueeze(2)).mean(dim=2)


def _pad_channels(tensor: Tensor, channels: int) -> Tensor:
    batch, given, height, width = tensor.shape
    if given > channels:
        raise RacError(f"{given} channels do not fit a state of {channels}; give more state_channels")
    return torch.cat([tensor, tensor.new_full((batch, channels - given, height, width), PAD)], dim=1)
