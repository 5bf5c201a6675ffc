"""Linear probe: how much of an image's class a linear classifier finds in its latent.

The images themselves are the data: they are split into five parts, and each part is classified by a classifier that
learnt from the other four. So no other set is needed, and every image counts once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RacError
from ..images import to_pixels
from .image_sets import digest

FOLDS = 5
"""Number of parts; those of a class are of one size, up to one image."""

TOKENS = 16
"""Most places of a latent that are classified, spread evenly over it."""

PENALTY = 1e-3
"""Weight of half the sum of squares of the classifier's weights, beside the mean cross-entropy."""

ITERATIONS = 100
"""Most iterations of L-BFGS."""

POOLED, PER_TOKEN = "probe, pooled", "probe, per token"
"""Names of the two results."""


class LinearProbe:
    """Accuracy of classifiers of latents, each a share of 0 to 1: multinomial logistic regression on scaled features.

    - `probe, pooled`: of the mean of an image's latent over all places.
    - `probe, per token`: of the latent at one place, which has to tell the class of the whole image.

    Neither batches nor the order of the images change a number.
    """

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._labels: list[str] = []
        self._pooled: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def update(self, latent: Tensor, images: Tensor, labels: Sequence[str | None] | None) -> None:
        """Adds the latents B c h w of images B 3 H W in [-1, 1], whose classes are `labels`.

        Raises `RacError` for an image without class.
        """
        check_labels(labels)
        assert labels is not None
        flat = latent.detach().float().cpu().flatten(2)
        places = torch.linspace(0, flat.shape[2] - 1, min(TOKENS, flat.shape[2])).round().long()
        self._pooled.append(flat.mean(dim=2))
        self._tokens.append(flat[:, :, places].transpose(1, 2))
        self._digests += [digest(to_pixels(image)) for image in images]
        self._labels += map(str, labels)

    def accuracies(self) -> dict[str, float]:
        """Returns the two accuracies.

        Raises `RacError` for latents of different sizes, and for classes that cannot be learnt: fewer than two, or one
        of a single image.
        """
        if len({tokens.shape[1:] for tokens in self._tokens}) != 1:
            raise RacError("a probe needs images of one size; choose a protocol that crops")
        check_classes(self._labels)
        order = sorted(range(len(self._labels)), key=lambda place: self._digests[place])
        classes = sorted(set(self._labels))
        labels = torch.tensor([classes.index(self._labels[place]) for place in order])
        folds = _folds(labels.tolist())
        pooled, tokens = torch.cat(self._pooled)[order], torch.cat(self._tokens)[order]
        count = tokens.shape[1]
        return {
            POOLED: _accuracy(pooled, labels, folds),
            PER_TOKEN: _accuracy(tokens.flatten(0, 1), labels.repeat_interleave(count), folds.repeat_interleave(count)),
        }


def check_labels(labels: Sequence[str | None] | None) -> None:
    """Raises `RacError` unless every image has a class."""
    if labels is None or None in labels:
        raise RacError(
            "a probe needs the classes of all images, which are the folders directly above them; give a folder of "
            "folders, or a tar of class/name"
        )


def check_classes(labels: Sequence[str | None]) -> None:
    """Raises `RacError` unless the labels are of two classes at least, each of two images at least."""
    counts = Counter(labels)
    if len(counts) < 2:
        raise RacError(f"a probe needs images of at least 2 classes, not {len(counts)}")
    name, least = min(counts.items(), key=lambda item: item[1])
    if least < 2:
        raise RacError(f"class {name} has one image, too few to learn and to test; a probe needs 2 of each")


def _folds(labels: Sequence[int]) -> Tensor:
    """Returns the part of each image, the images of each class taking turns."""
    seen: Counter[int] = Counter()
    folds = []
    for label in labels:
        folds.append(seen[label] % FOLDS)
        seen[label] += 1
    return torch.tensor(folds)


def _accuracy(features: Tensor, labels: Tensor, folds: Tensor) -> float:
    """Returns the share of features N D that classifiers of the other parts give their own label."""
    right = 0
    for fold in range(FOLDS):
        test = folds == fold
        if test.any():
            mean, std = features[~test].mean(dim=0), features[~test].std(dim=0).clamp_min(1e-6)
            scaled = (features - mean) / std
            weight, bias = _regression(scaled[~test], labels[~test], int(labels.max()) + 1)
            right += int(((scaled[test] @ weight + bias).argmax(dim=1) == labels[test]).sum())
    return right / len(labels)


def _regression(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Returns weight D K and bias K of multinomial logistic regression, by L-BFGS from zero."""
    weight = torch.zeros(features.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight + bias, labels) + PENALTY / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()
