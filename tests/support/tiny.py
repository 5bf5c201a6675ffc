"""Synthetic images, and coders of a few hundred or thousand weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rac.coders.dgae import DGAE, DGAEConfig
from rac.coders.klvae import KLVAE, KLVAEConfig
from rac.coders.rac import RAC, RACConfig
from rac.fields import SiTFieldConfig, TinyFieldConfig, UNetConfig
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.generators.sampling import Sampling
from rac.images import write_image
from rac.latents import LatentSpec, Statistics
from rac.representations import Features


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


def classed_photos(folder: Path) -> Path:
    """Writes eight pictures of two classes to `folder`/photos, and returns that."""
    for number in range(8):
        path = folder / "photos" / ("fish", "bird")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(smooth_images(1, 40, 48, number), path)
    return folder / "photos"


def untrained_klvae() -> KLVAE:
    """A KL-VAE of a few thousand weights at f = 8, c = 4."""
    torch.manual_seed(0)
    return KLVAEConfig(widths=(8, 8, 8, 8), latent_channels=4, norm_groups=4).build()


def untrained_generator(
    spec: LatentSpec, classes: tuple[str, ...] = (), coder: str | None = None, side: int = 4
) -> FlowGenerator:
    """A generator of a few thousand weights, none of them zero, that takes two steps."""
    field = SiTFieldConfig(depth=1, width=16, heads=2, patch=2, classes=len(classes))
    torch.manual_seed(1)
    generator = FlowGenerator(FlowGeneratorConfig(spec, side, field, classes, coder, Sampling(steps=2)))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return generator.eval().requires_grad_(False)


class Colours(nn.Module):
    """Extractor of the mean and the mean square of each colour, with logits that follow the first of them."""

    width, spatial_width, has_logits = 6, None, True

    def __init__(self, path: Path, label: str = "colours") -> None:
        super().__init__()
        self.path, self.label, self.seen = path, label, 0

    def forward(self, image: Tensor) -> Features:
        """Features of B 3 H W images."""
        self.seen += len(image)
        pooled = torch.cat([image.mean(dim=(2, 3)), image.square().mean(dim=(2, 3))], dim=1)
        return Features(pooled, logits=pooled[:, :1] * torch.arange(1000) / 1000)
