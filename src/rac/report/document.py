"""Tables, and reports that are one HTML file: pictures inside, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

from PIL import Image

from ..errors import printable


def utf8(text: str) -> bytes:
    """Encodes text for a file, with escapes such as \\udcff for the bytes of file names that are not Unicode."""
    return text.encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Table:
    """A table of finished text under named columns. The first column names the row, the others hold numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_csv(self) -> str:
        """Returns comma-separated values, with one header line."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return text.getvalue()

    def to_markdown(self) -> str:
        """Returns a Markdown table, padded so that it reads well as plain text too."""
        rows = [[printable(cell).replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            for row in (rows[0], rule, *rows[1:])
        ]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def to_html(self) -> str:
        """Returns a `<table>`, its text escaped."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in self.rows)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


@dataclass(frozen=True)
class Figure:
    """A picture of a report and the sentence under it."""

    picture: Image.Image
    name: str
    """File name of the picture, without suffix."""
    caption: str = ""

    @cached_property
    def png(self) -> bytes:
        """The picture as a PNG file."""
        buffer = io.BytesIO()
        self.picture.save(buffer, "PNG")
        return buffer.getvalue()

    def to_html(self) -> str:
        """Returns a `<figure>` with the picture in it as base64 PNG."""
        data = base64.b64encode(self.png).decode("ascii")
        width, height = self.picture.size
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        alt = escape(self.caption or self.name)
        image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{alt}">'
        return f"<figure>{image}{caption}</figure>\n"


@dataclass(frozen=True)
class Section:
    """A section of a report: a heading, a few sentences, tables and figures."""

    heading: str
    text: str = ""
    contents: Sequence[Table | Figure] = ()

    def to_html(self) -> str:
        """Returns a `<section>`."""
        text = f"<p>{escape(self.text)}</p>\n" if self.text else ""
        contents = "".join(content.to_html() for content in self.contents)
        return f"<section>\n<h2>{escape(self.heading)}</h2>\n{text}{contents}</section>\n"


def html_report(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """Returns a whole HTML page, to be written as UTF-8."""
    body = "".join(section.to_html() for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(introduction)}</p>\n{body}</body>\n</html>\n"
    )


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c1c1e; background: #fff;
  max-width: 78rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid #ddd; }
p { max-width: 46rem; }
figure { margin: 1.25rem 0; overflow-x: auto; }
figure img { max-width: 100%; height: auto; border: 1px solid #e3e3e6; }
figcaption { color: #6e6e73; font-size: .875rem; max-width: 46rem; }
table { border-collapse: collapse; margin: 1.25rem 0; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid #e3e3e6; }
th { border-bottom: 2px solid #1c1c1e; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
"""
