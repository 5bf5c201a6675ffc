"""Evaluation of generated images: metrics of a set beside real images, and of real images beside others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import json_safe, to_json
from ..errors import RacError
from ..files import write_bytes
from ..representations import Features
from ..runtime import generator
from .image_sets import FeatureMoments, ImageSet, ReferenceRecord
from .latent_metrics import LatentDistance
from .protocol import Protocol
from .result import command_line, versions
from .suite import SET_METRICS, MetricSuite


@dataclass(frozen=True)
class GeneratedResult:
    """Metrics of a set of generated images, and everything needed to reproduce them. Written as JSON."""

    name: str
    protocol: Protocol
    images: ReferenceRecord
    compared_with: ReferenceRecord
    metrics: dict[str, float]
    """Metrics by name, which says the features that they use: only `gFID` is an FID."""
    floor: dict[str, float]
    """The same metrics of real images beside other real ones; empty where the reference is a file of moments."""
    floor_count: int
    """Number of images of each of the two sets that the floor compares."""
    weight_files: dict[str, str]
    """Names of the metrics' weight files, and the SHA-256 of each."""
    versions: dict[str, str]
    command: str
    made_by: dict[str, Any] | None = None
    """The record that `rac generate` left: generator, coder, sampling, labels and evaluations for each image."""
    latents: LatentDistance | None = None

    def save(self, path: str | Path) -> None:
        """Writes the result as JSON, completely or not at all; infinite and undefined values as strings."""
        text = json.dumps(json_safe(to_json(self)), indent=2, allow_nan=False)
        write_bytes(path, (text + "\n").encode())


def of_sets_alone(protocol: Protocol) -> Protocol:
    """Returns the protocol with its metrics of sets alone: a generated image has no original to be compared with.

    Raises `RacError` if there are none.
    """
    metrics = tuple(metric for metric in protocol.metrics if metric in SET_METRICS)
    if not metrics:
        raise RacError(
            f"protocol {protocol.name} has no metrics of sets, and generated images no originals; choose another "
            "protocol, such as generated-128 or dev-128"
        )
    return replace(protocol, metrics=metrics)


def evaluate_generated(
    images: ImageSet,
    reference: ImageSet | FeatureMoments,
    protocol: Protocol,
    suite: MetricSuite,
    *,
    name: str = "images",
    made_by: Mapping[str, Any] | None = None,
    latents: LatentDistance | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GeneratedResult:
    """Evaluates generated images by their distances from real ones.

    - `images`: the generated images, read with the protocol's preprocessing.
    - `reference`: real images, or moments of their features.
    - `protocol`: names the metrics, which are all of sets (`of_sets_alone`).
    - `suite`: the loaded networks of these metrics.
    - `name`: the name of the set in the result.
    - `made_by`: the record of `rac generate`, to be kept in the result.
    - `latents`: the distance of the latents, to be kept in the result.
    - `batch`: images at a time; changes no number.
    - `device`: where features are computed.
    - `command`: the command that the result records; None: this process's command line.
    - `progress`: called with (images done, images in all).

    Raises `RacError` for images that are too few for a metric, of another size than the reference, or of another number
    than the protocol's, and for a reference that lacks what a metric needs.
    """
    if protocol.count is not None and protocol.count != len(images):
        raise RacError(f"protocol {protocol.name} is for {protocol.count} images, but {images.name} has {len(images)}")
    if suite.extractor is None:
        raise RacError(f"protocol {protocol.name} names no features; choose one that compares sets")
    suite.check(images, reference)
    total = len(images) + (len(reference) if isinstance(reference, ImageSet) else 0)

    def told(before: int) -> Callable[[int], None] | None:
        return None if progress is None else lambda done: progress(before + done, total)

    features = images.features(suite.extractor, batch, device, told(0))
    compared: Features | FeatureMoments
    floor: dict[str, float] = {}
    count = 0
    if isinstance(reference, ImageSet):
        compared = reference.features(suite.extractor, batch, device, told(len(images)))
        floor, count = _floor(suite, compared, len(images))
    else:
        compared = reference
    return GeneratedResult(
        name=name,
        protocol=protocol,
        images=images.record,
        compared_with=reference.record,
        metrics=suite.of_sets(features, compared, "g"),
        floor=floor,
        floor_count=count,
        weight_files=dict(suite.files),
        versions=versions(),
        command=command_line() if command is None else command,
        made_by=None if made_by is None else dict(made_by),
        latents=latents,
    )


def _floor(suite: MetricSuite, reference: Features, count: int) -> tuple[dict[str, float], int]:
    """Returns the metrics of some references beside others, and their number: `count`, or half of all if fewer."""
    total = len(reference.pooled)
    count = min(count, total // 2)
    order = torch.randperm(total, generator=generator(0, "floor"))
    one, other = (_rows(reference, order[first : first + count]) for first in (0, count))
    extractor = suite.extractor
    assert extractor is not None
    widths = {"frechet": extractor.width, "spatial-frechet": extractor.spatial_width or 0, "precision-recall": 3}
    fitting = tuple(metric for metric in suite.metrics if count > max(widths.get(metric, 1), 1))
    return replace(suite, metrics=fitting).of_sets(one, other, "g"), count


def _rows(features: Features, rows: torch.Tensor) -> Features:
    return Features(*(None if tensor is None else tensor[rows] for tensor in features))  # type: ignore[arg-type]
