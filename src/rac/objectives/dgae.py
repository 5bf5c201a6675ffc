"""Training terms of DGAE, pure and unweighted (arXiv 2506.09644, section 3).

With x0 the noise, x1 the image, x_t = (1 - t) x0 + t x1 and v the field's velocity at x_t, given the latent z:

    velocity     mean (v - (x1 - x0))^2
    kl           KL(q(z | x1) || N(0, 1)), summed over the latent
    perceptual   LPIPS(x_t + (1 - t) v, x1)

The paper's equation 8 writes denoising score matching, its text a velocity; the velocity is taken. Gradients reach the
encoder through z alone: x_t is made of the image, never of its reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..draws import Draws
from ..flow import straight
from ..flow.times import TimeDistribution, times_of
from ..images import pad_to_multiple
from .image_terms import NO_IMAGE_LOSSES, ImageLosses, check_weights, image_terms

if TYPE_CHECKING:
    from ..coders.dgae import DGAE


@dataclass(frozen=True)
class DGAEWeights:
    """Weights of the terms of `dgae_terms`; the paper prints none."""

    velocity: float = 1.0
    """Weight of the MSE of the velocity against that of the straight path from noise to the image."""
    kl: float = 1e-6
    """Weight of the divergence of the posterior from N(0, 1), summed over each image's latent."""
    perceptual: float = 1.0
    """Weight of LPIPS (VGG16, its weight files looked for in RAC_WEIGHTS_DIR) of the image that one step to the end
    would give, at every time alike."""

    def __post_init__(self) -> None:
        check_weights(vars(self))


def dgae_terms(
    coder: DGAE,
    image: Tensor,
    draws: Draws,
    losses: ImageLosses = NO_IMAGE_LOSSES,
    times: TimeDistribution = "uniform",
) -> dict[str, Tensor]:
    """Returns the training terms for images B 3 H W in [-1, 1], each a scalar.

    - `coder`: the coder.
    - `image`: the images; sides are padded by reflection to multiples of the factor.
    - `draws`: samples the posterior, then noise and times.
    - `losses`: LPIPS, if its term is wanted.
    - `times`: the distribution of the times.
    """
    posterior = coder.posterior(image)
    raw_latent = posterior.mean + posterior.std * draws.normal(posterior.mean)
    terms = decoder_terms(coder, image, coder.statistics.normalise(raw_latent), draws, losses, times)
    return {**terms, "kl": posterior.kl().mean()}


def decoder_terms(
    coder: DGAE,
    image: Tensor,
    latent: Tensor,
    draws: Draws,
    losses: ImageLosses = NO_IMAGE_LOSSES,
    times: TimeDistribution = "uniform",
) -> dict[str, Tensor]:
    """Returns the terms that need no posterior, `velocity` and `perceptual`, for images and their latents B c h w.

    - `coder`, `image`, `draws`, `losses`, `times`: as for `dgae_terms`.
    - `latent`: the latents, normalised.
    """
    image, _ = pad_to_multiple(image, coder.spec.factor)
    time = times_of(draws.uniform(image), times)
    point = straight(draws.normal(image), image, time)
    velocity = coder.conditioned(latent)(point.state, time)
    terms = {"velocity": F.mse_loss(velocity, point.velocity)}
    with torch.autocast(image.device.type, enabled=False):  # LPIPS in float32
        return {**terms, **image_terms(losses, one_step_end(point.state, velocity, time), image)}


def one_step_end(state: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """Returns where one step of Euler's from `time` (B) to 1 ends: state + (1 - t) velocity, B C H W, not clamped."""
    return state + (1 - time).view(-1, 1, 1, 1) * velocity
