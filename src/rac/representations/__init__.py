"""Frozen networks that look at images: extractors of features, by which sets are compared, and representations.

An extractor sums an image up; a representation describes every place of it, and generators are aligned with it (REPA)
or made of it (RAE).

A metric carries the name of its features: only the 2048 features of the Inception graph of 2015-12-05 make an FID, all
others append what they are, as in FID-768 and FID-EffNetLite0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import RacError, WeightsError
from .efficientnet import EfficientNetLite0, EfficientNetTokens
from .extractor import Extractor, Features, extract, join, metric_name
from .inception import INCEPTION, INCEPTION_TO_MIXED_8, Inception768, Inception2048
from .levels import DINO, Levels, LevelsName, load_levels
from .lpips import FILES
from .representation import Representation
from .targets import Targets
from .vit import PUBLISHED, VisionTransformer
from .weight_files import WeightFile, find_weights

__all__ = [
    "WEIGHT_FILES",
    "EfficientNetLite0",
    "Extractor",
    "ExtractorName",
    "Features",
    "Inception768",
    "Inception2048",
    "Levels",
    "LevelsName",
    "Representation",
    "Targets",
    "extract",
    "join",
    "load_extractor",
    "load_levels",
    "load_representation",
    "metric_name",
]

ExtractorName = Literal["inception-2048", "inception-768", "efficientnet-lite0"]

WEIGHT_FILES: tuple[WeightFile, ...] = (*FILES.values(), INCEPTION, INCEPTION_TO_MIXED_8, DINO)
"""All weight files that metrics and terms of training may need."""


def load_extractor(name: ExtractorName, weights: str | Path | None = None) -> Extractor:
    """Loads the extractor called `name`, on the CPU, in evaluation mode, frozen.

    - `inception-2048`: the FID of the literature. Needs the full graph of 2015-12-05 as safetensors (`inception` says
      in which layouts): `weights`, or inception_v3_2015-12-05.safetensors in the weights folder.
    - `inception-768`: the mean of the same graph's layer mixed_7. Takes the full file or one that ends at mixed_8.
    - `efficientnet-lite0`: needs no file of weights; the extra `metrics` brings them.

    Raises `WeightsError` if there is no such file, or it does not fit.
    """
    if name == "efficientnet-lite0":
        if weights is not None:
            raise WeightsError(
                f"{name} brings its own weights, so {weights} cannot be used; choose an Inception for it"
            )
        return EfficientNetLite0()
    if name == "inception-2048":
        return Inception2048(find_weights(weights, INCEPTION))
    if name == "inception-768":
        return Inception768(find_weights(weights, INCEPTION_TO_MIXED_8))
    raise RacError(f"extractor {name!r} is not known; expected inception-2048, inception-768 or efficientnet-lite0")


EFFICIENTNET = "efficientnet-lite0"

REPRESENTATIONS: tuple[str, ...] = (EFFICIENTNET, *PUBLISHED)
"""Short names that `load_representation` takes."""


def load_representation(name_or_dir: str | Path, *, affine: bool = True) -> Representation:
    """Loads a representation: float32, on the CPU, always in evaluation mode, frozen.

    - `name_or_dir`: `efficientnet-lite0`, whose weights the extra `metrics` brings; one of the vision transformers
      `dinov2-s`, `dinov2-b`, `dinov2-l` (all with registers), `siglip2-b` and `mae-b`, from the Hugging Face hub; or a
      directory or hub name of such a model, as transformers saves it.
    - `affine`: keep scale and shift of a transformer's final layer norm, as REPA does and RAE does not.

    Raises `WeightsError` if a package it needs is not installed, and if there is no such model.
    """
    if str(name_or_dir) == EFFICIENTNET:
        return EfficientNetTokens()
    # What is neither a directory nor a name on the hub, organisation/name, is a slip of the pen.
    if str(name_or_dir) not in PUBLISHED and "/" not in str(name_or_dir) and not Path(name_or_dir).is_dir():
        raise WeightsError(
            f"there is no representation {str(name_or_dir)!r}: it is not a directory, a hub name (organisation/name) "
            f"or one of {', '.join(REPRESENTATIONS)}"
        )
    return VisionTransformer.load(name_or_dir, affine=affine)
