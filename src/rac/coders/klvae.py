"""KL-VAE: diffusers' AutoencoderKL as a coder, whether downloaded as a teacher or trained here at small widths.

Convolutional encoder and decoder with a diagonal Gaussian posterior (Rombach et al. 2022, section 3.1). A saved one
is a plain diffusers directory: `diffusers.AutoencoderKL.from_pretrained` opens it too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RacError
from .adapter import DiffusersCoder, statistics_of


@dataclass(frozen=True)
class KLVAEConfig:
    """Shape of a KL-VAE; each width after the first halves the resolution once more.

    Raises `RacError` for numbers below 1 and for widths that do not divide into the groups.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels at strides 1, 2, 4, ...; the last stride is the factor."""
    layers_per_block: int = 1
    """Number of residual blocks at each resolution of the encoder; the decoder has one more."""
    latent_channels: int = 8
    """Number of latent channels."""
    norm_groups: int = 4
    """Groups of the group normalisation; must divide every width."""
    middle_attention: bool = False
    """Self-attention at latent resolution, as in the SD-VAE; its cost grows with the square of the image's area."""

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise RacError(f"widths {self.widths} must name one positive width per resolution, such as 16 32 64 128")
        for name in ("layers_per_block", "latent_channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise RacError(f"{name} must be at least 1, not {getattr(self, name)}")
        uneven = [width for width in self.widths if width % self.norm_groups]
        if uneven:
            raise RacError(f"width {uneven[0]} does not divide into norm_groups {self.norm_groups}; change either")

    def build(self) -> KLVAE:
        """Returns a coder with random weights whose statistics are still scale 1, shift 0."""
        return KLVAE.from_config(
            {
                "block_out_channels": self.widths,
                "down_block_types": ("DownEncoderBlock2D",) * len(self.widths),
                "up_block_types": ("UpDecoderBlock2D",) * len(self.widths),
                "layers_per_block": self.layers_per_block,
                "latent_channels": self.latent_channels,
                "norm_num_groups": self.norm_groups,
                "mid_block_add_attention": self.middle_attention,
                "scaling_factor": 1.0,
                "shift_factor": 0.0,
            }
        )


class KLVAE(DiffusersCoder):
    """A coder around diffusers' AutoencoderKL; its latent is the posterior's mean."""

    network_class = "AutoencoderKL"
    has_posterior = True

    def posterior(self, image: Tensor) -> Any:
        """Returns diffusers' DiagonalGaussianDistribution over raw latents for an image B 3 H W in [-1, 1].

        It has `.mean`, `.std`, `.sample(generator)` and `.kl()`, the divergence from N(0, 1) summed per image.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(self.moments(image))

    def freeze_encoder(self) -> None:
        """Freezes all modules that produce latents, so that training changes only the decoder."""
        for part in (self.network.encoder, self.network.quant_conv):
            if part is not None:
                part.requires_grad_(False)

    @torch.no_grad()
    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Sets scale and shift so that the latents of `images` (batches B 3 H W) have mean 0 and variance 1 over all.

        Raises `RacError` if there are no images, or if their latents are all one value.
        """
        count, total, squares = 0, 0.0, 0.0
        for image in images:
            raw_latent = self.posterior(image).mean.cpu().double()
            count += raw_latent.numel()
            total += float(raw_latent.sum())
            squares += float(raw_latent.square().sum())
        if count == 0:
            raise RacError("no images to fit the latents' statistics on; give at least one batch")
        mean = total / count
        variance = squares / count - mean**2
        if not variance > 0:
            raise RacError(f"the latents' variance is {variance}; train the coder before fitting its statistics")
        statistics = {"scaling_factor": variance**-0.5, "shift_factor": mean}
        self.network.register_to_config(**statistics, latents_mean=None, latents_std=None)
        self.set_statistics(statistics_of(self.network.config))

    def set_channel_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets statistics of each channel: latent = (raw latent - `mean`) / `std`, both c.

        Raises `RacError` for a std that is not positive, and for another number of channels.
        """
        per_channel = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
        self.network.register_to_config(scaling_factor=1.0, shift_factor=None, **per_channel)
        self.set_statistics(statistics_of(self.network.config))

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latent_dist.parameters
