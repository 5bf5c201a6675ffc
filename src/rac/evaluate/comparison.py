"""Comparison of coders under one protocol: how good, how large, how costly and how fast each is."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from typing import Protocol as Interface

import torch
from torch import Tensor

from .. import hub
from ..coders.protocol import Coder
from ..config import json_safe, to_json
from ..errors import RacError
from ..files import write_bytes
from ..flow.grid import check_steps, steps_in_words
from ..report.document import Table
from ..runtime import pick_device
from .cost import MacCounter, parameters
from .image_sets import FeatureMoments, ImageSet
from .protocol import Protocol, protocol_named
from .reconstruction import Reconstructor, evaluate
from .result import Result
from .robustness import RobustnessCurve, robustness_curve
from .suite import IMAGE_METRICS, LATENT_METRICS, MetricSuite

LatentSource = Literal["own", "teacher"]

_SOURCES: dict[LatentSource, str] = {"own": "", "teacher": ", teacher's latents"}


class ComparisonProgress(Interface):
    """A function that `compare` calls to report how far it is."""

    def __call__(self, what: str, done: int, total: int | None = None) -> None:
        """Report `done` of `total` images of the task called `what`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Candidate(Reconstructor):
    """A coder in one setting: its number of steps, and whose latents it decodes."""

    name: str
    """Name that the coder was given by: a shipped name, a directory, a name on the hub."""
    title: str
    """Name of the coder in tables."""

    @property
    def label(self) -> str:
        """Title and setting, such as "rac-64, 4 steps, teacher's latents"."""
        steps = "" if self.steps is None else f", {steps_in_words(self.steps)}"
        return f"{self.title}{steps}{_SOURCES[self.protocol.latents]}"

    @property
    def family(self) -> str:
        """Key that all numbers of steps of one coder share."""
        return f"{self.title}{_SOURCES[self.protocol.latents]}"

    @property
    def walked(self) -> bool:
        """Whether the coder takes steps."""
        return self.steps is not None

    @property
    def decoder_label(self) -> str:
        """The label of the decoder alone, the same for both sources of latents."""
        return replace(self, protocol=replace(self.protocol, latents="own")).label


def candidates(
    coders: Sequence[str | Path] | Mapping[str, Coder],
    protocol: Protocol,
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    latents: Sequence[LatentSource] = ("own",),
    teachers: Mapping[str, Coder] | None = None,
    titles: Mapping[str, str] | None = None,
    device: str = "auto",
) -> list[Candidate]:
    """Returns a candidate for each setting of each coder: numbers of steps, and sources of latents.

    - `coders`: names for `rac.load`, or coders by name.
    - `protocol`: the protocol that they are evaluated under.
    - `steps`: a coder with a flow is a candidate once for each of these numbers, other coders once.
    - `latents`: a coder with a teacher is a candidate once for each of these sources, other coders with their own.
    - `teachers`: teachers by the names that coders give them; others are loaded by that name, with a warning if they
      cannot be.
    - `titles`: names of the coders in tables; None: their short names.
    - `device`: the device that named coders and teachers are loaded to.

    Raises `RacError` for steps below 1, a name given twice or unknown, and where no coder has the teacher whose latents
    are asked for.
    """
    for number in steps:
        check_steps(number)
    if not coders or not latents:
        raise RacError("a comparison needs at least one coder and one source of latents, own or teacher")
    names = [str(name) for name in coders]
    titles = titles or coder_titles(names)
    loaded = dict(coders) if isinstance(coders, Mapping) else {name: _load(name, device) for name in names}
    found_teachers = _teachers(loaded, teachers or {}, device)
    if tuple(latents) != ("own",) and not found_teachers:
        raise RacError(f"latents of a teacher need a coder whose teacher can be loaded; {', '.join(names)} have none")
    found = []
    for name, coder in loaded.items():
        teacher = found_teachers.get(name)
        plain = Candidate(coder=coder, protocol=protocol, teacher=teacher, name=name, title=titles[name])
        if plain.walked and not steps:
            raise RacError(f"{name} decodes in steps; give at least one number of steps, such as 1 2 4 8")
        sources: Iterable[LatentSource] = dict.fromkeys(latents) if teacher is not None else ("own",)
        numbers: Iterable[int | None] = dict.fromkeys(steps) if plain.walked else (None,)
        for source in sources:
            _warn_of_untrained(plain, source)
            for asked in numbers:
                setting = replace(protocol, latents=source, steps=asked)
                setting = replace(setting, metrics=_metrics(replace(plain, protocol=setting)))
                found.append(replace(plain, protocol=setting))
    return found


