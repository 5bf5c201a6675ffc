"""`rac bench`: how fast coders and generators are on this machine, and what the time goes into."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from .. import hub, runtime
from ..coders.protocol import Coder
from ..data import DataConfig, open_stream
from ..errors import RacError
from ..experiments.speed import Setting, Speed, best_convolution, coding_speeds, generating_speed, training_speed
from ..flow.grid import check_steps
from ..generators.protocol import LatentGenerator
from ..images import check_size
from ..progress import watched
from ..recipes import RECIPES, Recipe
from ..report.document import Table
from ..train import TrainConfig
from .shared import note, show
from .train import find_recipe

Precision = Literal["fp32", "bf16"]
Job = Literal["encode", "decode", "train", "generate"]

COLUMNS = ("coder", "job", "precision", "images/s", "GFLOP/s", "of best", "what the time goes into")


@dataclass(frozen=True)
class Measured:
    """One line of the result."""

    coder: str
    job: Job
    precision: Precision
    speed: Speed
    share: float
    """Rate as a share of the best convolution's in this precision."""


@dataclass(frozen=True)
class Command:
    """Measure images per second to encode, decode, generate and train, and show where the time of a training step goes.

    GFLOP/s count two operations for each multiply-accumulate; their share is of the best rate that plain convolutions
    reach in the same run. bf16 is autocast with the channels-last layout. Times are medians. On a machine that does
    other work too, compare only the figures of one run.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Coders and generators: shipped names (see `rac models`), directories, or names on the hub. None: all shipped
    coders."""
    jobs: tuple[Job, ...] = ("encode", "decode", "train", "generate")
    """What to measure. Training is measured only for coders that this package can train; generators generate latents,
    and coders do the rest."""
    size: int = 64
    """Side of the square images."""
    batch: int = 16
    """Number of images processed together."""
    steps: int | None = None
    """Number of steps to encode, decode and generate. None: the model's own number."""
    recipe: str = "rac-64"
    """The recipe whose objective is trained. A coder that it does not suit is trained by the first recipe that
    suits."""
    data: tuple[Path, ...] = ()
    """Training images: folders, tar files, single images. None: scikit-image's photographs."""
    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """Precision of the computation."""
    threads: int = 0
    """Number of threads that torch uses. 0: the number that decodes fastest, which is measured first."""
    seconds: float = 2.0
    """Minimum time of each measurement, in seconds."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    format: Literal["table", "markdown", "csv", "json"] = "table"
    """Format of the output."""

    def run(self) -> int:
        """Measure and print; the exit code. Raises `RacError`."""
        self._check()
        device = runtime.pick_device(self.device)
        names = self.models or tuple(hub.available())
        before = torch.get_num_threads()
        try:
            by_threads = self._threads(self._work(names[0]), device)
            best, found = self._measure(names, device)
            self._print(found, best, device, by_threads)
        finally:
            torch.set_num_threads(before)
        return 0

    def _check(self) -> None:
        for name in ("size", "batch"):
            if getattr(self, name) < 1:
                raise RacError(f"--{name} {getattr(self, name)} must be at least 1")
        check_size(self.size)
        if self.seconds < 0 or not self.jobs or not self.precision:
            raise RacError("--seconds must not be negative, and --jobs and --precision need at least one name each")
        if self.steps is not None:
            check_steps(self.steps)
        _, recipe = find_recipe(self.recipe)
        if recipe.product != "coder":
            raise RacError(f"--recipe {self.recipe} trains a {recipe.product}, and only coders are trained here")

    def _recipe(self, coder: Coder, device: torch.device) -> Recipe | None:
        """The recipe that trains `coder`, on the images asked for; None if none does."""
        all_recipes = (recipe for _, recipe in (find_recipe(self.recipe), *RECIPES.values()))
        recipe = next((recipe for recipe in all_recipes if recipe.trains(coder)), None)
        data = DataConfig(paths=self.data, size=self.size)
        train = TrainConfig(batch=self.batch, device=str(device))
        return None if recipe is None else replace(recipe, data=data, train=train)

    def _threads(self, work: Callable[[], object], device: torch.device) -> dict[int, float]:
        if self.threads or device.type != "cpu":
            runtime.set_threads(self.threads)
            return {}
        seconds = runtime.seconds_by_threads(work, rounds=3)
        torch.set_num_threads(min(seconds, key=seconds.__getitem__))
        return seconds

    def _work(self, name: str) -> Callable[[], object]:
        """The work whose time chooses the number of threads: decoding, or generating."""
        if hub.is_generator(name):
            return self._sample(hub.load_generator(name))
        coder = hub.load(name)
        latents = coder.encode(self._images(coder), walk=coder.walk("encode", self.steps))
        return partial(coder.decode, latents, walk=coder.walk("decode", self.steps))

    def _measure(self, names: Sequence[str], device: torch.device) -> tuple[dict[Precision, float], list[Measured]]:
        settings = {one: Setting(device, one == "bf16", self.seconds) for one in self.precision}
        found = []
        plan = [("best convolution", one) for one in settings] + [(name, one) for name in names for one in settings]
        best: dict[Precision, float] = {}
        with closing(watched(plan, " ".join)) as shown:
            for name, precision in shown:
                if precision not in best:
                    best[precision] = best_convolution(settings[precision])
                    continue
                for job, speed in self._speeds(name, settings[precision]):
                    found.append(Measured(name, job, precision, speed, speed.gflops / best[precision]))
        return best, found

    def _speeds(self, name: str, setting: Setting) -> Iterator[tuple[Job, Speed]]:
        if hub.is_generator(name):
            if "generate" in self.jobs:
                generator = hub.load_generator(name).to(setting.device)
                yield "generate", generating_speed(self._sample(generator), self.batch, setting)
            return
        coder = hub.load(name)
        if "encode" in self.jobs or "decode" in self.jobs:
            coding = coding_speeds(coder, self._images(coder), setting, self.steps)
            yield from ((job, coding[job]) for job in ("encode", "decode") if job in self.jobs)
        if "train" in self.jobs and (speed := self._training(name, coder, setting)):
            yield "train", speed

    def _training(self, name: str, coder: Coder, setting: Setting) -> Speed | None:
        recipe = self._recipe(coder, setting.device)
        if recipe is None:
            note(f"no recipe trains {name}, a {type(coder).__name__}")
            return None
        try:
            task = recipe.task(coder)
        except RacError as error:
            note(f"the training of {name} is not measured: {error}")
            return None
        return training_speed(task, open_stream(recipe.data), recipe.train, setting)

    def _sample(self, generator: LatentGenerator) -> Callable[[], object]:
        """Generating a batch of latents, with the generator's own settings but for the steps; classes take turns."""
        factor, own = generator.kind.spec.factor, generator.sampling
        if self.size % (factor * generator.multiple):
            raise RacError(f"--size {self.size} must be a multiple of the generator's {factor * generator.multiple}")
        size = (self.size // factor, self.size // factor)
        sampling = own if self.steps is None else replace(own, steps=self.steps)
        classes = len(generator.classes)
        labels = [number % classes for number in range(self.batch)] if classes else None
        return partial(generator.sample, range(self.batch), labels, sampling, size=size)

    def _images(self, coder: Coder) -> torch.Tensor:
        factor = coder.spec.factor
        if self.size % factor:
            raise RacError(f"--size {self.size} must be a multiple of the coder's factor {factor}")
        return 2 * torch.rand(self.batch, 3, self.size, self.size, generator=runtime.generator(0, "bench")) - 1

    def _print(
        self,
        found: list[Measured],
        best: dict[Precision, float],
        device: torch.device,
        by_threads: dict[int, float],
    ) -> None:
        if self.format == "json":
            print(json.dumps(self._as_dict(found, best, device, by_threads), indent=2))
            return
        table = Table(COLUMNS, tuple(map(_row, found)))
        if self.format != "table":
            print(table.to_csv() if self.format == "csv" else table.to_markdown(), end="")
            return
        threads = f", {_threads(torch.get_num_threads())}" if device.type == "cpu" else ""
        show(table, f"{self.size} x {self.size}, batch {self.batch}, {device}{threads}")
        for precision, gflops in best.items():
            print(f"best convolution in {precision}: {gflops:.4g} GFLOP/s")
        for count, seconds in by_threads.items():
            print(f"{names_of(self)} handles a batch in {1000 * seconds:.4g} ms with {_threads(count)}")

    def _as_dict(
        self,
        found: list[Measured],
        best: dict[Precision, float],
        device: torch.device,
        by_threads: dict[int, float],
    ) -> dict[str, Any]:
        return {
            "size": self.size,
            "batch": self.batch,
            "steps": self.steps,
            "recipe": self.recipe,
            "device": str(device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "seconds_by_threads": by_threads,
            "best_convolution_gflops": best,
            "speeds": [
                {
                    "coder": one.coder,
                    "job": one.job,
                    "precision": one.precision,
                    "images_per_second": one.speed.images_per_second,
                    "gflops": one.speed.gflops,
                    "share": one.share,
                    "seconds": one.speed.seconds,
                    "flops": one.speed.flops,
                    "parts": dict(one.speed.parts),
                }
                for one in found
            ],
        }


def names_of(command: Command) -> str:
    """The model whose speed chose the number of threads."""
    return (command.models or tuple(hub.available()))[0]


def _row(one: Measured) -> tuple[str, ...]:
    speed = one.speed
    whole = sum(speed.parts.values())
    parts = ", ".join(f"{name} {100 * seconds / whole:.0f} %" for name, seconds in speed.parts.items())
    figures = (f"{speed.images_per_second:.4g}", f"{speed.gflops:.3g}", f"{100 * one.share:.0f} %")
    return one.coder, one.job, one.precision, *figures, parts


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
