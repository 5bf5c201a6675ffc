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
from .posterior import gaussian, scale_and_shift
from .protocol import Coder


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

    def shape(self) -> dict[str, Any]:
        """Returns all that leaves a trace in the weights, under diffusers' names."""
        return {
            "block_out_channels": list(self.widths),
            "layers_per_block": self.layers_per_block,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_groups,
            "mid_block_add_attention": self.middle_attention,
        }

    def build(self) -> KLVAE:
        """Returns a coder with random weights whose statistics are still scale 1, shift 0."""
        return KLVAE.from_config(
            {
                **self.shape(),
                "down_block_types": ("DownEncoderBlock2D",) * len(self.widths),
                "up_block_types": ("UpDecoderBlock2D",) * len(self.widths),
                "scaling_factor": 1.0,
                "shift_factor": 0.0,
            }
        )


class KLVAE(DiffusersCoder):
    """A coder around diffusers' AutoencoderKL; its latent is the posterior's mean."""

    network_class = "AutoencoderKL"
    has_posterior = True

    @classmethod
    def of(cls, coder: Coder) -> KLVAE:
        """Returns `coder` itself, typed as a KL-VAE. Raises `RacError` for a coder of another family."""
        if not isinstance(coder, KLVAE):
            raise RacError(f"expected a KL-VAE, such as klvae-f8d4, not a {type(coder).__name__}")
        return coder

    def shape(self) -> dict[str, Any]:
        """Returns the configuration without its statistics and without what leaves no trace in the weights."""
        names = KLVAEConfig().shape()
        return {name: value for name, value in self.config.items() if name in names}

    def posterior(self, image: Tensor) -> Any:
        """Returns diffusers' DiagonalGaussianDistribution over raw latents for an image B 3 H W in [-1, 1].

        It has `.mean`, `.std`, `.sample(generator)` and `.kl()`, the divergence from N(0, 1) summed per image.
        """
        return gaussian(self.moments(image))

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
        scale, shift = scale_and_shift(self.posterior(image).mean for image in images)
        self.network.register_to_config(scaling_factor=scale, shift_factor=shift, latents_mean=None, latents_std=None)
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
