"""What the library tells while it works: the logger `rac`, which a library keeps quiet and the command line prints.

A program that wants to hear it adds a handler to `logging.getLogger("rac")`, as to any other logger.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("rac")
log.addHandler(logging.NullHandler())

_said: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Log `message` as a warning, unless another one of this `kind` was logged before in this run of the program."""
    if kind not in _said:
        _said.add(kind)
        log.warning(message)


@contextmanager
def spoken() -> Iterator[None]:
    """Prints what is logged meanwhile on stderr, a line each that begins with `rac: `, as a new run of the program."""
    _said.clear()
    handler = _Stderr()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Stderr(logging.Handler):
    """Looks `sys.stderr` up for each line, so that whoever replaces it gets the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"rac: {' '.join(record.getMessage().split())}", file=sys.stderr, flush=True)
