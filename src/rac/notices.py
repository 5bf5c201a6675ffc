"""Messages of the library: the logger `rac`, which a library keeps quiet and the command line prints.

A program that wants them adds a handler to `logging.getLogger("rac")`, as to any other logger.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import printable

log = logging.getLogger("rac")
log.addHandler(logging.NullHandler())

_said: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Logs `message` as a warning, unless another one of this `kind` was logged before in this run of the program."""
    if kind not in _said:
        _said.add(kind)
        log.warning(message)


@contextmanager
def spoken() -> Iterator[None]:
    """Prints messages logged within the block on stderr, each a line that begins with `rac: `.

    The block counts as a new run of the program, for `warn_once`.
    """
    _said.clear()
    handler = _Stderr()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Stderr(logging.Handler):
    """A handler that looks `sys.stderr` up for each line, so that whoever replaces it gets the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(" ".join(record.getMessage().split()))
        print(f"rac: {line}", file=sys.stderr, flush=True)
