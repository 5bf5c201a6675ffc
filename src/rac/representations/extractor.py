"""The interface of extractors, and the features of many images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import RacError
from ..runtime import reproducible


class Features(NamedTuple):
    """Features of B images, or of all images of a set."""

    pooled: Tensor
    """Pooled features, B D, for Frechet and kernel distances, precision and recall."""
    spatial: Tensor | None = None
    """A few channels with their places, B S, for sFID."""
    logits: Tensor | None = None
    """Logits of classes, B K, for the Inception Score."""


class Extractor(Protocol):
    """A network that maps images to features. Every extractor is a frozen `nn.Module` as well."""

    @property
    def width(self) -> int:
        """Number of pooled features, D."""
        ...

    @property
    def label(self) -> str:
        """Suffix of the names of metrics made of the pooled features or the logits; empty for the real FID's."""
        ...

    @property
    def spatial_width(self) -> int | None:
        """Number of spatial features, S; None if it has none."""
        ...

    @property
    def has_logits(self) -> bool:
        """Whether it returns logits of classes."""
        ...

    @property
    def path(self) -> Path:
        """File that its weights are from."""
        ...

    def __call__(self, image: Tensor) -> Features:
        """Returns the features of images B 3 H W in [-1, 1], of any size, each independent of the others."""
        ...


def extract(extractor: Extractor, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None) -> Features:
    """Returns the features of all images in `batches` (each B 3 H W in [-1, 1]), float32 on the CPU, in their order.

    `progress` is called with the number of images done. Raises `RacError` if there are no images.
    """
    parts: list[Features] = []
    with reproducible():
        for images in batches:
            parts.append(extractor(images))
            if progress is not None:
                progress(sum(len(part.pooled) for part in parts))
    return join(parts)


def join(parts: Iterable[Features]) -> Features:
    """Joins the features of several batches, on the CPU. Raises `RacError` if there are none."""
    parts = list(parts)
    if not parts:
        raise RacError("no images to take features of; give at least one batch")
    return Features(
        torch.cat([part.pooled.cpu() for part in parts]),
        _concatenate([part.spatial for part in parts]),
        _concatenate([part.logits for part in parts]),
    )


def _concatenate(parts: list[Tensor | None]) -> Tensor | None:
    present = [part.cpu() for part in parts if part is not None]
    return torch.cat(present) if present else None


def metric_name(metric: str, label: str) -> str:
    """Returns the name of a metric with the extractor's label, such as `FID-768`; just the name if that is empty."""
    return f"{metric}-{label}" if label else metric
