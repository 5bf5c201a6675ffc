"""`rac generate`: images of classes, by a generator of latents and the coder that decodes them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from .. import hub, runtime
from ..coders.protocol import Coder
from ..config import differences, json_safe, read_json, to_json
from ..errors import RacError
from ..files import MARKER, make_folder, make_output, write_bytes
from ..flow import Walk
from ..flow.grid import check_steps, steps_in_words
from ..flow.stochastic import Diffusion
from ..generators.protocol import LatentGenerator
from ..generators.sample import Samples, Source, Wanted
from ..generators.sampling import Method, Sampling
from ..images import read_image, write_image, write_picture
from ..progress import counting
from ..report.pictures import Panel, sheet, strip
from ..storage import weights_hash
from .latent_files import LatentFile
from .shared import load_coder, need_trained, note, part_of, say

RECORD = "generate.json"
"""Name of the file that says what the images in a folder were made by."""

MOST = 10_000_000
"""Most images of one folder."""

ROWS, COLUMNS = 8, 8
"""Most rows and columns of the grid of pictures."""


@dataclass(frozen=True)
class Command:
    """Generate images of classes: PNG files, a folder for each class, and a grid of the first ones.

    An image is a function of the settings, its number and its class: it is the same alone and among 50,000. Settings
    that are None are the generator's own.
    """

    model: Annotated[str, tyro.conf.Positional]
    """The generator: a shipped name, the folder of a training run, a directory, or a name on the hub."""
    coder: str | None = None
    """The coder that decodes its latents, such as a RAC that was trained on them. None: the one it was trained on."""
    classes: tuple[str, ...] = ()
    """Names or numbers of classes. None: all."""
    count: int = 16
    """Number of images, of all classes together."""
    labels: Literal["turns", "random"] = "turns"
    """Classes take turns, as often as each other, or are drawn at random for each image."""
    steps: int | None = None
    """Steps of the generator's flow."""
    method: Method | None = None
    """Rule of its steps: euler, heun, midpoint or rk4; or sde, with noise in each step but the last."""
    guidance: float | None = None
    """Scale of guidance; 1: none, which halves the work."""
    interval: tuple[float, float] | None = None
    """First and last time at which guidance acts, in [0, 1]; 0 is noise."""
    channels: int | None = None
    """Guide only the first so many channels; 3 reproduces tables of DiT, SiT and LightningDiT."""
    weaker: str | None = None
    """A weaker generator to be guided away from (autoguidance), in place of the same one without classes."""
    shift: float | None = None
    """Above 1: more steps near the noise."""
    diffusion: Diffusion | None = None
    """Noise of the SDE."""
    last_step: float | None = None
    """Length of the SDE's last step."""
    last: Literal["mean", "tweedie"] | None = None
    """The SDE's last step: along the drift, or to the expected data."""
    decode_steps: tuple[int, ...] = ()
    """Steps of the coder's flow. Several: each latent is decoded with each, into a folder of its own."""
    size: int | None = None
    """Side of the images in pixels. None: that which was trained on."""
    rng_seed: int = 0
    """Chooses, with the number of an image, its noise."""
    out: Path = Path("generated")
    """Folder for the results; created if it does not exist."""
    resume: bool = False
    """Make those images that the folder lacks, with the settings it was begun with."""
    part: str | None = None
    """Share of the images that this process makes: 0/4, 1/4, 2/4 and 3/4 together make all. None: all, or under
    torchrun an equal share."""
    latents: bool = False
    """Keep the latents too, as files that `rac decode` reads."""
    batch: int = 8
    """Images that are made together."""
    bf16: bool = False
    """Compute the generator's matrix products in bfloat16: faster, and a little different."""
    threads: int = 0
    """Threads torch computes with; 0: torch's own choice."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Generate; the exit code. Raises `RacError` if nothing could be done."""
        part = self._checked()
        runtime.set_threads(self.threads)
        job = self._job()
        mine = job.wanted[part[0] :: part[1]]
        missing, made = self._enter(job, mine), 0
        with counting(f"generating {len(missing):,} images") as progress:
            try:
                for samples in job.source.samples(missing, self.batch, job.walks):
                    job.write(samples)
                    made += len(samples.wanted)
                    progress(made, len(missing))
                    if made == len(missing):
                        job.finish(samples.evaluations)
            except KeyboardInterrupt:
                done = len(mine) - len(missing) + made
                note(f"stopped after {done:,} of {len(mine):,} images; the same command with --resume goes on")
                raise
        grid = job.draw() if part[0] == 0 else None
        say(f"{self.out}: {len(mine):,} images{f', {len(missing):,} of them new' if self.resume else ''}")
        if grid is not None:
            say(f"{grid}: the first of them")
        return 0

    def _checked(self) -> tuple[int, int]:
        """Checks what needs no file, and returns the share of this process. Raises `RacError`."""
        if not 1 <= self.count <= MOST:
            raise RacError(f"count {self.count} must be at least 1, and at most {MOST:,}")
        if self.batch < 1:
            raise RacError(f"batch {self.batch} must be at least 1")
        for steps in self.decode_steps:
            check_steps(steps)
        part = part_of(self.part) if self.part is not None else _own_share()
        runtime.check_threads(self.threads)
        runtime.pick_device(self.device)
        # The generator's own settings are not known yet; its numbers are in range, so these are judged alone.
        self._sampling(Sampling())
        return part

    def _sampling(self, own: Sampling) -> Sampling:
        names = {one.name for one in fields(Sampling)}
        given = {name: value for name, value in vars(self).items() if name in names and value is not None}
        return replace(own, **given)

    def _job(self) -> _Job:
        generator = hub.load_generator(self.model)
        labels = self._labels(generator)
        sampling = self._sampling(generator.sampling)
        if sampling.channels is not None and sampling.channels > generator.kind.spec.channels:
            raise RacError(
                f"channels {sampling.channels} to guide are more than the latents have, {generator.kind.spec.channels}"
            )
        self._check_use(sampling)
        weaker = None if self.weaker is None else hub.load_generator(self.weaker)
        size = self._size(generator)
        generator.check_request([one for one in labels if one is not None] or None, sampling, weaker, size)
        name = self.coder or generator.kind.coder
        if name is None:
            raise RacError(f"{self.model} names no coder of its latents; give --coder")
        coder = load_coder(name, self.device)
        generator.check_coder(coder, name)
        need_trained(coder, name, "decode")
        walks = self._walks(coder, name)
        for one in (generator, weaker):
            if one is not None:
                one.to(runtime.pick_device(self.device))
        source = Source(generator, coder, sampling, self.rng_seed, weaker, size, self.bf16)
        wanted = [Wanted(number, self._label(labels, number)) for number in range(self.count)]
        return _Job(source, wanted, walks, self.out, self._record(source, labels, name), self.latents)

    def _check_use(self, sampling: Sampling) -> None:
        """Raises `RacError` for options that would change nothing."""
        for needs, there, names in (
            ("guidance", sampling.guides, ("weaker", "interval", "channels")),
            ("method sde", sampling.method == "sde", ("diffusion", "last_step", "last")),
        ):
            for name in names:
                if getattr(self, name) is not None and not there:
                    option = name.replace("_", "-")
                    raise RacError(f"--{option} has no use without --{needs}; leave it out, or give both")

    def _labels(self, generator: LatentGenerator) -> list[int] | list[None]:
        """Returns the labels that take turns; one None if there are no classes."""
        labels = [generator.label(name) for name in self.classes]
        for place, label in enumerate(labels):
            if label in labels[:place]:
                raise RacError(f"class {self.classes[place]!r} is asked for twice; name each once")
        return labels or list(range(len(generator.classes))) or [None]

    def _label(self, labels: Sequence[int | None], number: int) -> int | None:
        if self.labels == "random":
            return labels[runtime.derived_seed(self.rng_seed, "label", number) % len(labels)]
        return labels[number % len(labels)]

    def _size(self, generator: LatentGenerator) -> tuple[int, int] | None:
        if self.size is None:
            return None
        side, rest = divmod(self.size, generator.kind.spec.factor)
        if rest or side < 1:
            raise RacError(f"size {self.size} must be a multiple of the coder's factor, {generator.kind.spec.factor}")
        return side, side

    def _walks(self, coder: Coder, name: str) -> dict[str, Walk | None]:
        """Returns the ways to decode, by the names of their folders."""
        if not self.decode_steps:
            return {"images": coder.walk("decode")}
        if coder.walk("decode") is None:
            raise RacError(f"{name} decodes in one pass and has no steps; leave out --decode-steps")
        steps = dict.fromkeys(self.decode_steps)
        if len(steps) == 1:
            return {"images": coder.walk("decode", next(iter(steps)))}
        return {f"images-{number}": coder.walk("decode", number) for number in steps}

    def _record(self, source: Source, labels: Sequence[int | None], coder: str) -> dict[str, Any]:
        """Returns all that the images depend on, as JSON."""
        generator = source.generator
        return {
            "generator": {"name": self.model, "weights": weights_hash(generator.state_dict())},
            "coder": {"name": coder, "weights": weights_hash(source.coder.state_dict())},
            "weaker": None if source.weaker is None else weights_hash(source.weaker.state_dict()),
            "sampling": to_json(source.sampling),
            "decode_steps": list(dict.fromkeys(self.decode_steps)),
            "classes": [generator.classes[label] for label in labels if label is not None],
            "labels": self.labels,
            "size": None if source.size is None else self.size,
            "rng_seed": self.rng_seed,
            "bf16": self.bf16,
        }

    def _enter(self, job: _Job, mine: Sequence[Wanted]) -> list[Wanted]:
        """Makes the folder or checks that it was begun alike; returns the images that it lacks. Raises `RacError`."""
        path = self.out / RECORD
        if path.exists():
            found = read_json(path)
            known = {name: found.get(name) for name in job.record} if isinstance(found, dict) else {}
            if changed := differences(json_safe(job.record), known):
                raise RacError(f"{self.out} was generated otherwise: {'; '.join(changed)}; choose another --out")
        elif self.out.exists() and (not self.out.is_dir() or any(one.name != MARKER for one in self.out.iterdir())):
            raise RacError(f"{self.out} is not empty; choose another --out")
        elif self.resume:
            raise RacError(f"{self.out} holds nothing to go on with (no {RECORD}); leave out --resume")
        missing = [one for one in mine if not job.has(one)]
        if len(missing) < len(mine) and not self.resume:
            raise RacError(f"{self.out} holds {len(mine) - len(missing):,} of these images; --resume makes the others")
        make_output(self.out)
        job.enter()
        return missing


