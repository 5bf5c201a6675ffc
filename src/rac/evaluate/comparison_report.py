"""The pages of the report that `rac evaluate` and `rac compare` write: tables and pictures, section by section."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..coders.protocol import Coder
from ..data.files import find_pictures
from ..flow import Trajectory
from ..flow.grid import steps_in_words
from ..images import crop, from_pixels, read_picture
from ..report.document import Figure, Section, Table
from ..report.pictures import Panel, scale_bar, sheet, strip
from ..report.plots import BLACK, PALETTE, Series, Walk, heat, line_panels, shades, walk_panels
from .comparison import (
    Candidate,
    Comparison,
    Row,
    axis_title,
    extremes,
    file_name,
    metric_text,
    metric_title,
    pick,
    quality,
    short_name,
)
from .image_metrics import psnr
from .image_sets import Batch, ImageSet, Preprocessing
from .principal import PrincipalAxes, latent_axes, latent_colours
from .reconstruction import Reconstructor
from .result import Result
from .robustness import RobustnessCurve, noised_latents

EXTREMES = 3
"""Number of worst images, and of best images, that are shown."""
VIEWS = 3
"""Number of pictures whose latents are shown."""
VIEW_SIDE = 256
"""Largest side of the pictures whose latents are shown, whatever the protocol's: a small latent shows little."""
WALKS = 24
"""Number of images, and of places of one image, whose trajectories are drawn."""
WALK_NUMBERS = 2**26
"""Limit on the numbers in all states of the trajectories; beyond it, fewer images are taken."""
ERROR_QUANTILE = 0.995
"""Quantile of all errors shown at which error maps end: a few bright specks would leave the rest black."""


@dataclass(frozen=True)
class Material:
    """Data of a report: the pictures' paths, the candidates, their comparison and the images compared."""

    data: tuple[Path, ...]
    candidates: Sequence[Candidate]
    comparison: Comparison
    references: ImageSet

    @property
    def rows(self) -> Sequence[Row]:
        """The rows of the comparison, in the order of the candidates."""
        return self.comparison.rows

    @cached_property
    def default_steps(self) -> list[Candidate]:
        """One candidate of each family: at the coder's own number of steps, or the nearest that was evaluated."""
        families: dict[str, Candidate] = {}
        for candidate in self.candidates:
            best = families.setdefault(candidate.family, candidate)
            own = replace(candidate, protocol=replace(candidate.protocol, steps=None)).steps
            if own is not None and abs((candidate.steps or 0) - own) < abs((best.steps or 0) - own):
                families[candidate.family] = candidate
        return list(families.values())

    @cached_property
    def highlighted(self) -> Candidate:
        """The candidate whose best and worst images are shown: the first family with a flow, or the first."""
        return next((candidate for candidate in self.default_steps if candidate.walked), self.default_steps[0])

    @cached_property
    def colours(self) -> dict[str, str]:
        """A colour for each family: coders without a flow are black and grey."""
        found: dict[str, str] = {}
        flows, plain = (
            iter(PALETTE * len(self.default_steps)),
            iter((BLACK, "#6e6e73", "#a0a0a5") * len(self.default_steps)),
        )
        for candidate in self.default_steps:
            found[candidate.family] = next(flows) if candidate.walked else next(plain)
        return found

    def result_of(self, candidate: Candidate) -> Result:
        """Returns the result of a candidate."""
        return self.rows[list(self.candidates).index(candidate)].result

    def of_family(self, family: str) -> list[Candidate]:
        """Returns the candidates of a family, one for each number of steps."""
        return [candidate for candidate in self.candidates if candidate.family == family]


def introduction(material: Material) -> str:
    """Returns a text that says what was measured, on what, and how to reproduce it."""
    result = material.rows[0].result
    reference, preprocessing = result.reference, result.protocol.preprocessing
    size = (
        f"{preprocessing.size} x {preprocessing.size}, crop {preprocessing.crop}"
        if preprocessing.size
        else "at their own sizes"
    )
    return (
        f"Protocol {result.protocol.name}: {reference.count} images of {reference.name}, {size}; their hash begins "
        f"with {reference.hash[:16]}. Command: {result.command}"
    )


def sections(material: Material, pictures: bool, progress: Callable[[int, int | None], None]) -> list[Section]:
    """Returns the sections that have something to show; without `pictures`, only tables and plots of metrics."""
    makers = [_quality, _robustness]
    if pictures:
        makers += [_best_and_worst, _step_by_step, _latents, _trajectories]
    found = []
    for done, make in enumerate(makers):
        progress(done, len(makers))
        found += [section for section in (make(material),) if section is not None]
    return found


