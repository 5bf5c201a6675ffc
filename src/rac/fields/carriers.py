"""A field that carries the image and the latent side by side: a decoder and an encoder of the TAESD shape, joined.

In a `beside` state the image's channels and the latent's are apart, and each is scaled by the time. Undoing that scale
gives two carriers: the image as far as the flow has painted it, and the latent as far as it is known. The way up
decodes the latent carrier, the way down encodes the image carrier, and the way down's features join the way up at every
stride, so that each step of decoding sees what the steps before it have made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RacError
from ..states import PAD, RGB, StateSpec
from .conv import check_input, zero
from .local import Level, ModulatedBlock

NEAREST = 0.05
"""Least divisor of the carriers; nearer to the end of the flow where they tell nothing, errors would blow up."""


@dataclass(frozen=True)
class CarriersFieldConfig:
    """Configuration of a field with two carriers, for the spread `beside`.

    With the teacher's sizes it can begin as a coder of the TAESD family.
    """

    kind: Literal["carriers"] = "carriers"
    """Kind of field."""
    latent_channels: int = 32
    """Channels of the latents that the states hold."""
    width: int = 64
    """Channels at every stride, on both ways."""
    hidden: int | None = None
    """Channels inside the blocks; None: as many as outside."""
    blocks: tuple[int, ...] = (3, 3, 3, 1)
    """Number of residual blocks of the way up, at strides f, f/2, ..., 1."""
    down_blocks: tuple[int, ...] = (1, 3, 3, 3)
    """Number of residual blocks of the way down, at strides 1, 2, ..., f."""
    clamp: float = 0.0
    """Bound of the soft clamp on the latent that the way up reads, as in TAESD's decoders; 0: none."""
    pooled: bool = False
    """Add context from the whole image in the blocks at stride f, as in TAEF2; the field is then not local."""
    interval: bool = True
    """Accept the signed interval as a third input: the direction and length of the step.

    A step forwards then goes straight to the image that the way up paints, and a step backwards straight to the latent
    that the way down reads.
    """
    embedding: int = 64
    """Width of the embedding of the times."""
    frequencies: int = 4
    """Number of cosines, and of sines, that embed each time.

    Few, so that numbers of steps between the trained ones work too.
    """

    @property
    def factor(self) -> int:
        """Upsampling factor from the coarsest level to the image: 2^(len(blocks) - 1)."""
        return 2 ** (len(self.blocks) - 1)

    def build(self, state_channels: int, factor: int) -> CarriersField:
        """Returns the field.

        Raises `RacError` unless `factor` is the configuration's own, both ways have as many strides, and latents fit.
        """
        if len(self.blocks) != len(self.down_blocks):
            raise RacError(f"blocks {self.blocks} and down_blocks {self.down_blocks} must be of one length")
        if factor != self.factor:
            raise RacError(
                f"{len(self.blocks)} strides upsample by {self.factor}, but the teacher's factor is {factor}; give "
                "blocks and down_blocks one number for each stride"
            )
        return CarriersField(self, StateSpec(factor, self.latent_channels, state_channels, "beside"))


class Times(NamedTuple):
    """Times and signed intervals of a batch, each B 1 1 1."""

    t: Tensor
    h: Tensor

    @property
    def forwards(self) -> Tensor:
        """Mask of the images whose step goes towards the image (h > 0)."""
        return self.h > 0

    @property
    def backwards(self) -> Tensor:
        """Mask of the images whose step goes towards the latent (h < 0)."""
        return self.h < 0


