"""The `Recipe` protocol, and what recipes share: settings of machines, the gallery, the check of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from torch import Tensor

from ..data import DataConfig
from ..errors import RacError
from ..evaluate import protocol
from ..evaluate.image_sets import Preprocessing
from ..images import from_pixels
from ..report.pictures import Panel, sheet, strip
from ..train import Fitted, TrainConfig
from ..train.discriminator import DiscriminatorConfig

ONE_CORE = TrainConfig(lr=1e-3, warmup=100, schedule="cosine", final_lr=0.05, bf16=True, channels_last=True, threads=1)
"""What the recipes for small machines have in common."""

ONE_GPU = TrainConfig(
    warmup=100,
    schedule="cosine",
    final_lr=0.02,
    bf16=True,
    channels_last=True,
    workers=12,
    threads=1,  # of each worker, which would otherwise all want every core
    checkpoint_minutes=4.0,
    gallery_every=1_000,
    log_every=50,
)
"""What the recipes for one large GPU have in common; their iterations are guesses, `tools/offline` plans them anew."""

SHOWN = 8
"""Images in a gallery, out of those held out."""

HELD_OUT = protocol.Protocol("held out", Preprocessing(), metrics=("psnr",))
"""What galleries are judged by."""


class Recipe(Protocol):
    """All that shapes one training run: a frozen dataclass whose every field can be set on the command line."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def discriminator(self) -> DiscriminatorConfig:
        """The discriminator, which is built where its term has a weight."""
        ...

    @property
    def data(self) -> DataConfig:
        """The images to train on."""
        ...

    @property
    def train(self) -> TrainConfig:
        """How long, how fast and where."""
        ...

    def run(self, directory: Path, *, resume: bool = False, crops: Path | None = None) -> Fitted:
        """Train in `directory`; `directory`/coder holds the result. See `rac.train.fit`.

        Prepared crops, if any, are kept in the folder `crops`; `directory`.crops where none is named. Raises `RacError`
        for settings that do not go together, and `WeightsError` where weights are wanted and not found.
        """
        ...


R = TypeVar("R", bound=Recipe)


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise `RacError` if no term has a weight beside the adversarial one, whose names `weights` leaves out."""
    if not any(weights.values()):
        raise RacError(
            "no term but the adversarial one has a weight, so there is nothing to balance it against; give another, "
            "such as l1 or reconstruction"
        )


def gallery(columns: Mapping[str, Tensor]) -> Tensor:
    """Labelled columns of images, each B 3 H W, one row per image, as one picture 1 3 H W in [-1, 1]."""
    rows = [
        strip([Panel(image.float().cpu(), name) for name, image in zip(columns, row, strict=True)])
        for row in zip(*columns.values(), strict=True)
    ]
    return from_pixels(np.asarray(sheet(rows[:SHOWN])))


def in_seconds(recipe: R) -> R:
    """The same recipe at a size that runs in seconds on a CPU, for trying it out and for tests."""
    return replace(
        recipe,
        discriminator=replace(recipe.discriminator, width=8, start=min(recipe.discriminator.start, 1)),
        data=replace(
            recipe.data,
            size=32,
            further_sizes=(64,)[: len(recipe.data.further_sizes)],
            held_out=2,
            cached_crops=min(recipe.data.cached_crops, 8),
        ),
        train=replace(recipe.train, iterations=3, batch=2, warmup=0, gallery_every=3, log_every=1),
    )
