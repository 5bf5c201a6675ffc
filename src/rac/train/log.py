"""Output of a run: a progress line, log.jsonl, curves, and TensorBoard's events where it is installed."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import printable
from ..files import explained, write_bytes
from ..progress import clock

_PLAIN_SECONDS = 10.0
_NAMED = 5
"""Most damaged pictures named on the screen; log.jsonl has them all."""


class RunLog:
    """Collects the values of every iteration, writes their means, and shows how far the run is.

    Terminals get a live bar on stderr, everything else a plain line every ten seconds. A `silent` one writes and shows
    nothing: it is for the processes beside the first.
    """

    def __init__(
        self,
        directory: Path,
        start: int,
        iterations: int,
        batch: int,
        tensorboard: bool = True,
        silent: bool = False,
    ) -> None:
        self._path = directory / "log.jsonl"
        self._curves = directory / "losses.png"
        # Lines written after the checkpoint that is resumed from would come twice.
        self._records = [record for record in read_log(self._path) if start and record["iteration"] <= start]
        self._silent = silent
        if not silent:
            write_bytes(self._path, "".join(json.dumps(record) + "\n" for record in self._records).encode())
        self._batch, self._iterations = batch, iterations
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._count = 0
        self._before = max((record.get("seconds", 0.0) for record in self._records), default=0.0)
        self._began = self._since = self._printed = time.monotonic()
        self._board = _tensorboard(directory, start) if tensorboard and not silent else None
        self._bar = _bar() if not silent and Console(stderr=True).is_terminal else None
        self._task = self._bar.add_task("", total=iterations, completed=start, values="") if self._bar else None

    def __enter__(self) -> RunLog:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar:
            with suppress(OSError):
                self._bar.stop()
        if self._board:
            self._board.close()

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Excludes the block from the time of the training: galleries, checkpoints."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            self._began, self._since = self._began + spent, self._since + spent

    def count(self, values: dict[str, float]) -> None:
        """Adds the values of one iteration; of a skipped one, whose values are not all finite, only the time."""
        self._count += 1
        if not all(map(math.isfinite, values.values())):
            return
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def write(self, iteration: int, learning_rate: float, skipped: int = 0) -> None:
        """Writes the means since the last time, and shows them; `skipped` iterations of the run changed no weight."""
        now = time.monotonic()
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        speed = self._count * self._batch / max(now - self._since, 1e-9)
        seconds = self._before + now - self._began
        so_far = {"iteration": iteration, "images": iteration * self._batch, "seconds": seconds}
        counted = {"skipped": skipped} if skipped else {}
        self._append({**so_far, "images_per_second": speed, "learning_rate": learning_rate, **counted, "train": means})
        self._show(iteration, speed, {**means, **counted})
        self._sums, self._counts, self._count, self._since = {}, {}, 0, now

    def held_out(self, iteration: int, metrics: dict[str, float]) -> None:
        """Writes metrics of the held-out images."""
        self._append({"iteration": iteration, "held_out": metrics})
        self.say(f"iteration {iteration}, held out: {_listing(metrics)}")

    def damaged(self, iteration: int, pictures: Mapping[str, str]) -> None:
        """Writes which pictures could not be read, and why, if there are any."""
        if pictures:
            self._append({"iteration": iteration, "damaged": dict(pictures)})
            more = f" and {len(pictures) - _NAMED} more, see log.jsonl" if len(pictures) > _NAMED else ""
            self.say(f"skipped {len(pictures)} damaged picture(s): {', '.join(list(pictures)[:_NAMED])}{more}")

    def say(self, line: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self._silent:
            return
        line = printable(line)
        with suppress(OSError):  # a terminal that was closed; the run has still to be saved
            if self._bar:
                self._bar.console.print(line, highlight=False, markup=False)
            else:
                print(line, file=sys.stderr, flush=True)

    @property
    def latest_held_out(self) -> dict[str, float]:
        """Metrics of the held-out images that were written last; empty if there are none."""
        return next((record["held_out"] for record in reversed(self._records) if "held_out" in record), {})

    def draw(self) -> None:
        """Draws all curves into losses.png."""
        if not self._silent:
            write_bytes(self._curves, draw_curves(self._records))

    def _append(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        if self._silent:
            return
        with explained(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board:
            for kind in ("train", "held_out"):
                for name, value in record.get(kind, {}).items():
                    self._board.add_scalar(f"{kind}/{name}", value, record["iteration"])

    def _show(self, iteration: int, speed: float, means: dict[str, float]) -> None:
        if self._bar is not None and self._task is not None:
            shown = f"{speed:.1f} img/s  {_listing(means)}"
            self._bar.update(self._task, completed=iteration, values=shown)
        elif time.monotonic() - self._printed > _PLAIN_SECONDS or iteration == self._iterations:
            self._printed = time.monotonic()
            left = (self._iterations - iteration) * self._batch / speed
            self.say(f"{iteration}/{self._iterations}  {speed:.1f} img/s  {clock(left)} left  {_listing(means)}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a log.jsonl; a last line cut by a crash is left out. No file: no records."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def draw_curves(records: Iterable[dict[str, Any]]) -> bytes:
    """Draws one small panel per named value, over iterations, as PNG; losses on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    curves: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for record in records:
        for kind in ("train", "held_out"):
            for name, value in record.get(kind, {}).items():
                across, up = curves.setdefault((kind, name), ([], []))
                across.append(record["iteration"])
                up.append(value)
    columns = min(4, max(1, len(curves)))
    rows = max(1, -(-len(curves) // columns))
    figure = Figure(figsize=(3.2 * columns, 2.2 * rows))
    # Margins in inches, not a layout engine: that one costs more time than the drawing.
    left, up_down = 0.6 / (3.2 * columns), 0.35 / (2.2 * rows)
    figure.subplots_adjust(left, up_down, 1 - left / 4, 1 - up_down, wspace=0.3, hspace=0.35)
    figure.supxlabel("iteration", y=0.01, fontsize=8)
    for place, ((kind, name), (across, up)) in enumerate(curves.items(), 1):
        panel = figure.add_subplot(rows, columns, place)
        panel.plot(across, up, linewidth=1, marker="." if len(up) < 3 else "", color="C0" if kind == "train" else "C1")
        panel.set_title(name if kind == "train" else f"{name}, held out", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        if kind == "train" and min(up) > 0:
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:.2g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _bar() -> Progress:
    return Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}", markup=False),
        console=Console(stderr=True),
    )


def _tensorboard(directory: Path, start: int) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)


def _listing(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
