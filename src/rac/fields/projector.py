"""The learned contraction: seed state -> latent."""

from __future__ import annotations

from torch import nn

from ..errors import RacError


class Projector(nn.Sequential):
    """A learned contraction: log2(f) stride-2 convolutions from a state B C H W to a latent B c H/f W/f.

    RAC, section 3.3. About 100 k parameters at f = 8 (88,364 for C = c = 4). Raises `RacError` unless f is a power of
    two above 1.
    """

    def __init__(self, state_channels: int, latent_channels: int, factor: int, width: int = 40) -> None:
        if factor < 2 or factor & (factor - 1):
            raise RacError(
                f"the projector needs a factor that is a power of two, not {factor}; use the spread's inverse"
            )
        layers: list[nn.Module] = []
        channels, out = state_channels, width
        for _ in range(factor.bit_length() - 1):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.ReLU()]
            channels, out = out, 2 * width
        super().__init__(*layers, nn.Conv2d(channels, latent_channels, 1))