# ------------------------------------------------------------------------------------------- metrics


def _quality(material: Material) -> Section:
    comparison = material.comparison
    contents: list[Table | Figure] = [comparison.table()]
    shown = [metric for metric in comparison.metrics if metric not in ("explained variance", "psnr, state round trip")]
    steps = sorted({row.result.steps for row in material.rows if row.result.steps is not None})
    if len(steps) > 1:
        panels = {axis_title(metric): _against_steps(material, metric, steps) for metric in shown}
        contents.append(Figure(line_panels(panels, "steps", "log2", steps), "quality-against-steps", _STEPS_CAPTION))
    panels = {axis_title(metric): _against_macs(material, metric) for metric in shown}
    label = "GMACs to encode and decode one image"
    contents.append(Figure(line_panels(panels, label, "log10"), "quality-against-macs", _MACS_CAPTION))
    height, width = material.rows[0].cost.side
    return Section("Quality and cost", _QUALITY.format(height=height, width=width), contents)


def _against_steps(material: Material, metric: str, steps: Sequence[int]) -> list[Series]:
    found = []
    for family, points in quality(material.rows, metric, lambda row: row.result.steps).items():
        x, y = zip(*points, strict=True)
        level = x[0] is None
        colour = material.colours[family]
        found.append(Series(family, steps if level else x, y, colour, dashed=level, level=level))
    return found


def _against_macs(material: Material, metric: str) -> list[Series]:
    found = []
    for row_family, points in quality(material.rows, metric, lambda row: row.cost.macs / 1e9).items():
        x, y = zip(*points, strict=True)
        steps = sorted(row.result.steps or 0 for row in material.rows if row.family == row_family)
        marks = [str(number) for number in steps] if steps[0] else ()
        found.append(Series(row_family, x, y, material.colours[row_family], dashed=not steps[0], marks=marks))
    return found


# ------------------------------------------------------------------------------------------- correction


def _robustness(material: Material) -> Section | None:
    contents: list[Table | Figure] = []
    for curve in material.comparison.robustness:
        contents += [_robustness_plot(curve), _robustness_table(curve)]
        contents.append(_robustness_strips(material, curve))
    return Section("Robustness to latent noise", _ROBUSTNESS, contents) if contents else None


def _robustness_plot(curve: RobustnessCurve) -> Figure:
    teacher, *students = next(iter(curve.metrics.values()))
    colours = {teacher: BLACK, **dict(zip(students, shades(len(students)), strict=True))}

    def lines(rows: Mapping[str, Sequence[float]]) -> list[Series]:
        return [Series(name, curve.sigmas, y, colours[name], dashed=name == teacher) for name, y in rows.items()]

    panels = {axis_title(metric): lines(rows) for metric, rows in curve.metrics.items()}
    metric, rows = next(iter(curve.metrics.items()))
    if curve.sigmas[0] == 0:
        panels[f"{metric_title(metric)}, change from sigma 0"] = lines(
            {name: [value - y[0] for value in y] for name, y in rows.items()}
        )
    caption = f"Mean over {curve.images} images; the same noise for every decoder. Dashed: the teacher, {teacher}."
    label = "sigma of the noise added to the teacher's latent"
    return Figure(line_panels(panels, label), f"robustness-{file_name(teacher)}", caption)


def _robustness_table(curve: RobustnessCurve) -> Table:
    """Returns a table of the first metric, by decoder and sigma."""
    metric, rows = next(iter(curve.metrics.items()))
    columns = (f"{metric_title(metric)} at sigma", *(f"{sigma:g}" for sigma in curve.sigmas))
    return Table(columns, tuple((name, *(metric_text(metric, y) for y in values)) for name, values in rows.items()))