def _load(name: str, device: str) -> Coder:
    coder = hub.load(name)
    coder.to(pick_device(device))
    return coder


def _teachers(coders: Mapping[str, Coder], given: Mapping[str, Coder], device: str) -> dict[str, Coder]:
    """Returns the teacher of each coder that has one; loaded once, however many coders share it or compete with it."""
    found: dict[str, Coder | None] = {**coders, **given}
    for coder in coders.values():
        if coder.teacher is not None and coder.teacher not in found:
            try:
                found[coder.teacher] = _load(coder.teacher, device)
            except RacError as error:
                warnings.warn(f"continuing without the teacher: {error}", stacklevel=3)
                found[coder.teacher] = None
    teachers = {name: found[coder.teacher] for name, coder in coders.items() if coder.teacher is not None}
    return {name: teacher for name, teacher in teachers.items() if teacher is not None}


def _warn_of_untrained(candidate: Candidate, source: LatentSource) -> None:
    ways = candidate.coder.trained_ways
    for way in ("encode", "decode"):
        if way not in ways and (way == "decode" or source == "own"):
            mend = "; use its teacher's latents" if way == "encode" else ""
            warnings.warn(f"{candidate.title} was not trained to {way}, so its metrics say little{mend}", stacklevel=3)


def _metrics(candidate: Candidate) -> tuple[str, ...]:
    """Returns the protocol's metrics, with those of the coder's own latents if it has them."""
    plain = tuple(metric for metric in candidate.protocol.metrics if metric not in LATENT_METRICS)
    if candidate.protocol.latents == "teacher" or not candidate.walked:
        return plain
    if candidate.teacher is not None:
        plain = (*plain, "explained-variance")
    both_walked = candidate.walk("encode") is not None and candidate.walk("decode") is not None
    return (*plain, "state-round-trip") if both_walked else plain


@dataclass(frozen=True)
class CodingCost:
    """Cost of encoding and decoding one image."""

    parameters: int
    """Number of the coder's parameters; those of a teacher that encodes for it are not counted."""
    macs_per_step: int
    """MACs of one evaluation while decoding; a coder without a flow decodes in one."""
    decoding_macs: int
    macs: int
    """MACs of encoding and decoding together."""
    side: tuple[int, int]
    """Height and width of the image."""


@torch.no_grad()
def coding_cost(reconstructor: Reconstructor, image: Tensor) -> CodingCost:
    """Counts the cost while coding one image 1 3 H W, on the coder's device."""
    with MacCounter() as encoding:
        latent = reconstructor.encode(image)
    with MacCounter() as decoding:
        decoded = reconstructor.coder.decoded(latent, reconstructor.walk("decode"))
    return CodingCost(
        parameters=parameters(reconstructor.coder),
        macs_per_step=decoding.macs // decoded.evaluations,
        decoding_macs=decoding.macs,
        macs=encoding.macs + decoding.macs,
        side=(image.shape[-2], image.shape[-1]),
    )


@dataclass(frozen=True)
class Row:
    """One row of a comparison: a candidate, evaluated."""

    label: str
    family: str
    cost: CodingCost
    result: Result


@dataclass(frozen=True)
class Comparison:
    """Results of all candidates under one protocol on the same images."""

    rows: tuple[Row, ...]
    robustness: tuple[RobustnessCurve, ...] = ()

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that at least one row has, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.result.metrics))

    def table(self) -> Table:
        """Returns a table for people, one row for each candidate."""
        columns = ("coder", *(metric_title(name) for name in self.metrics), *_COST_COLUMNS)
        return Table(columns, tuple(self._cells(row) for row in self.rows))

    def save(self, path: str | Path) -> None:
        """Writes the comparison as JSON, completely or not at all. Raises `RacError` if the file cannot be written."""
        text = json.dumps(json_safe(to_json(self)), indent=2, allow_nan=False)
        write_bytes(path, (text + "\n").encode())

    def _cells(self, row: Row) -> tuple[str, ...]:
        found, cost = row.result.metrics, row.cost
        metrics = (metric_text(name, found[name]) if name in found else "-" for name in self.metrics)
        costs = (cost.macs_per_step, cost.decoding_macs, cost.macs)
        gmacs = (f"{macs / 1e9:.3g}" for macs in costs)
        return row.label, *metrics, f"{cost.parameters:,}", *gmacs, f"{row.result.images_per_second:.3g}"


