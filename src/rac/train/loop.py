"""The training loop: the same for every task, and resumed as if it had never stopped."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from .. import runtime
from ..config import differences, read_json, to_json
from ..data import Batch, Stream, batches, check_pictures
from ..errors import RacError
from ..files import MARKER, explained, make_output, write_bytes
from ..images import write_image
from ..storage import write_tensors
from . import checkpoint
from .config import FREE_ON_RESUME, TrainConfig, learning_rate
from .log import RunLog
from .processes import Processes, answered
from .step import DivergedError, TrainState, train_step
from .task import Task


@dataclass(frozen=True)
class Fitted:
    """What `fit` leaves behind."""

    module: nn.Module
    """The averaged module, in eval mode."""
    iteration: int
    """Iterations done, those before a resume included."""
    metrics: dict[str, float]
    """Figures of the held-out images, from the last gallery; on several processes the first one alone has them."""


def fit(
    task: Task,
    stream: Stream,
    settings: TrainConfig,
    directory: Path,
    *,
    recipe: Any = None,
    resume: bool = False,
    stop_at: int | None = None,
) -> Fitted:
    """Train `task` on `stream` and keep everything in `directory`.

    Written there: recipe.json (`recipe`, a dataclass holding all that shapes the run; `settings` if there is none),
    log.jsonl, losses.png, gallery-<iteration>.png, checkpoints/<iteration>/, and coder/, which is what `task.save`
    makes of the averaged module, renewed with every checkpoint.

    Where `torchrun` or `accelerate launch` started several processes, all of them call this, with equal arguments: each
    reads its own rows of every batch, and the first writes (`rac.train.processes`). `directory` must be on a disk that
    all of them see. A run goes on on any number of processes.

    With `resume` the run in `directory` goes on from its newest checkpoint; on the CPU it ends with the same weights,
    bit for bit, as if it had not been broken. `stop_at` ends the run after that many iterations, to be resumed later.
    Ctrl-C finishes the iteration, saves, and raises `KeyboardInterrupt`; SIGTERM, by which machines are taken back,
    does the same and raises `SystemExit` with the code 0. A second one raises at once, unless there are several
    processes, whose launcher hands signals on. After `settings.minutes` the call returns what it has, saved, with
    `iteration` short of the whole.

    Raises:
        RacError: the directory holds a run and `resume` is not set, or the reverse; the recipe differs from the one
            that is resumed; the loss is not finite (the batch is then kept in diverged-<iteration>.safetensors);
            no image can be read, or none came for `settings.patience_minutes`; another process has ended or did
            not answer for so long; the disk is full.
        WeightsError: no checkpoint of the run can be read.
    """
    began = time.monotonic()
    patience = 60 * settings.patience_minutes
    processes = Processes.join(settings.device, patience)
    _check_parts(settings, processes)
    with processes.in_turn():
        if processes.first:
            _enter(directory, settings, recipe, resume)
            check_pictures(stream.fingerprint, directory)
    runtime.set_threads(settings.threads)
    device = runtime.pick_device(settings.device)
    runtime.choose_kernels(device)
    state = TrainState.start(task, settings, device, processes)
    checkpoint.restore_newest(state, directory / "checkpoints")
    _check_start(state, directory)
    start, last = state.iteration, min(settings.iterations, stop_at or settings.iterations)
    saved_at = time.monotonic()
    rows = processes.rows(settings.batch)
    supply = batches(stream, settings.batch, start, last, settings.workers, rows=rows, patience=patience)
    log = RunLog(directory, start, settings.iterations, settings.batch, settings.tensorboard, not processes.first)
    with _asked_to_stop(processes) as asked, closing(supply), answered(), log:
        if start == 0:
            _show(task, state, stream, directory, log)
        for batch in supply:
            log.count(_step(task, state, batch, settings, directory))
            k = state.iteration
            if k % settings.log_every == 0 or k == last:
                log.write(k, learning_rate(settings, k - 1), state.skipped)
            if k % settings.gallery_every == 0 or k == settings.iterations:
                _show(task, state, stream, directory, log)
            # The clocks of processes differ, and a signal may reach only some of them.
            due = time.monotonic() - saved_at >= 60 * settings.checkpoint_minutes
            late = 0 < 60 * settings.minutes <= time.monotonic() - began
            number, due_anywhere, time_is_up = processes.agree([asked.number, due, late])
            if number or k == last or due_anywhere or time_is_up:
                with log.elsewhere():
                    _save(task, state, directory)
                saved_at = time.monotonic()
            if number or k == last or time_is_up:
                log.damaged(k, {name: why for found in processes.gather(stream.skipped) for name, why in found.items()})
            if number and k < last:
                log.say(f"stopped after iteration {k} of {settings.iterations}; --resume goes on from there")
                raise SystemExit(0) if number == signal.SIGTERM else KeyboardInterrupt
            if time_is_up and k < last:
                log.say(f"time is up after iteration {k} of {settings.iterations}; --resume goes on from there")
                break
    return Fitted(state.averaged(), state.iteration, log.latest_held_out)


def _check_parts(settings: TrainConfig, processes: Processes) -> None:
    fewest = settings.batch // processes.count
    if fewest < settings.accumulate:
        raise RacError(
            f"a batch of {settings.batch} cannot be split over {processes.count} processes into {settings.accumulate} "
            "part(s) each; raise batch, or lower accumulate"
        )


def _check_start(state: TrainState, directory: Path) -> None:
    found = state.processes.gather(state.iteration)
    if len(set(found)) > 1:
        raise RacError(
            f"the processes would go on from different checkpoints, of iterations {found}; {directory} must be on a "
            "disk that all of them see"
        )


def _enter(directory: Path, settings: TrainConfig, recipe: Any, resume: bool) -> None:
    """Make `directory`, or check that it holds a run of this recipe; either way write the recipe into it."""
    path = directory / "recipe.json"
    ours = to_json(settings if recipe is None else recipe)
    if not resume:
        if directory.exists() and (not directory.is_dir() or any(map(_counts, directory.iterdir()))):
            raise RacError(f"{directory} is not empty; --resume goes on with the run in it, or choose another --out")
        make_output(directory)
    elif not path.exists():
        raise RacError(f"{directory} holds no run to resume (no recipe.json); leave out --resume to start one")
    elif changed := differences(_fixed(ours), _fixed(read_json(path))):
        raise RacError(f"{directory} was trained otherwise: {'; '.join(changed)}; resume it with the recipe it has")
    write_bytes(path, json.dumps(ours, indent=2).encode())


def _counts(path: Path) -> bool:
    """Whether a file makes a folder used: not what a run left that was killed while it wrote its recipe."""
    return path.name != MARKER and not (path.name.startswith(".recipe.json.") and path.name.endswith(".tmp"))


def _fixed(recipe: Any) -> Any:
    """A recipe's JSON without what may change on resume: how it is watched; its length, if nothing hangs on that."""
    if not isinstance(recipe, dict):
        return recipe
    free = FREE_ON_RESUME | ({"iterations"} if recipe.get("schedule") == "constant" else set())
    # What is unset counts as absent, so that a run goes on that was begun before a setting existed.
    return {name: _fixed(value) for name, value in recipe.items() if name not in free and value not in ([], None)}


