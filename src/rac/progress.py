"""Progress of long tasks on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from .errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS = 5.0
"""Seconds between the lines of `counting` without a terminal; work that is done sooner prints none."""

T = TypeVar("T")


class ProgressFn(Protocol):
    """A function that a long task calls to report its progress."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """Reports `done` of `total`, which is None if it is not known."""
        ...


@contextmanager
def counting(what: str) -> Iterator[ProgressFn]:
    """Gives a function that shows the progress of the task called `what`, with the time that is left."""
    began = shown = time.monotonic()
    with _bar() as bar:
        task = bar.add_task(what, total=None)

        def progress(done: int, total: int | None = None) -> None:
            nonlocal shown
            bar.update(task, completed=done, total=total)
            if bar.disable and time.monotonic() - shown > SECONDS:
                shown = time.monotonic()
                whole = (
                    f" of {total:,}, {clock((shown - began) * (total - done) / done)} left" if total and done else ""
                )
                print(f"rac: {what}: {done:,}{whole}", file=sys.stderr, flush=True)

        yield progress


def watched(items: Sequence[T], name: Callable[[T], str]) -> Generator[T, None, None]:
    """Yields the items one by one, showing which one is in hand and how many are left.

    Without a terminal that is a line at most every two seconds.
    """
    with _bar() as bar:
        task, shown = bar.add_task("", total=len(items)), time.monotonic()
        for count, item in enumerate(items, 1):
            if bar.disable and time.monotonic() - shown > 2:
                print(f"{count}/{len(items)}  {printable(name(item))}", file=sys.stderr, flush=True)
                shown = time.monotonic()
            bar.update(task, description=printable(name(item)))
            yield item
            bar.advance(task)


def clock(seconds: float) -> str:
    """Returns seconds as hours, minutes and seconds, such as 0:02:10."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _bar() -> Progress:
    # rich takes longer to import than most of what the library's users ask of it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal)