@torch.no_grad()
def _robustness_strips(material: Material, curve: RobustnessCurve) -> Figure:
    """Draws one image decoded from noised latents, by the teacher and by a flow at its fewest and its most steps."""
    teacher = next(candidate.teacher for candidate in material.candidates if candidate.coder.teacher == curve.teacher)
    assert teacher is not None
    students = [candidate for candidate in material.candidates if candidate.coder.teacher == curve.teacher]
    first = next(material.references.batches(1))
    device = next(teacher.parameters()).device
    part = Batch(first.names, first.images.to(device))
    sigmas = curve.sigmas[::2]
    noised = list(noised_latents(teacher, part, sigmas, curve.rng_seed))
    decoders: dict[str, Reconstructor] = {short_name(curve.teacher): students[0].of_teacher()}
    decoders |= {_steps_of(candidate): candidate for candidate in (students[0], students[-1])}
    rows = []
    for name, decoder in decoders.items():
        size = (part.images.shape[-2], part.images.shape[-1])
        made = [crop(decoder.decode(latent, part.names).float(), size) for latent in noised]
        notes = [f"{float(psnr(image, part.images)):.2f} dB" for image in made]
        panels = [
            Panel(image, f"sigma {sigma:g}", note) for image, sigma, note in zip(made, sigmas, notes, strict=True)
        ]
        rows.append(strip(panels, name))
    caption = f"One image, {part.names[0]}, decoded from its latent with growing noise."
    return Figure(sheet(rows), f"robustness-{file_name(short_name(curve.teacher))}-images", caption)


# ------------------------------------------------------------------------------------------- errors


