"""Ablations: training variants of a recipe on the same images in the same order, with equal seeds and equal budgets.

Where the budget is a time, it becomes a number of images before anything is trained, by the measured speed of every
variant. The speeds are kept, so an ablation that is broken off and resumed ends as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..config import differences, fixed, read_json, to_json
from ..errors import RacError
from ..files import make_output, write_bytes
from ..recipes import Recipe
from ..train import read_log
from .sweep import Axis, read_axis, variants

TRIAL = 8
"""Number of iterations of each variant's first trial, after which its speed is roughly known."""
TRIAL_SECONDS = 10.0
"""Seconds for which a speed is measured when a time has to become a number of images; a tenth of short budgets."""
GALLERIES = 10
"""Least number of points of the learning curves of held-out images, beside the first."""
LOG_LINES = 50
"""Least number of points of the learning curves of the losses."""

PLAN = "ablation.json"

Equal = Literal["images", "time"]


@dataclass(frozen=True)
class Budget:
    """Budget of each variant: so many iterations of the unchanged recipe, or so many seconds."""

    iterations: int | None = None
    seconds: float | None = None

    @classmethod
    def read(cls, text: str) -> Budget:
        """Parses a budget such as "500", "90s", "10m" or "1.5h". Raises `RacError`."""
        time = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
        if time and float(time[1]) > 0:
            return cls(seconds=float(time[1]) * {"s": 1, "m": 60, "h": 3600}[time[2]])
        if re.fullmatch(r"\d+", text) and int(text) > 0:
            return cls(iterations=int(text))
        raise RacError(f"budget {text!r} is neither a number of iterations, such as 500, nor a time: 90s, 10m, 1.5h")


@dataclass(frozen=True)
class Training:
    """The training of one variant, and the files that it writes."""

    label: str
    recipe: Recipe
    folder: Path

    @property
    def coder(self) -> Path:
        """Folder of the trained coder."""
        return self.folder / self.recipe.product

    @property
    def log(self) -> list[dict[str, Any]]:
        """Records of the training's log, as `rac.train.read_log` gives them."""
        return read_log(self.folder / "log.jsonl")

    @property
    def images(self) -> int:
        """Number of images seen while training, repeated ones counted again."""
        return self.recipe.train.iterations * self.recipe.train.batch

    @property
    def seconds(self) -> float:
        """Seconds spent on training, without galleries and interruptions."""
        seconds, seen = 0.0, 0
        for record in self.log:
            if "train" in record:
                seconds += (record["images"] - seen) / record["images_per_second"]
                seen = record["images"]
        return seconds


