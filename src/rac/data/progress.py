"""Saying how far a long preparation is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

SECONDS = 5.0
"""Between lines where there is no terminal; work that is done sooner goes without."""


class Told(Protocol):
    """What a long task tells how far it is."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """`done` of `total`, which is None where it is not known."""
        ...


@contextmanager
def counting(what: str) -> Iterator[Told]:
    """Gives a function to be told how far a task is; stderr shows it, as a bar on a terminal, else as lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def told(done: int, total: int | None = None) -> None:
            nonlocal shown
            bar.update(task, completed=done, total=total)
            if bar.disable and time.monotonic() - shown > SECONDS:
                shown = time.monotonic()
                print(f"rac: {what}: {done:,}{f' of {total:,}' if total else ''}", file=sys.stderr, flush=True)

        yield told