def _best_and_worst(material: Material) -> Section:
    highlighted = material.highlighted
    result = material.result_of(highlighted)
    if "psnr" not in result.per_image:
        return Section("Best and worst", "The protocol does not measure PSNR, by which images are sorted.")
    count = min(EXTREMES, len(result.images) // 2)
    worst, best = extremes(result, count)
    images = pick(material.references, [*worst, *best])
    made = {place: _by_each(material.default_steps, image, result.images[place]) for place, image in images.items()}
    full = _full_scale([error for place, image in images.items() for error in _errors(image, made[place])])
    metrics = []
    for name, places in (("worst", worst), ("best", best)):
        rows = [_with_errors(images[place], made[place], full, result.images[place]) for place in places]
        caption = f"The {count} {name} by PSNR of {highlighted.label}. {_error_words(full)}"
        metrics.append(Figure(sheet([*rows, scale_bar(partial(heat, full=1.0), full)]), name, caption))
    return Section("Best and worst", _EXTREMES, metrics)


def _step_by_step(material: Material) -> Section | None:
    """Returns a section on one image at every number of steps: the highlighted coder's median image."""
    family = material.of_family(material.highlighted.family)
    result = material.result_of(material.highlighted)
    if len(family) < 2 or "psnr" not in result.per_image:
        return None
    order, _ = extremes(result, len(result.images))
    place = order[len(order) // 2]
    image = pick(material.references, [place])[place]
    made = _by_each(family, image, result.images[place])
    full = _full_scale(_errors(image, made))
    above = [Panel(image, "original"), *(_judged_panel(image, name, one) for name, one in made.items())]
    blank = torch.ones_like(image)
    below = [Panel(blank, ""), *(Panel(heat(error, full), "") for error in _errors(image, made))]
    picture = sheet([strip(above, result.images[place]), strip(below), scale_bar(partial(heat, full=1.0), full)])
    caption = f"The image of median PSNR, and where it differs from the original. {_error_words(full)}"
    return Section("Step by step", "", [Figure(picture, "step-by-step", caption)])


def _by_each(candidates: Sequence[Candidate], image: Tensor, name: str) -> dict[str, Tensor]:
    device = next(candidates[0].coder.parameters()).device
    return {candidate.label: candidate.reconstruct(image.to(device), (name,)).cpu() for candidate in candidates}


def _errors(image: Tensor, made: dict[str, Tensor]) -> list[Tensor]:
    """Returns the root mean square error over the channels, H W, in the range of [-1, 1]."""
    return [(one - image)[0].square().mean(dim=0).sqrt() for one in made.values()]


def _full_scale(errors: Sequence[Tensor]) -> float:
    """Returns the end of the error maps' colours, to two digits: one scale for all."""
    largest = float(torch.cat([error.flatten() for error in errors]).quantile(ERROR_QUANTILE))
    return float(f"{max(largest, 1e-6):.1g}")


def _with_errors(image: Tensor, made: dict[str, Tensor], full: float, title: str) -> Image.Image:
    panels = [Panel(image, "original")]
    for (name, one), error in zip(made.items(), _errors(image, made), strict=True):
        panels += [_judged_panel(image, name, one), Panel(heat(error, full), "error")]
    return strip(panels, title)


def _judged_panel(image: Tensor, name: str, made: Tensor) -> Panel:
    return Panel(made, name, f"{float(psnr(made, image)):.2f} dB")


def _error_words(full: float) -> str:
    return (
        "Error maps show the root mean square of the difference over the channels; the brightest colour stands for "
        f"{full:g} or more, where black and white differ by 2."
    )


# ------------------------------------------------------------------------------------------- latents


@torch.no_grad()
def _latents(material: Material) -> Section | None:
    shown = [candidate for candidate in material.default_steps if candidate.protocol.latents == "own"]
    views = _views(material.data)
    device = next(shown[0].coder.parameters()).device
    latents = _all_latents(shown, [image.to(device) for image in views.values()])
    axes = {name: latent_axes(latent) for name, (_, latent, _) in latents.items()}
    rows = []
    for index, (name, image) in enumerate(views.items()):
        panels = [Panel(image, "original")]
        for title, (factor, latent, basis) in latents.items():
            colours = latent_colours(latent[index], axes[basis], factor)
            height, width = latent[index].shape[-2:]
            panels.append(Panel(colours, title, f"{latent[index].shape[1]} channels, {width} x {height}"))
        rows.append(strip(panels, name))
    contents: list[Table | Figure] = [Figure(sheet(rows), "latents", _LATENTS_CAPTION)]
    if table := _agreement(material):
        contents.append(table)
    return Section("Latents", _LATENTS, contents)


def _all_latents(shown: Sequence[Candidate], images: Sequence[Tensor]) -> dict[str, tuple[int, list[Tensor], str]]:
    """Returns, by title, the factor, a latent for each image, and the name of the coder whose axes they are shown on.

    A RAC's latents are shown on its teacher's axes.
    """
    found: dict[str, tuple[int, list[Tensor], str]] = {}
    for candidate in shown:
        basis = candidate.family
        if candidate.teacher is not None and candidate.coder.teacher is not None:
            basis = short_name(candidate.coder.teacher)
            found.setdefault(basis, _latents_of(candidate.teacher, candidate.teacher.encode, images, basis))
        found[candidate.family] = _latents_of(candidate.coder, candidate.encode, images, basis)
    return found


def _latents_of(
    coder: Coder, encode: Callable[[Tensor], Tensor], images: Sequence[Tensor], basis: str
) -> tuple[int, list[Tensor], str]:
    return coder.spec.factor, [encode(image).float().cpu() for image in images], basis


def _agreement(material: Material) -> Table | None:
    """Returns a table of explained variance and offset per channel of each RAC's latents.

    Each RAC takes its own number of steps.
    """
    rows = []
    for candidate, row in zip(material.candidates, material.rows, strict=True):
        values = row.result.per_channel.get("explained variance")
        if values and candidate in material.default_steps:
            rows.append((row.label, *(f"{value:.3f}" for value in values)))
    if not rows:
        return None
    channels = max(len(row) for row in rows) - 1
    if channels > 16:  # a table of all would not fit a page; the JSON has them
        summary = [(row[0], min(row[1:], key=float), max(row[1:], key=float)) for row in rows]
        return Table(("variance of the teacher's latent explained", "worst channel", "best channel"), tuple(summary))
    columns = ("variance of the teacher's latent explained, by channel", *(str(c) for c in range(channels)))
    return Table(columns, tuple((*row, *[""] * (channels + 1 - len(row))) for row in rows))


def _views(data: Sequence[Path]) -> dict[str, Tensor]:
    """Reads the first pictures, cropped to squares of up to `VIEW_SIDE`; larger ones to a multiple of 32."""
    found = {}
    for file in islice(find_pictures(data), VIEWS):
        picture = read_picture(io.BytesIO(file.read()), name=file.name)
        side = min(VIEW_SIDE, *picture.size)
        side -= side % 32 if side > 32 else 0
        found[file.name] = _image(Preprocessing(side, "centre").cut(picture, file.name)[0])
    return found


def _image(picture: Image.Image) -> Tensor:
    import numpy as np

    return from_pixels(np.asarray(picture))


# ------------------------------------------------------------------------------------------- trajectories


@torch.no_grad()
def _trajectories(material: Material) -> Section | None:
    metrics = []
    for candidate in material.default_steps:
        if candidate.walk("decode") is not None and candidate.protocol.latents == "own":
            metrics.append(_trajectory_plot(material, material.of_family(candidate.family)[-1]))
    return Section("Trajectories", _TRAJECTORIES, metrics) if metrics else None


def _trajectory_plot(material: Material, candidate: Candidate) -> Figure:
    """Plots trajectories: left, states of several images; right, channels of one image's state at several places."""
    part = next(material.references.batches(WALKS))
    walks = _walks(candidate, part, 1)
    numbers = sum(state.numel() for state in walks[0].states)
    if len(part.names) > 1:
        walks = _walks(candidate, part, max(2, WALK_NUMBERS // numbers))
    whole = [_points(walk, lambda state: state.flatten(1)) for walk in walks]
    places = [_points(walk, _some_places) for walk in walks]
    panels, labels = {}, []
    for title, lines in (("whole states of several images", whole), ("places of one image", places)):
        decoding = lines[0]
        axes = PrincipalAxes.fit(decoding.flatten(0, 1), 2)
        colours = [PALETTE[index % len(PALETTE)] for index in range(decoding.shape[1])]
        panels[title] = [
            Walk(axes.project(walk[:, index]), colour, dashed=place > 0)  # decoding, then encoding if it is walked
            for place, walk in enumerate(lines)
            for index, colour in enumerate(colours)
        ]
        first, second = (f"{100 * share:.1f} % of the variance" for share in axes.shares.tolist())
        labels.append((f"axis 1 ({first})", f"axis 2 ({second})"))
    legend = "solid: decoding; dashed: encoding; ring: start, dot: end"
    return Figure(
        walk_panels(panels, labels, legend), f"trajectories-{file_name(candidate.title)}", f"{candidate.label}."
    )


def _walks(candidate: Candidate, part: Batch, count: int) -> list[Trajectory]:
    """Returns the flow that decodes the first `count` images, and the one that encodes them if there is one."""
    coder, names = candidate.coder, part.names[:count]
    coded = coder.coded(part.images[:count].to(candidate.device), candidate.walk("encode"), keep="nodes")
    noise = coder.noise_of(coded.latent, names, candidate.protocol.rng_seed)
    decoded = coder.decoded(coded.latent, candidate.walk("decode"), noise, keep="nodes")
    return [flow for flow in (decoded.flow, coded.flow) if flow is not None]


def _points(walk: Trajectory, take: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the points of a trajectory, nodes x things x D, that `take` chooses from its states."""
    return torch.stack([take(state).float().cpu() for state in walk.states])


def _some_places(state: Tensor) -> Tensor:
    """Returns the channels of the first image's state at `WALKS` places, evenly over it: N C."""
    places = state[0].flatten(1)
    chosen = torch.linspace(0, places.shape[1] - 1, WALKS + 2, device=state.device)[1:-1].long()
    return places[:, chosen].T


def _steps_of(candidate: Candidate) -> str:
    steps = "" if candidate.steps is None else f", {steps_in_words(candidate.steps)}"
    return f"{candidate.title}{steps}"


_QUALITY = (
    "Values are means over the images. A step is one evaluation of the network that decodes; GMACs are 10^9 "
    "multiply-accumulates "
    "for one image of {height} x {width}. Parameters are those of the coder alone; decoding a teacher's latents "
    "also needs the teacher's encoder. Speeds are of encoding and decoding, were measured in this run, and hold for "
    "this machine only. PSNR of the state round trip is that of encoding and decoding without a latent in between: it "
    "measures how exactly the flow is inverted, not how good the coder is."
)
_STEPS_CAPTION = "Encoding takes as many steps as decoding. Horizontal lines are coders without a flow."
_MACS_CAPTION = "The numbers beside the points are steps."
_ROBUSTNESS = (
    "Gaussian noise is added to the teacher's latents, since the latents of a generator are never exactly those of an "
    "encoder. Every decoder gets the same noisy latents. If steps correct the state, quality falls more slowly with "
    "more steps. Quality is measured against the original image. A decoder whose quality is low without noise has "
    "little to lose, so look at both the value and its change."
)
_EXTREMES = "Each image is shown with its reconstruction by every coder, and a map of the differences."
_LATENTS = (
    "The channels of a latent, reduced to three by principal component analysis and shown as red, green and blue. A "
    "RAC's latents are shown on its teacher's axes, so that equal colours are equal latents; coders with latents of "
    "their own have axes of their own, and their colours cannot be compared."
)
_LATENTS_CAPTION = "Pictures are larger than the protocol's images, so that latents have more positions."
_TRAJECTORIES = (
    "States on the way from the seed state to the image state and back, in the plane in which the decoded ones vary "
    "most. Where the flow is straight, the lines are straight; where encoding inverts decoding, the dashed lines lie "
    "on the solid ones."
)
