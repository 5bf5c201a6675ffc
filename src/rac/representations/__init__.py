"""Networks that extract features from images, by which sets of images are compared, and the names of such metrics.

A metric carries the name of its features: only the 2048 features of the Inception graph of 2015-12-05 make an FID, all
others append what they are, as in FID-768 and FID-EffNetLite0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import RacError, WeightsError
from .efficientnet import EfficientNetLite0
from .extractor import Extractor, Features, extract, join, metric_name
from .inception import INCEPTION, INCEPTION_TO_MIXED_8, Inception768, Inception2048
from .lpips import FILES
from .weight_files import WeightFile, find_weights

__all__ = [
    "WEIGHT_FILES",
    "EfficientNetLite0",
    "Extractor",
    "ExtractorName",
    "Features",
    "Inception768",
    "Inception2048",
    "extract",
    "join",
    "load_extractor",
    "metric_name",
]

ExtractorName = Literal["inception-2048", "inception-768", "efficientnet-lite0"]

WEIGHT_FILES: tuple[WeightFile, ...] = (*FILES.values(), INCEPTION, INCEPTION_TO_MIXED_8)
"""All weight files that metrics and perceptual terms may need."""


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
