"""The training loop: the same for every task, and resumed as if it had never stopped."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from .. import runtime
from ..config import differences, read_json, to_json
from ..data import Stream, batches
from ..errors import RacError
from ..files import make_folder, write_bytes
from ..images import write_image
from . import checkpoint
from .config import FREE_ON_RESUME, TrainConfig, learning_rate
from .log import RunLog
from .state import TrainState, train_step
from .task import Task


@dataclass(frozen=True)
class Fitted:
    """What `fit` leaves behind."""

    module: nn.Module
    """The averaged module, in eval mode."""
    iteration: int
    """Iterations done, those before a resume included."""
    metrics: dict[str, float]
    """Figures of the held-out images, from the last gallery."""


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

    With `resume` the run in `directory` goes on from its newest checkpoint; on the CPU it ends with the same weights,
    bit for bit, as if it had not been broken. `stop_at` ends the run after that many iterations, to be resumed later.
    After `settings.minutes` the call returns what it has, saved, with `iteration` short of the whole.
    Ctrl-C and SIGTERM finish the iteration, save, and raise `KeyboardInterrupt`; a second one raises at once.

    Raises:
        RacError: the directory holds a run and `resume` is not set, or the reverse; the recipe differs from the one
            that is resumed; the loss is not finite; no image can be read; the disk is full.
        WeightsError: no checkpoint of the run can be read.
    """
    began = time.monotonic()
    _enter(directory, settings, recipe, resume)
    runtime.set_threads(settings.threads)
    device = runtime.pick_device(settings.device)
    runtime.choose_kernels(device)
    state = TrainState.start(task, settings, device)
    checkpoint.restore_newest(state, directory / "checkpoints")
    start, last = state.iteration, min(settings.iterations, stop_at or settings.iterations)
    saved_at = time.monotonic()
    supply = batches(stream, settings.batch, start, last, settings.workers)
    log = RunLog(directory, start, settings.iterations, settings.batch, settings.tensorboard)
    with _asked_to_stop() as asked, closing(supply), log:
        if start == 0:
            _show(task, state, stream, directory, log)
        for batch in supply:
            log.count(train_step(task, state, batch, settings))
            k = state.iteration
            if k % settings.log_every == 0 or k == last:
                log.write(k, learning_rate(settings, k - 1))
            if k % settings.gallery_every == 0 or k == settings.iterations:
                _show(task, state, stream, directory, log)
            stop = asked.is_set()
            time_is_up = 0 < 60 * settings.minutes <= time.monotonic() - began
            if stop or time_is_up or k == last or time.monotonic() - saved_at >= 60 * settings.checkpoint_minutes:
                _save(task, state, directory)
                saved_at = time.monotonic()
            if stop and k < last:
                log.say(f"stopped after iteration {k} of {settings.iterations}; --resume goes on from there")
                raise KeyboardInterrupt
            if time_is_up and k < last:
                log.say(f"time is up after iteration {k} of {settings.iterations}; --resume goes on from there")
                break
    return Fitted(state.ema, state.iteration, log.latest_held_out)


def _enter(directory: Path, settings: TrainConfig, recipe: Any, resume: bool) -> None:
    """Make `directory`, or check that it holds a run of this recipe; either way write the recipe into it."""
    path = directory / "recipe.json"
    ours = to_json(settings if recipe is None else recipe)
    if not resume:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise RacError(f"{directory} is not empty; --resume goes on with the run in it, or choose another --out")
        make_folder(directory)
    elif not path.exists():
        raise RacError(f"{directory} holds no run to resume (no recipe.json); leave out --resume to start one")
    elif changed := differences(_fixed(ours), _fixed(read_json(path))):
        raise RacError(f"{directory} was trained otherwise: {'; '.join(changed)}; resume it with the recipe it has")
    write_bytes(path, json.dumps(ours, indent=2).encode())


def _fixed(recipe: Any) -> Any:
    """A recipe's JSON without what may change on resume: how it is watched; its length, if nothing hangs on that."""
    if not isinstance(recipe, dict):
        return recipe
    free = FREE_ON_RESUME | ({"iterations"} if recipe.get("schedule") == "constant" else set())
    return {name: _fixed(value) for name, value in recipe.items() if name not in free}


def _show(task: Task, state: TrainState, stream: Stream, directory: Path, log: RunLog) -> None:
    """What the averaged module makes of the held-out images: a picture and figures; and the curves so far."""
    device = next(state.ema.parameters()).device
    with torch.no_grad():
        picture, metrics = task.gallery(state.ema, stream.held_out().to(device))
    write_image(picture, directory / f"gallery-{state.iteration:06d}.png")
    log.held_out(state.iteration, metrics)
    if state.iteration:
        log.draw()


def _save(task: Task, state: TrainState, directory: Path) -> None:
    # In this order: a run killed in between repeats some iterations, and saves the coder again.
    with checkpoint.whole_folder(directory / "coder") as temporary:
        task.save(state.ema, temporary)
    checkpoint.save(state, directory / "checkpoints")


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that an iteration is never cut in two. The second one raises."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
