"""Named protocols: all that a metric depends on, as a value.

A metric means nothing without the images, their crop, the sample of the posterior, the features, the steps. All of it
is one value here, a `Protocol`, and travels with every `Result`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..coders.rac import RAC
from ..config import saved_as
from ..errors import RacError
from ..flow import TimeGrid
from ..flow.solvers import SOLVERS, SolverName
from ..representations import ExtractorName
from .image_sets import Preprocessing
from .suite import IMAGE_METRICS, LATENT_METRICS, SET_METRICS, SHORTEST_SIDE


@dataclass(frozen=True)
class Protocol:
    """All that a metric depends on, the coder's weights apart. Raises `RacError` for what does not go together."""

    name: str
    framing: Preprocessing
    """Size, crop and resize filter of the reference images."""
    count: int | None = None
    """Number of reference images; None: all there are."""
    reference: str | None = None
    """Hash of the one set of reference images it is meant for (`ImageSet.hash`); None: any."""
    metrics: tuple[str, ...] = field(default=("psnr", "ssim"), metadata=saved_as("figures"))
    """Out of `IMAGE_METRICS`, `SET_METRICS` and `LATENT_METRICS`."""
    extractor: ExtractorName | None = None
    """Whose features the set metrics are made of."""
    latents: Literal["own", "teacher"] = "own"
    """Whether the coder decodes the latents it encoded, or its teacher's."""
    posterior: Literal["mean", "sample"] = "mean"
    """What of a KL-VAE's posterior is decoded."""
    rng_seed: int = 0
    """For posterior samples."""
    steps: int | None = None
    """Of a RAC, for each way; None: its own. Coders without a flow pass over this and the next two."""
    solver: SolverName = "euler"
    shift: float = 1.0
    """Of the time grid, see `TimeGrid.shifted`; 1: uniform."""
    weights: Literal["ema", "raw"] = "ema"
    """Which of a training's weights the coder has, as whoever made it says; saved coders have the average."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the coder's arithmetic; metrics are always computed in float32, distances of sets in float64."""
    rounded: bool = True
    """Round reconstructions to 8 bits first, so that metrics are those of the written files."""

    def __post_init__(self) -> None:
        known = (*IMAGE_METRICS, *SET_METRICS, *LATENT_METRICS)
        for metric in self.metrics:
            if metric not in known:
                raise RacError(f"metric {metric!r} is not known; expected some of {', '.join(known)}")
            if metric in SET_METRICS and self.extractor is None:
                raise RacError(
                    f"metric {metric} compares features and protocol {self.name} names no extractor; add one"
                )
            if self.framing.size is not None and self.framing.size < SHORTEST_SIDE.get(metric, 0):
                raise RacError(
                    f"{metric} needs sides of at least {SHORTEST_SIDE[metric]} pixels, not {self.framing.size}"
                )
        if not self.metrics:
            raise RacError(f"protocol {self.name} asks for no metrics; expected some of {', '.join(known)}")
        if self.count is not None and self.count < 2:
            raise RacError(f"count {self.count} must be at least 2")
        if self.solver not in SOLVERS:
            raise RacError(f"solver {self.solver!r} is not known; expected {', '.join(SOLVERS)}")

    def grid(self, coder: RAC) -> TimeGrid:
        """The time grid that `coder` walks."""
        steps = coder.config.steps if self.steps is None else self.steps
        return TimeGrid.uniform(steps) if self.shift == 1 else TimeGrid.shifted(steps, self.shift)


_PIXELS = ("psnr", "ssim", "lpips-alex")

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
    )
}
