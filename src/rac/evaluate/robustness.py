"""Robustness to latent noise: how well decoders take latents that lie off the encoder's manifold.

A generator never hits an encoder's latents exactly. Here noise of growing size is added to a teacher's latent, and all
decoders get the same noised latents: a flow whose later steps correct the state should lose less than a decoder that
maps once (RAC, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..coders.protocol import Coder
from ..images import crop
from ..runtime import generator, reproducible
from .image_sets import Batch, ImageSet
from .suite import IMAGE_METRICS, MetricSuite

SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Standard deviations of the noise; latents have a deviation of about 1."""

Decoder = Callable[[Tensor, Sequence[str]], Tensor]
"""A function that decodes latents B c h w of images with these names."""


@dataclass(frozen=True)
class RobustnessCurve:
    """Mean metrics over the images, for each decoder and each sigma of the noise."""

    teacher: str
    """Name of the coder whose latents are decoded."""
    images: int
    rng_seed: int
    sigmas: tuple[float, ...]
    metrics: dict[str, dict[str, tuple[float, ...]]]
    """Values by metric and decoder, one for each sigma."""


def robustness_curve(
    decoders: Mapping[str, Decoder],
    teacher: Coder,
    image_set: ImageSet,
    suite: MetricSuite,
    *,
    name: str,
    images: int = 64,
    sigmas: Sequence[float] = SIGMAS,
    rng_seed: int = 0,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> RobustnessCurve:
    """Decodes latent + sigma * noise by every decoder, and compares the results with the original images.

    The noise depends on `rng_seed` and the image's name alone, so it is the same for all decoders and, up to its size,
    for all sigmas. Noise that a coder decodes from depends on the name as well, and is the same for all sigmas.

    - `decoders`: the decoders by name.
    - `teacher`: the coder whose latents are decoded.
    - `image_set`: the images.
    - `suite`: the networks of the image metrics.
    - `name`: the teacher's name.
    - `images`: number of images, from the first on.
    - `sigmas`: standard deviations of the noise.
    - `rng_seed`: seed of the noise.
    - `batch`: images at a time.
    - `progress`: called with (images done, images in all).
    """
    suite = replace(suite, metrics=tuple(metric for metric in suite.metrics if metric in IMAGE_METRICS))
    device = next(teacher.parameters()).device
    total = min(images, len(image_set))
    sums: dict[str, dict[str, list[float]]] = {}
    done = 0
    for part in _first(image_set.batches(batch), total):
        image = part.images.to(device)
        for place, noised in enumerate(noised_latents(teacher, part._replace(images=image), sigmas, rng_seed)):
            for decoder, decode in decoders.items():
                with reproducible():
                    made = crop(decode(noised, part.names).float(), (image.shape[-2], image.shape[-1]))
                for metric, values in suite.of_images(made, image).items():
                    row = sums.setdefault(metric, {}).setdefault(decoder, [0.0] * len(sigmas))
                    row[place] += float(values.double().sum())
        done += len(image)
        if progress is not None:
            progress(done, total)
    means = {
        metric: {decoder: tuple(value / total for value in row) for decoder, row in rows.items()}
        for metric, rows in sums.items()
    }
    return RobustnessCurve(name, total, rng_seed, tuple(sigmas), means)


def noised_latents(teacher: Coder, part: Batch, sigmas: Iterable[float], rng_seed: int = 0) -> Iterator[Tensor]:
    """Yields, for each sigma, the teacher's latents of the images plus sigma times their noise.

    - `teacher`: the coder that encodes.
    - `part`: the images.
    - `sigmas`: standard deviations of the noise.
    - `rng_seed`: seed of the noise, which depends on it and the image's name alone.
    """
    with reproducible():
        latent = teacher.encode(part.images).float()
    noise = latent_noise(latent, part.names, rng_seed)
    for sigma in sigmas:
        yield latent + sigma * noise


def latent_noise(latent: Tensor, names: Sequence[str], rng_seed: int) -> Tensor:
    """Returns normal noise for latents B c h w, that of each image depending on its name and the seed alone."""
    streams = [generator(rng_seed, "correction", name) for name in names]
    return torch.stack([torch.randn(latent.shape[1:], generator=stream) for stream in streams]).to(latent.device)


def _first(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yields the first `count` images."""
    for part in batches:
        if count <= 0:
            return
        yield Batch(part.names[:count], part.images[:count])
        count -= len(part.names)
