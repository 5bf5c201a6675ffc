"""PatchGAN: a small network that tells decoded image patches from real ones (Isola et al., arXiv 1611.07004)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from ..errors import RacError

_WIDEST = 8
"""Greatest number of channels, in multiples of the first width."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Settings of a discriminator and of its training. Unused where the adversarial weight is 0."""

    width: int = 32
    """Number of channels of the first layer; it doubles with each further layer, up to eight times."""
    layers: int = 3
    """Number of strided layers. With 3 each logit sees 70 x 70 pixels, with 2 it sees 34 x 34."""
    norm_groups: int = 4
    """Groups of the group norm, which, unlike batch norm, judges each image alone; 0: no normalisation."""
    start: int = 0
    """Number of iterations before the discriminator, and with it the adversarial term, is used."""
    rate: float = 1.0
    """Learning rate, as a multiple of the coder's."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Decays of the two moments of the discriminator's own AdamW."""

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("layers", 1), ("norm_groups", 0), ("start", 0), ("rate", 0)):
            if not getattr(self, name) >= least:
                raise RacError(f"the discriminator's {name} {getattr(self, name)} must be at least {least}")
        if self.norm_groups and self.width % self.norm_groups:
            raise RacError(
                f"the discriminator's width {self.width} does not divide into norm_groups {self.norm_groups}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RacError(f"the discriminator's betas {self.betas} must be at least 0 and below 1")

    def build(self) -> PatchDiscriminator:
        """Returns a discriminator with random weights."""
        return PatchDiscriminator(self)


class PatchDiscriminator(nn.Module):
    """A network from images B 3 H W in [-1, 1] to logits B 1 h w, one for each patch, high for real ones."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [config.width * min(2**level, _WIDEST) for level in range(config.layers + 1)]
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            stride = 2 if level < config.layers else 1
            stages.append(nn.Conv2d(inputs, outputs, 4, stride, 1, bias=not config.norm_groups))
            if config.norm_groups:
                stages.append(nn.GroupNorm(config.norm_groups, outputs))
            stages.append(nn.LeakyReLU(0.2))
        self.stages = nn.Sequential(*stages, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.least = 3 * 2**config.layers  # shorter sides leave the two last layers nothing to look at
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # pix2pix's initialisation
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Returns the logits B 1 h w. Raises `RacError` for an image too small for the last layer."""
        self.check_side(min(image.shape[-2:]))
        return self.stages(image)

    def check_side(self, side: int) -> None:
        """Raises `RacError` if images whose shorter side has `side` pixels are too small for the last layer."""
        if side < self.least:
            raise RacError(
                f"the discriminator needs sides of at least {self.least} pixels, not {side}; give it fewer layers, or "
                "larger crops"
            )
