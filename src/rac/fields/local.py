"""A local U-Net: reads the state at full resolution, and processes the latent at the coarse one.

`ConvField`'s networks fold the whole state into one coarse block, and what does not fit its width is lost. Here a way
down reads the state from stride `patch` on, and its features are added on the way up; the time scales and shifts the
features of every block. Nothing normalises, so the field is local and runs at any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RacError
from ..states import PAD, RGB
from .conv import ResidualBlock, check_input, constant_channel, context, zero

NEAR_THE_IMAGE = 0.05
"""Least divisor 1 - t of the carrier's latent; nearer to t = 1 the division would blow up errors."""

FREQUENCIES = 16
"""Number of cosines, and of sines, that embed a time for the modulation."""


@dataclass(frozen=True)
class LocalFieldConfig:
    """Configuration of the local U-Net.

    Widths run from stride f down to stride `patch`, as in `TinyFieldConfig`.
    """

    kind: Literal["local"] = "local"
    """Kind of field."""
    widths: tuple[int, ...] = (64, 64, 64)
    """Channels on the way up, at strides f, f/2, ..., `patch`."""
    blocks: tuple[int, ...] = (3, 3, 3)
    """Number of residual blocks at each of the strides of `widths`."""
    down: tuple[int, ...] = (32, 64)
    """Channels on the way down, at strides `patch`, 2 `patch`, ..., f/2. Empty: no way down; the fine path of the state
    is a single convolution at stride `patch`.
    """
    down_blocks: tuple[int, ...] = (0, 1)
    """Number of residual blocks at each of the strides of `down`."""
    patch: int = 2
    """Stride of the finest level: the output convolution gives C*patch^2 channels, laid out by pixel shuffle."""
    hidden: int | None = None
    """Channels inside the blocks of the finest level, where most of the work is done; None: as many as outside."""
    carrier: bool = True
    """Let the coarse level read and write only the channels x beyond the image's (for the spread `beside`). On the
    straight path x = (1 - t) latent + t PAD, with velocity PAD - latent. So the coarse level reads an estimate of the
    latent, (x - t PAD) / max(1 - t, 0.05), and PAD minus this estimate is added to the network's velocity of these
    channels.
    """
    clamp: float = 0.0
    """Bound of the soft clamp on the coarse level's input, as in TAESD's decoders; 0: none."""
    pooled: bool = False
    """Add context from the whole image in the coarsest blocks, as in TAEF2's decoder; the field is then not local."""
    time: Literal["modulation", "channel"] = "modulation"
    """Way in which the time enters: a learned scale and shift of the features of every block, or one more channel."""
    embedding: int = 64
    """Width of the time's embedding."""
    interval: bool = False
    """Accept the signed interval as a third input, for mean velocities."""
    zero_output: bool = True
    """Start the last convolutions at zero, so that the flow starts as the identity (but for the carrier)."""

    @property
    def factor(self) -> int:
        """Upsampling factor from the coarsest level to the image: patch * 2^(len(widths) - 1)."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def build(self, state_channels: int, factor: int) -> LocalField:
        """Returns the field.

        Raises `RacError` unless `factor` is the configuration's own and the lists fit each other.
        """
        if len(self.widths) != len(self.blocks) or len(self.down) != len(self.down_blocks):
            raise RacError(
                f"widths {self.widths} and blocks {self.blocks}, down {self.down} and down_blocks {self.down_blocks} "
                "must be of one length each"
            )
        if self.down and len(self.down) != len(self.widths) - 1:
            raise RacError(f"down {self.down} must name one width less than widths {self.widths}, or none")
        if factor != self.factor:
            raise RacError(
                f"{len(self.widths)} widths and patch {self.patch} upsample by {self.factor}, but the teacher's factor "
                f"is {factor}; change widths or patch"
            )
        if self.carrier and state_channels <= RGB:
            raise RacError(f"a carrier needs state_channels beyond {RGB}, not {state_channels}; give one more")
        return LocalField(self, state_channels)


class LocalField(nn.Module):
    """The local U-Net, a field (state B C H W, time B[, interval B]) -> velocity B C H W.

    H and W must be multiples of the factor.
    """

    def __init__(self, config: LocalFieldConfig, state_channels: int) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        widths, patch = config.widths, config.patch
        folded = (state_channels - (RGB if config.carrier else 0)) * self.factor**2
        fine = state_channels * patch**2
        modulated = config.time == "modulation"
        times = 2 if config.interval else 1
        self.embed = _embedding(times, config.embedding) if modulated else None
        width_of_time = config.embedding if modulated else 0
        self.stem = nn.Conv2d(folded + (0 if modulated else times), widths[0], 3, padding=1)
        self.downs, self.down_levels, self.joins = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = fine
        for place, (width, blocks) in enumerate(zip(config.down, config.down_blocks, strict=True)):
            self.downs.append(nn.Conv2d(channels, width, 3, stride=1 if place == 0 else 2, padding=1))
            self.down_levels.append(Level(ModulatedBlock(width, width_of_time) for _ in range(blocks)))
            channels = width
        # The finest features join the finest level, and so on; where there is no way down, the state itself does.
        for place, width in enumerate(config.down or (fine,)):
            self.joins.append(
                nn.Conv2d(width, widths[-1 - place], 1 if config.down else 3, padding=0 if config.down else 1)
            )
        self.bottom = nn.Conv2d(channels, widths[0], 3, stride=2, padding=1) if config.down else None
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for place, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            if place:
                self.ups.append(nn.Conv2d(widths[place - 1], width, 3, padding=1, bias=False))
            hidden = config.hidden if place == len(widths) - 1 else None
            pooled = config.pooled and place == 0
            self.levels.append(Level(ModulatedBlock(width, width_of_time, hidden, pooled) for _ in range(blocks)))
        self.coarse_head = nn.Conv2d(widths[0], folded, 3, padding=1)
        self.head = nn.Conv2d(widths[-1], fine, 3, padding=1)
        if config.zero_output:
            zero(self.coarse_head)
            zero(self.head)

    def forward(self, state: Tensor, time: Tensor, interval: Tensor | None = None) -> Tensor:
        """Returns the velocity at `state` and `time`.

        Raises `RacError` for an interval the field was not built for, and for sides that are not multiples of the
        factor.
        """
        check_input(state, self.factor, interval, self.config.interval)
        times = [time]
        if self.config.interval:
            times.append(torch.zeros_like(time) if interval is None else interval)
        embedded = None if self.embed is None else self.embed(_waves(times).to(state.dtype))
        carried = self._carried(state, time)
        coarse = F.pixel_unshuffle(carried, self.factor)
        if self.config.clamp:
            coarse = self.config.clamp * torch.tanh(coarse / self.config.clamp)
        if embedded is None:
            coarse = torch.cat([coarse, *(constant_channel(value, coarse) for value in times)], dim=1)
        fine = F.pixel_unshuffle(state, self.config.patch)

        x, passed = fine, []
        for convolution, level in zip(self.downs, self.down_levels, strict=True):
            x = level(convolution(x).relu_(), embedded)
            passed.append(x)
        passed = passed or [fine]

        y = self.stem(coarse)
        y = (y if self.bottom is None else y.add_(self.bottom(x))).relu_()
        correction = torch.zeros(())
        for place, level in enumerate(self.levels):
            if place:
                y = self.ups[place - 1](F.interpolate(y, scale_factor=2.0))
                finer = len(self.levels) - 1 - place  # levels that follow
                if finer < len(self.joins):
                    y = y.add_(self.joins[finer](passed[finer]))
            y = level(y, embedded)
            if place == 0:
                correction = F.pixel_shuffle(self.coarse_head(y), self.factor)
        velocity = F.pixel_shuffle(self.head(y), self.config.patch)
        if not self.config.carrier:
            return velocity + correction
        return torch.cat([velocity[:, :RGB], velocity[:, RGB:] + correction + PAD - carried], dim=1)

    def _carried(self, state: Tensor, time: Tensor) -> Tensor:
        """Returns the input of the coarse level: the whole state, or the latent estimated from the carrier channels."""
        if not self.config.carrier:
            return state
        t = time.to(state.dtype).view(-1, 1, 1, 1)
        return (state[:, RGB:] - t * PAD) / (1 - t).clamp(min=NEAR_THE_IMAGE)


class Level(nn.ModuleList):
    """The blocks of one stride, one after the other."""

    def forward(self, x: Tensor, embedded: Tensor | None) -> Tensor:
        """Maps B width H W, with the time's embedding B e, to B width H W."""
        for block in self:
            x = block(x, embedded)
        return x


