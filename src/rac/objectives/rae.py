"""Training terms of an RAE's decoder, pure and unweighted (RAE, arXiv 2510.11690)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..draws import Draws
from .image_terms import ADVERSARIAL, ImageLosses, check_weights, hinge, image_terms

Decode = Callable[[Tensor], Tensor]
"""Function from raw latents B c h w to images B 3 H W, about [-1, 1]."""

TRANSLATION = 0.125
"""Largest translation of an image by `augmented`, as a share of its sides."""


@dataclass(frozen=True)
class RAEWeights:
    """Weights of the terms of `decoder_terms`; the defaults are the paper's, whose L1 is that of pixels in [0, 1]."""

    l1: float = 0.5
    """Weight of the mean absolute error of the decoded image."""
    perceptual: float = 1.0
    """Weight of LPIPS with VGG16, whose weight file is looked for in RAC_WEIGHTS_DIR."""
    adversarial: float = 0.75
    """Weight of the adversarial term relative to the others: at 1, its gradient at the last layer has the same norm as
    theirs."""

    def __post_init__(self) -> None:
        check_weights(vars(self))


def noised(raw_latents: Tensor, tau: float, draws: Draws) -> Tensor:
    """Returns raw latents B c h w with noise of a deviation that is uniform in [0, tau], one for each image.

    A decoder that is trained on them forgives what a generator gets wrong, and is a little less exact (section 4.3).
    """
    if not tau:
        return raw_latents
    sigma = tau * draws.uniform(raw_latents)
    return raw_latents + sigma.view(-1, 1, 1, 1) * draws.normal(raw_latents)


def decoder_terms(decode: Decode, image: Tensor, raw_latents: Tensor, losses: ImageLosses) -> dict[str, Tensor]:
    """Returns the decoder's terms for images B 3 H W in [-1, 1] and their raw latents, noised or not, each a scalar.

    - `l1`: mean absolute error of the decoded image, over all pixels and channels.
    - `perceptual`: perceptual distance of the decoded image; 0 if `losses` has none.
    - `adversarial`: minus the mean logit of the decoded image, if `losses` has a discriminator.
    """
    decoded = decode(raw_latents)
    terms = {"l1": F.l1_loss(decoded, image), "perceptual": decoded.new_zeros(())}
    terms |= image_terms(ImageLosses(losses.perceptual), decoded, image)
    if losses.discriminator is not None:
        terms[ADVERSARIAL] = -losses.discriminator(decoded).float().mean()
    return terms


def discriminator_term(
    decode: Decode, image: Tensor, raw_latents: Tensor, discriminator: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns the discriminator's term, half a hinge loss, for images B 3 H W in [-1, 1] and their raw latents.

    The decoded images are made anew, without noise on the latents and without gradient, and rounded to 8 bits as real
    ones are, so that rounding gives nothing away.
    """
    with torch.no_grad():
        made = rounded(decode(raw_latents))
    return hinge(discriminator(image), discriminator(made))


def rounded(image: Tensor) -> Tensor:
    """Returns images in [-1, 1] as 8 bits hold them: clamped, and rounded to 256 levels."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def augmented(image: Tensor, draws: Draws) -> Tensor:
    """Returns images B 3 H W, translated and with other colours, each by draws of its own, differentiably.

    DiffAugment (arXiv 2006.10738): a shift by up to an eighth of each side, zeros coming in; then brightness,
    saturation about the mean of a pixel, and contrast about the mean of the image.
    """
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    down, right, light, colour, contrast = (draws.uniform(image).view(-1, 1, 1, 1) for _ in range(5))
    image = translated(image, down.flatten(), right.flatten())
    image = image + light - 0.5
    grey = image.mean(dim=1, keepdim=True)
    image = (image - grey) * (2 * colour) + grey
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return (image - mean) * (contrast + 0.5) + mean


def translated(image: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Returns images B 3 H W, each moved by whole pixels; `down` and `right`, B in [0, 1), span the moves, .5 none."""
    height, width = image.shape[-2:]
    places = []
    for side, drawn in ((height, down), (width, right)):
        most = round(side * TRANSLATION)
        moved = (drawn * (2 * most + 1)).floor().long() - most
        # One row or column of zeros at each end stands for all that lies outside.
        places.append((torch.arange(side, device=image.device) + moved[:, None] + 1).clamp(0, side + 1))
    rows, columns = places
    padded = F.pad(image, (1, 1, 1, 1)).movedim(1, -1)
    batch = torch.arange(len(image), device=image.device).view(-1, 1, 1)
    return padded[batch, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
