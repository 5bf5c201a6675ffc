"""Named protocols: all that a figure depends on, as a value.

A figure means nothing without the images, their crop, the sample of the posterior, the features, the steps. All of it
is one value here, a `Protocol`, and travels with every `Result`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..coders.rac import RAC
from ..errors import RacError
from ..flow import TimeGrid
from ..flow.solvers import SOLVERS, SolverName
from ..representations import ExtractorName
from .image_sets import Preprocessing
from .suite import IMAGE_FIGURES, LATENT_FIGURES, SET_FIGURES, SHORTEST_SIDE


@dataclass(frozen=True)
class Protocol:
    """All that a figure depends on, the coder's weights apart. Raises `RacError` for what does not go together."""

    name: str
    framing: Preprocessing
    """Size, crop and resize filter of the reference images."""
    count: int | None = None
    """Number of reference images; None: all there are."""
    reference: str | None = None
    """Hash of the one set of reference images it is meant for (`ImageSet.hash`); None: any."""
    figures: tuple[str, ...] = ("psnr", "ssim")
    """Out of `IMAGE_FIGURES`, `SET_FIGURES` and `LATENT_FIGURES`."""
    extractor: ExtractorName | None = None
    """Whose features the set figures are made of."""
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
    """Of the coder's arithmetic; figures are always computed in float32, distances of sets in float64."""
    rounded: bool = True
    """Round reconstructions to 8 bits first, so that figures are those of the written files."""

    def __post_init__(self) -> None:
        known = (*IMAGE_FIGURES, *SET_FIGURES, *LATENT_FIGURES)
        for figure in self.figures:
            if figure not in known:
                raise RacError(f"figure {figure!r} is not known; expected some of {', '.join(known)}")
            if figure in SET_FIGURES and self.extractor is None:
                raise RacError(
                    f"figure {figure} compares features and protocol {self.name} names no extractor; add one"
                )
            if self.framing.size is not None and self.framing.size < SHORTEST_SIDE.get(figure, 0):
                raise RacError(
                    f"{figure} needs sides of at least {SHORTEST_SIDE[figure]} pixels, not {self.framing.size}"
                )
        if not self.figures:
            raise RacError(f"protocol {self.name} asks for no figures; expected some of {', '.join(known)}")
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
        Protocol("pixels-64", Preprocessing(64, "centre"), figures=("psnr", "ssim")),
        # Sets of some hundred images: the kernel distance is fair at any number, the Frechet distance is not.
        Protocol("dev-64", Preprocessing(64, "centre"), figures=(*_PIXELS, "kernel"), extractor="inception-768"),
        Protocol("dev-128", Preprocessing(128, "centre"), figures=(*_PIXELS, "kernel"), extractor="inception-768"),
        # Every picture as it is, whatever its size; 176 pixels a side at least.
        Protocol("native", Preprocessing(), figures=("psnr", "ssim", "ms-ssim", "lpips-alex")),
        # Enough images for a Frechet distance out of some hundred pictures.
        Protocol(
            "tiles-64",
            Preprocessing(64, "tiles"),
            figures=(*_PIXELS, "frechet", "kernel", "precision-recall"),
            extractor="inception-768",
        ),
        # The same where no weight files are at hand.
        Protocol(
            "tiles-64-lite",
            Preprocessing(64, "tiles"),
            figures=("psnr", "ssim", "frechet", "kernel", "precision-recall"),
            extractor="efficientnet-lite0",
        ),
        # The literature's rFID: the 50,000 validation images, the full Inception.
        Protocol(
            "imagenet-256",
            Preprocessing(256, "adm"),
            count=50_000,
            figures=(*_PIXELS, "frechet", "spatial-frechet", "score"),
            extractor="inception-2048",
        ),
    )
}
