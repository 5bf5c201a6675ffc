"""Training terms of the KL-VAE, pure and unweighted (Latent Diffusion, arXiv 2112.10752, appendix G)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from ..draws import Draws
from ..images import crop
from .image_terms import NO_IMAGE_LOSSES, ImageLosses, check_weights, image_terms

if TYPE_CHECKING:
    from ..coders.klvae import KLVAE


@dataclass(frozen=True)
class KLVAEWeights:
    """Weights of the terms of `klvae_terms`."""

    l1: float = 1.0
    """Weight of the mean absolute error of the decoded image."""
    kl: float = 1e-6
    """Weight of the divergence of the posterior from N(0, 1), summed over each image's latent."""
    perceptual: float = 0.0
    """Weight of LPIPS with VGG16, whose weight file is looked for in RAC_WEIGHTS_DIR."""
    adversarial: float = 0.0
    """Weight of the adversarial term relative to the others: at 1, its gradient at the last layer has the same norm as
    theirs."""

    def __post_init__(self) -> None:
        check_weights(vars(self))


def klvae_terms(coder: KLVAE, image: Tensor, draws: Draws, losses: ImageLosses = NO_IMAGE_LOSSES) -> dict[str, Tensor]:
    """Returns the training terms for images B 3 H W in [-1, 1], each a scalar; `draws` samples the posterior.

    - `kl`: divergence of the posterior from N(0, 1), summed over each image's latent, averaged over the batch, as in
      the SD-VAE's code. That code sums the pixel error as well; against a mean the same weight binds 3 H W times
      harder.
    - the terms of `decoder_terms`, for the sampled latent.
    """
    raw_latent, kl = sampled(coder, image, draws)
    return {**decoder_terms(coder, image, coder.statistics.normalise(raw_latent), losses), "kl": kl}


def sampled(coder: KLVAE, image: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Returns a sample of the posterior, a raw latent B c h w, for images B 3 H W in [-1, 1], and the term `kl`."""
    posterior = coder.posterior(image)
    return posterior.mean + posterior.std * draws.normal(posterior.mean), posterior.kl().mean()


def decoder_terms(
    coder: KLVAE, image: Tensor, latent: Tensor, losses: ImageLosses = NO_IMAGE_LOSSES
) -> dict[str, Tensor]:
    """Returns the terms that need no posterior, for images B 3 H W in [-1, 1] and their latents B c h w.

    - `l1`: mean absolute error of the decoded latent, over all pixels and channels.
    - the terms of `image_terms`, for the same decoded image.
    """
    decoded = crop(coder.decode(latent), (image.shape[-2], image.shape[-1]))
    return {"l1": F.l1_loss(decoded, image), **image_terms(losses, decoded, image)}
