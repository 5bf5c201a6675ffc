"""Training terms computed by networks on the decoded image: perceptual and adversarial (arXiv 2012.09841).

Pure and unweighted. The networks are passed as functions: LPIPS with VGG16 (arXiv 1801.03924), and a discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..errors import RacError

ADVERSARIAL = "adversarial"
"""Name of the coder's adversarial term, which a discriminator gives."""
DISCRIMINATOR = "discriminator"
"""Name of the discriminator's own term; the coder gets no gradient from it."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises `RacError` for a weight below 0, by which training would make its term large, and for one not finite."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise RacError(f"the weight {name} {weight} must be at least 0, and finite")


class ImageLosses(NamedTuple):
    """The networks behind the image terms, as functions; a term whose network is None is left out."""

    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    """Function of the decoded image and the image (both B 3 H W in [-1, 1]) that returns distances, B."""
    discriminator: Callable[[Tensor], Tensor] | None = None
    """Function of images B 3 H W that returns logits B 1 h w, high for real ones."""


NO_IMAGE_LOSSES = ImageLosses()


def image_terms(losses: ImageLosses, decoded: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Returns the terms for a decoded image and its original, both B 3 H W in [-1, 1].

    Each is a scalar, a mean over images.

    - `perceptual`: their perceptual distance.
    - `adversarial`: minus the mean logit of the decoded image.
    - `discriminator`: (mean max(0, 1 - logit of the image) + mean max(0, 1 + logit of the decoded image)) / 2, with no
      gradient to the decoded image: 1 if it cannot tell the two apart, 0 if it always can.
    """
    terms: dict[str, Tensor] = {}
    if losses.perceptual is not None:
        terms["perceptual"] = losses.perceptual(decoded, image).mean()
    if losses.discriminator is not None:
        terms[ADVERSARIAL] = -losses.discriminator(decoded).float().mean()
        real, made = losses.discriminator(image), losses.discriminator(decoded.detach())
        terms[DISCRIMINATOR] = hinge(real, made)
    return terms


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """Returns half the hinge loss of a discriminator's logits of real and of made images, a scalar."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + made.float()).mean()) / 2