@dataclass(frozen=True)
class _Job:
    """The images to make, and where they go."""

    source: Source
    wanted: list[Wanted]
    walks_by_folder: dict[str, Walk | None]
    out: Path
    record: dict[str, Any]
    latents: bool

    @property
    def walks(self) -> list[Walk | None]:
        return list(self.walks_by_folder.values())

    def file(self, folder: str, one: Wanted) -> Path:
        """Returns the file of an image: a folder for each class, so that a search for pictures finds their labels."""
        within = self.out / folder
        if one.label is not None:
            within /= _folder_name(self.source.generator.classes[one.label])
        return within / f"{one.number:06d}.png"

    def has(self, one: Wanted) -> bool:
        """Returns whether all files of a sample are there."""
        images = all(self.file(folder, one).exists() for folder in self.walks_by_folder)
        return images and (not self.latents or self.latent_file(one).exists())

    def latent_file(self, one: Wanted) -> Path:
        return self.out / "latents" / f"{one.number:06d}.safetensors"

    def enter(self) -> None:
        """Writes the record and makes the folders."""
        path = self.out / RECORD
        if not path.exists():
            write_bytes(path, _json(self.record))
        for one in {one.label: one for one in self.wanted}.values():
            for folder in self.walks_by_folder:
                make_folder(self.file(folder, one).parent)
        if self.latents:
            make_folder(self.out / "latents")

    def write(self, samples: Samples) -> None:
        """Writes the files of a batch."""
        for place, one in enumerate(samples.wanted):
            if self.latents:
                self._write_latent(samples.latents[place : place + 1], one)
            for folder, images in zip(self.walks_by_folder, samples.images, strict=True):
                write_image(images[place].float(), self.file(folder, one))

    def _write_latent(self, latent: torch.Tensor, one: Wanted) -> None:
        spec = self.source.coder.spec
        size = latent.shape[-2] * spec.factor, latent.shape[-1] * spec.factor
        LatentFile(latent.float(), spec, size, self.record["coder"]["name"]).write(self.latent_file(one))

    def finish(self, evaluations: int) -> None:
        """Adds to the record how many evaluations of the generator's networks each image took."""
        write_bytes(self.out / RECORD, _json({**self.record, "evaluations": evaluations}))

    def draw(self) -> Path | None:
        """Draws the first images as a grid, and returns its file; None if none of them is there yet."""
        classes = max(1, len(self.record["classes"]))
        columns = min(COLUMNS, classes if classes > 1 else 4)
        several = len(self.walks_by_folder) > 1
        shown = [one for one in self.wanted[: ROWS if several else ROWS * columns] if self.has(one)]
        panels = [self._panel(folder, one) for one in shown for folder in self.walks_by_folder]
        if not panels:
            return None
        across = len(self.walks_by_folder) if several else columns
        rows = [strip(panels[first : first + across]) for first in range(0, len(panels), across)]
        path = self.out / "grid.png"
        write_picture(sheet(rows), path)
        return path

    def _panel(self, folder: str, one: Wanted) -> Panel:
        name = "" if one.label is None else f"{self.source.generator.classes[one.label]} "
        steps = steps_in_words(int(folder.removeprefix("images-"))) if folder != "images" else ""
        return Panel(read_image(self.file(folder, one)), f"{name}{one.number}", steps)


def _own_share() -> tuple[int, int]:
    """Returns the place of this process among those that torchrun started, and their number."""
    return int(os.environ.get("RANK", "0")) if runtime.processes() > 1 else 0, runtime.processes()


def _folder_name(name: str) -> str:
    """Returns the name of a class as one that a folder can have."""
    return re.sub(r"[/\\:*?\"<>|\x00-\x1f]+", "-", name).strip(" .") or "-"


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(json_safe(record), indent=2) + "\n").encode()
