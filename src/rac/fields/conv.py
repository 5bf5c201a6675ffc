"""Convolutional fields: networks shaped like a VAE decoder, with the time as a further input.

Both fields fold the state by f (pixel unshuffle), append the time as a channel, and upsample back to the state's size
(RAC, section 3.2). Their last convolution starts at zero, so that the flow starts as the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RacError

POSITION_SCALE = 0.01


class ConvField(nn.Module):
    """A convolutional velocity field: (state B C H W, time B[, interval B]) -> velocity B C H W.

    H and W must be multiples of the factor. `interval` (signed, for mean velocities) is only accepted by fields built
    with `interval=True`; by default it is 0, for which the mean velocity is the velocity itself.
    """

    def __init__(
        self,
        network: nn.Module,
        factor: int,
        position: bool = False,
        interval: bool = False,
        channels_last: bool = False,
    ) -> None:
        """`channels_last`: the network runs in that layout on a CPU, whatever layout the state has."""
        super().__init__()
        self.network = network
        self.factor = factor
        self.position = position
        self.interval = interval
        self.channels_last = channels_last

    def forward(self, state: Tensor, time: Tensor, interval: Tensor | None = None) -> Tensor:
        """Returns the velocity at `state` and `time`.

        Raises `RacError` for an interval the field was not built for, and for sides that are not multiples of the
        factor.
        """
        check_input(state, self.factor, interval, self.interval)
        folded = F.pixel_unshuffle(state, self.factor)
        channels = [folded, constant_channel(time, folded)]
        if self.interval:
            channels.append(constant_channel(torch.zeros_like(time) if interval is None else interval, folded))
        if self.position:
            channels.append(_position(folded))
        given = torch.cat(channels, dim=1)
        if self.channels_last and given.device.type == "cpu" and _has_layout(given):
            given = given.contiguous(memory_format=torch.channels_last)
        return self.network(given)


def _has_layout(tensor: Tensor) -> bool:
    """Returns whether the layout of a tensor can be chosen: not under torch.func's transforms."""
    return torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_input(state: Tensor, factor: int, interval: Tensor | None, knows_interval: bool) -> None:
    """Raises `RacError` for an interval the field was not built for, and for sides not divisible by `factor`."""
    if interval is not None and not knows_interval:
        raise RacError("this field accepts no interval; build it with interval=True to ask for mean velocities")
    if state.shape[-2] % factor or state.shape[-1] % factor:
        raise RacError(f"state sides {tuple(state.shape[-2:])} must be multiples of {factor}; pad the image first")


def extra_channels(position: bool, interval: bool) -> int:
    """Returns the number of channels that `ConvField` appends to the folded state."""
    return 1 + int(interval) + 2 * int(position)


def constant_channel(value: Tensor, like: Tensor) -> Tensor:
    """Returns a channel B 1 H W, sized as `like`, that holds one number for each image, `value` B."""
    return value.to(like.dtype).view(-1, 1, 1, 1).expand(like.shape[0], 1, *like.shape[2:])


def _position(like: Tensor) -> Tensor:
    """Returns two channels, cos(pi x) and cos(pi y) over [-1, 1], scaled by 0.01: the position in the whole image."""
    height, width = like.shape[2:]
    y, x = _from_end_to_end(height, like).view(1, 1, height, 1), _from_end_to_end(width, like).view(1, 1, 1, width)
    across, down = torch.cos(torch.pi * x), torch.cos(torch.pi * y)
    shape = (like.shape[0], 1, height, width)
    return POSITION_SCALE * torch.cat([across.expand(shape), down.expand(shape)], dim=1)


def _from_end_to_end(length: int, like: Tensor) -> Tensor:
    """Returns `length` even steps from -1 to 1; unlike linspace, exporters keep the length free."""
    steps = torch.arange(length, device=like.device, dtype=like.dtype)
    return 2 * steps / torch.sym_max(length - 1, 1) - 1


@dataclass(frozen=True)
class TinyFieldConfig:
    """Residual 3 x 3 convolutions without normalisation (TAESD's decoder shape).

    Purely local unless `position` is set: it runs at any size and tiles exactly.
    """

    kind: Literal["tiny"] = "tiny"
    """Kind of field."""
    widths: tuple[int, ...] = (64, 64, 64, 64)
    """Channels at strides f, f/2, ..., `patch`; with `patch` 1 the last stride is the output's resolution."""
    blocks: tuple[int, ...] = (3, 3, 3, 1)
    """Number of residual blocks at each of the strides of `widths`."""
    patch: int = 1
    """Stride of the last level: the output convolution gives C*patch^2 channels, laid out by pixel shuffle."""
    position: bool = False
    """Append two channels of relative position."""
    interval: bool = False
    """Append one channel for the signed interval, for mean velocities."""
    taesd_range: bool = False
    """Conventions of TAESD, which the original nano RAC inherits: 3 tanh(x / 3) on the input, 2 y - 1 on the output,
    and no zero initialisation.
    """

    @property
    def factor(self) -> int:
        """Upsampling factor from the coarsest level to the image: patch * 2^(len(widths) - 1)."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def build(self, state_channels: int, factor: int) -> ConvField:
        """Returns the field. Raises `RacError` unless `factor` is the configuration's own."""
        if len(self.widths) != len(self.blocks):
            raise RacError(f"widths {self.widths} and blocks {self.blocks} must be of one length")
        if factor != self.factor:
            raise RacError(
                f"{len(self.widths)} widths and patch {self.patch} upsample by {self.factor}, but the teacher's factor "
                f"is {factor}; change widths or patch"
            )
        network = _TinyNetwork(self, state_channels, state_channels * factor**2)
        return ConvField(network, factor, self.position, self.interval)


