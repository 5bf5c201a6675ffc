"""Pieces of the page's HTML: notes, pictures, tables and film strips."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..evaluate.one_image import Reconstruction
from ..flow import Trajectory
from ..images import crop, to_pixels
from ..report.document import Table

FILM_SIDE = 144
"""Longer side, in pixels, of the pictures in a film strip."""


class Cell(NamedTuple):
    """A picture with its name and a short note."""

    name: str
    note: str
    image: Tensor
    """The image, 1 3 H W or 3 H W in [-1, 1]."""


def notes_html(*notes: str) -> str:
    """Lays out notes, leaving out those that are empty."""
    return "".join(f"<p class='rac-note'>{escape(note)}</p>" for note in notes if note)


def versions_html(image: Tensor, versions: Sequence[Reconstruction]) -> str:
    """Lays out the original and its versions side by side."""
    cells = [Cell("original", f"{image.shape[-1]} x {image.shape[-2]}", image)]
    cells += [Cell(one.name, f"{_decibels(one.psnr)} dB", one.image) for one in versions]
    return pictures_html(cells, 3 if len(cells) in (3, 5, 6) else len(cells))


def pictures_html(cells: Sequence[Cell], columns: int) -> str:
    """Lays out pictures in so many columns; zoomed, they show the same part."""
    figures = "".join(
        f"<figure><div class='rac-lens'><img src='{_png(picture)}' alt='{escape(name)}, {escape(note)}'></div>"
        f"<figcaption><b>{escape(name)}</b><span>{escape(note)}</span></figcaption></figure>"
        for name, note, picture in cells
    )
    reached = "tabindex='0' role='group' aria-label='Pictures; when zoomed, the arrow keys move the part that is shown'"
    return f"<div class='rac-pictures' style='--columns:{columns}' {reached}>{figures}</div>"


def figures_html(versions: Sequence[Reconstruction], what: str) -> str:
    """Tabulates PSNR, SSIM, time and cost of each version."""
    rows = tuple(
        (
            one.name,
            _decibels(one.psnr),
            "-" if math.isnan(one.ssim) else f"{one.ssim:.3f}",
            f"{1000 * one.seconds:,.0f} ms",
            f"{one.evaluations}",
            f"{one.macs / 1e9:.3g}",
        )
        for one in versions
    )
    return table_html(Table((what, "PSNR dB", "SSIM", "time", "evaluations", "GMACs"), rows))


def table_html(table: Table) -> str:
    """Shows a table, which scrolls where it is too wide."""
    return f"<div class='rac-table' tabindex='0' role='region' aria-label='Table'>{table.to_html()}</div>"


def film_html(title: str, flow: Trajectory | None, image: Tensor) -> str:
    """Shows the first three channels of the states of a flow, in the order of computation."""
    if flow is None:
        return ""
    frames = "".join(
        f"<figure><img src='{_thumbnail(crop(state[:, :3], (image.shape[-2], image.shape[-1])))}' alt='t = {time:.3g}'>"
        f"<figcaption>t = {time:.3g}</figcaption></figure>"
        for state, time in zip(flow.states, flow.times, strict=True)
    )
    reached = f"tabindex='0' role='region' aria-label='{escape(title)}'"
    return f"<h3 class='rac-title'>{escape(title)}</h3><div class='rac-film' {reached}>{frames}</div>"


def _decibels(psnr: float) -> str:
    return f"{psnr:.2f}" if math.isfinite(psnr) else "∞"


def _png(image: Tensor) -> str:
    return _data(Image.fromarray(to_pixels(image)), "PNG")


def _thumbnail(image: Tensor) -> str:
    picture = Image.fromarray(to_pixels(image))
    picture.thumbnail((FILM_SIDE, FILM_SIDE), Image.Resampling.LANCZOS)
    return _data(picture, "JPEG", quality=92, subsampling=0)


def _data(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
