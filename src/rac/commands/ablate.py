"""`rac ablate RECIPE`: variants of a recipe, and recipes beside it, trained alike, judged alike, in one report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from .. import hub
from ..coders.protocol import Coder
from ..config import json_safe, to_json
from ..data import held_out_images
from ..errors import RacError
from ..evaluate.comparison import (
    Candidate,
    Comparison,
    LatentSource,
    Row,
    candidates,
    coding_cost,
    evaluate_candidate,
)
from ..evaluate.image_sets import ImageSet, Preprocessing
from ..evaluate.protocol import PROTOCOLS, Protocol
from ..evaluate.result import Result
from ..evaluate.suite import MetricSuite
from ..experiments.ablation import Ablation, Equal, Training, file_name
from ..experiments.ablation_report import (
    Showing,
    Strips,
    introduction,
    markdown_report,
    sections,
    summary,
    training_table,
)
from ..files import make_folder, write_bytes
from ..flow.grid import check_steps
from ..progress import counting
from ..recipes import Recipe
from ..report.document import Figure, Section, html_report, utf8
from ..runtime import pick_device, processes
from ..storage import weights_hash
from .options import read_options
from .shared import note, say, show
from .train import find_recipe


@dataclass(frozen=True)
class Options:
    """Options of the ablation itself, beside those of the recipe."""

    out: Path
    """Folder of the ablation: the runs of all variants, the report, and report.json."""
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A field of the recipe and its values, such as spread=nearest,shuffle or objective.step-noise=0,0.05; colons join
    the parts of a tuple: objective.steps=1:1,4:4. Given several times, every combination is a variant."""
    beside: tuple[str, ...] = ()
    """Further recipes, of any family, to train and evaluate in the same way. They take the data and training settings
    (data, train) of this one, and are not varied."""
    budget: str = "500"
    """Length of each variant's training: a number of iterations of the unchanged recipe, or a time such as 90s, 10m or
    1.5h. A time is converted once to a number of images, by measured speeds; --resume keeps that number."""
    equal: Equal = "images"
    """Quantity that is the same for all variants. images: each variant sees the same number of images; a --budget in
    time is then their average time, and the report tells the time of each. time: each variant trains for the same time,
    so faster ones see more images."""
    protocol: str = "pixels-64"
    """Protocol by which all variants are evaluated; rac evaluate --help lists the protocols."""
    test: tuple[Path, ...] = ()
    """Pictures to evaluate on, cropped and scaled as the protocol says. None: the recipe's held-out images,
    unchanged."""
    latents: tuple[LatentSource, ...] = ("own",)
    """Latents that a coder with a teacher decodes: its own, its teacher's, or both, one after the other."""
    judged_steps: tuple[int, ...] = ()
    """Numbers of steps at which all coders with a flow are evaluated. None: those of each recipe."""
    resume: bool = False
    """Continue the ablation in --out."""


def run(arguments: Sequence[str]) -> int:
    """`rac ablate` with these arguments; the exit code. Raises `RacError`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: rac ablate RECIPE --vary FIELD=VALUE,VALUE --out FOLDER")
        print("                  [--budget 10m] [--resume] [options]")
        print("       rac ablate RECIPE --beside RECIPE RECIPE --out FOLDER")
        print("                  [--budget 10m] [--resume] [options]\n")
        print("rac train lists the recipes; rac ablate RECIPE --help lists all options.")
        return 0
    name, *options = arguments
    description, recipe = find_recipe(name)
    purpose = (
        f"Train variants of a recipe in the same way, and evaluate them in the same way. The recipe: {description}"
    )
    chosen = read_options(_both(recipe), f"rac ablate {name}", options, purpose)
    return ablate(name, chosen.recipe, chosen.options)


def ablate(name: str, recipe: Recipe, options: Options) -> int:
    """Train, judge, report; the exit code: 1 if some of the variants could not be trained. Raises `RacError`."""
    if processes() > 1:
        raise RacError("rac ablate runs in one process; start it without torchrun or accelerate launch")
    if recipe.product != hub.PRODUCTS[0]:
        raise RacError(
            f"rac ablate judges reconstructions, and {name} trains a {recipe.product}; give a coder's recipe"
        )
    vary = tuple(_dotted(choice) for choice in options.vary)
    for number in options.judged_steps:
        check_steps(number)
    beside = {one: replace(find_recipe(one)[1], data=recipe.data, train=recipe.train) for one in options.beside}
    label = name if beside else Ablation.name
    ablation = Ablation(recipe, vary, options.budget, options.out, options.equal, label, beside)
    # Before hours of training, all that can be wrong with what comes after.
    evaluation = _evaluation(ablation, options)
    ablation.enter(options.resume)
    trainings = ablation.trainings(ablation.measured(note))
    failures = _train(ablation, trainings)
    trained = [training for training in trainings if training.label not in failures]
    with counting("evaluation") as progress:
        rows, strips = [], Strips.start(evaluation.images)
        for done, training in enumerate(trained):
            progress(done, len(trained))
            for candidate in evaluation.candidates(training, options.judged_steps or ablation.steps(training)):
                rows.append(evaluation.row(candidate, options.out))
                strips.add(candidate)
    showing = Showing(name, ablation, trainings, failures, Comparison(tuple(rows)), strips)
    _report(showing, options.out)
    return 1 if failures else 0


def _both(recipe: Recipe) -> Any:
    """A dataclass of the ablation's options and the recipe's, under their own names."""
    plain = tyro.conf.arg(name="")
    fields: list[Any] = [
        ("options", Annotated[Options, plain]),
        ("recipe", Annotated[type(recipe), plain], field(default=recipe)),
    ]
    return dataclasses.make_dataclass("Both", fields, frozen=True)


def _dotted(choice: str) -> str:
    """Fields as they are named in Python, where the command line's own spelling has hyphens."""
    name, equals, values = choice.partition("=")
    return name.replace("-", "_") + equals + values


