"""The errors a user can cause, and how they are worded.

Every message names the value, what was expected, and the mend. The command line prints such an error as one line
and exits with 2; library users catch `RacError` (a `ValueError`), or one of its kinds.
"""

from __future__ import annotations


class RacError(ValueError):
    """Something the caller gave, or the machine refused, that the caller can mend."""


class ImageError(RacError):
    """A picture file that cannot be read or written as asked."""


class WeightsError(RacError):
    """A name, directory or file of weights that cannot be loaded or saved."""


class ConvergenceWarning(UserWarning):
    """An implicit step did not reach its tolerance; the result carries the residual."""


def install_extra(extra: str) -> str:
    """Returns the sentence that tells how to install one of the optional extras of pyproject.toml."""
    return f"run pip install '.[{extra}]' in the folder of rac's source code"


def out_of_memory(error: BaseException) -> bool:
    """Returns whether `error` says that memory ran out, in Python's words or in torch's, on any device."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)
