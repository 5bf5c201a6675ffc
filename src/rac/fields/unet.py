"""ADM's U-Net (Diffusion Models Beat GANs on Image Synthesis, arXiv 2105.05233), as a field.

It works at full resolution down to stride 2^(levels - 1), where it attends over the whole image, and joins the features
of the way down to those of the way up. As a decoder it is given the noised image and, in further channels, the latent
enlarged by nearest neighbour (DGAE, arXiv 2506.09644, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RacError
from .conv import check_input, zero

TICKS = 1000.0
"""Times are embedded as the noise level, from 0 at the image to this at pure noise, as ADM counts them."""

LONGEST = 10_000.0
"""Longest wavelength of the time's embedding, in radians per noise level."""


@dataclass(frozen=True)
class UNetConfig:
    """Shape of ADM's U-Net; the defaults are DGAE-B's decoder.

    Raises `RacError` for numbers below 1, and for a width that is odd or does not divide into the groups.
    """

    width: int = 128
    """Base width; the time's embedding has four times as many numbers."""
    multiples: tuple[int, ...] = (1, 2, 2, 4, 4)
    """Widths at strides 1, 2, 4, ..., in units of the base width."""
    blocks: int = 2
    """Number of residual blocks at each stride on the way down; one more on the way up."""
    norm_groups: int = 32
    """Groups of the group normalisation; must divide the base width."""

    def __post_init__(self) -> None:
        if not self.multiples or min(self.multiples) < 1:
            raise RacError(f"multiples {self.multiples} must name one positive width per stride, such as 1 2 2 4 4")
        for name in ("width", "blocks", "norm_groups"):
            if getattr(self, name) < 1:
                raise RacError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % 2 or self.width % self.norm_groups:
            raise RacError(
                f"width {self.width} must be even and divide into norm_groups {self.norm_groups}; change either"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at strides 1, 2, 4, ...."""
        return tuple(self.width * multiple for multiple in self.multiples)


class UNet(nn.Module):
    """ADM's U-Net: (state B C H W, time B) -> velocity B c H W, at any height and width.

    The last convolution starts at zero, so the velocity starts at zero too. Sides that a stride does not divide are
    averaged over what there is of a block, and cut off again on the way up.
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.config = config
        width, embedding, groups = config.width, 4 * config.width, config.norm_groups
        self.embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, passed = width, [width]
        for level, wide in enumerate(config.widths):
            for _ in range(config.blocks):
                self.down.append(UNetBlock(channels, wide, embedding, groups))
                channels = wide
                passed.append(channels)
            if level < len(config.widths) - 1:
                self.down.append(UNetBlock(channels, channels, embedding, groups, "down"))
                passed.append(channels)
        self.middle = nn.ModuleList(
            [UNetBlock(channels, channels, embedding, groups), UNetBlock(channels, channels, embedding, groups)]
        )
        self.attention = UNetAttention(channels, groups)
        for level, wide in reversed(list(enumerate(config.widths))):
            for _ in range(config.blocks + 1):
                self.up.append(UNetBlock(channels + passed.pop(), wide, embedding, groups))
                channels = wide
            if level:
                self.up.append(UNetBlock(channels, channels, embedding, groups, "up"))
        self.norm = nn.GroupNorm(groups, channels)
        self.head = zero(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        """Returns the velocity at `state` and `time`."""
        embedded = self.embed(noise_level_waves(time, self.config.width).to(state.dtype))
        x = self.stem(state)
        passed = [x]
        for block in self.down:
            x = block(x, embedded)
            passed.append(x)
        x = self.middle[1](self.attention(self.middle[0](x, embedded)), embedded)
        for block in self.up:
            if block.resample == "up":
                x = block(x, embedded, passed[-1].shape[-2:])
            else:
                x = block(torch.cat([x, passed.pop()], dim=1), embedded)
        return self.head(F.silu(self.norm(x)))


class UNetBlock(nn.Module):
    """Residual block whose normalised features are scaled and shifted depending on the time.

    It may resample: both ways from input to output are averaged over blocks of 2 x 2, or enlarged by nearest
    neighbour, before the first convolution. Its last convolution starts at zero.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        embedding: int,
        groups: int,
        resample: Literal["none", "down", "up"] = "none",
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm = nn.GroupNorm(groups, channels)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * width)
        self.second_norm = nn.GroupNorm(groups, width)
        self.second = zero(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor, embedded: Tensor, size: tuple[int, ...] = ()) -> Tensor:
        """Maps B C H W, with the time's embedding B e, to B width H W; enlarged to `size` where it goes up."""
        y = F.silu(self.norm(x))
        if self.resample == "down":
            x, y = halved(x), halved(y)
        elif self.resample == "up":
            # For sides that were odd, the nearest of the larger size is the enlarged one, cut off.
            x, y = (F.interpolate(one, size=size, mode="nearest") for one in (x, y))
        scale, shift = self.modulation(F.silu(embedded))[:, :, None, None].chunk(2, dim=1)
        y = self.second_norm(self.first(y)) * (1 + scale) + shift
        return self.skip(x) + self.second(F.silu(y))


def halved(x: Tensor) -> Tensor:
    """Returns the means over blocks of 2 x 2, or over what there is of them where a side is odd: B C H/2 W/2."""
    if torch.compiler.is_compiling():
        # The same, without a question whose answer exporters would write down for all sides.
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2)
    return F.avg_pool2d(x, 2, ceil_mode=True)


class UNetAttention(nn.Module):
    """Residual self-attention over all places of the image, with one head; it starts as the identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps B C H W to the same shape."""
        places = self.query_key_value(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        query, key, value = places.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))


def noise_level_waves(time: Tensor, width: int) -> Tensor:
    """Returns cosines, then sines, of the noise level 1000 (1 - t) at falling frequencies, B width.

    `width` is even; the frequencies are 10000^(-k / (width / 2)). The result has float32's precision at least.
    """
    exact = torch.promote_types(time.dtype, torch.float32)  # half precision does not tell the fast waves apart
    half = width // 2
    frequencies = torch.exp(-math.log(LONGEST) / half * torch.arange(half, device=time.device, dtype=exact))
    angles = TICKS * (1 - time.to(exact)).unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass(frozen=True)
class UNetFieldConfig:
    """ADM's U-Net as the field of a RAC.

    It normalises and attends over the whole image, so it does not tile exactly.
    """

    kind: Literal["unet"] = "unet"
    network: UNetConfig = field(default_factory=UNetConfig)
    """Shape of the network."""
    factor: int = 8
    """Factor f of the latents, which divides the sides of states; the network's own strides do not depend on it."""
    interval: ClassVar[bool] = False

    def build(self, state_channels: int, factor: int) -> UNetField:
        """Returns the field. Raises `RacError` unless `factor` is the configuration's own."""
        if factor != self.factor:
            raise RacError(f"the field is for a factor of {self.factor}, not the teacher's {factor}; change factor")
        return UNetField(self.network, state_channels, factor)


class UNetField(nn.Module):
    """ADM's U-Net as a field: (state B C H W, time B) -> velocity B C H W; H and W must be multiples of the factor."""

    def __init__(self, config: UNetConfig, state_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.network = UNet(config, state_channels, state_channels)

    def forward(self, state: Tensor, time: Tensor, interval: Tensor | None = None) -> Tensor:
        """Returns the velocity at `state` and `time`.

        Raises `RacError` for an interval, and for sides that are not multiples of the factor.
        """
        check_input(state, self.factor, interval, knows_interval=False)
        return self.network(state, time)
