"""Coders side by side under one protocol: how good, how large, how costly and how fast each is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..config import json_safe, to_json
from ..files import write_bytes
from ..flow import Solver, TimeGrid
from ..flow.solvers import SOLVERS
from ..images import crop
from ..report.document import Table
from .cost import MacCounter, parameters
from .image_sets import ImageSet
from .protocol import Protocol
from .reconstruction import evaluate
from .result import Result
from .robustness import RobustnessCurve
from .suite import LATENT_METRICS, MetricSuite

LatentSource = Literal["own", "teacher"]


@dataclass(frozen=True)
class Candidate:
    """A coder in one setting: at so many steps, decoding its own latents or its teacher's."""

    name: str
    """As it was named: a shipped name, a directory, a name on the hub."""
    title: str
    """What it is called in tables."""
    coder: Coder
    protocol: Protocol
    """With the steps and the latents of this setting."""
    teacher: Coder | None = None

    @property
    def steps(self) -> int | None:
        """Each way; None for a coder without a flow."""
        return self.protocol.grid(self.coder).steps if isinstance(self.coder, RAC) else None

    @property
    def label(self) -> str:
        """Such as "rac-f8d8, 4 steps, teacher's latents"."""
        steps = "" if self.steps is None else f", {self.steps} step{'' if self.steps == 1 else 's'}"
        return f"{self.title}{steps}{_SOURCES[self.protocol.latents]}"

    @property
    def family(self) -> str:
        """What all numbers of steps share."""
        return f"{self.title}{_SOURCES[self.protocol.latents]}"

    @torch.no_grad()
    def reconstruct(self, image: Tensor) -> Tensor:
        """Image B 3 H W -> what the coder makes of it, cropped to its size, clamped to [-1, 1]."""
        made = crop(self.decode(self.encode(image)), (image.shape[-2], image.shape[-1]))
        return made.float().clamp(-1, 1)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """The latent that it decodes."""
        if self.protocol.latents == "teacher" and self.teacher is not None:
            return self.teacher.encode(image)
        return self.coder.encode(image, *self.flow()) if isinstance(self.coder, RAC) else self.coder.encode(image)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Latent B c h w -> image, not cropped and not clamped."""
        return self.coder.decode(latent, *self.flow()) if isinstance(self.coder, RAC) else self.coder.decode(latent)

    def flow(self) -> tuple[TimeGrid, Solver]:
        """The grid and the solver of a RAC."""
        assert isinstance(self.coder, RAC)
        return self.protocol.grid(self.coder), SOLVERS[self.protocol.solver]


_SOURCES: dict[LatentSource, str] = {"own": "", "teacher": ", teacher's latents"}


@dataclass(frozen=True)
class CodingCost:
    """What one image costs, there and back."""

    parameters: int
    """Of the coder; its teacher, where that encodes, not counted."""
    macs_per_step: int
    """Of one evaluation while decoding; a coder without a flow decodes in one."""
    decoding_macs: int
    macs: int
    """Encoding and decoding together."""
    side: tuple[int, int]
    """Height and width of the image this is about."""


@torch.no_grad()
def coding_cost(candidate: Candidate, image: Tensor) -> CodingCost:
    """Counted while coding one image 1 3 H W."""
    with MacCounter() as encoding:
        latent = candidate.encode(image)
    evaluations = 1
    with MacCounter() as decoding:
        if isinstance(candidate.coder, RAC):
            flow = candidate.coder.trajectory(latent, *candidate.flow())
            evaluations = flow.evaluations
        else:
            candidate.decode(latent)
    return CodingCost(
        parameters=parameters(candidate.coder),
        macs_per_step=decoding.macs // evaluations,
        decoding_macs=decoding.macs,
        macs=encoding.macs + decoding.macs,
        side=(image.shape[-2], image.shape[-1]),
    )


@dataclass(frozen=True)
class Row:
    """One candidate, judged."""

    label: str
    family: str
    cost: CodingCost
    result: Result


@dataclass(frozen=True)
class Comparison:
    """All candidates under one protocol on the same images."""

    rows: tuple[Row, ...]
    corrections: tuple[RobustnessCurve, ...] = ()

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that at least one row has, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.result.metrics))

    def table(self) -> Table:
        """One row for each candidate, for people."""
        columns = ("coder", *(metric_title(name) for name in self.metrics), *_COST_COLUMNS)
        return Table(columns, tuple(self._cells(row) for row in self.rows))

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all. Raises `RacError`."""
        text = json.dumps(json_safe(to_json(self)), indent=2, allow_nan=False)
        write_bytes(path, (text + "\n").encode())

    def _cells(self, row: Row) -> tuple[str, ...]:
        found, cost = row.result.metrics, row.cost
        metrics = (metric_text(name, found[name]) if name in found else "-" for name in self.metrics)
        costs = (cost.macs_per_step, cost.decoding_macs, cost.macs)
        gmacs = (f"{macs / 1e9:.3g}" for macs in costs)
        return row.label, *metrics, f"{cost.parameters:,}", *gmacs, f"{row.result.images_per_second:.3g}"


