"""Figures by name: which networks they need, which images they can be had of, and what they must be called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..errors import RacError
from ..representations import Extractor, ExtractorName, Features, figure_name, load_extractor
from ..representations.lpips import FILES, LPIPS, Backbone
from ..representations.weight_files import find_weights
from ..runtime import reproducible
from .image_metrics import MS_SSIM_SIDE, SSIM_WINDOW, ms_ssim, psnr, ssim
from .image_sets import ImageSet
from .set_metrics import Gaussian, frechet, inception_score, kernel_distance, precision_recall, require_more_images

ImageFigure = Literal["psnr", "ssim", "ms-ssim", "lpips-alex", "lpips-vgg16"]
"""One value per image, of which the mean is reported under the same name."""

SetFigure = Literal["frechet", "spatial-frechet", "kernel", "score", "precision-recall"]
"""One value for a set: FID, sFID, KID, IS, precision and recall, each followed by the name of its features."""

LatentFigure = Literal["explained-variance", "state-round-trip"]
"""How a RAC's latents agree with its teacher's; the PSNR of going back and there without contraction."""

IMAGE_FIGURES: tuple[ImageFigure, ...] = get_args(ImageFigure)
SET_FIGURES: tuple[SetFigure, ...] = get_args(SetFigure)
LATENT_FIGURES: tuple[LatentFigure, ...] = get_args(LatentFigure)

SHORTEST_SIDE: dict[str, int] = {"ssim": SSIM_WINDOW, "ms-ssim": MS_SSIM_SIDE, "lpips-alex": 31, "lpips-vgg16": 16}
"""Of an image that has the figure."""

_BACKBONES: dict[str, Backbone] = {"lpips-alex": "alex", "lpips-vgg16": "vgg16"}


@dataclass(frozen=True)
class MetricSuite:
    """The networks behind the figures of a protocol, loaded once and used for many coders."""

    figures: tuple[str, ...]
    lpips: Mapping[str, LPIPS] = field(default_factory=dict)
    """By figure."""
    extractor: Extractor | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    """Names of the weight files, and the SHA-256 of each."""

    @classmethod
    def load(
        cls,
        figures: Collection[str],
        extractor: ExtractorName | None = None,
        device: torch.device | str = "cpu",
        weights: Mapping[str, Path] | None = None,
    ) -> MetricSuite:
        """Only the networks that `figures` need.

        `weights` gives files by hand, under "lpips-alex", "lpips-vgg16" or the extractor's name. Raises `WeightsError`.
        """
        given = weights or {}
        lpips, paths = {}, []
        for figure, backbone in _BACKBONES.items():
            if figure in figures:
                path = find_weights(given.get(figure), FILES[backbone])
                lpips[figure] = LPIPS.load(backbone, path).to(device)
                paths.append(path)
        loaded = None
        if extractor is not None and set(figures) & set(SET_FIGURES):
            loaded = load_extractor(extractor, given.get(extractor))
            cast(nn.Module, loaded).to(device)
            paths.append(loaded.path)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        return cls(tuple(figures), lpips, loaded, files)

    def check(self, references: ImageSet) -> None:
        """Raise `RacError`, before anything is computed, if a figure cannot be had of these images."""
        shortest = min(min(size) for size in references.sizes)
        for figure in self.figures:
            if shortest < SHORTEST_SIDE.get(figure, 0):
                raise RacError(
                    f"{figure} needs sides of at least {SHORTEST_SIDE[figure]} pixels, {references.name} has images of "
                    f"{shortest}; leave the figure out, or choose a protocol of a larger size"
                )
        if self.extractor is None:
            return
        if len(references.sizes) > 1:
            one, other, *_ = sorted(references.sizes)
            raise RacError(
                f"{references.name} has images of {one[0]} x {one[1]} and of {other[0]} x {other[1]}; features of sets "
                "compare images of one size: choose a protocol that crops"
            )
        if "frechet" in self.figures:
            require_more_images(len(references), self.extractor.width)
        if "spatial-frechet" in self.figures:
            if self.extractor.spatial_width is None:
                raise RacError("this extractor has no spatial features for an sFID; choose an Inception")
            require_more_images(len(references), self.extractor.spatial_width)
        if "score" in self.figures and not self.extractor.has_logits:
            raise RacError(
                f"features {self.extractor.label} name no classes, so there is no Inception Score; "
                "choose inception-2048 or efficientnet-lite0"
            )

    def of_images(self, image: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """The image figures of B 3 H W images in [-1, 1], B values each, float32 on the CPU."""
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "psnr": psnr,
            "ssim": ssim,
            "ms-ssim": ms_ssim,
            **self.lpips,
        }
        with reproducible():
            return {
                figure: measures[figure](image, reference).float().cpu()
                for figure in self.figures
                if figure in IMAGE_FIGURES
            }

    def of_sets(self, features: Features, reference: Features, kind: Literal["r", "g"] = "r") -> dict[str, float]:
        """The set figures under their honest names; `kind` tells reconstructions (rFID) from generations (gFID)."""
        return {} if self.extractor is None else set_figures(self.figures, self.extractor, features, reference, kind)


def set_figures(
    figures: Collection[str],
    extractor: Extractor,
    features: Features,
    reference: Features,
    kind: Literal["r", "g"] = "r",
) -> dict[str, float]:
    """See `MetricSuite.of_sets`; only the score does without the reference."""
    found: dict[str, float] = {}
    label = extractor.label
    if "frechet" in figures:
        distance = frechet(Gaussian.of(features.pooled), Gaussian.of(reference.pooled))
        found[figure_name(f"{kind}FID", label)] = distance
    if "spatial-frechet" in figures and features.spatial is not None and reference.spatial is not None:
        distance = frechet(Gaussian.of(features.spatial), Gaussian.of(reference.spatial))
        found[f"sFID-{extractor.spatial_width}"] = distance
    if "kernel" in figures:
        found[figure_name("KID", label)] = kernel_distance(features.pooled, reference.pooled)
    if "score" in figures and features.logits is not None:
        found[figure_name("IS", label)] = inception_score(features.logits)
    if "precision-recall" in figures:
        shares = precision_recall(features.pooled, reference.pooled)
        found[figure_name("precision", label)] = shares.precision
        found[figure_name("recall", label)] = shares.recall
    return found
