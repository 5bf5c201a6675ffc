"""Metrics by name: the networks they need, the images they apply to, and how results are labelled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..errors import RacError
from ..representations import Extractor, ExtractorName, Features, load_extractor, metric_name
from ..representations.lpips import FILES, LPIPS, Backbone
from ..representations.weight_files import find_weights
from ..runtime import reproducible
from .image_metrics import MS_SSIM_SIDE, SSIM_WINDOW, ms_ssim, psnr, ssim
from .image_sets import FeatureMoments, ImageSet
from .set_metrics import Gaussian, frechet, inception_score, kernel_distance, precision_recall, require_more_images

ImageMetric = Literal["psnr", "ssim", "ms-ssim", "lpips-alex", "lpips-vgg16"]
"""Names of metrics with one value per image, whose mean is reported under the same name."""

SetMetric = Literal["frechet", "spatial-frechet", "kernel", "score", "precision-recall"]
"""Names of metrics with one value for a set.

They are FID, sFID, KID, IS, precision and recall, each followed by the name of its features.
"""

LatentMetric = Literal["explained-variance", "state-round-trip"]
"""Names of metrics of a RAC's latents.

They are their agreement with the teacher's, and the PSNR of encoding and decoding without contraction.
"""

ClassMetric = Literal["probe"]
"""Names of metrics of latents and the classes of their images: the accuracy of a linear probe, pooled and per token."""

IMAGE_METRICS: tuple[ImageMetric, ...] = get_args(ImageMetric)
SET_METRICS: tuple[SetMetric, ...] = get_args(SetMetric)
LATENT_METRICS: tuple[LatentMetric, ...] = get_args(LatentMetric)
CLASS_METRICS: tuple[ClassMetric, ...] = get_args(ClassMetric)

SHORTEST_SIDE: dict[str, int] = {"ssim": SSIM_WINDOW, "ms-ssim": MS_SSIM_SIDE, "lpips-alex": 31, "lpips-vgg16": 16}
"""Shortest side, in pixels, of the images that a metric applies to."""

_BACKBONES: dict[str, Backbone] = {"lpips-alex": "alex", "lpips-vgg16": "vgg16"}


@dataclass(frozen=True)
class MetricSuite:
    """The networks behind the metrics of a protocol, loaded once and used for many coders."""

    metrics: tuple[str, ...]
    lpips: Mapping[str, LPIPS] = field(default_factory=dict)
    """LPIPS networks by metric."""
    extractor: Extractor | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    """Names of the weight files, and the SHA-256 of each."""

    @classmethod
    def load(
        cls,
        metrics: Collection[str],
        extractor: ExtractorName | None = None,
        device: torch.device | str = "cpu",
        weights: Mapping[str, Path] | None = None,
    ) -> MetricSuite:
        """Loads the networks that `metrics` need, and no others.

        - `metrics`: names of metrics.
        - `extractor`: name of the network whose features metrics of sets compare.
        - `device`: the device to load to.
        - `weights`: weight files to use, under "lpips-alex", "lpips-vgg16" or the extractor's name.

        Raises `WeightsError` for weights that are missing or do not fit.
        """
        given = weights or {}
        lpips, paths = {}, []
        for metric, backbone in _BACKBONES.items():
            if metric in metrics:
                path = find_weights(given.get(metric), FILES[backbone])
                lpips[metric] = LPIPS.load(backbone, path).to(device)
                paths.append(path)
        loaded = None
        if extractor is not None and set(metrics) & set(SET_METRICS):
            loaded = load_extractor(extractor, given.get(extractor))
            cast(nn.Module, loaded).to(device)
            paths.append(loaded.path)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        return cls(tuple(metrics), lpips, loaded, files)

    def check(self, images: ImageSet, reference: ImageSet | FeatureMoments | None = None) -> None:
        """Raises `RacError`, before anything is computed, if a metric does not apply to these images.

        `reference` is the set that metrics of sets compare with; None: `images` themselves.
        """
        shortest = min(min(size) for size in images.sizes)
        for metric in self.metrics:
            if shortest < SHORTEST_SIDE.get(metric, 0):
                raise RacError(
                    f"{metric} needs sides of at least {SHORTEST_SIDE[metric]} pixels, {images.name} has images of "
                    f"{shortest}; leave the metric out, or choose a protocol of a larger size"
                )
        if self.extractor is None:
            return
        if len(images.sizes) > 1:
            one, other, *_ = sorted(images.sizes)
            raise RacError(
                f"{images.name} has images of {one[0]} x {one[1]} and of {other[0]} x {other[1]}; features of sets "
                "compare images of one size: choose a protocol that crops"
            )
        if "frechet" in self.metrics:
            require_more_images(len(images), self.extractor.width)
        if "spatial-frechet" in self.metrics:
            if self.extractor.spatial_width is None:
                raise RacError("this extractor has no spatial features for an sFID; choose an Inception")
            require_more_images(len(images), self.extractor.spatial_width)
        if "score" in self.metrics and not self.extractor.has_logits:
            raise RacError(
                f"features {self.extractor.label} have no classes, so there is no Inception Score; choose "
                "inception-2048 or efficientnet-lite0"
            )

        if reference is not None:
            self._check_reference(images, reference, self.extractor)

    def _check_reference(self, images: ImageSet, reference: ImageSet | FeatureMoments, extractor: Extractor) -> None:
        if isinstance(reference, FeatureMoments):
            reference.check(self.metrics, extractor)
            return
        if reference.sizes != images.sizes:
            raise RacError(
                f"{reference.name} and {images.name} have images of different sizes; read both with the protocol's "
                "preprocessing"
            )
        if "frechet" in self.metrics:
            require_more_images(len(reference), extractor.width)
        if "spatial-frechet" in self.metrics and extractor.spatial_width is not None:
            require_more_images(len(reference), extractor.spatial_width)

    def of_images(self, image: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Returns the image metrics of B 3 H W images in [-1, 1], B values each, float32 on the CPU."""
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "psnr": psnr,
            "ssim": ssim,
            "ms-ssim": ms_ssim,
            **self.lpips,
        }
        with reproducible():
            return {
                metric: measures[metric](image, reference).float().cpu()
                for metric in self.metrics
                if metric in IMAGE_METRICS
            }

    def of_sets(
        self, features: Features, reference: Features | FeatureMoments, kind: Literal["r", "g"] = "r"
    ) -> dict[str, float]:
        """Returns the metrics of sets, named after their features.

        `kind` tells reconstructions (rFID) from generations (gFID).
        """
        return {} if self.extractor is None else set_metrics_of(self.metrics, self.extractor, features, reference, kind)


