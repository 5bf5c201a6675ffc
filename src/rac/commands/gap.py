"""`rac gap`: how much worse generated latents decode than encoded ones, by decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from torch import nn

from .. import hub, runtime
from ..coders.protocol import Coder
from ..errors import RacError
from ..evaluate.comparison import coder_titles
from ..evaluate.gap import AXES, Decoder, GapExperiment
from ..evaluate.gap_report import markdown, pictures, plot, table
from ..evaluate.matched_sets import MatchedSets, matched_sets
from ..files import check_output, write_bytes
from ..flow.grid import check_steps
from ..generators.protocol import LatentGenerator
from ..generators.sampling import Method, Sampling
from ..images import write_picture
from ..progress import counting
from ..report.document import utf8
from ..representations import Extractor, ExtractorName, load_extractor
from ..storage import weights_hash
from .shared import load_coder, need_trained, note, say, show

RESAMPLES = 1000
"""Number of resamples that intervals are made of."""

LARGEST_SIGMA = 100.0
"""Largest deviation of noise on latents, whose own is about 1."""


@dataclass(frozen=True)
class Command:
    """Measure how much worse generated latents decode than encoded ones: the gap of each decoder.

    The latents of one coder are encoded from images, perturbed by noise, and generated. That coder and every one of
    --coders decodes all of them, and the images are compared with other images. Writes gap.md, gap.json, gap.png (gaps
    against steps) and pictures.png. Latents and features are kept for --resume, which may also add decoders,
    sigmas and images.
    """

    model: Annotated[str, tyro.conf.Positional]
    """The generator: a shipped name, the folder of a training run, a directory, or a name on the hub."""
    coders: tuple[str, ...] = ()
    """Coders of the same latents whose decoders are compared, such as a RAC, or a decoder of one step as a control."""
    teacher: str | None = None
    """The coder of the latents: it encodes, and other decoders are compared with its own. None: the one that the
    generator was trained on."""
    data: tuple[Path, ...] = ()
    """Pictures to reconstruct: folders, tar files or single pictures, in folders of the generator's classes if it knows
    any. None: scikit-image's photographs."""
    reference: tuple[Path, ...] = ()
    """Pictures that all images are compared with. None: half of --data, which is then not reconstructed."""
    count: int | None = None
    """Number of images of each set: encoded, generated and compared with. None: as many as there are."""
    classes: tuple[str, ...] = ()
    """Names or numbers of the classes. None: all of the generator."""
    sigmas: tuple[float, ...] = (0.1, 0.3)
    """Deviations of the noise on encoded latents; 1 is about that of the latents themselves."""
    decode_steps: tuple[int, ...] = (1, 2, 4, 8)
    """Steps of decoders with a flow. The teacher takes its own number."""
    judges: tuple[ExtractorName, ...] = ("inception-768", "efficientnet-lite0")
    """Networks whose features are compared; EfficientNet also says which of ImageNet's classes it sees."""
    steps: int | None = None
    """Steps of the generator's flow. None: its own number."""
    method: Method | None = None
    """Rule of its steps: euler, heun, midpoint, rk4 or sde. None: its own."""
    guidance: float | None = None
    """Scale of guidance; 1: none. None: its own."""
    rng_seed: int = 0
    """Chooses the noise of the latents, and the resamples."""
    out: Path = Path("gap")
    """Folder for the results; created if it does not exist."""
    resume: bool = False
    """Go on with what the folder holds, made with the same settings."""
    batch: int = 10
    """Images that are made, and kept, together."""
    threads: int = 0
    """Threads torch computes with; 0: torch's own choice."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Measure; the exit code. Raises `RacError`."""
        self._check()
        runtime.set_threads(self.threads)
        experiment = self._experiment()
        experiment.enter(self.resume)
        with counting("decoding and comparing") as progress:
            try:
                new = experiment.work(progress)
            except KeyboardInterrupt:
                note("stopped; the same command with --resume goes on with what is kept")
                raise
        if self.resume:
            note(f"{new:,} images were made anew")
        result = experiment.result(RESAMPLES)
        result.save(self.out / "gap.json")
        write_bytes(self.out / "gap.md", utf8(markdown(result)))
        if (drawn := plot(result)) is None:
            note("gap.png is left out, since no gap is a number; give more images")
            (self.out / "gap.png").unlink(missing_ok=True)  # one of fewer decoders or images would mislead
        else:
            write_picture(drawn, self.out / "gap.png")
        write_picture(pictures(experiment), self.out / "pictures.png")
        if result.count <= AXES:
            note(f"Frechet distances are left out, since they need more than {AXES} images a set")
        show(table(result), f"{result.count} images a set, {result.size} x {result.size}, latents of {result.encoder}")
        say(f"{self.out}: gap.md, gap.json, {'' if drawn is None else 'gap.png, '}pictures.png")
        return 0

    def _check(self) -> None:
        """Checks what needs no file. Raises `RacError`."""
        for steps in self.decode_steps:
            check_steps(steps)
        for name in ("sigmas", "decode_steps", "judges"):
            values: tuple[object, ...] = getattr(self, name)
            if twice := [value for value in values if values.count(value) > 1]:
                raise RacError(f"--{name.replace('_', '-')} names {twice[0]} twice; give each once")
        for sigma in self.sigmas:
            if not 0 <= sigma <= LARGEST_SIGMA:
                raise RacError(f"sigma {sigma} must be a number from 0 to {LARGEST_SIGMA:g}, such as 0.3")
        if not self.judges:
            raise RacError("--judges needs at least one network, such as efficientnet-lite0")
        if self.count is not None and self.count < 2:
            raise RacError(f"count {self.count} must be at least 2")
        if self.batch < 1:
            raise RacError(f"batch {self.batch} must be at least 1")
        runtime.check_threads(self.threads)
        runtime.pick_device(self.device)
        self._sampling(Sampling())
        check_output(self.out, (*self.data, *self.reference))

    def _sampling(self, own: Sampling) -> Sampling:
        given: dict[str, Any] = {"steps": self.steps, "method": self.method, "guidance": self.guidance}
        return replace(own, **{name: value for name, value in given.items() if value is not None})

    def _experiment(self) -> GapExperiment:
        generator = hub.load_generator(self.model)
        labels = [generator.label(name) for name in self.classes] or list(range(len(generator.classes)))
        if len(set(labels)) < len(labels):
            raise RacError("a class is asked for twice; name each once")
        sampling = self._sampling(generator.sampling)
        generator.check_request(labels or None, sampling)
        name = self.teacher or generator.kind.coder
        if name is None:
            raise RacError(f"{self.model} names no coder of its latents; give --teacher")
        teacher = self._coder(name, generator, "encode")
        decoders = self._decoders(name, teacher, generator)
        generator.to(runtime.pick_device(self.device))
        return GapExperiment(
            generator=generator,
            sampling=sampling,
            encoder=teacher,
            decoders=decoders,
            sets=self._sets(generator, labels),
            judges={str(judge): self._judge(judge) for judge in self.judges},
            sigmas=self.sigmas,
            folder=self.out,
            rng_seed=self.rng_seed,
            batch=self.batch,
            names={"generator": self.model, "encoder": name},
        )

    def _coder(self, name: str, generator: LatentGenerator, *more: str) -> Coder:
        """Loads a coder of the generator's latents. Raises `RacError` for another one."""
        coder = load_coder(name, self.device)
        generator.check_coder(coder, name)
        need_trained(coder, name, "decode")
        if "encode" in more:
            need_trained(coder, name, "encode")
        return coder

    def _decoders(self, name: str, teacher: Coder, generator: LatentGenerator) -> tuple[Decoder, ...]:
        """Returns all decoders, first the teacher's, once, whether --coders names it or not."""
        titles = coder_titles([*self.coders] if name in self.coders else [name, *self.coders])
        found = [Decoder(titles[name], teacher)]
        own = weights_hash(teacher.state_dict())
        for other in self.coders:
            coder = teacher if other == name else self._coder(other, generator)
            if weights_hash(coder.state_dict()) == own:
                continue
            if coder.walk("decode") is None:
                found.append(Decoder(titles[other], coder))
            elif not self.decode_steps:
                raise RacError(f"{other} decodes in steps; give at least one number of --decode-steps, such as 1 2 4 8")
            else:
                walks = ((steps, coder.walk("decode", steps)) for steps in self.decode_steps)
                found += [Decoder(titles[other], coder, walk, steps) for steps, walk in walks]
        return tuple(found)

    def _judge(self, name: ExtractorName) -> Extractor:
        judge = load_extractor(name)
        cast(nn.Module, judge).to(runtime.pick_device(self.device))
        return judge

    def _sets(self, generator: LatentGenerator, labels: Sequence[int]) -> MatchedSets:
        with counting("reading pictures") as progress:
            return matched_sets(self.data, self.reference, generator, labels, self.count, progress)