_COST_COLUMNS = ("parameters", "GMACs per step", "GMACs decoding", "GMACs in all", "img/s")


def evaluate_candidate(
    candidate: Candidate,
    references: ImageSet,
    suite: MetricSuite,
    *,
    batch: int = 16,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Row:
    """Evaluate one candidate and count its cost. Raises `RacError` as `evaluate`."""
    protocol = candidate.protocol
    suite = replace(suite, metrics=protocol.metrics)
    first = next(references.batches(1)).images.to(next(candidate.coder.parameters()).device)
    # Before the images that are timed, so that no speed is that of a cold start.
    cost = coding_cost(candidate, first)
    result = evaluate(
        candidate.coder,
        references,
        protocol,
        name=candidate.name,
        teacher=candidate.teacher,
        suite=suite,
        batch=batch,
        command=command,
        progress=progress,
    )
    return Row(candidate.label, candidate.family, cost, result)


def all_candidates(
    names: Mapping[str, str],
    coders: Mapping[str, Coder],
    teachers: Mapping[str, Coder],
    protocol: Protocol,
    steps: Sequence[int],
    latents: Sequence[LatentSource],
) -> list[Candidate]:
    """Every coder in every setting that it has.

    `names` are the coders' titles by name, `teachers` those of the coders that have one. A RAC enters once for each
    number of steps and each kind of latents; other coders once. Latent metrics are asked of a RAC alone.
    """
    found = []
    for name, coder in coders.items():
        teacher = teachers.get(name)
        sources: Iterable[LatentSource] = dict.fromkeys(latents) if teacher is not None else ("own",)
        numbers: Iterable[int | None] = dict.fromkeys(steps) if isinstance(coder, RAC) else (None,)
        for source in sources:
            for number in numbers:
                setting = replace(protocol, latents=source, steps=number)
                setting = replace(setting, metrics=_metrics(setting, coder, teacher))
                found.append(Candidate(name, names[name], coder, setting, teacher))
    return found


def _metrics(protocol: Protocol, coder: Coder, teacher: Coder | None) -> tuple[str, ...]:
    """The protocol's metrics, with those about a RAC's own latents where it has them."""
    plain = tuple(metric for metric in protocol.metrics if metric not in LATENT_METRICS)
    if not isinstance(coder, RAC) or protocol.latents == "teacher":
        return plain
    return (*plain, "state-round-trip") if teacher is None else (*plain, "explained-variance", "state-round-trip")


# ------------------------------------------------------------------------------------------- names, in words


def short_name(name: str) -> str:
    """What tables call a coder: rac-f8d8; taef2 for taef2_decoder.pth; run for run/coder, as a training run has it."""
    path = Path(name).absolute()
    if path.name == "coder" and path.parent.name:
        return path.parent.name
    return re.sub(r"_(?:en|de)coder\.pth$", "", path.name)


def file_name(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^\w.]+", "-", label).strip("-")


_TITLES = {
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "ms-ssim": "MS-SSIM",
    "lpips-alex": "LPIPS Alex",
    "lpips-vgg16": "LPIPS VGG16",
    "explained variance": "latent variance explained",
    "psnr, state round trip": "PSNR dB, state round trip",
}
_LOWER_IS_BETTER = ("lpips", "FID", "KID")


def metric_title(name: str) -> str:
    """As it stands in tables."""
    return _TITLES.get(name, name)


def axis_title(name: str) -> str:
    """As it stands beside a plot, with an arrow to where it is better."""
    return f"{metric_title(name)} {'↓' if lower_is_better(name) else '↑'}"


def lower_is_better(name: str) -> bool:
    """Whether a smaller value of the metric is a better one."""
    return any(part in name for part in _LOWER_IS_BETTER)


def metric_text(name: str, value: float) -> str:
    """A metric with the digits that mean something."""
    if math.isnan(value):
        return "-"
    if name.startswith("psnr") or "FID" in name:
        return f"{value:.2f}"
    return f"{value:.2e}" if "KID" in name else f"{value:.4f}"


def extremes(result: Result, count: int) -> tuple[list[int], list[int]]:
    """Places of the `count` worst and the `count` best images by PSNR, the most extreme first."""
    order = sorted(range(len(result.images)), key=lambda index: result.per_image["psnr"][index])
    return order[:count], order[::-1][:count]


def pick(references: ImageSet, places: Sequence[int]) -> dict[int, Tensor]:
    """The images 1 3 H W at these places."""
    found: dict[int, Tensor] = {}
    wanted = set(places)
    for place, part in enumerate(references.batches(1)):
        if place in wanted:
            found[place] = part.images
    return found


def quality(rows: Sequence[Row], metric: str, x: Callable[[Row], Any]) -> dict[str, list[tuple[Any, float]]]:
    """For each family: (x, metric) of its rows that have both, in rising x."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for row in rows:
        if metric in row.result.metrics:
            found.setdefault(row.family, []).append((x(row), row.result.metrics[metric]))
    return {family: sorted(points) if points[0][0] is not None else points for family, points in found.items()}
