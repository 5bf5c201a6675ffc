"""Synthetic images, and coders of a few hundred or thousand weights."""

from __future__ import annotations

import torch
from torch import Tensor

from rac.coders.dgae import DGAE, DGAEConfig
from rac.coders.klvae import KLVAEConfig
from rac.coders.rac import RAC, RACConfig
from rac.fields import TinyFieldConfig, UNetConfig
from rac.latents import LatentSpec, Statistics


def smooth_images(batch: int, height: int, width: int, rng_seed: int = 0) -> Tensor:
    """Images B 3 H W in [-1, 1]: waves of a few frequencies, different in each image and channel."""
    generator = torch.Generator().manual_seed(rng_seed)
    y, x = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width)
    waves = 2 * torch.rand(3, batch, 3, 1, 1, generator=generator)
    return torch.sin(6 * (waves[0] * y + waves[1] * x + waves[2]))


def untrained_rac(
    lively: float = 0.0,
    dtype: torch.dtype = torch.float32,
    statistics: Statistics | None = None,
    **changes: object,
) -> RAC:
    """A RAC of a few hundred weights at f = 4, c = 4, C = 4; `lively` > 0 moves its weights off the identity flow."""
    settings = {
        "spec": LatentSpec(4, 4),
        "field": TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1)),
        "state_channels": 4,
        "spread": "nearest",
    }
    torch.manual_seed(0)
    coder = RAC(RACConfig(**{**settings, **changes}), statistics).to(dtype)
    if lively:
        with torch.no_grad():
            for parameter in coder.field.parameters():
                parameter.add_(lively * torch.randn_like(parameter))
    return coder


def untrained_dgae(lively: float = 0.0, statistics: Statistics | None = None, **changes: object) -> DGAE:
    """A DGAE of some ten thousand weights at f = 4, c = 4; `lively` > 0 moves its U-Net off the velocity zero."""
    settings = {
        "encoder": KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4),
        "decoder": UNetConfig(width=8, multiples=(1, 1, 1, 1), blocks=1, norm_groups=4),
        "steps": 3,
    }
    torch.manual_seed(0)
    coder = DGAE(DGAEConfig(**{**settings, **changes}), statistics)
    if lively:
        with torch.no_grad():
            for parameter in coder.field.parameters():
                parameter.add_(lively * torch.randn_like(parameter))
    return coder