class ModulatedBlock(ResidualBlock):
    """A residual block whose features are scaled and shifted depending on the time; initially not at all."""

    def __init__(self, width: int, embedding: int, hidden: int | None = None, pooled: bool = False) -> None:
        super().__init__(width, hidden)
        self.pool = context(width) if pooled else None
        self.modulation = nn.Linear(embedding, 2 * width) if embedding else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedded: Tensor | None = None) -> Tensor:
        """Maps B width H W, with the time's embedding B e, to B width H W."""
        if self.pool is not None:
            x = self.pool(x).add_(x)
        if self.modulation is None or embedded is None:
            return super().forward(x)
        scale, shift = self.modulation(embedded)[:, :, None, None].chunk(2, dim=1)
        return self.conv((x * (1 + scale)).add_(shift)).add_(x).relu_()


def _embedding(times: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2 * FREQUENCIES * times, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())


def _waves(times: list[Tensor]) -> Tensor:
    """Returns cos(k pi t), sin(k pi t) for k = 0, 1, ...: B x 2 FREQUENCIES for each of the times."""
    k = torch.pi * torch.arange(FREQUENCIES, device=times[0].device)
    # In float32 at least: half precision does not tell the fast waves apart.
    angles = [time.to(torch.promote_types(time.dtype, torch.float32)).unsqueeze(1) * k for time in times]
    return torch.cat([wave for angle in angles for wave in (angle.cos(), angle.sin())], dim=1)