@dataclass(frozen=True)
class Ablation:
    """An ablation: variants of a recipe, and how long to train them.

    Raises `RacError` for settings that do not go together.
    """

    recipe: Recipe
    choices: tuple[str, ...]
    """Choices of values such as "spread=nearest,shuffle", as `read_axis` takes them; every combination is a variant."""
    budget: str
    """Length of training, as `Budget.read` takes it. A time holds for the mean of all variants, or for each if `equal`
    is time.
    """
    directory: Path
    equal: Equal = "images"
    """Quantity that all variants get the same amount of."""
    name: str = "as the recipe"
    """Label of the recipe itself, where nothing of it is varied."""
    beside: Mapping[str, Recipe] = field(default_factory=dict)
    """Further recipes by label, of any family, trained and evaluated as they are."""

    def __post_init__(self) -> None:
        if not self.choices and not self.beside:
            raise RacError("nothing is varied; give --vary, such as: --vary spread=nearest,shuffle")
        if self.name in self.beside:
            raise RacError(f"recipe {self.name} is named twice; name each recipe once")
        if "train.iterations" in {axis.name for axis in self._axes}:
            raise RacError("train.iterations is set by the budget; vary another field")
        if Budget.read(self.budget).seconds is None and self.equal == "time":
            raise RacError(f"budget {self.budget} is a number of iterations; for equal time give a time, such as 10m")

    @cached_property
    def _axes(self) -> list[Axis]:
        return [read_axis(choice, self.recipe) for choice in self.choices]

    @cached_property
    def trained(self) -> dict[str, Recipe]:
        """Recipes of the trainings by label, their length still to be set.

        The number of steps that a finished coder takes affects no weight, so varying it needs no further training.
        """
        found = variants(self.recipe, [axis for axis in self._axes if axis.name != self.recipe.steps_field])
        return {**{variant.label or self.name: variant.recipe for variant in found}, **self.beside}

    def steps(self, training: Training) -> tuple[int, ...]:
        """Returns the numbers of steps at which a trained coder is evaluated; none for coders without a flow."""
        name = training.recipe.steps_field
        if name is None:
            return ()
        varied = [tuple(axis.values.values()) for axis in self._axes if axis.name == name]
        return varied[0] if varied and training.label not in self.beside else (getattr(training.recipe, name),)

    def varies(self, *names: str) -> bool:
        """Returns whether any of these fields takes several values."""
        return any(axis.name in names for axis in self._axes)

    @property
    def varies_images(self) -> bool:
        """Whether variants see other images, or in another order, or with other random numbers."""
        return any(axis.name.startswith("data.") or axis.name == "train.rng_seed" for axis in self._axes)

    def enter(self, resume: bool) -> None:
        """Makes the directory, or checks that it holds this very ablation. Raises `RacError`."""
        path = self.directory / PLAN
        if resume and not path.exists():
            raise RacError(f"{self.directory} holds no ablation to resume (no {PLAN}); leave out --resume to start one")
        if resume:
            if other := differences(self._compared(self._asked()), self._compared(read_json(path)["asked"])):
                raise RacError(
                    f"{self.directory} was started with other settings: {'; '.join(other)}; resume it with those"
                )
            return
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise RacError(
                f"{self.directory} is not empty; --resume continues the ablation in it, or choose another --out"
            )
        make_output(self.directory)
        self._keep({})

    def measured(self, note: Callable[[str], None]) -> dict[str, float]:
        """Returns the seconds of training per image, by label: as measured before, or now if that is still to be done.

        Every variant is tried, so that one which cannot be trained at all stops the others before they start. Raises
        `RacError` naming it.
        """
        speeds: dict[str, float] = read_json(self.directory / PLAN)["seconds_per_image"]
        for label, recipe in self.trained.items():
            if label not in speeds:
                note(f"measuring the speed of {label}")
                speeds[label] = self._try(label, recipe)
                self._keep(speeds)
        return speeds

    def trainings(self, seconds_per_image: Mapping[str, float]) -> list[Training]:
        """Returns all trainings, their lengths set by the budget."""
        images = self._images(seconds_per_image)
        found = []
        for number, (label, recipe) in enumerate(self.trained.items(), 1):
            iterations = max(1, round(images[label] / recipe.train.batch))
            folder = self.directory / "runs" / f"{number:02d}-{file_name(label)[:100]}"
            found.append(Training(label, _lasting(recipe, iterations), folder))
        return found

    def train(self, training: Training) -> None:
        """Trains, or continues, one training. A finished training is left as it is. Raises as `rac.train.fit`."""
        begun = (training.folder / "recipe.json").exists()
        if not begun:  # a killed process can leave a folder with nothing to resume in it
            shutil.rmtree(training.folder, ignore_errors=True)
        training.recipe.run(training.folder, resume=begun, crops=self._crops(training.recipe))

    def _images(self, seconds_per_image: Mapping[str, float]) -> dict[str, float]:
        budget = Budget.read(self.budget)
        if budget.iterations is not None:
            return dict.fromkeys(seconds_per_image, float(budget.iterations * self.recipe.train.batch))
        assert budget.seconds is not None
        if self.equal == "time":
            return {label: budget.seconds / seconds for label, seconds in seconds_per_image.items()}
        mean = sum(seconds_per_image.values()) / len(seconds_per_image)
        return dict.fromkeys(seconds_per_image, budget.seconds / mean)

    def _try(self, label: str, recipe: Recipe) -> float:
        """Tries a variant, and returns its seconds per image."""
        budget, batch = Budget.read(self.budget), recipe.train.batch
        try:
            rough = self._timed(recipe, TRIAL)
            if budget.seconds is None:
                return rough
            lasting = min(TRIAL_SECONDS, budget.seconds / 10) / (rough * batch)
            return self._timed(recipe, max(TRIAL, 2 * round(lasting)))
        except RacError as error:
            raise RacError(f"{label}: {error}") from None

    def _timed(self, recipe: Recipe, iterations: int) -> float:
        """Returns the seconds per image in the second half of a training that is thrown away."""
        folder = self.directory / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        train = replace(
            recipe.train,
            iterations=iterations,
            log_every=iterations // 2,
            gallery_every=iterations,
            tensorboard=False,
        )
        try:
            replace(recipe, train=train).run(folder, crops=self._crops(recipe))
            speeds = [record["images_per_second"] for record in read_log(folder / "log.jsonl") if "train" in record]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return 1 / speeds[-1]

    def _crops(self, recipe: Recipe) -> Path:
        """Returns the folder of prepared crops: one folder for all variants that prepare the same."""
        made_from = json.dumps(list(recipe.prepares().values()), sort_keys=True)
        return self.directory / "crops" / hashlib.sha256(made_from.encode()).hexdigest()[:16]

    def _asked(self) -> dict[str, Any]:
        """Returns everything that affects the result, as JSON."""
        recipe = fixed(self.recipe, to_json(self.recipe))
        asked = {"recipe": recipe, "vary": list(self.choices), "budget": self.budget, "equal": self.equal}
        beside = {label: fixed(one, to_json(one)) for label, one in self.beside.items()}
        return {**asked, "beside": beside} if beside else asked

    def _compared(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Returns the result of `_asked` without what may change on resume."""
        beside = {
            label: fixed(self.beside[label], one) if label in self.beside else one
            for label, one in asked.get("beside", {}).items()
        }
        return {**asked, "recipe": fixed(self.recipe, asked["recipe"]), **({"beside": beside} if beside else {})}

    def _keep(self, seconds_per_image: Mapping[str, float]) -> None:
        plan = {"asked": self._asked(), "seconds_per_image": dict(seconds_per_image)}
        write_bytes(self.directory / PLAN, (json.dumps(plan, indent=2) + "\n").encode())


def file_name(label: str) -> str:
    """Returns a label in a form that can be part of a file's name, on any system."""
    return re.sub(r"[^\w.=]+", "-", label).strip("-.")


def _lasting(recipe: Recipe, iterations: int) -> Recipe:
    """Returns the recipe at this length, with galleries and log lines often enough for curves."""
    train = replace(
        recipe.train,
        iterations=iterations,
        gallery_every=min(recipe.train.gallery_every, -(-iterations // GALLERIES)),
        log_every=min(recipe.train.log_every, -(-iterations // LOG_LINES)),
    )
    return replace(recipe, train=train)