class _TinyNetwork(nn.Module):
    def __init__(self, config: TinyFieldConfig, out_channels: int, folded_channels: int) -> None:
        super().__init__()
        channels = folded_channels + extra_channels(config.position, config.interval)
        layers: list[nn.Module] = [nn.Conv2d(channels, config.widths[0], 3, padding=1), nn.ReLU(inplace=True)]
        for level, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
            if level > 0:
                layers += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(config.widths[level - 1], width, 3, padding=1, bias=False),
                ]
            layers += [ResidualBlock(width) for _ in range(blocks)]
        last = nn.Conv2d(config.widths[-1], out_channels * config.patch**2, 3, padding=1)
        self.layers = nn.Sequential(*layers, last, nn.PixelShuffle(config.patch))
        self.taesd_range = config.taesd_range
        if not config.taesd_range:
            zero(last)

    def forward(self, folded: Tensor) -> Tensor:
        if self.taesd_range:
            return self.layers(torch.tanh(folded / 3) * 3).mul(2).sub(1)
        return self.layers(folded)


class ResidualBlock(nn.Module):
    """Residual block: three 3 x 3 convolutions with ReLU between, the input added, a ReLU.

    Keeps the shape B width H W; `hidden` channels inside.
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        # In place where nothing else reads a result: a new tensor costs more time than the values written to it.
        self.conv = nn.Sequential(
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps B width H W to the same shape."""
        return self.conv(x).add_(x).relu_()


def context(width: int) -> nn.Sequential:
    """Returns TAEF2's context layers: four times as many features, normalised over the whole image.

    Keeps B width H W.
    """
    return nn.Sequential(
        nn.Conv2d(width, 4 * width, 1, bias=False),
        nn.GroupNorm(4, 4 * width),
        nn.ReLU(inplace=True),
        nn.Conv2d(4 * width, width, 1, bias=False),
    )


@dataclass(frozen=True)
class LdmFieldConfig:
    """The SD-VAE decoder's shape (arXiv 2112.10752) at any width, from diffusers.

    Widths are 128 (1, 2, 4, 4) at f = 8 for the full decoder; `LdmFieldConfig.scaled` shrinks it by parameters. It
    normalises over the whole image and attends in the middle, so it does not tile exactly.
    """

    kind: Literal["ldm"] = "ldm"
    """Kind of field."""
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at strides 1, 2, ..., f."""
    layers_per_block: int = 2
    """Number of residual blocks at each resolution, less one."""
    groups: int = 32
    """Groups of the group normalisation; must divide every width."""
    attention: bool = True
    """Self-attention in the middle."""
    position: bool = True
    """Append two channels of relative position."""
    interval: bool = False
    """Append one channel for the signed interval, for mean velocities."""

    @classmethod
    def scaled(cls, ratio: float) -> LdmFieldConfig:
        """Returns the decoder at about `ratio` of the SD-VAE decoder's parameters (49.49 M), all widths in proportion.

        Parameters grow with the square of the width, so widths are 128 (1, 2, 4, 4) sqrt(ratio), each to the nearest
        multiple of 8, which then is the number of groups. Raises `RacError` unless 0 < ratio <= 1.
        """
        if not 0 < ratio <= 1:
            raise RacError(f"ratio {ratio} must lie in (0, 1]; 0.1, 0.2, 0.3 and 1 are the paper's")
        full = cls()
        if ratio == 1:
            return full
        return cls(widths=tuple(8 * max(1, round(width * ratio**0.5 / 8)) for width in full.widths), groups=8)

    @property
    def factor(self) -> int:
        """Upsampling factor from the coarsest level to the image: 2^(len(widths) - 1)."""
        return 2 ** (len(self.widths) - 1)

    def build(self, state_channels: int, factor: int) -> ConvField:
        """Returns the field.

        Raises `RacError` unless `factor` is the configuration's own and the groups divide the widths.
        """
        from diffusers.models.autoencoders.vae import Decoder

        if factor != self.factor:
            raise RacError(f"{len(self.widths)} widths upsample by {self.factor}, but the factor is {factor}")
        if any(width % self.groups for width in self.widths):
            raise RacError(f"groups {self.groups} must divide every width of {self.widths}")
        network = Decoder(
            in_channels=state_channels * factor**2 + extra_channels(self.position, self.interval),
            out_channels=state_channels,
            up_block_types=("UpDecoderBlock2D",) * len(self.widths),
            block_out_channels=self.widths,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.groups,
            mid_block_add_attention=self.attention,
        )
        zero(network.conv_out)
        # In the plain layout oneDNN pads channels to multiples of 16: widths such as 40 then cost as much as 48.
        return ConvField(network, factor, self.position, self.interval, channels_last=True)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Sets the weights and biases of `layer` to zero, and returns it."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
