"""Plots for people, made with matplotlib's Agg renderer; each function returns a `PIL.Image`.

No window system is touched and no global setting changed: figures are made without pyplot.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

LEGEND_HEIGHT = 0.5
"""Height of the legend in inches."""

Scale = Literal["linear", "log2", "log10"]

# Okabe and Ito's colours, which the colour-blind tell apart; black is for teachers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLACK = "#1c1c1e"


@dataclass(frozen=True)
class Series:
    """A named sequence of points; a single one is drawn as a level across the plot if `level` is set."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = BLACK
    dashed: bool = False
    level: bool = False
    marks: Sequence[str] = ()
    """Texts beside the points, if any."""
    spans: Sequence[tuple[float, float]] = ()
    """Intervals around the points, lower and upper end, if any."""


@dataclass(frozen=True)
class Walk:
    """A path in the plane, K 2, from its ringed start on."""

    points: Tensor
    colour: str
    dashed: bool = False


def shades(number: int) -> list[str]:
    """Returns so many colours from light to dark, for ordered things, such as numbers of steps."""
    import matplotlib
    from matplotlib.colors import to_hex

    ramp = matplotlib.colormaps["viridis_r"]
    return [to_hex(ramp(0.15 + 0.8 * (index / max(number - 1, 1)))) for index in range(number)]


def heat(values: Tensor, full: float) -> Tensor:
    """Maps values H W to colours 3 H W in [-1, 1], from black at 0 over red to pale yellow at `full` and above."""
    import matplotlib

    share = (values.detach().float().cpu() / full).clamp(0, 1).numpy()
    return torch.from_numpy(matplotlib.colormaps["inferno"](share)[..., :3]).permute(2, 0, 1).float() * 2 - 1


def line_panels(
    panels: Mapping[str, Sequence[Series]], x_label: str, x_scale: Scale = "linear", ticks: Sequence[float] = ()
) -> Image.Image:
    """Draws one plot for each label of a y axis, up to three side by side, with one legend for all of them below.

    - `panels`: series by the label of the y axis.
    - `x_label`, `x_scale`: label and scale of the x axis.
    - `ticks`: places of its ticks; empty: matplotlib's choice.
    """
    figure, all_axes = _figure(len(panels), 4.6, 3.6)
    for axes, (y_label, series) in zip(all_axes, panels.items(), strict=True):
        for one in series:
            _draw(axes, one)
        _scale(axes, x_scale, ticks)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    _legend(figure, [axes.get_legend_handles_labels() for axes in all_axes])
    return _rendered(figure)


def walk_panels(panels: Mapping[str, Sequence[Walk]], labels: Sequence[tuple[str, str]], legend: str) -> Image.Image:
    """Draws paths in planes, one plot for each title; `labels` are the labels of each plot's axes."""
    figure, all_axes = _figure(len(panels), 5.4, 4.9)
    for axes, (title, walks), (across, up) in zip(all_axes, panels.items(), labels, strict=True):
        for walk in walks:
            x, y = walk.points[:, 0].tolist(), walk.points[:, 1].tolist()
            style = "--" if walk.dashed else "-"
            axes.plot(x, y, style, color=walk.colour, linewidth=1.1, marker=".", markersize=3.5, alpha=0.85)
            ring = {"facecolors": "white", "edgecolors": walk.colour, "linewidths": 1.1, "zorder": 3}
            axes.scatter(x[:1], y[:1], s=18, **ring)
            axes.scatter(x[-1:], y[-1:], s=18, color=walk.colour, zorder=3)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    figure.supxlabel(legend, fontsize=9, color="#6e6e73")
    return _rendered(figure)


def _figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Makes a figure of so many plots, each of `width` x `height` inches, four as two rows of two."""
    from matplotlib.figure import Figure

    columns = panels if panels <= 3 else 2 if panels == 4 else 3
    rows = -(-panels // columns)
    size = (width * columns, height * rows + LEGEND_HEIGHT)
    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in all_axes[panels:]:
        spare.remove()
    all_axes = all_axes[:panels]
    for axes in all_axes:
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _draw(axes: Any, series: Series) -> None:
    style = {"color": series.colour, "linestyle": "--" if series.dashed else "-", "linewidth": 1.6}
    if series.level:
        axes.axhline(series.y[0], label=series.name, **style)
        for low, high in series.spans:
            axes.axhspan(low, high, color=series.colour, alpha=0.08, linewidth=0)
        return
    for x, (low, high) in zip(series.x if series.spans else (), series.spans, strict=True):
        axes.plot([x, x], [low, high], color=series.colour, linewidth=1.2)
    axes.plot(series.x, series.y, marker="s" if series.dashed else "o", markersize=4.5, label=series.name, **style)
    for x, y, mark in zip(series.x, series.y, series.marks or [""] * len(series.x), strict=True):
        axes.annotate(mark, (x, y), (4, 4), textcoords="offset points", fontsize=8, color=series.colour)


def _scale(axes: Any, x_scale: Scale, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if x_scale != "linear":
        axes.set_xscale("log", base=2 if x_scale == "log2" else 10)
        axes.xaxis.set_minor_formatter(NullFormatter())
        if x_scale == "log10":  # costs often span less than two decades, which powers of 10 would leave unlabelled
            axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        # As people write them: 0.5, 2, 300.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if ticks:
        axes.set_xticks(list(ticks))
    axes.margins(x=0.08, y=0.12)


def _legend(figure: Any, handles_and_labels: Iterable[tuple[list[Any], list[str]]]) -> None:
    entries: dict[str, Any] = {}
    for handles, labels in handles_and_labels:
        entries |= dict(zip(labels, handles, strict=True))
    # Some 10 characters to an inch, and a handle of half an inch before each name.
    longest = max(map(len, entries), default=0)
    columns = max(1, min(len(entries), int(figure.get_figwidth() / (longest / 10 + 0.6))))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False)


def _rendered(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")
