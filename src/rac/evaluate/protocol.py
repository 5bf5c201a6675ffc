"""Named protocols: everything that a metric depends on, as a value.

A metric means nothing without the images, their crop, the sample of the posterior, the features, the steps. All of it
is one value here, a `Protocol`, and travels with every `Result`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import from_json, read_json
from ..errors import RacError
from ..flow.solvers import SOLVERS, SolverName
from ..representations import ExtractorName
from .image_sets import Preprocessing
from .suite import CLASS_METRICS, IMAGE_METRICS, LATENT_METRICS, SET_METRICS, SHORTEST_SIDE


@dataclass(frozen=True)
class Protocol:
    """Everything that a metric depends on, except the coder's weights.

    Raises `RacError` for settings that do not go together.
    """

    name: str
    preprocessing: Preprocessing
    """Size, crop and resize filter of the images."""
    count: int | None = None
    """Number of reference images; None: all there are."""
    reference: str | None = None
    """Hash of the only set of reference images that the protocol is meant for (`ImageSet.hash`); None: any set."""
    metrics: tuple[str, ...] = ("psnr", "ssim")
    """Names of metrics, from `IMAGE_METRICS`, `SET_METRICS`, `LATENT_METRICS` and `CLASS_METRICS`."""
    extractor: ExtractorName | None = None
    """Name of the network whose features metrics of sets compare."""
    latents: Literal["own", "teacher"] = "own"
    """Whether the coder decodes latents that it encoded itself, or its teacher's."""
    posterior: Literal["mean", "sample"] = "mean"
    """The latent that is taken from a posterior: its mean, or a sample."""
    rng_seed: int = 0
    """Seed of the posterior samples."""
    steps: int | None = None
    """Number of steps of each way that a coder walks; None: the coder's own number. Other ways have no steps."""
    solver: SolverName = "euler"
    """Rule for each step of a flow."""
    shift: float = 1.0
    """Shift of the time grid, the `alpha` of `TimeGrid.shifted`; 1: equal steps."""
    weights: Literal["ema", "raw"] = "ema"
    """Kind of weights that the coder has, averaged or raw, as the protocol's maker states it. Saved coders have the
    average.
    """
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the coder's arithmetic; metrics are always computed in float32, distances of sets in float64."""
    rounded: bool = True
    """Round reconstructions to 8 bits first, so that metrics are those of the written files."""

    def __post_init__(self) -> None:
        known = (*IMAGE_METRICS, *SET_METRICS, *LATENT_METRICS, *CLASS_METRICS)
        for metric in self.metrics:
            if metric not in known:
                raise RacError(f"metric {metric!r} is not known; expected some of {', '.join(known)}")
            if metric in SET_METRICS and self.extractor is None:
                raise RacError(
                    f"metric {metric} compares features and protocol {self.name} names no extractor; add one"
                )
            if self.preprocessing.size is not None and self.preprocessing.size < SHORTEST_SIDE.get(metric, 0):
                raise RacError(
                    f"{metric} needs sides of at least {SHORTEST_SIDE[metric]} pixels, not {self.preprocessing.size}"
                )
        if not self.metrics:
            raise RacError(f"protocol {self.name} asks for no metrics; expected some of {', '.join(known)}")
        if self.count is not None and self.count < 2:
            raise RacError(f"count {self.count} must be at least 2")
        if self.solver not in SOLVERS:
            raise RacError(f"solver {self.solver!r} is not known; expected {', '.join(SOLVERS)}")


_PIXELS = ("psnr", "ssim", "lpips-alex")
_SETS = ("frechet", "kernel", "precision-recall")

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # Needs nothing but pixels, so it runs anywhere, and during training.
        Protocol("pixels-64", Preprocessing(64, "centre"), metrics=("psnr", "ssim")),
        # Sets of some hundred images: the kernel distance is fair at any number, the Frechet distance is not.
        Protocol("dev-64", Preprocessing(64, "centre"), metrics=(*_PIXELS, "kernel"), extractor="inception-768"),
        Protocol("dev-128", Preprocessing(128, "centre"), metrics=(*_PIXELS, "kernel"), extractor="inception-768"),
        # Every picture as it is, whatever its size; 176 pixels a side at least.
        Protocol("native", Preprocessing(), metrics=("psnr", "ssim", "ms-ssim", "lpips-alex")),
        # Enough images for a Frechet distance out of some hundred pictures.
        Protocol(
            "tiles-64",
            Preprocessing(64, "tiles"),
            metrics=(*_PIXELS, "frechet", "kernel", "precision-recall"),
            extractor="inception-768",
        ),
        # The same where no weight files are at hand.
        Protocol(
            "tiles-64-lite",
            Preprocessing(64, "tiles"),
            metrics=("psnr", "ssim", "frechet", "kernel", "precision-recall"),
            extractor="efficientnet-lite0",
        ),
        # The literature's rFID: the 50,000 validation images, the full Inception.
        Protocol(
            "imagenet-256",
            Preprocessing(256, "adm"),
            count=50_000,
            metrics=(*_PIXELS, "frechet", "spatial-frechet", "score"),
            extractor="inception-2048",
        ),
        # Generated images beside real ones: more than 768 of each, or 1,280 for the lite ones.
        Protocol("generated-64", Preprocessing(64, "centre"), metrics=_SETS, extractor="inception-768"),
        Protocol("generated-128", Preprocessing(128, "centre"), metrics=_SETS, extractor="inception-768"),
        Protocol("generated-64-lite", Preprocessing(64, "centre"), metrics=_SETS, extractor="efficientnet-lite0"),
        Protocol("generated-128-lite", Preprocessing(128, "centre"), metrics=_SETS, extractor="efficientnet-lite0"),
        # The literature's FID, sFID and IS: 50,000 images beside ADM's moments of ImageNet.
        Protocol(
            "generated-256",
            Preprocessing(256, "adm"),
            count=50_000,
            metrics=("frechet", "spatial-frechet", "score"),
            extractor="inception-2048",
        ),
    )
}


def protocol_named(name: str) -> Protocol:
    """Returns the protocol called `name`, or the one in a JSON file.

    The file holds a protocol, or a result, which is then repeated on its images. Raises `RacError` for a name that is
    not known, and for a file that holds neither.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if Path(name).suffix != ".json":
        raise RacError(f"no protocol {name!r}; give a JSON file of one, or one of {', '.join(PROTOCOLS)}")
    data = in_todays_words(read_json(Path(name)))
    reference = None
    if isinstance(data, dict) and "protocol" in data:
        data, reference = data["protocol"], data.get("reference")
    protocol = from_json(Protocol, data, name)
    if isinstance(reference, dict):
        return replace(protocol, reference=reference.get("hash"))
    return protocol


_FORMER_WORDS = {"figures": "metrics", "framing": "preprocessing", "judges": "weight_files"}


def in_todays_words(data: Any) -> Any:
    """Renames the keys of earlier versions in the JSON of a protocol or a result."""
    if not isinstance(data, dict):
        return data
    return {
        _FORMER_WORDS.get(key, key): in_todays_words(value) if key == "protocol" else value
        for key, value in data.items()
    }
