"""What `rac evaluate` and `rac compare` share: the options, and the way from coders and pictures to a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..coders.protocol import Coder
from ..config import from_json, read_json
from ..errors import RacError
from ..evaluate.comparison import (
    Candidate,
    Comparison,
    LatentSource,
    all_candidates,
    evaluate_candidate,
    file_name,
    short_name,
)
from ..evaluate.comparison_report import Material, introduction, sections
from ..evaluate.image_sets import ImageSet
from ..evaluate.protocol import PROTOCOLS, Protocol
from ..evaluate.result import Result
from ..evaluate.robustness import RobustnessCurve, robustness_curve
from ..evaluate.suite import IMAGE_METRICS, MetricSuite
from ..files import check_output, make_folder, make_output, write_bytes
from ..flow.grid import check_steps
from ..images import write_picture
from ..progress import counting
from ..report.document import Figure, html_report
from ..runtime import pick_device
from .shared import load_coder, load_teacher, show


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of both verbs."""

    data: tuple[Path, ...] = ()
    """Folders of pictures, tar files, or pictures. None: scikit-image's photographs."""
    protocol: str = "pixels-64"
    """pixels-64, dev-64, dev-128, native, tiles-64, tiles-64-lite, imagenet-256, or a JSON file: a protocol, or a
    result to repeat on the same images."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of steps at which a RAC is judged, each way."""
    latents: tuple[LatentSource, ...] = ("own",)
    """What a RAC decodes: the latents it encoded itself, its teacher's, or both in turn."""
    count: int | None = None
    """Take only so many images, for a quick look. None: as many as the protocol says."""
    pictures: bool = True
    """Draw the report's pictures, too; otherwise its numbers alone."""
    correction: int = 64
    """Images for the correction curve; 0 leaves it out."""
    batch: int = 16
    """Images at a time; changes no metric."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def evaluate_all(self, models: Sequence[str], out: Path, title: str) -> int:
        """Judge the coders called `models`, write everything to `out`, print the table; the exit code."""
        protocol = self._protocol()
        check_output(out, self.data)
        coders = {name: load_coder(name, self.device) for name in models}
        teachers = self._teachers(coders)
        self._check_latents(coders, teachers)
        references = self._references(protocol)
        suite = MetricSuite.load(protocol.metrics, protocol.extractor, pick_device(self.device))
        candidates = all_candidates(_titles(models), coders, teachers, protocol, self.steps, self.latents)
        comparison = self._evaluated(candidates, references, suite, make_folder(make_output(out) / "results"))
        comparison = replace(comparison, corrections=self._corrections(candidates, references, suite))
        comparison.save(out / "comparison.json")
        write_bytes(out / "table.md", comparison.table().to_markdown().encode())
        show(comparison.table(), f"{protocol.name}: {len(references)} images of {references.name}")
        self._report(Material(self.data, candidates, comparison, references), out, title)
        return 0

    def _protocol(self) -> Protocol:
        for number in self.steps:
            check_steps(number)
        if self.batch < 1 or self.correction < 0:
            raise RacError(f"--batch {self.batch} must be at least 1, and --correction {self.correction} at least 0")
        if not self.steps or not self.latents:
            raise RacError("--steps and --latents need at least one value each, such as --steps 1 2 4 8 --latents own")
        if self.protocol in PROTOCOLS:
            chosen = PROTOCOLS[self.protocol]
        elif Path(self.protocol).suffix == ".json":
            chosen = _protocol_file(Path(self.protocol))
        else:
            raise RacError(f"no protocol {self.protocol!r}; give a JSON file of one, or one of {', '.join(PROTOCOLS)}")
        return chosen if self.count is None else replace(chosen, count=self.count)

    def _teachers(self, coders: Mapping[str, Coder]) -> dict[str, Coder]:
        """The teacher of each coder that has one; loaded once, however many share it or compete with it."""
        found: dict[str, Coder | None] = dict(coders)
        for coder in coders.values():
            if coder.teacher is not None and coder.teacher not in found:
                found[coder.teacher] = load_teacher(coder, self.device)
        teachers = {name: found[coder.teacher] for name, coder in coders.items() if coder.teacher is not None}
        return {name: teacher for name, teacher in teachers.items() if teacher is not None}

    def _check_latents(self, coders: Mapping[str, Coder], teachers: Mapping[str, Coder]) -> None:
        if self.latents != ("own",) and not teachers:
            names = ", ".join(coders)
            raise RacError(f"--latents teacher needs a coder whose teacher can be loaded; {names} have none")

    def _references(self, protocol: Protocol) -> ImageSet:
        with counting("reading pictures") as progress:
            return ImageSet.read(self.data, protocol.framing, protocol.count, progress)

    def _evaluated(
        self, candidates: Sequence[Candidate], references: ImageSet, suite: MetricSuite, out: Path
    ) -> Comparison:
        """Each result is written as soon as it is there."""
        rows = []
        for candidate in candidates:
            with counting(candidate.label) as progress:
                rows.append(evaluate_candidate(candidate, references, suite, batch=self.batch, progress=progress))
            rows[-1].result.save(out / f"{file_name(candidate.label)}.json")
        return Comparison(tuple(rows))

    def _corrections(
        self, candidates: Sequence[Candidate], references: ImageSet, suite: MetricSuite
    ) -> tuple[RobustnessCurve, ...]:
        """One curve for each teacher: it, and all who decode its latents."""
        curves = []
        for name, teacher in _teachers(candidates).items():
            students = [candidate for candidate in candidates if candidate.coder.teacher == name]
            # A coder of own latents and of its teacher's decodes alike.
            decoders = {short_name(name): teacher.decode, **{_plain(student): student.decode for student in students}}
            if self.correction > 0 and set(suite.metrics) & set(IMAGE_METRICS):
                with counting(f"correction curve of {short_name(name)}") as progress:
                    curve = robustness_curve(
                        decoders,
                        teacher,
                        references,
                        suite,
                        name=name,
                        images=self.correction,
                        batch=self.batch,
                        progress=progress,
                    )
                curves.append(curve)
        return tuple(curves)

    def _report(self, material: Material, out: Path, title: str) -> None:
        with counting("drawing pictures") as progress:
            contents = sections(material, pictures=self.pictures, progress=progress)
        for section in contents:
            for content in section.contents:
                if isinstance(content, Figure):
                    write_picture(content.picture, out / f"{content.name}.png")
        write_bytes(out / "report.html", html_report(title, introduction(material), contents).encode())
        print(f"\nThe report, with pictures: {out / 'report.html'}")


def _protocol_file(path: Path) -> Protocol:
    """A protocol of its own, or the one that a result was made under, and then for the same images only."""
    data = read_json(path)
    if isinstance(data, dict) and "protocol" in data:
        result = Result.load(path)
        return replace(result.protocol, reference=result.reference.hash)
    return from_json(Protocol, data, str(path))


def _teachers(candidates: Sequence[Candidate]) -> dict[str, Coder]:
    return {
        candidate.coder.teacher: candidate.teacher
        for candidate in candidates
        if candidate.teacher is not None and candidate.coder.teacher is not None
    }


def _plain(candidate: Candidate) -> str:
    return replace(candidate, protocol=replace(candidate.protocol, latents="own")).label


def _titles(models: Sequence[str]) -> dict[str, str]:
    """A short name for each, or all of it where those collide. Raises `RacError` for a name given twice."""
    if twice := [name for name in models if models.count(name) > 1]:
        raise RacError(f"{twice[0]} is given twice; give each coder once")
    short = [short_name(name) for name in models]
    return {name: last if short.count(last) == 1 else name for name, last in zip(models, short, strict=True)}
