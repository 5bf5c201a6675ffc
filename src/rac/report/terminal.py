"""Tables as plain text for a terminal: side by side where that fits, else one record after the other."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import printable

if TYPE_CHECKING:  # it imports Pillow, for which the help text of `rac` need not wait
    from .document import Table

GAP = "  "
LEAST_WIDTH = 20
"""Least width that a layout is made for; on a narrower terminal its lines are broken by the terminal."""


def listing(texts: Mapping[str, str], width: int) -> str:
    """Lays out names and their texts in two columns, in lines of at most `width` characters."""
    longest = max(map(len, texts))
    indent = " " * (longest + 2 * len(GAP))
    room = max(width, len(indent) + LEAST_WIDTH)
    entries = (
        textwrap.fill(text, room, initial_indent=f"{GAP}{name:<{longest}}{GAP}", subsequent_indent=indent)
        for name, text in texts.items()
    )
    return "\n".join(entries) + "\n"


def table_text(table: Table, width: int) -> str:
    """Lays out a table in lines of at most `width` characters.

    Headings may be broken between words, figures never. Where the columns do not fit side by side, each row becomes a
    record: its first cell, and a line "heading  value" for each further cell that is not empty. Only a single word
    longer than the width makes a longer line; nothing is cut.
    """
    width = max(width, LEAST_WIDTH)
    table = replace(table, rows=tuple(tuple(map(printable, row)) for row in table.rows))
    widths = [_least(column, cells) for column, cells in _columns(table)]
    room = width - sum(widths) - len(GAP) * (len(widths) - 1)
    if room < 0:
        return _records(table, width)
    for index, column in enumerate(table.columns):  # headings on one line as long as there is room
        more = max(_cells(column) - widths[index], 0)
        if more <= room:
            widths[index], room = widths[index] + more, room - more
    heads = [_wrapped(column, wide) for column, wide in zip(table.columns, widths, strict=True)]
    height = max(map(len, heads))
    # The last lines of all headings stand above the cells.
    lines = zip(*([""] * (height - len(head)) + head for head in heads), strict=True)
    return "".join(_line(cells, widths) for cells in [*lines, *table.rows])


def _records(table: Table, width: int) -> str:
    longest = max((_cells(word) for row in table.rows for cell in row[1:] for word in cell.split()), default=0)
    room = max(width - longest - 2 * len(GAP), LEAST_WIDTH // 2)
    headings = [_wrapped(column, room) for column in table.columns[1:]]
    heading = max((_cells(line) for lines in headings for line in lines), default=0)
    records = []
    for row in table.rows:
        lines = _wrapped(row[0], width)
        for names, cell in zip(headings, row[1:], strict=True):
            if not cell:
                continue
            values = _wrapped(cell, width - heading - 2 * len(GAP))
            for index in range(max(len(names), len(values))):
                name = names[index] if index < len(names) else ""
                value = values[index] if index < len(values) else ""
                lines.append(f"{GAP}{_padded(name, heading)}{GAP}{value}".rstrip())
        records.append("\n".join(lines) + "\n")
    return "\n".join(records)


def _columns(table: Table) -> list[tuple[str, list[str]]]:
    return [(column, [row[index] for row in table.rows]) for index, column in enumerate(table.columns)]


def _least(column: str, cells: Sequence[str]) -> int:
    """Returns the width of the longest cell, and of the longest word in the heading."""
    return max(map(_cells, [*column.split(), *cells]), default=0)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        _padded(cell, wide, right=index > 0) for index, (cell, wide) in enumerate(zip(cells, widths, strict=True))
    ]
    return GAP.join(padded).rstrip() + "\n"


def _padded(text: str, width: int, right: bool = False) -> str:
    spaces = " " * (width - _cells(text))
    return spaces + text if right else text + spaces


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]


def _cells(text: str) -> int:
    """Returns the columns that a terminal needs for `text`: letters such as Chinese take two."""
    from rich.cells import cell_len

    return cell_len(text)
