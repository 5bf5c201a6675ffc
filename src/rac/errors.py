"""The errors a user can cause, and how they are worded.

Every message names the value, what was expected, and how to correct it. The command line prints such an error as one
line and exits with 2; library users catch `RacError` (a `ValueError`), or one of its kinds.
"""

from __future__ import annotations

import os
from unicodedata import category


class RacError(ValueError):
    """An error that the caller can correct: wrong input, or something that the machine refused."""


class ImageError(RacError):
    """Error for a picture file that cannot be read or written as asked."""


class WeightsError(RacError):
    """Error for a name, directory or file of weights that cannot be loaded or saved."""


class ConvergenceWarning(UserWarning):
    """Warning that an implicit step did not reach its tolerance; the result carries the residual."""


def install_extra(extra: str) -> str:
    """Returns the sentence that tells how to install one of the optional extras of pyproject.toml."""
    return f"run pip install '.[{extra}]' in the folder of rac's source code"


def check_path(path: object, error: type[RacError] = RacError) -> None:
    """Raises `error` unless `path` is a path: a string or an `os.PathLike`, not bytes."""
    if not isinstance(path, (str, os.PathLike)):
        raise error(f"expected a path, a string or a pathlib.Path, not {path!r:.80}")


def printable(text: str) -> str:
    """Returns `text` with its control characters and line breaks as escapes such as \\n.

    The names of files may contain both; printed as they are, they would break a line or change a terminal's colours.
    """
    return "".join(
        letter.encode("unicode_escape").decode() if category(letter) in ("Cc", "Zl", "Zp") else letter
        for letter in text
    )


def out_of_memory(error: BaseException) -> bool:
    """Returns whether `error` says that memory ran out, in Python's words or in torch's, on any device."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)
