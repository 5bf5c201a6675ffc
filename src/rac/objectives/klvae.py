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
    """Weight of each term of `klvae_terms`."""

    l1: float = 1.0
    """Mean absolute error of the decoded image."""
    kl: float = 1e-6
    """Divergence of the posterior from N(0, 1), summed over each image's latent."""
    perceptual: float = 0.0
    """LPIPS with VGG16, whose weights are looked for in RAC_WEIGHTS_DIR."""
    adversarial: float = 0.0
    """In units of the other terms: at 1 its gradient at the last layer is as long as theirs."""

    def __post_init__(self) -> None:
        check_weights(vars(self))


def klvae_terms(coder: KLVAE, image: Tensor, draws: Draws, losses: ImageLosses = NO_IMAGE_LOSSES) -> dict[str, Tensor]:
    """The terms for images B 3 H W in [-1, 1], each a scalar; `draws` samples the posterior.

    - `kl`: divergence of the posterior from N(0, 1), summed over each image's latent, averaged over the batch, as in
      the SD-VAE's code. That code sums the pixel error as well; against a mean the same weight binds 3 H W times
      harder.
    - the others are `decoder_terms` of the sample.
    """
    posterior = coder.posterior(image)
    raw_latent = posterior.mean + posterior.std * draws.normal(posterior.mean)
    terms = decoder_terms(coder, image, coder.statistics.normalise(raw_latent), losses)
    return {**terms, "kl": posterior.kl().mean()}


def decoder_terms(
    coder: KLVAE, image: Tensor, latent: Tensor, losses: ImageLosses = NO_IMAGE_LOSSES
) -> dict[str, Tensor]:
    """The terms that need no posterior, for images B 3 H W in [-1, 1] and their latents B c h w.

    - `l1`: mean absolute error of the decoded latent, over all pixels and channels.
    - those of `image_terms`, on the same decoded image.
    """
    decoded = crop(coder.decode(latent), (image.shape[-2], image.shape[-1]))
    return {"l1": F.l1_loss(decoded, image), **image_terms(losses, decoded, image)}
