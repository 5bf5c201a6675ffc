"""Pictures for people: labelled strips, sheets of strips, trajectories, curves.

All functions return a `PIL.Image`, dark writing on white; `images.write_picture` puts it into a file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..flow import Trajectory
from ..images import to_pixels

LEAST_SIDE = 160
"""Least length of the shorter side in pixels; smaller pictures are enlarged to it, pixel by pixel."""
GREATEST_SIDE = 512
"""Greatest length of the longer side in pixels; larger pictures are scaled down to it."""

WHITE, INK, PALE = (255, 255, 255), (28, 28, 30), (110, 110, 115)
MARGIN, GAP, LINE = 12, 10, 20
LABEL, NOTE, TITLE = 15, 13, 17


class Panel(NamedTuple):
    """A picture of a strip, with the text under it."""

    image: Tensor
    """The picture, 1 3 H W or 3 H W in [-1, 1]; clamped."""
    label: str = ""
    note: str = ""
    """A second, paler line, such as its PSNR."""


def strip(panels: Sequence[Panel], title: str = "") -> Image.Image:
    """Draws one row of labelled pictures. Nothing is cut: a panel is as wide as its picture or its writing."""
    cells = [_cell(panel) for panel in panels]
    top = MARGIN + (LINE + 6 if title else 0)
    width = 2 * MARGIN + sum(cell.width for cell in cells) + GAP * (len(cells) - 1)
    width = max(width, 2 * MARGIN + _text_width(title, TITLE))
    canvas = Image.new("RGB", (width, top + max(cell.height for cell in cells) + MARGIN), WHITE)
    ImageDraw.Draw(canvas).text((MARGIN, MARGIN - 2), title, INK, _font(TITLE))
    left = MARGIN
    for cell in cells:
        canvas.paste(cell, (left, top))
        left += cell.width + GAP
    return canvas


def sheet(strips: Sequence[Image.Image]) -> Image.Image:
    """Puts strips below one another, left edges aligned."""
    canvas = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), WHITE)
    top = 0
    for one in strips:
        canvas.paste(one, (0, top))
        top += one.height
    return canvas


def scale_bar(colour: Callable[[Tensor], Tensor], full: float, width: int = 220) -> Image.Image:
    """Draws the colours of an error map from 0 to `full`.

    `colour` turns shares H W in [0, 1] into 3 H W in [-1, 1].
    """
    bar = Image.fromarray(to_pixels(colour(torch.linspace(0, 1, width).expand(12, -1))))
    canvas = Image.new("RGB", (width + 160, bar.height + 2 * MARGIN), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 2), "error 0", PALE, _font(NOTE))
    left = MARGIN + _text_width("error 0", NOTE) + 8
    canvas.paste(bar, (left, MARGIN))
    draw.text((left + width + 8, MARGIN - 2), f"{full:g}", PALE, _font(NOTE))
    return canvas


def trajectory_strip(trajectory: Trajectory, size: tuple[int, int] | None = None, title: str = "") -> Image.Image:
    """Draws the states at the nodes of a trajectory of one image (`keep="nodes"`), as in the paper's first figure.

    Shown are a state's first three channels, clamped to [-1, 1]; `size` (height, width) crops the padding away.
    """
    panels = []
    for state, time in zip(trajectory.states, trajectory.times, strict=True):
        note = "seed state" if time == 0 else "image state" if time == 1 else ""
        height, width = size or (state.shape[-2], state.shape[-1])
        panels.append(Panel(state[:1, :3, :height, :width], f"t = {_number(time)}", note))
    return strip(panels, title)


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str) -> Image.Image:
    """Draws named series of (x, y), all positive, in one double logarithmic plot."""
    # The figure is made without pyplot, so that no window system is touched and nothing global is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=110, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for name, (x, y) in series.items():
        axes.plot(x, y, marker="o", markersize=4, linewidth=1.6, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")


def _cell(panel: Panel) -> Image.Image:
    """Draws a picture with its one or two lines of writing, if any, centred beneath."""
    picture = _at_readable_size(Image.fromarray(to_pixels(panel.image)))
    if not (panel.label or panel.note):
        return picture
    width = max(picture.width, _text_width(panel.label, LABEL), _text_width(panel.note, NOTE))
    canvas = Image.new("RGB", (width, picture.height + 4 + 2 * LINE), WHITE)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    middle, top = width / 2, picture.height + 6
    draw.text((middle, top), panel.label, INK, _font(LABEL), anchor="ma")
    draw.text((middle, top + LINE), panel.note, PALE, _font(NOTE), anchor="ma")
    return canvas


def _at_readable_size(picture: Image.Image) -> Image.Image:
    short, long = min(picture.size), max(picture.size)
    if short < LEAST_SIDE and long <= GREATEST_SIDE:
        times = -(-LEAST_SIDE // short)
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    if long > GREATEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((GREATEST_SIDE, GREATEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def _text_width(text: str, size: int) -> int:
    return round(_font(size).getlength(text)) + 2


def _number(time: float) -> str:
    return f"{time:.3f}".rstrip("0").rstrip(".")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns DejaVu Sans, which comes with matplotlib: Pillow's own font lacks signs such as arrows."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
