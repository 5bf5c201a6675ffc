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


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, in Python's words or in torch's, on any device."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def install(extra: str) -> str:
    """The command that installs one of this package's extras, such as `serve`: in the folder of its source."""
    return f"pip install '.[{extra}]' in rac's source folder"
