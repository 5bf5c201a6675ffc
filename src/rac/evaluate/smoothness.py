"""Smoothness of coders: how evenly the decoded image moves while the latent moves on a line, or away by noise.

DGAE's paper (arXiv 2506.09644, section 4.4) shows its latents to be smoother than a KL-VAE's; here that is a number,
the same for every coder, whatever its latents are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from ..errors import RacError
from ..images import crop
from ..report.document import Table
from ..report.pictures import Panel, sheet, strip
from ..runtime import reproducible
from .comparison import Candidate
from .image_sets import ImageSet
from .robustness import latent_noise

POINTS = 8
"""Number of equal steps from one latent to the other."""
SIGMAS = (0.1, 0.3, 1.0)
"""Standard deviations of the noise; latents have a deviation of about 1."""


@dataclass(frozen=True)
class Smoothness:
    """Smoothness of one coder over some pairs of images."""

    label: str
    roughness: float
    """Root mean square of the second differences of the decoded image on the line between two latents, over that of
    the first differences: 0 if the image changes evenly, 1.73 if neighbours had nothing in common, at most 2."""
    sensitivity: tuple[float, ...]
    """Root mean square change of the decoded image, in units of its [-1, 1], over sigma, for each of `SIGMAS`."""
    pairs: int


def smoothness(candidate: Candidate, images: ImageSet, pairs: int) -> Smoothness:
    """Measures a coder between each of the first images and the next one.

    Every line, and every image with all of its noised latents, is decoded from one noise where a coder takes any.

    - `candidate`: the coder in its setting.
    - `images`: the images.
    - `pairs`: number of pairs; needs one image more.

    Raises `RacError` for fewer than 1, and where there are too few images.
    """
    shown = _first(images, pairs + 1)
    first = second = 0.0
    changes = [0.0] * len(SIGMAS)
    for (name, one), (_, other) in pairwise(shown):
        line = interpolation(candidate, name, one, other)
        first += float((line[1:] - line[:-1]).double().square().mean())
        second += float((line[2:] - 2 * line[1:-1] + line[:-2]).double().square().mean())
        still, *moved = perturbation(candidate, name, one)
        for place, image in enumerate(moved):
            changes[place] += float((image - still).double().square().mean())
    if not first > 0:
        raise RacError(f"{candidate.label} decodes every latent to one image, whose smoothness says nothing; train it")
    sensitivity = tuple((change / pairs) ** 0.5 / sigma for change, sigma in zip(changes, SIGMAS, strict=True))
    return Smoothness(candidate.label, (second / first) ** 0.5, sensitivity, pairs)


def interpolation(candidate: Candidate, name: str, one: Tensor, other: Tensor) -> Tensor:
    """Returns the decoded images N 3 H W on the line between the latents of two images 1 3 H W.

    N is `POINTS` + 1. `name` chooses the noise of all of them.
    """
    start, end = (_encoded(candidate, image) for image in (one, other))
    return torch.cat([_decoded(candidate, torch.lerp(start, end, k / POINTS), name, one) for k in range(POINTS + 1)])


def perturbation(candidate: Candidate, name: str, image: Tensor) -> list[Tensor]:
    """Returns an image 1 3 H W decoded from its latent, and from that with noise of each of `SIGMAS`."""
    latent = _encoded(candidate, image)
    noise = latent_noise(latent, (name,), candidate.protocol.rng_seed)
    return [_decoded(candidate, latent + sigma * noise, name, image) for sigma in (0.0, *SIGMAS)]


def picture(candidates: Sequence[Candidate], images: ImageSet) -> Image.Image:
    """Draws, for each coder, the line between the latents of the first two images, and the first one noised."""
    (name, one), (_, other) = _first(images, 2)
    rows = [strip([Panel(one, "first"), Panel(other, "second")], "originals")]
    for candidate in candidates:
        line = interpolation(candidate, name, one, other).cpu()
        rows.append(
            strip([Panel(image, f"{k / POINTS:g}") for k, image in enumerate(line)], f"{candidate.label}: between")
        )
        noised = [image.cpu() for image in perturbation(candidate, name, one)]
        panels = [Panel(image, f"sigma {sigma:g}") for sigma, image in zip((0.0, *SIGMAS), noised, strict=True)]
        rows.append(strip(panels, f"{candidate.label}: noised"))
    return sheet(rows)


def table(found: Sequence[Smoothness]) -> Table:
    """Returns a table with a row for each coder."""
    columns = ("coder", "roughness ↓", *(f"change at sigma {sigma:g} ↓" for sigma in SIGMAS))
    rows = [(one.label, f"{one.roughness:.3f}", *(f"{value:.3f}" for value in one.sensitivity)) for one in found]
    return Table(columns, tuple(rows))


def _first(images: ImageSet, count: int) -> list[tuple[str, Tensor]]:
    """Returns the names of the first images, and the images 1 3 H W."""
    if count < 2:
        raise RacError(f"pairs {count - 1} must be at least 1")
    if len(images) < count:
        raise RacError(f"{count - 1} pairs need {count} images, {images.name} has {len(images)}; give more")
    found: list[tuple[str, Tensor]] = []
    for part in images.batches(1):
        if len(found) == count:
            break
        found.append((part.names[0], part.images))
    return found


def _encoded(candidate: Candidate, image: Tensor) -> Tensor:
    with reproducible():
        return candidate.encode(image.to(candidate.device)).float()


def _decoded(candidate: Candidate, latent: Tensor, name: str, image: Tensor) -> Tensor:
    with reproducible():
        return crop(candidate.decode(latent, (name,)).float(), (image.shape[-2], image.shape[-1]))