def _train(ablation: Ablation, trainings: Sequence[Training]) -> dict[str, str]:
    """Train all; why some could not be, by label. Raises the reason if none could."""
    failures: dict[str, str] = {}
    for number, training in enumerate(trainings, 1):
        iterations = training.recipe.train.iterations
        note(f"training {number} of {len(trainings)}, {iterations} iterations: {training.label}")
        try:
            ablation.train(training)
        except RacError as error:
            if len(failures) == len(trainings) - 1:
                raise
            failures[training.label] = str(error)
            note(f"continuing without {training.label}: {error}")
    return failures


@dataclass(frozen=True)
class _Evaluation:
    """One protocol, one set of images, one set of networks that judge: for all variants."""

    protocol: Protocol
    images: ImageSet
    suite: MetricSuite
    device: str
    latents: tuple[LatentSource, ...]
    _teachers: dict[str, Coder] = field(default_factory=dict)
    """Loaded once, by name."""

    def candidates(self, training: Training, steps: Sequence[int]) -> list[Candidate]:
        """Returns the candidates of a training: its coder at every number of steps."""
        name, coder = str(training.coder), self._load(str(training.coder))
        if coder.teacher is not None and coder.teacher not in self._teachers:
            self._teachers[coder.teacher] = self._load(coder.teacher)
        return candidates(
            {name: coder},
            self.protocol,
            steps=steps,
            latents=self.latents if coder.teacher is not None else ("own",),
            teachers=self._teachers,
            titles={name: training.label},
        )

    def row(self, candidate: Candidate, out: Path) -> Row:
        """Its metrics: those that an earlier run left in `out`, if they are of these weights, images and protocol."""
        path = out / "results" / f"{file_name(candidate.label)}.json"
        if path.exists():
            result = Result.load(path)
            found = (result.coder_hash, result.reference.hash, result.protocol)
            if found == (weights_hash(candidate.coder.state_dict()), self.images.hash, candidate.protocol):
                first = next(self.images.batches(1)).images.to(pick_device(self.device))
                return Row(candidate.label, candidate.family, coding_cost(candidate, first), result)
        row = evaluate_candidate(candidate, self.images, self.suite)
        make_folder(path.parent)
        row.result.save(path)
        return row

    def _load(self, name: str) -> Coder:
        coder = hub.load(name)
        coder.to(pick_device(self.device))
        return coder


def _evaluation(ablation: Ablation, options: Options) -> _Evaluation:
    if options.protocol not in PROTOCOLS:
        raise RacError(f"no protocol {options.protocol!r}; expected one of {', '.join(PROTOCOLS)}")
    protocol, recipe = PROTOCOLS[options.protocol], ablation.recipe
    if options.test:
        with counting("reading pictures") as progress:
            images = ImageSet.read(
                options.test, protocol.preprocessing, protocol.count, progress=lambda done: progress(done, None)
            )
    elif ablation.varies("data.paths", "data.held_out"):
        raise RacError(
            "variants that differ in their data hold out different pictures; give --test with pictures that no "
            "variant trains on"
        )
    else:
        held_out = held_out_images(recipe.data)
        images = ImageSet.of(held_out, "the held-out set")
        preprocessing = Preprocessing(recipe.data.size, "none")
        protocol = replace(protocol, name=f"{protocol.name}, held out", preprocessing=preprocessing, count=None)
    device = recipe.train.device
    suite = MetricSuite.load(protocol.metrics, protocol.extractor, pick_device(device))
    suite.check(images)
    return _Evaluation(protocol, images, suite, device, options.latents)


def _report(showing: Showing, out: Path) -> None:
    """Everything that is one for all variants, written and printed."""
    with counting("drawing pictures"):
        contents: list[Section] = sections(showing)
    for section in contents:
        for content in section.contents:
            if isinstance(content, Figure):
                write_bytes(out / f"{content.name}.png", content.png)
    title = " beside ".join([showing.name, *showing.ablation.beside])
    title = ": ".join(part for part in (title, ", ".join(showing.ablation.choices)) if part)
    write_bytes(out / "report.json", utf8(_as_json(showing)))
    write_bytes(out / "report.md", utf8(markdown_report(title, introduction(showing), contents)))
    write_bytes(out / "report.html", utf8(html_report(title, introduction(showing), contents)))
    show(summary(showing), title)
    show(training_table(showing))
    say("")
    say(f"The report, with pictures: {out / 'report.html'}")


def _as_json(showing: Showing) -> str:
    ablation = showing.ablation
    trainings: list[Mapping[str, Any]] = [
        {
            "label": training.label,
            "coder": training.coder.relative_to(ablation.directory).as_posix(),
            "images": training.images,
            "seconds": training.seconds,
            "failure": showing.failures.get(training.label),
            "recipe": to_json(training.recipe),
        }
        for training in showing.trainings
    ]
    asked = {"recipe": showing.name, "vary": ablation.choices, "budget": ablation.budget, "equal": ablation.equal}
    whole = {**asked, "trainings": trainings, "comparison": to_json(showing.comparison)}
    return json.dumps(json_safe(whole), indent=2, allow_nan=False) + "\n"
