"""Checks of the numbers that the page's controls send."""

from __future__ import annotations

from ..errors import RacError

GREATEST_STEPS = 16
"""Most steps of a coder."""


def whole_number(value: object, least: int, greatest: int, words: str) -> int:
    """Returns a number as an int.

    - `value`: what a control sent; boxes of numbers send whole numbers as floats.
    - `least`, `greatest`: the range.
    - `words`: what is wrong with another value, which stands in the place of {}.

    Raises `RacError` unless it is whole and within the range.
    """
    if isinstance(value, (int, float)) and least <= value <= greatest and float(value).is_integer():
        return int(value)
    raise RacError(f"{words.format(value)}; give a whole number from {least} to {greatest}")


def number_in(value: object, least: float, greatest: float, words: str) -> float:
    """Returns a number as a float; the arguments are those of `whole_number`. Raises `RacError` out of the range."""
    if isinstance(value, (int, float)) and least <= value <= greatest:
        return float(value)
    raise RacError(f"{words.format(value)}; give a number from {least} to {greatest}")