_COST_COLUMNS = ("parameters", "GMACs per step", "GMACs decoding", "GMACs in all", "img/s")


def compare(
    coders: Sequence[str | Path] | Mapping[str, Coder] | Sequence[Candidate],
    images: ImageSet | str | Path | Sequence[str | Path] = (),
    protocol: Protocol | str = "pixels-64",
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    latents: Sequence[LatentSource] = ("own",),
    reference: ImageSet | FeatureMoments | None = None,
    robustness: int = 0,
    suite: MetricSuite | None = None,
    batch: int = 16,
    device: str = "auto",
    command: str | None = None,
    progress: ComparisonProgress | None = None,
    done: Callable[[Row], None] | None = None,
) -> Comparison:
    """Evaluates several coders on the same images under one protocol.

        import rac.evaluate

        comparison = rac.evaluate.compare(["rac-64", "klvae-f8d4"], "photos", "pixels-64", steps=(1, 4))
        print(comparison.table().to_markdown())
        comparison.save("comparison.json")

    - `coders`: names for `rac.load`, coders by name, or the result of `candidates`, which have settings of their own.
    - `images`: a set, or folders, tar files or pictures; nothing: scikit-image's photographs.
    - `protocol`: a protocol, the name of one of `PROTOCOLS`, or a JSON file.
    - `steps`: a coder with a flow is evaluated once with each of these numbers of steps.
    - `latents`: a coder with a teacher is evaluated once on each of these sources of latents.
    - `reference`: the set that metrics of sets compare the reconstructions with; None: `images` themselves.
    - `robustness`: number of images whose latents are decoded with noise, for each teacher; 0: none.
    - `suite`: loaded networks of the protocol's metrics; None: loads them.
    - `batch`: images at a time; changes no number.
    - `device`: the device that named coders and teachers are loaded to.
    - `command`: the command that results record; None: this process's command line.
    - `progress`: called with the task in hand, and how far it is.
    - `done`: called with each row as soon as it is finished.

    Raises `RacError` as `candidates`, `ImageSet.read` and `evaluate`.
    """
    if batch < 1 or robustness < 0:
        raise RacError(f"batch {batch} must be at least 1, and robustness {robustness} at least 0")
    chosen = protocol_named(protocol) if isinstance(protocol, str) else protocol
    report = progress or _silent
    field = _fielded(coders, chosen, steps, latents, device)
    first = field[0]
    images = _image_set(images, chosen, report)
    suite = suite or MetricSuite.load(chosen.metrics, chosen.extractor, first.device)
    settings: dict[str, Any] = {"reference": reference, "batch": batch, "command": command}
    rows = []
    for candidate in field:
        told = partial(report, candidate.label)
        rows.append(evaluate_candidate(candidate, images, suite, progress=told, **settings))
        if done is not None:
            done(rows[-1])
    curves = _robustness(field, images, suite, robustness, batch, report) if robustness else ()
    return Comparison(tuple(rows), tuple(curves))


def _fielded(
    coders: Sequence[str | Path] | Mapping[str, Coder] | Sequence[Candidate],
    protocol: Protocol,
    steps: Sequence[int],
    latents: Sequence[LatentSource],
    device: str,
) -> list[Candidate]:
    if isinstance(coders, Mapping):
        return candidates(coders, protocol, steps=steps, latents=latents, device=device)
    given = [coder for coder in coders if isinstance(coder, Candidate)]
    names = [coder for coder in coders if isinstance(coder, (str, Path))]
    if not names and given:
        return given
    return given + candidates(names, protocol, steps=steps, latents=latents, device=device)


def _image_set(
    images: ImageSet | str | Path | Sequence[str | Path], protocol: Protocol, report: ComparisonProgress
) -> ImageSet:
    if isinstance(images, ImageSet):
        return images
    paths = [Path(path) for path in ([images] if isinstance(images, (str, Path)) else images)]
    return ImageSet.read(paths, protocol.preprocessing, protocol.count, partial(report, "reading pictures"))


def _silent(what: str, done: int, total: int | None = None) -> None:
    pass


