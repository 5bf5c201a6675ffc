"""SiT: a transformer over the patches of a state, with labels as conditions (Ma et al., arXiv 2401.08740).

Its time is this library's: 0 is noise, 1 the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RacError
from .conv import check_input
from .transformer import (
    Block,
    Head,
    LabelEmbedding,
    Patches,
    Style,
    TimeEmbedding,
    check_factor,
    initialise,
    positions,
    rotation,
    unpatchify,
)


@dataclass(frozen=True)
class SiTFieldConfig:
    """Configuration of a SiT.

    Raises `RacError` for numbers below 1, for a width that is no multiple of 4 or that the heads do not divide, and
    for an odd share of a head where positions are rotated.
    """

    kind: Literal["sit"] = "sit"
    depth: int = 12
    """Number of blocks."""
    width: int = 384
    """Channels of the tokens."""
    heads: int = 6
    """Heads of the attention."""
    patch: int = 2
    """Side of the patches: 2 for latents of factor 8, 1 for those of larger factors."""
    classes: int = 0
    """Number of classes; 0: none, all states are of one kind."""
    style: Style = "layer"
    """Blocks of SiT (`layer`: layer norm, GELU) or of LightningDiT (`rms`: RMS norm, SwiGLU, rotated positions)."""
    interval: bool = False
    """Accept the signed interval as a further time, for mean velocities (MeanFlow)."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch"):
            if getattr(self, name) < 1:
                raise RacError(f"{name} {getattr(self, name)} of a SiT must be at least 1")
        if self.classes < 0:
            raise RacError(f"classes {self.classes} of a SiT must be at least 0 (none)")
        if self.width % 4 or self.width % self.heads:
            raise RacError(f"width {self.width} of a SiT must be a multiple of 4 and of its heads, {self.heads}")
        if self.style == "rms" and self.width // self.heads % 4:
            raise RacError(f"heads of {self.width // self.heads} channels cannot be rotated; give a multiple of 4")

    @property
    def factor(self) -> int:
        """The number that a state's sides must be multiples of: the side of a patch."""
        return self.patch

    def build(self, state_channels: int, factor: int | None = None) -> SiTField:
        """Returns the field for states of so many channels; `factor`, if given, must be the patch's side.

        Raises `RacError` for another factor.
        """
        check_factor(self.patch, factor)
        return SiTField(self, state_channels)

    def tiny(self) -> SiTFieldConfig:
        """Returns the same configuration at a size for trying out."""
        return replace(self, depth=2, width=32, heads=2)


SIZES: dict[str, tuple[int, int, int]] = {
    "XXS": (6, 192, 3),
    "XS": (8, 256, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
"""Depth, width and heads: those of SiT from S on (arXiv 2401.08740, table 2 of the appendix), and two for CPUs."""


def sit(size: str, patch: int = 2, classes: int = 1000, **further: object) -> SiTFieldConfig:
    """Returns the configuration of one of `SIZES`; `further` sets the other fields of `SiTFieldConfig`.

    Raises `RacError` for another size.
    """
    if size not in SIZES:
        raise RacError(f"no SiT of size {size!r}; sizes are {', '.join(SIZES)}")
    depth, width, heads = SIZES[size]
    return SiTFieldConfig(depth=depth, width=width, heads=heads, patch=patch, classes=classes, **further)  # type: ignore[arg-type]


class Tapped(NamedTuple):
    """A velocity, and tokens from the middle of the evaluation that gave it."""

    velocity: Tensor
    """The velocity, B C H W."""
    tokens: Tensor
    """The tokens after the block asked for, B N width, N = H/p W/p, row by row."""


class SiTField(nn.Module):
    """SiT, a velocity field: (state B C H W, time B[, interval B], condition=labels B) -> velocity B C H W.

    H and W must be multiples of the patch's side; the table of positions is made for the grid at hand. Labels are
    whole numbers; `null`, or no condition at all, stands for no label.
    """

    def __init__(self, config: SiTFieldConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        width, style = config.width, config.style
        self.patches = Patches(channels, width, config.patch)
        self.time = TimeEmbedding(width)
        self.interval = TimeEmbedding(width) if config.interval else None
        self.label = LabelEmbedding(config.classes, width)
        self.blocks = nn.ModuleList(Block(width, config.heads, style) for _ in range(config.depth))
        self.head = Head(width, channels * config.patch**2, style)
        initialise(self)

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
        return self.tapped(state, time, interval, condition=condition).velocity

    def tapped(
        self,
        state: Tensor,
        time: Tensor,
        interval: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        after: int | None = None,
    ) -> Tapped:
        """Returns the velocity, and the tokens after block number `after`, counted from 1; None: the last.

        - `state`, `time`, `interval`, `condition`: as for `forward`.
        - `after`: the block whose tokens are wanted, such as those that REPA aligns with a representation.

        Raises `RacError` as `forward`, and for a block that is not there.
        """
        after = self._block(self.config.depth if after is None else after)
        x, given, turn = self._entered(state, time, interval, condition)
        tokens = x
        for number, block in enumerate(self.blocks, 1):
            x = block(x, given, turn)
            if number == after:
                tokens = x
        height, width = (side // self.config.patch for side in state.shape[-2:])
        velocity = unpatchify(self.head(x, given), height, width, self.config.patch)
        return Tapped(velocity.to(state.dtype), tokens)

    def tokens(
        self,
        state: Tensor,
        time: Tensor,
        interval: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        after: int,
    ) -> Tensor:
        """Returns the tokens of `tapped` alone, B N width, without computing what comes after them.

        - `state`, `time`, `interval`, `condition`: as for `forward`.
        - `after`: the block whose tokens are wanted, counted from 1.

        Raises `RacError` as `tapped`.
        """
        x, given, turn = self._entered(state, time, interval, condition)
        for block in self.blocks[: self._block(after)]:
            x = block(x, given, turn)
        return x

    def _block(self, number: int) -> int:
        if not 1 <= number <= self.config.depth:
            raise RacError(f"a SiT of {self.config.depth} blocks has no block {number}; count them from 1")
        return number

    def _entered(
        self, state: Tensor, time: Tensor, interval: Tensor | None, condition: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Returns the tokens that enter the first block, and the condition and the rotation that all blocks are given.

        Raises `RacError` as `forward`.
        """
        check_input(state, self.config.patch, interval, self.config.interval)
        height, width = (side // self.config.patch for side in state.shape[-2:])
        x = self.patches(state)
        x = x + positions(height, width, self.config.width, x)
        given = self.time(time) + self.label(condition, len(state))
        if self.interval is not None:
            given = given + self.interval(torch.zeros_like(time) if interval is None else interval)
        head_width = self.config.width // self.config.heads
        return x, given, rotation(height, width, head_width, x) if self.config.style == "rms" else None
