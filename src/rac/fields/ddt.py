"""DiT^DH: a transformer whose last blocks are shallow and wide, for latents of many channels (RAE, arXiv 2510.11690).

A narrow body makes one condition for each token, out of the state, the time and the label. A wide head, as in DDT
(arXiv 2504.05741), makes the velocity out of the state under those conditions. A network whose tokens have fewer
numbers, d, than the state has channels, n, cannot come below a mean squared error of (n - d) / n on noise, which has n
independent ones; the head lifts that bound at a small cost. Time: 0 is noise, 1 the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RacError
from .conv import check_input
from .transformer import (
    Block,
    FourierEmbedding,
    Head,
    LabelEmbedding,
    Patches,
    check_factor,
    initialise,
    positions,
    rotation,
    unpatchify,
)


@dataclass(frozen=True)
class DDTFieldConfig:
    """Configuration of a DiT^DH.

    Raises `RacError` for numbers below 1, and for widths whose share of a head is no multiple of 4.
    """

    kind: Literal["ddt"] = "ddt"
    depth: int = 12
    """Number of blocks of the body."""
    width: int = 384
    """Channels of the body's tokens."""
    heads: int = 6
    """Heads of the body's attention."""
    head_depth: int = 2
    """Number of blocks of the wide head."""
    head_width: int = 2048
    """Channels of the head's tokens; at least those of the latents, or their noise cannot be told."""
    head_heads: int = 16
    """Heads of the attention in the wide head."""
    patch: int = 1
    """Side of the patches: 1 for latents of factor 16."""
    classes: int = 0
    """Number of classes; 0: none, all states are of one kind."""
    interval: bool = False
    """Accept the signed interval as a further time, for mean velocities (MeanFlow)."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "head_depth", "head_width", "head_heads", "patch"):
            if getattr(self, name) < 1:
                raise RacError(f"{name} {getattr(self, name)} of a DiT^DH must be at least 1")
        if self.classes < 0:
            raise RacError(f"classes {self.classes} of a DiT^DH must be at least 0 (none)")
        for width, heads in ((self.width, self.heads), (self.head_width, self.head_heads)):
            if width % (4 * heads):
                raise RacError(f"width {width} of a DiT^DH must be a multiple of 4 times its heads, {heads}")

    @property
    def factor(self) -> int:
        """The number that a state's sides must be multiples of: the side of a patch."""
        return self.patch

    def build(self, state_channels: int, factor: int | None = None) -> DDTField:
        """Returns the field for states of so many channels; `factor`, if given, must be the patch's side.

        Raises `RacError` for another factor.
        """
        check_factor(self.patch, factor)
        return DDTField(self, state_channels)

    def tiny(self) -> DDTFieldConfig:
        """Returns the same configuration at a size for trying out."""
        return replace(self, depth=2, width=32, heads=2, head_depth=1, head_width=64, head_heads=2)


class Size(NamedTuple):
    """Size of a DiT^DH."""

    depth: int
    width: int
    heads: int
    head_depth: int = 2
    head_width: int = 2048
    head_heads: int = 16


SIZES: dict[str, Size] = {
    "XS": Size(6, 192, 3, 2, 384, 6),
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}
"""Sizes of body and head: those of the paper from S on, and one for CPUs."""


def ddt(size: str, patch: int = 1, classes: int = 1000, interval: bool = False) -> DDTFieldConfig:
    """Returns the configuration of one of `SIZES`. Raises `RacError` for another size."""
    if size not in SIZES:
        raise RacError(f"no DiT^DH of size {size!r}; sizes are {', '.join(SIZES)}")
    return DDTFieldConfig(**SIZES[size]._asdict(), patch=patch, classes=classes, interval=interval)


class DDTField(nn.Module):
    """DiT^DH, a velocity field: (state B C H W, time B[, interval B], condition=labels B) -> velocity B C H W.

    H and W must be multiples of the patch's side; positions are made for the grid at hand. Labels are whole numbers;
    `null`, or no condition at all, stands for no label.
    """

    def __init__(self, config: DDTFieldConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        width, head_width = config.width, config.head_width
        self.patches = Patches(channels, width, config.patch)
        self.time = FourierEmbedding(width)
        self.interval = FourierEmbedding(width) if config.interval else None
        self.label = LabelEmbedding(config.classes, width)
        self.blocks = nn.ModuleList(Block(width, config.heads, "rms") for _ in range(config.depth))
        self.bridge = nn.Identity() if width == head_width else nn.Linear(width, head_width)
        self.head_patches = Patches(channels, head_width, config.patch)
        self.head_blocks = nn.ModuleList(Block(head_width, config.head_heads, "rms") for _ in range(config.head_depth))
        self.head = Head(head_width, channels * config.patch**2, "rms")
        initialise(self, "torch")
        if self.interval is not None:
            # A mean velocity begins as the velocity, whatever the interval.
            for parameter in self.interval[2].parameters():
                nn.init.zeros_(parameter)

    @property
    def null(self) -> int:
        """The label that stands for none."""
        return self.label.null

    def forward(
        self, state: Tensor, time: Tensor, interval: Tensor | None = None, *, condition: Tensor | None = None
    ) -> Tensor:
        """Returns the velocity at `state` and `time`, or its mean over `interval`, for the labels `condition`.

        Raises `RacError` for an interval the field was not built for, and for sides that are not multiples of the
        patch's.
        """
        check_input(state, self.config.patch, interval, self.config.interval)
        height, width = (side // self.config.patch for side in state.shape[-2:])
        when = self.time(time)
        if self.interval is not None:
            when = when + self.interval(torch.zeros_like(time) if interval is None else interval)
        tokens = self.patches(state)
        tokens = tokens + positions(height, width, self.config.width, tokens)
        # Blocks apply SiLU to their condition once more, as published networks do.
        given = F.silu(when + self.label(condition, len(state)))
        turn = rotation(height, width, self.config.width // self.config.heads, tokens)
        for block in self.blocks:
            tokens = block(tokens, given, turn)
        given = self.bridge(F.silu(when[:, None] + tokens))  # one for each token, which knows the label already
        wide = self.head_patches(state)
        turn = rotation(height, width, self.config.head_width // self.config.head_heads, wide)
        for block in self.head_blocks:
            wide = block(wide, given, turn)
        return unpatchify(self.head(wide, given), height, width, self.config.patch).to(state.dtype)