def _show(task: Task, state: TrainState, stream: Stream, directory: Path, log: RunLog) -> None:
    """What the averaged module makes of the held-out images: a picture and figures; and the curves so far."""
    with torch.no_grad(), log.elsewhere():
        averaged = state.averaged()
        if not state.processes.first:
            return
        picture, metrics = task.gallery(averaged, stream.held_out().to(next(averaged.parameters()).device))
        write_image(picture, directory / f"gallery-{state.iteration:06d}.png")
        log.held_out(state.iteration, metrics)
        if state.iteration:
            log.draw()


def _save(task: Task, state: TrainState, directory: Path) -> None:
    averaged = state.averaged()
    # In this order: a run killed in between repeats some iterations, and saves the coder again.
    if state.processes.first:
        with checkpoint.whole_folder(directory / "coder") as temporary:
            task.save(averaged, temporary)
    checkpoint.save(state, directory / "checkpoints")


def _step(task: Task, state: TrainState, batch: Batch, settings: TrainConfig, directory: Path) -> dict[str, float]:
    try:
        return train_step(task, state, batch, settings)
    except DivergedError as error:
        path = _keep(batch, error, settings, state.processes, directory)
        raise RacError(f"{error}; the batch is in {path}") from error


def _keep(batch: Batch, error: DivergedError, settings: TrainConfig, processes: Processes, directory: Path) -> Path:
    """Write a batch on which training diverged, and beside it what it gave; where the batch is.

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
    """Which signal asked the run to stop; 0: none."""

    number: int = 0


@contextmanager
def _asked_to_stop(processes: Processes) -> Iterator[_Asked]:
    """Takes note of Ctrl-C and SIGTERM, so that an iteration is never cut in two. The second one raises.

    Not on several processes: there the launcher, which was asked too, sends it.
    """
    asked = _Asked()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.number and processes.count == 1:
            raise SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt
        asked.number = number

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
