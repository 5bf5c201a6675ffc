"""What an extractor is, and how the features of many images are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import RacError
from ..runtime import reproducible


class Features(NamedTuple):
    """What an extractor sees in B images, or in all images of a set."""

    pooled: Tensor
    """B D: for Frechet and kernel distances, precision and recall."""
    spatial: Tensor | None = None
    """B S: a few channels with their places, for sFID."""
    logits: Tensor | None = None
    """B K: classes, for the Inception Score."""


class Extractor(Protocol):
    """image -> features. Every extractor is a frozen `nn.Module` as well."""

    @property
    def width(self) -> int:
        """D, the number of pooled features."""
        ...

    @property
    def label(self) -> str:
        """What follows the name of a metric made of the pooled features or the logits; empty for the real FID's."""
        ...

    @property
    def spatial_width(self) -> int | None:
        """S, the number of spatial features; None if it has none."""
        ...

    @property
    def has_logits(self) -> bool:
        """Whether it names classes."""
        ...

    @property
    def path(self) -> Path:
        """The file its weights are from."""
        ...

    def __call__(self, image: Tensor) -> Features:
        """Image B 3 H W in [-1, 1], of any size -> features of its B images, each independent of the others."""
        ...


def extract(extractor: Extractor, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None) -> Features:
    """Features of all images in `batches` (each B 3 H W in [-1, 1]), float32 on the CPU, in their order.

    `progress` is told the number of images done. Raises `RacError` if there are no images.
    """
    parts: list[Features] = []
    with reproducible():
        for images in batches:
            parts.append(extractor(images))
            if progress is not None:
                progress(sum(len(part.pooled) for part in parts))
    return join(parts)


def join(parts: Iterable[Features]) -> Features:
    """Features of several batches as one, on the CPU. Raises `RacError` if there are none."""
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
    """`FID` and the extractor's label -> `FID-768`; no label, nothing appended."""
    return f"{metric}-{label}" if label else metric