class CarriersField(nn.Module):
    """A field with two carriers: (state B C H W, time B[, interval B]) -> velocity B C H W.

    H and W must be multiples of the factor. With x the image that is predicted, z the latent, and c the carrier of
    either, the velocity is, for an interval h > 0, (x - s) / (1 - t) of the image's channels s and PAD - c of the
    latent's; for h < 0, c - PAD and (s - z) / t; without one, (1 - t) x + t c - PAD and PAD - (1 - t) c - t z. Only
    what is needed of these is computed: at t = 0 the way up alone, for h < 0 and at t = 1 the way down alone, provided
    that this holds for all images of the batch.
    """

    def __init__(self, config: CarriersFieldConfig, states: StateSpec) -> None:
        super().__init__()
        self.config = config
        self.states = states
        self.factor = states.factor
        width, hidden, strides = config.width, config.hidden, len(config.blocks)
        inputs = 2 * config.frequencies * (2 if config.interval else 1)
        self.embed = nn.Sequential(
            nn.Linear(inputs, config.embedding), nn.SiLU(), nn.Linear(config.embedding, config.embedding), nn.SiLU()
        )

        def level(blocks: int, coarsest: bool) -> Level:
            pooled = config.pooled and coarsest
            return Level(ModulatedBlock(width, config.embedding, hidden, pooled) for _ in range(blocks))

        self.entry = nn.Conv2d(RGB, width, 3, padding=1)
        self.downs = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False) for _ in range(strides - 1)
        )
        self.down_levels = nn.ModuleList(
            level(blocks, place == strides - 1) for place, blocks in enumerate(config.down_blocks)
        )
        self.latent_head = nn.Conv2d(width, config.latent_channels, 3, padding=1)
        self.joins = nn.ModuleList(zero(nn.Conv2d(width, width, 1)) for _ in range(strides))
        self.stem = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.ups = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(strides - 1))
        self.levels = nn.ModuleList(level(blocks, place == 0) for place, blocks in enumerate(config.blocks))
        self.head = nn.Conv2d(width, RGB, 3, padding=1)

    def forward(self, state: Tensor, time: Tensor, interval: Tensor | None = None) -> Tensor:
        """Returns the velocity at `state` and `time`, or its mean over `interval`.

        Raises `RacError` for an interval the field was not built for, and for sides that are not multiples of the
        factor.
        """
        check_input(state, self.factor, interval, self.config.interval)
        h = torch.zeros_like(time) if interval is None else interval
        times = Times(*(each.to(state.dtype).view(-1, 1, 1, 1) for each in (time, h)))
        embedded = self.embed(self._waves(time, h).to(state.dtype))
        t = times.t
        painted = (state[:, :RGB] - (1 - t) * PAD) / t.clamp(min=NEAREST)
        blocks = F.pixel_unshuffle(state[:, RGB:], self.factor)
        slots = [slot - RGB * self.factor**2 for slot in self.states.slots()]
        known = (blocks[:, slots] - t * PAD) / (1 - t).clamp(min=NEAREST)

        features: list[Tensor] = []
        latent, image = known, painted
        if _anywhere(t > 0):
            features = self._look_down(painted, embedded)
            if _anywhere(~times.forwards & (t > 0)):
                latent = self.latent_head(features[-1]).to(state.dtype)
        if _anywhere(~times.backwards & (t < 1)):
            image = self._paint(known, features, t > 0, embedded).to(state.dtype)
        velocity = torch.zeros_like(blocks)
        velocity[:, slots] = _latent_velocity(blocks[:, slots], known, latent, times)
        return torch.cat(
            [_image_velocity(state[:, :RGB], painted, image, times), F.pixel_shuffle(velocity, self.factor)], dim=1
        )

    def _look_down(self, image: Tensor, embedded: Tensor) -> list[Tensor]:
        """Returns the features of an image B 3 H W in [-1, 1], at strides 1, 2, ..., f."""
        # In [0, 1], as the family has it: its zeros beyond the edge mean black.
        x = self.entry((image + 1) / 2)
        features = []
        for place, level in enumerate(self.down_levels):
            x = level(self.downs[place - 1](x) if place else x, embedded)
            features.append(x)
        return features

    def _paint(self, latent: Tensor, features: list[Tensor], seen: Tensor, embedded: Tensor) -> Tensor:
        """Returns the image B 3 H W in [-1, 1] of a latent and of the way down's features of the image so far.

        `seen`, B 1 1 1, marks the images of the batch that have such features.
        """
        if self.config.clamp:
            latent = self.config.clamp * torch.tanh(latent / self.config.clamp)
        y = F.relu(self.stem(latent))
        for place, level in enumerate(self.levels):
            if place:
                y = self.ups[place - 1](F.interpolate(y, scale_factor=2.0))
            if features:
                joined = self.joins[place](features[-1 - place])
                y = torch.addcmul(y, joined, seen.to(joined.dtype))
            y = level(y, embedded)
        return 2 * self.head(y) - 1

    def _waves(self, time: Tensor, interval: Tensor) -> Tensor:
        """Returns cos(k pi t) and sin(k pi t), k = 1, 2, ..., of the time, and of the interval if accepted."""
        k = torch.pi * torch.arange(1, self.config.frequencies + 1, device=time.device)
        told = (time, interval) if self.config.interval else (time,)
        # In float32 at least: half precision does not tell the fast waves apart.
        angles = [each.to(torch.promote_types(each.dtype, torch.float32)).unsqueeze(1) * k for each in told]
        return torch.cat([wave for angle in angles for wave in (angle.cos(), angle.sin())], dim=1)


def _image_velocity(state: Tensor, carrier: Tensor, image: Tensor, times: Times) -> Tensor:
    t, h = times
    mixed = (1 - t) * image + t * carrier - PAD
    left = torch.maximum(1 - t, h).clamp(min=1e-6)  # only where h > 0, so never 0 there
    return torch.where(times.forwards, (image - state) / left, torch.where(times.backwards, carrier - PAD, mixed))


def _latent_velocity(state: Tensor, carrier: Tensor, latent: Tensor, times: Times) -> Tensor:
    t, h = times
    mixed = PAD - (1 - t) * carrier - t * latent
    left = torch.maximum(t, -h).clamp(min=1e-6)
    return torch.where(times.forwards, PAD - carrier, torch.where(times.backwards, (state - latent) / left, mixed))


def _anywhere(mask: Tensor) -> bool:
    """Returns whether the mask holds for any image of the batch; true where a graph is made that must serve for all."""
    return mask.is_meta or torch.compiler.is_compiling() or bool(mask.any())
