"""Training terms of the KL-VAE, pure and unweighted (Latent Diffusion, arXiv 2112.10752, appendix G)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from ..draws import Draws
from ..images import crop
from ..latents import normalise

if TYPE_CHECKING:
    from ..coders.klvae import KLVAE


@dataclass(frozen=True)
class KLVAEWeights:
    """Weight of each term of `klvae_terms`."""

    l1: float = 1.0
    kl: float = 1e-6


def klvae_terms(coder: KLVAE, image: Tensor, draws: Draws) -> dict[str, Tensor]:
    """The terms for images B 3 H W in [-1, 1], each a scalar; `draws` samples the posterior.

    - `l1`: mean absolute error of the decoded sample, over all pixels and channels.
    - `kl`: divergence of the posterior from N(0, 1), summed over each image's latent, averaged over the batch, as in
      the SD-VAE's code. That code sums the pixel error as well; against a mean the same weight binds 3 H W times
      harder.
    """
    posterior = coder.posterior(image)
    raw_latent = posterior.mean + posterior.std * draws.normal(posterior.mean)
    height, width = image.shape[-2:]
    decoded = crop(coder.decode(normalise(raw_latent, coder.spec)), (height, width))
    return {"l1": F.l1_loss(decoded, image), "kl": posterior.kl().mean()}
