"""The networks behind the perceptual and the adversarial terms, whatever coder they judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import runtime
from ..errors import RacError
from ..objectives.image_terms import Judges
from ..representations.lpips import LPIPS
from .discriminator import DiscriminatorConfig, PatchDiscriminator
from .task import Opponent


@dataclass(frozen=True)
class Jury:
    """LPIPS, frozen, and a discriminator, trained along; each where its term has a weight."""

    lpips: LPIPS | None = None
    discriminator: PatchDiscriminator | None = None
    config: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    @classmethod
    def called(cls, perceptual: float, adversarial: float, config: DiscriminatorConfig, rng_seed: int) -> Jury:
        """Those that terms of these weights need. Raises `WeightsError` where LPIPS's weights are not found."""
        torch.manual_seed(runtime.derived_seed(rng_seed, "discriminator"))
        return cls(LPIPS.load("vgg16") if perceptual else None, config.build() if adversarial else None, config)

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """What is never trained."""
        return () if self.lpips is None else (self.lpips,)

    def judges(self, iteration: int) -> Judges:
        """Those at work in `iteration`."""
        return Judges(self.lpips, self.discriminator if iteration >= self.config.start else None)

    def opponent(self, last_layer: nn.Parameter, weight: float) -> Opponent | None:
        """The discriminator, as the loop takes it."""
        if self.discriminator is None:
            return None
        return Opponent(self.discriminator, last_layer, weight, self.config.rate, self.config.betas)

    def figures(self, decoded: Tensor, images: Tensor) -> dict[str, float]:
        """The mean distance of held-out images, where LPIPS is among the terms: PSNR alone would mislead there."""
        return {} if self.lpips is None else {"lpips_vgg16": float(self.lpips(decoded, images).mean())}


def last_layer(module: nn.Module) -> nn.Parameter:
    """The weight of the layer that a decoder or a field registers last, which is the one that makes its output.

    Raises `RacError` where that one is not trained.
    """
    weight = [parameter for parameter in module.parameters() if parameter.ndim > 1][-1]
    if not weight.requires_grad:
        raise RacError("the last layer of the decoder is frozen, so adversarial gradients cannot be balanced at it")
    return weight
