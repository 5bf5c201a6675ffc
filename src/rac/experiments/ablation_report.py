"""The pages of the report that `rac ablate` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..evaluate.comparison import Candidate, Comparison, lower_is_better, metric_text
from ..evaluate.image_metrics import psnr
from ..evaluate.image_sets import ImageSet
from ..evaluate.reconstruction import Reconstructor
from ..images import from_pixels, to_pixels
from ..report.document import Figure, Section, Table
from ..report.pictures import Panel, sheet, strip
from ..report.plots import PALETTE, Series, line_panels
from .ablation import Ablation, Training

SHOWN = 6
"""Number of images of each strip."""
CURVES = {"psnr": "PSNR dB ↑", "psnr_round_trip": "PSNR dB, round trip ↑"}
"""Metrics of the held-out images that are drawn over training, with the labels of their axes."""


@dataclass
class Strips:
    """Strips of the same few images, as every variant reconstructs them."""

    names: list[str]
    images: list[Tensor]
    """The images, 1 3 H W each."""
    rows: list[Image.Image] = field(default_factory=list)

    @classmethod
    def start(cls, images: ImageSet) -> Strips:
        """Returns a first strip: the first few images themselves."""
        parts = list(islice(images.batches(1), SHOWN))
        names, shown = [part.names[0] for part in parts], [part.images for part in parts]
        panels = [Panel(image, name) for name, image in zip(names, shown, strict=True)]
        return cls(names, shown, [strip(panels, "originals")])

    def add(self, candidate: Candidate) -> None:
        """Adds a strip of the reconstructions of `candidate` below the others.

        The first one added by a coder with a teacher puts a strip of the teacher's above it.
        """
        device = next(candidate.coder.parameters()).device
        if candidate.teacher is not None and len(self.rows) == 1:
            self._add("the teacher", candidate.of_teacher(), device)
        self._add(candidate.label, candidate, device)

    def _add(self, title: str, reconstructor: Reconstructor, device: torch.device) -> None:
        panels = []
        for name, image in zip(self.names, self.images, strict=True):
            # As a file would hold it, and as the metrics see it.
            made = from_pixels(to_pixels(reconstructor.reconstruct(image.to(device), (name,)).float().cpu()))
            panels.append(Panel(made, f"{float(psnr(made, image)):.2f} dB"))
        self.rows.append(strip(panels, title))


@dataclass(frozen=True)
class Showing:
    """Data of a report: the ablation, its trainings and what came of them."""

    name: str
    """Name of the recipe."""
    ablation: Ablation
    trainings: Sequence[Training]
    failures: Mapping[str, str]
    """Reasons of trainings that failed, by label."""
    comparison: Comparison
    strips: Strips


def introduction(showing: Showing) -> str:
    """Returns a text that says what was asked for, what all variants share, and how to reproduce it."""
    ablation, result = showing.ablation, showing.comparison.rows[0].result
    most = max(training.images for training in showing.trainings)
    if ablation.budget.isdigit():
        budget = f"{ablation.budget} iterations of the recipe, {most:,} images for each variant"
    elif ablation.equal == "time":
        budget = f"{ablation.budget} for each variant, turned into a number of images by its own measured speed"
    else:
        budget = f"{ablation.budget} for a variant of average speed, {most:,} images for each"
    shared = "The variants differ in data or rng." if ablation.varies_images else _SHARED
    reference = result.reference
    return (
        f"The budget is {budget}. {shared} All are evaluated under protocol {result.protocol.name}, on "
        f"{reference.count} images of {reference.name}, whose hash begins with {reference.hash[:16]}. Command: "
        f"{result.command}"
    )


def summary(showing: Showing) -> Table:
    """Returns a table with a row for each variant: metrics and cost. The best value of each metric has a star."""
    table = showing.comparison.table()
    best = {name: _best(showing.comparison, name) for name in showing.comparison.metrics}
    rows = []
    for row, cells in zip(showing.comparison.rows, table.rows, strict=True):
        label, *rest = cells
        for place, name in enumerate(showing.comparison.metrics):
            if rest[place] == best[name] and len(table.rows) > 1:
                rest[place] = f"* {rest[place]}"
        assert label == row.label
        rows.append((label, *rest))
    return Table(("variant", *table.columns[1:]), tuple(rows))


def training_table(showing: Showing) -> Table:
    """Returns a table with a row for each training: its settings and its cost."""
    rows = []
    for training in showing.trainings:
        train, seconds = training.recipe.train, training.seconds
        cells = (f"{train.iterations:,}", f"{training.images:,}", _minutes(seconds))
        speed = f"{training.images / seconds:.3g}" if seconds else "-"
        failed = training.label in showing.failures
        rows.append((training.label, *(("-",) * 3 if failed else cells), "failed" if failed else speed))
    return Table(("training", "iterations", "images seen", "time", "img/s in training"), tuple(rows))


def sections(showing: Showing) -> list[Section]:
    """Returns the sections of the report, from the numbers to the pictures."""
    strips = Figure(sheet(showing.strips.rows), "strips", "PSNR of each image below it.")
    found = [
        Section("Quality and cost", _QUALITY, [summary(showing)]),
        Section("Training", _TRAINING, [training_table(showing), *_curves(showing)]),
        Section("The same images by every variant", "", [strips]),
    ]
    if showing.failures:
        reasons = Table(("training", "reason"), tuple(showing.failures.items()))
        found.insert(0, Section("Not trained to the end", "", [reasons]))
    return found


def markdown_report(title: str, text: str, contents: Sequence[Section]) -> str:
    """Returns the report as Markdown; its pictures are the files beside it."""
    parts = [f"# {title}", text]
    for section in contents:
        parts += [f"## {section.heading}", section.text]
        for content in section.contents:
            if isinstance(content, Table):
                parts.append(content.to_markdown())
            else:
                parts.append(f"![{content.caption}]({content.name}.png)")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _curves(showing: Showing) -> list[Figure]:
    """Plots held-out metrics and the loss, over the images seen."""
    trained = [training for training in showing.trainings if training.label not in showing.failures]
    panels: dict[str, list[Series]] = {}
    for number, training in enumerate(trained):
        colour, dashed = PALETTE[number % len(PALETTE)], number >= len(PALETTE)
        for name, (x, y) in _points(training).items():
            panels.setdefault(name, []).append(Series(training.label, x, y, colour, dashed))
    return [Figure(line_panels(panels, "images seen"), "curves", _CURVES)] if panels else []


def _points(training: Training) -> dict[str, tuple[list[float], list[float]]]:
    """Returns the points of a training's curves, by the label of their axis."""
    batch = training.recipe.train.batch
    found: dict[str, tuple[list[float], list[float]]] = {}
    for record in training.log:
        held_out: Mapping[str, Any] = record.get("held_out", {})
        named = {title: held_out[name] for name, title in CURVES.items() if name in held_out}
        if "train" in record:
            named = {"loss": record["train"]["loss"]}
        for name, value in named.items():
            x, y = found.setdefault(name, ([], []))
            x.append(float(record["iteration"] * batch))
            y.append(value)
    return found


def _best(comparison: Comparison, metric: str) -> str:
    values = [row.result.metrics[metric] for row in comparison.rows if metric in row.result.metrics]
    return metric_text(metric, min(values) if lower_is_better(metric) else max(values))


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


_SHARED = "All variants see the same images in the same order, with the same random numbers."
_QUALITY = (
    "Means over all images; a star marks the best of each metric. A coder with a flow is evaluated at each of the "
    "given numbers of steps; no further training is needed for that. GMACs are 10^9 multiply-accumulates for one "
    "image."
)
_TRAINING = "Time is that of the training alone, on this machine: galleries of held-out images are left out."
_CURVES = (
    "The averaged weights on the recipe's held-out images, at its own number of steps, and the weighted loss. The "
    "PSNR of a RAC is that of decoding its teacher's latents; the round trip decodes its own. The losses of variants "
    "with different weights or terms cannot be compared."
)
