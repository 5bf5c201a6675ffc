"""The options that `rac evaluate` and `rac compare` share, and the report they write."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import RacError
from ..evaluate.comparison import LatentSource, Row, candidates, compare, file_name
from ..evaluate.comparison_report import Material, introduction, sections
from ..evaluate.image_sets import FeatureMoments, ImageSet, read_reference
from ..evaluate.protocol import Protocol, protocol_named
from ..evaluate.suite import MetricSuite
from ..files import check_output, make_folder, make_output, write_bytes
from ..flow.grid import check_steps
from ..progress import ProgressFn, counting
from ..report.document import Figure, html_report, utf8
from ..runtime import pick_device
from .shared import say, show


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of both verbs."""

    data: tuple[Path, ...] = ()
    """Folders of pictures, tar files, or single pictures. None: scikit-image's photographs."""
    protocol: str = "pixels-64"
    """Protocol: pixels-64, dev-64, dev-128, native, tiles-64, tiles-64-lite, imagenet-256; for generated images also
    generated-64, generated-128, both also with -lite, generated-256; or a JSON file with a protocol, or with a result,
    which is repeated on the same images."""
    metrics: tuple[str, ...] = ()
    """Further metrics, beside those of the protocol: `probe` is how well a linear classifier finds the classes of the
    images in their latents, pooled and at single places; classes are the folders above the pictures."""
    reference: Path | None = None
    """Images that FID and other metrics of sets compare with: pictures, or an .npz file of moments (mu, sigma), such as
    ADM's of ImageNet. None: the images themselves."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of steps at which a coder with a flow is evaluated; it encodes and decodes in the same number."""
    latents: tuple[LatentSource, ...] = ("own",)
    """Latents that a coder with a teacher decodes: its own, its teacher's, or both, one after the other."""
    count: int | None = None
    """Number of images to use, for a quick look. None: as many as the protocol says."""
    pictures: bool = True
    """Include pictures in the report. Without them it has tables and plots only."""
    robustness: Annotated[int, tyro.conf.arg(aliases=("--correction",))] = 64
    """Number of images whose latents are decoded with increasing noise; 0 skips this test."""
    batch: int = 16
    """Number of images processed together; it does not change the results."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def evaluate_all(self, models: Sequence[str], out: Path, title: str) -> int:
        """Evaluate the coders called `models`, write everything to `out`, print the table; the exit code."""
        protocol = self._protocol()
        check_output(out, self.data)
        field = candidates(models, protocol, steps=self.steps, latents=self.latents, device=self.device)
        images, reference = self._images(protocol)
        suite = MetricSuite.load(protocol.metrics, protocol.extractor, pick_device(self.device))
        suite.check(images, reference)
        results = make_folder(make_output(out) / "results")

        def keep(row: Row) -> None:
            row.result.save(results / f"{file_name(row.label)}.json")

        with _Bars() as progress:
            comparison = compare(
                field,
                images,
                protocol,
                reference=reference,
                robustness=self.robustness,
                suite=suite,
                batch=self.batch,
                progress=progress,
                done=keep,
            )
        comparison.save(out / "comparison.json")
        write_bytes(out / "table.md", utf8(comparison.table().to_markdown()))
        show(comparison.table(), f"{protocol.name}: {len(images)} images of {images.name}")
        self._report(Material(self.data, field, comparison, images), out, title)
        return 0

    def _protocol(self) -> Protocol:
        for number in self.steps:
            check_steps(number)
        if self.batch < 1 or self.robustness < 0:
            raise RacError(f"--batch {self.batch} must be at least 1, and --robustness {self.robustness} at least 0")
        if not self.steps or not self.latents:
            raise RacError("--steps and --latents need at least one value each, such as --steps 1 2 4 8 --latents own")
        chosen = protocol_named(self.protocol)
        metrics = tuple(dict.fromkeys((*chosen.metrics, *self.metrics)))
        return replace(chosen, metrics=metrics, count=chosen.count if self.count is None else self.count)

    def _images(self, protocol: Protocol) -> tuple[ImageSet, ImageSet | FeatureMoments | None]:
        reference = None
        if self.reference is not None:
            with counting("reading the reference") as progress:
                reference = read_reference(self.reference, protocol.preprocessing, progress)
        with counting("reading pictures") as progress:
            return ImageSet.read(self.data, protocol.preprocessing, protocol.count, progress), reference

    def _report(self, material: Material, out: Path, title: str) -> None:
        with counting("drawing pictures") as progress:
            contents = sections(material, pictures=self.pictures, progress=progress)
        for section in contents:
            for content in section.contents:
                if isinstance(content, Figure):
                    write_bytes(out / f"{content.name}.png", content.png)
        write_bytes(out / "report.html", utf8(html_report(title, introduction(material), contents)))
        say("")
        say(f"The report, with pictures: {out / 'report.html'}")


class _Bars:
    """One progress bar after the other, for the tasks that `compare` names."""

    def __enter__(self) -> _Bars:
        self._stack, self._what = ExitStack(), ""
        self._bar: ProgressFn = _ignored
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def __call__(self, what: str, done: int, total: int | None = None) -> None:
        """See `ComparisonProgress`."""
        if what != self._what:
            self._stack.close()
            self._what, self._bar = what, self._stack.enter_context(counting(what))
        self._bar(done, total)


def _ignored(done: int, total: int | None = None) -> None:
    pass