def evaluate_candidate(
    candidate: Candidate,
    images: ImageSet,
    suite: MetricSuite,
    *,
    reference: ImageSet | FeatureMoments | None = None,
    batch: int = 16,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Row:
    """Evaluates one candidate and counts its cost.

    - `candidate`: the coder in its setting.
    - `images`, `suite`, `reference`, `batch`, `command`, `progress`: as for `evaluate`.

    Raises `RacError` as `evaluate`.
    """
    protocol = candidate.protocol
    first = next(images.batches(1)).images.to(candidate.device)
    # Before the images that are timed, so that no speed is that of a cold start.
    cost = coding_cost(candidate, first)
    result = evaluate(
        candidate.coder,
        images,
        protocol,
        name=candidate.name,
        teacher=candidate.teacher,
        reference=reference,
        suite=replace(suite, metrics=protocol.metrics),
        batch=batch,
        command=command,
        progress=progress,
    )
    return Row(candidate.label, candidate.family, cost, result)


def _robustness(
    field: Sequence[Candidate],
    images: ImageSet,
    suite: MetricSuite,
    count: int,
    batch: int,
    report: ComparisonProgress,
) -> Iterable[RobustnessCurve]:
    """Computes one curve for each teacher, for it and all coders that decode its latents."""
    if not set(suite.metrics) & set(IMAGE_METRICS):
        return
    for name, teacher in teachers_of(field).items():
        students = [candidate for candidate in field if candidate.coder.teacher == name]
        # A coder of own latents and of its teacher's decodes alike.
        decoders = {
            short_name(name): students[0].of_teacher().decode,
            **{one.decoder_label: one.decode for one in students},
        }
        yield robustness_curve(
            decoders,
            teacher,
            images,
            suite,
            name=name,
            images=count,
            batch=batch,
            progress=partial(report, f"robustness to noise on latents of {short_name(name)}"),
        )


def teachers_of(field: Iterable[Candidate]) -> dict[str, Coder]:
    """Returns the teachers of the candidates, by name."""
    return {
        candidate.coder.teacher: candidate.teacher
        for candidate in field
        if candidate.teacher is not None and candidate.coder.teacher is not None
    }


def coder_titles(names: Sequence[str]) -> dict[str, str]:
    """Returns a short name for each coder, or the full one where short ones collide.

    Raises `RacError` for a name given twice.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise RacError(f"{twice[0]} is given twice; give each coder once")
    short = [short_name(name) for name in names]
    return {name: last if short.count(last) == 1 else name for name, last in zip(names, short, strict=True)}


# ------------------------------------------------------------------------------------------- names, in words


def short_name(name: str) -> str:
    """Returns the name of a coder in tables: rac-64; taef2 for taef2_decoder.pth; run for run/coder.

    The last is where a training run has its coder.
    """
    path = Path(name).absolute()
    if path.name in hub.PRODUCTS and path.parent.name:
        return path.parent.name
    return re.sub(r"_(?:en|de)coder\.pth$", "", path.name)


def file_name(label: str) -> str:
    """Returns a label in a form that can be part of a file's name."""
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
    """Returns the name of a metric in tables."""
    return _TITLES.get(name, name)


def axis_title(name: str) -> str:
    """Returns the name of a metric beside a plot, with an arrow in the direction of better values."""
    return f"{metric_title(name)} {'↓' if lower_is_better(name) else '↑'}"


def lower_is_better(name: str) -> bool:
    """Returns whether smaller values of the metric are better."""
    return any(part in name for part in _LOWER_IS_BETTER)


def metric_text(name: str, value: float) -> str:
    """Returns the value of a metric with its significant digits."""
    if math.isnan(value):
        return "-"
    if name.startswith("psnr") or "FID" in name:
        return f"{value:.2f}"
    return f"{value:.2e}" if "KID" in name else f"{value:.4f}"


def extremes(result: Result, count: int) -> tuple[list[int], list[int]]:
    """Returns the places of the `count` worst and the `count` best images by PSNR, the most extreme first."""
    order = sorted(range(len(result.images)), key=lambda index: result.per_image["psnr"][index])
    return order[:count], order[::-1][:count]


def pick(images: ImageSet, places: Sequence[int]) -> dict[int, Tensor]:
    """Returns the images 1 3 H W at these places."""
    found: dict[int, Tensor] = {}
    wanted = set(places)
    for place, part in enumerate(images.batches(1)):
        if place in wanted:
            found[place] = part.images
    return found


def quality(rows: Sequence[Row], metric: str, x: Callable[[Row], Any]) -> dict[str, list[tuple[Any, float]]]:
    """Returns, for each family, the points (x, metric) of its rows that have both, in rising x."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for row in rows:
        if metric in row.result.metrics:
            found.setdefault(row.family, []).append((x(row), row.result.metrics[metric]))
    return {family: sorted(points) if points[0][0] is not None else points for family, points in found.items()}
