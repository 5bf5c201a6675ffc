"""The training loop: the same for every task, and resumed as if it had never stopped."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from .. import hub, runtime
from ..config import differences, fixed, read_json, to_json
from ..data import Batch, Stream, batches, check_pictures
from ..errors import RacError
from ..files import MARKER, explained, locked, make_output, write_bytes
from ..images import write_image
from ..storage import write_tensors
from . import checkpoint
from .config import TrainConfig, learning_rate
from .log import RunLog
from .processes import Processes, answered
from .step import DivergedError, TrainState, train_step
from .task import Task


@dataclass(frozen=True)
class Fitted:
    """Result of a training: the finished modules and their metrics."""

    modules: Mapping[str, nn.Module]
    """The finished modules by the names of their parts, as `Task.gallery` gets them."""
    iteration: int
    """Number of iterations done, those before a resume included."""
    metrics: dict[str, float]
    """Metrics of the held-out images, from the last gallery; on several processes only the first one has them."""

    @property
    def module(self) -> nn.Module:
        """The finished module of the first part."""
        return next(iter(self.modules.values()))


def fit(
    task: Task,
    stream: Stream,
    settings: TrainConfig,
    directory: Path,
    *,
    recipe: Any = None,
    resume: bool = False,
    stop_at: int | None = None,
    product: str = hub.PRODUCTS[0],
) -> Fitted:
    """Trains `task` on `stream` and writes everything to `directory`.

    Written there: recipe.json, log.jsonl, losses.png, gallery-<iteration>.png, checkpoints/<iteration>/, and the folder
    `product`, which `task.save` writes from the finished modules, renewed with every checkpoint.

    Where `torchrun` or `accelerate launch` started several processes, all of them call this, with equal arguments: each
    reads its own rows of every batch, and the first writes (`rac.train.processes`). `directory` must be on a disk that
    all of them see. A run can continue on any number of processes.

    Ctrl-C finishes the iteration, saves, and raises `KeyboardInterrupt`; SIGTERM, by which machines are taken back, and
    SIGHUP, which a closed terminal sends, do the same and raise `SystemExit` with the code 0. A second one raises at
    once, unless there are several processes, whose launcher hands signals on. After `settings.minutes` the call returns
    what it has, saved, with `iteration` short of the whole.

    Args:
        task: the parts to train, and their terms.
        stream: the training images, and the held-out ones.
        settings: length, learning rate, device and the like.
        directory: the folder of the run.
        recipe: a dataclass holding all that shapes the run, for recipe.json; None: `settings`.
        resume: go on from the newest checkpoint in `directory`; on the CPU the run ends with the same weights, bit for
            bit, as if it had not been broken.
        stop_at: end the run after that many iterations, to be resumed later.
        product: name of the folder for the trained product.

    Raises:
        RacError: As `check_run`; the loss is not finite (the batch is then kept in diverged-<iteration>.safetensors);
            no image can be read, or none came for `settings.patience_minutes`; another process has ended or did
            not answer for so long; the disk is full.
        WeightsError: No checkpoint of the run can be read.
    """
    began = time.monotonic()
    processes = Processes.join(settings.device, 60 * settings.patience_minutes)
    with ExitStack() as entered:
        with processes.in_turn():
            check_run(directory, settings, recipe=recipe, resume=resume, processes=processes)
            if processes.first:
                entered.enter_context(_entered(directory, settings if recipe is None else recipe))
                check_pictures(stream.fingerprint, directory)
        runtime.set_threads(settings.threads)
        device = runtime.pick_device(settings.device)
        runtime.choose_kernels(device)
        state = TrainState.start(task, settings, device, processes)
        checkpoint.restore_newest(state, directory / "checkpoints")
        _check_start(state, directory)
        run = _Run(task, stream, settings, directory, directory / product, state, began)
        return run.to(min(settings.iterations, stop_at or settings.iterations))


@dataclass(frozen=True)
class _Run:
    """State and helpers of one call of `fit`."""

    task: Task
    stream: Stream
    settings: TrainConfig
    directory: Path
    product: Path
    state: TrainState
    began: float

    def to(self, last: int) -> Fitted:
        """Trains until iteration `last`."""
        state, settings, stream, directory = self.state, self.settings, self.stream, self.directory
        processes, start, patience = state.processes, state.iteration, 60 * settings.patience_minutes
        saved_at = time.monotonic()
        rows = processes.rows(settings.batch)
        supply = batches(stream, settings.batch, start, last, settings.workers, rows=rows, patience=patience)
        log = RunLog(directory, start, settings.iterations, settings.batch, settings.tensorboard, not processes.first)
        with _asked_to_stop(processes) as asked, closing(supply), answered(), log:
            if start == 0:
                self._show(log)
            for batch in supply:
                log.count(self._step(batch))
                k = state.iteration
                if k % settings.log_every == 0 or k == last:
                    log.write(k, learning_rate(settings, k - 1), state.skipped)
                if k % settings.gallery_every == 0 or k == settings.iterations:
                    self._show(log)
                # The clocks of processes differ, and a signal may reach only some of them.
                due = time.monotonic() - saved_at >= 60 * settings.checkpoint_minutes
                late = 0 < 60 * settings.minutes <= time.monotonic() - self.began
                number, due_anywhere, time_is_up = processes.agree([asked.number, due, late])
                if number or k == last or due_anywhere or time_is_up:
                    with log.elsewhere():
                        self._save()
                    saved_at = time.monotonic()
                if number or k == last or time_is_up:
                    found = processes.gather(stream.skipped)
                    log.damaged(k, {name: why for skipped in found for name, why in skipped.items()})
                if number and k < last:
                    log.say(f"stopped after iteration {k} of {settings.iterations}; --resume continues from there")
                    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)
                if time_is_up and k < last:
                    log.say(f"time is up after iteration {k} of {settings.iterations}; --resume continues from there")
                    break
        return Fitted(state.finished(), state.iteration, log.latest_held_out)

    def _show(self, log: RunLog) -> None:
        """Writes a picture and metrics of the finished modules on the held-out images, and the curves so far."""
        state = self.state
        with torch.no_grad(), log.elsewhere():
            modules = state.finished()
            if not state.processes.first:
                return
            picture, metrics = self.task.gallery(modules, self.stream.held_out().to(state.device))
            write_image(picture, self.directory / f"gallery-{state.iteration:06d}.png")
            log.held_out(state.iteration, metrics)
            if state.iteration:
                log.draw()

    def _save(self) -> None:
        modules = self.state.finished()
        # In this order: a run killed in between repeats some iterations, and saves the product again.
        if self.state.processes.first:
            with checkpoint.whole_folder(self.product) as temporary:
                self.task.save(modules, self.stream, temporary)
        checkpoint.save(self.state, self.directory / "checkpoints")

    def _step(self, batch: Batch) -> dict[str, float]:
        try:
            return train_step(self.task, self.state, batch, self.settings)
        except DivergedError as error:
            path = _keep(batch, error, self.settings, self.state.processes, self.directory)
            raise RacError(f"{error}; the batch is in {path}") from error


def check_run(
    directory: Path,
    settings: TrainConfig,
    *,
    recipe: Any = None,
    resume: bool = False,
    processes: Processes | None = None,
) -> None:
    """Checks, without writing anything, that `fit` can run with these arguments.

    - `directory`: the folder of the run.
    - `settings`: settings of the training.
    - `recipe`: the recipe of the run.
    - `resume`: whether the run in `directory` is to go on.
    - `processes`: the processes that train; None: finds out.

    Raises `RacError` where `directory` holds a run and `resume` is not set, or the reverse; where the run in it has
    another recipe, or another process is training it; where a batch is too small for its pieces; where the device is
    not there.
    """
    processes = processes or Processes()
    runtime.pick_device(settings.device)
    if settings.batch // processes.count < settings.accumulate:
        raise RacError(
            f"a batch of {settings.batch} cannot be split over {processes.count} processes into {settings.accumulate} "
            "part(s) each; raise batch, or lower accumulate"
        )
    if processes.first:
        _check_folder(directory, settings if recipe is None else recipe, resume)


def _check_folder(directory: Path, recipe: Any, resume: bool) -> None:
    path, ours = directory / "recipe.json", to_json(recipe)
    if not resume:
        if directory.exists() and (not directory.is_dir() or any(map(_counts, directory.iterdir()))):
            raise RacError(f"{directory} is not empty; --resume continues the run in it, or choose another --out")
    elif not path.exists():
        raise RacError(f"{directory} holds no run to resume (no recipe.json); leave out --resume to start one")
    elif changed := differences(fixed(recipe, ours), fixed(recipe, read_json(path))):
        raise RacError(
            f"{directory} was trained with other settings: {'; '.join(changed)}; resume it with the settings that it "
            "has"
        )
    else:
        with _alone(directory):
            pass


def _alone(directory: Path) -> AbstractContextManager[None]:
    return locked(directory, f"another process is training in {directory}; wait for its end, or choose another --out")


@contextmanager
def _entered(directory: Path, recipe: Any) -> Iterator[None]:
    """Makes `directory` and writes the recipe into it; no other process may train in it during the block."""
    make_output(directory)
    with _alone(directory):
        write_bytes(directory / "recipe.json", json.dumps(to_json(recipe), indent=2).encode())
        yield


def _counts(path: Path) -> bool:
    """Returns whether a file shows that a folder is in use.

    Files of a run that was killed while it wrote its recipe do not.
    """
    return path.name != MARKER and not (path.name.startswith(".recipe.json.") and path.name.endswith(".tmp"))


def _check_start(state: TrainState, directory: Path) -> None:
    found = state.processes.gather(state.iteration)
    if len(set(found)) > 1:
        raise RacError(
            f"the processes would continue from different checkpoints, of iterations {found}; {directory} must be on a "
            "disk that all of them share"
        )


def _keep(batch: Batch, error: DivergedError, settings: TrainConfig, processes: Processes, directory: Path) -> Path:
    """Writes a batch on which training diverged, and its values beside it, and returns the path.

    Each process writes its own rows, into a file of its own.
    """
    beside = "" if processes.first else f"-process-{processes.rank}"
    path = directory / f"diverged-{error.iteration:08d}{beside}.safetensors"
    with explained(path):
        write_tensors(path, {name: tensor for name, tensor in batch._asdict().items() if tensor is not None})
    # JSON knows no nan and no infinity.
    values = {name: value if isfinite(value) else str(value) for name, value in error.values.items()}
    first_image = processes.rows(settings.batch).start
    about = {"iteration": error.iteration, "first_image": first_image, "rng_seed": settings.rng_seed, "terms": values}
    write_bytes(path.with_suffix(".json"), json.dumps(about, indent=2).encode())
    return path


@dataclass
class _Asked:
    """The signal that asked the run to stop; 0: none."""

    number: int = 0


@contextmanager
def _asked_to_stop(processes: Processes) -> Iterator[_Asked]:
    """Notes Ctrl-C, SIGTERM and SIGHUP, so that an iteration is never cut in two. The second one raises.

    Not on several processes: there the launcher, which was asked too, sends it. A SIGHUP that is ignored, as under
    nohup, stays so.
    """
    asked = _Asked()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.number and processes.count == 1:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        asked.number = number

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
