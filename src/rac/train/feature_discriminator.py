"""A discriminator on features of a frozen network: light heads that judge every place at several depths.

StyleGAN-T (arXiv 2301.09515), as RAE (arXiv 2510.11690) trains its decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..errors import RacError, WeightsError
from ..representations import Levels, LevelsName, load_levels

EPSILON = 1e-6
"""Number that norms add to the variance."""


@dataclass(frozen=True)
class FeatureDiscriminatorConfig:
    """Settings of a discriminator on features, and of its training. Unused where the adversarial weight is 0.

    Name the features beside every rFID of what was trained with it: it depends on them.
    """

    features: LevelsName = "dino-vits8"
    """Frozen network whose features are judged: dino-vits8, as in the paper, or efficientnet-lite0, which needs no file
    of weights."""
    kernel: int = 9
    """Number of neighbouring places that a head looks at, in the order of the rows; odd."""
    start: int = 0
    """Number of iterations before the discriminator is trained."""
    decoder_start: int = 0
    """Number of iterations before the decoder learns from it."""
    rate: float = 1.0
    """Learning rate, as a multiple of the decoder's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decays of the two moments of the discriminator's own AdamW."""

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise RacError(f"the discriminator's kernel {self.kernel} must be odd, and at least 1")
        for name in ("start", "decoder_start", "rate"):
            if not getattr(self, name) >= 0:
                raise RacError(f"the discriminator's {name} {getattr(self, name)} must be at least 0")
        if self.decoder_start < self.start:
            raise RacError(
                f"decoder_start {self.decoder_start} is before start {self.start}; the decoder can only learn from a "
                "discriminator that is trained"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RacError(f"the discriminator's betas {self.betas} must be at least 0 and below 1")

    def build(self) -> FeatureDiscriminator:
        """Returns a discriminator with random heads. Raises `WeightsError` if its features' weights are not found."""
        try:
            levels = load_levels(self.features)
        except WeightsError as error:
            other = "; or choose --discriminator.features efficientnet-lite0" if self.features == "dino-vits8" else ""
            raise WeightsError(f"{error}{other}") from None
        return FeatureDiscriminator(levels, self.kernel)


class FeatureDiscriminator(nn.Module):
    """A network from images B 3 H W in [-1, 1], of any size, to logits B L, one for each place of each depth.

    They are high for real images. The logits of an image do not depend on its batch.
    """

    def __init__(self, levels: Levels, kernel: int) -> None:
        super().__init__()
        self.levels = levels
        self.heads = nn.ModuleList(_head(channels, kernel) for channels in levels.channels)

    def forward(self, image: Tensor) -> Tensor:
        """Returns the logits."""
        found = zip(self.heads, self.levels(image), strict=True)
        return torch.cat([head(features).flatten(1) for head, features in found], dim=1)

    def check_side(self, side: int) -> None:
        """Accepts images of every side: they are resized."""


class PlaceNorm(nn.Module):
    """Normalisation of each channel over the places of one image, in float32, with weight and bias for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps features B C N to the same shape."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(exact, dim=2, correction=0, keepdim=True)
        return (exact - mean) * torch.rsqrt(variance + EPSILON) * self.weight + self.bias


class Residual(nn.Sequential):
    """Layers whose result is added to what they were given, divided by the square root of 2."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps features B C N to the same shape."""
        return (x + super().forward(x)) * 0.5**0.5


def _head(channels: int, kernel: int) -> nn.Sequential:
    def block(side: int) -> list[nn.Module]:
        convolution = nn.Conv1d(channels, channels, side, padding=side // 2, padding_mode="circular")
        return [spectral_norm(convolution), PlaceNorm(channels), nn.LeakyReLU(0.2)]

    return nn.Sequential(*block(1), Residual(*block(kernel)), spectral_norm(nn.Conv1d(channels, 1, 1)))