def set_metrics_of(
    metrics: Collection[str],
    extractor: Extractor,
    features: Features,
    reference: Features | FeatureMoments,
    kind: Literal["r", "g"] = "r",
) -> dict[str, float]:
    """Returns the metrics of a set of images beside a reference; the Inception Score alone needs no reference.

    - `metrics`: names of metrics.
    - `extractor`: the network that the features are from.
    - `features`: features of the images.
    - `reference`: features of the reference, or their moments.
    - `kind`: "r" for reconstructions (rFID), "g" for generations (gFID).

    Raises `RacError` if the reference lacks what a metric needs.
    """
    found: dict[str, float] = {}
    label = extractor.label
    if isinstance(reference, FeatureMoments):
        reference.check(metrics, extractor)
    if "frechet" in metrics:
        distance = frechet(Gaussian.of(features.pooled), _gaussian(reference.pooled))
        found[metric_name(f"{kind}FID", label)] = distance
    if "spatial-frechet" in metrics and features.spatial is not None and reference.spatial is not None:
        distance = frechet(Gaussian.of(features.spatial), _gaussian(reference.spatial))
        found[f"sFID-{extractor.spatial_width}"] = distance
    if "kernel" in metrics and isinstance(reference.pooled, Tensor):
        found[metric_name("KID", label)] = kernel_distance(features.pooled, reference.pooled)
    if "score" in metrics and features.logits is not None:
        found[metric_name("IS", label)] = inception_score(features.logits)
    if "precision-recall" in metrics and isinstance(reference.pooled, Tensor):
        shares = precision_recall(features.pooled, reference.pooled)
        found[metric_name("precision", label)] = shares.precision
        found[metric_name("recall", label)] = shares.recall
    return found


def _gaussian(features: Tensor | Gaussian) -> Gaussian:
    return Gaussian.of(features) if isinstance(features, Tensor) else features
