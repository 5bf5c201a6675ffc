"""Tables, pictures and film of a flow in the plane."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..flow import Euler, TimeGrid, integrate
from ..report.document import Table
from ..report.pictures import curves
from .toy import STEPS, ToyConfig, ToyField, ToyMetrics, to_latent

TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
FRAMES = 24
"""Number of frames of the film, each way."""
INK, PALE = "#1c1c1e", "#b8b8bd"


def table(metrics: list[ToyMetrics]) -> Table:
    """Returns a table of the metrics for people."""
    columns = (
        *("steps", "latents found", "point, by its latent", "point, by its state"),
        *("seed: reversed Euler", "fixed point", "undone to 1e-5", "reversible Heun"),
    )
    rows = tuple(
        (
            *(str(one.steps), f"{100 * one.latents_found:.1f} %", f"{one.image_error:.3f}", f"{one.state_error:.3f}"),
            *(f"{one.euler:.1e}", f"{one.fixed_point:.1e}", f"{100 * one.undone:.1f} %", f"{one.reversible:.1e}"),
        )
        for one in metrics
    )
    return Table(columns, rows)


def exact_table(metrics: list[ToyMetrics]) -> Table:
    """Returns a table for programs: every metric, unrounded."""
    names = tuple(ToyMetrics.__dataclass_fields__)
    return Table(names, tuple(tuple(repr(getattr(one, name)) for name in names) for one in metrics))


def draw_flow(field: ToyField, config: ToyConfig, point: Tensor, seed: Tensor) -> Image.Image:
    """Draws the velocities as arrows at five times, and the seed states as far as they have come by then.

    - `field`, `config`: the field, and the settings of its training.
    - `point`: images B 2, points of the moons.
    - `seed`: their seed states B 2.
    """
    fine = integrate(field, seed, TimeGrid.uniform(32), Euler(), keep="nodes")
    figure, all_axes = _figure(1, len(TIMES), config)
    for axes, time in zip(all_axes, TIMES, strict=True):
        state = fine.states[round(32 * time)]
        _lattice(axes, config)
        _points(axes, state, point, config)
        # Arrows where states are: elsewhere the field was never trained and means nothing.
        place = state[::2]
        with torch.no_grad():
            arrow = field(place, torch.full((len(place),), time))
        axes.quiver(
            *place.T.tolist(), *arrow.T.tolist(), angles="xy", scale_units="xy", scale=1, width=0.004, color=INK
        )
        axes.set_title(f"t = {time:g}" + {0.0: ", seed states", 1.0: ", images"}.get(time, ""), fontsize=10, loc="left")
    figure.supxlabel("the velocity field over time; each colour is one latent", fontsize=9, color="#6e6e73")
    return _rendered(figure)


def draw_paths(field: ToyField, config: ToyConfig, point: Tensor, seed: Tensor) -> Image.Image:
    """Draws the paths of the states at 1, 2, 4 and 8 steps: decoding above, encoding below.

    - `field`, `config`: the field, and the settings of its training.
    - `point`: images B 2, points of the moons.
    - `seed`: their seed states B 2.
    """
    from matplotlib.collections import LineCollection

    figure, all_axes = _figure(2, len(STEPS), config)
    for place, axes in enumerate(all_axes):
        number, decoding = STEPS[place % len(STEPS)], place < len(STEPS)
        grid = TimeGrid.uniform(number)
        flow = integrate(field, seed if decoding else point, grid if decoding else grid.reversed(), keep="nodes")
        _lattice(axes, config)
        ways = torch.stack(flow.states, dim=1).tolist()
        axes.add_collection(LineCollection(ways, colors=PALE, linewidths=0.7, zorder=1))
        _points(axes, flow.end, point, config)
        axes.set_title(
            f"{'decode' if decoding else 'encode'}, {number} {'step' if number == 1 else 'steps'}",
            fontsize=10,
            loc="left",
        )
    figure.supxlabel("where the states end, and the paths to there", fontsize=9, color="#6e6e73")
    return _rendered(figure)


def draw_errors(metrics: list[ToyMetrics]) -> Image.Image:
    """Plots the distance from the end of the way back to the seed state, over the number of steps."""
    steps = [one.steps for one in metrics]
    named = {"reversed Euler": "euler", "fixed point": "fixed_point", "reversible Heun": "reversible"}
    # Rounding can be none at all, which a logarithmic axis has no place for.
    series = {name: (steps, [max(getattr(one, key), 1e-17) for one in metrics]) for name, key in named.items()}
    return curves(series, "steps", "distance from the seed state (RMS)")


def film(field: ToyField, config: ToyConfig, point: Tensor, seed: Tensor) -> bytes:
    """Returns an animated GIF: the seed states flow to points, and the images back to seed states.

    - `field`, `config`: the field, and the settings of its training.
    - `point`: images B 2, points of the moons.
    - `seed`: their seed states B 2.
    """
    there = integrate(field, seed, TimeGrid.uniform(FRAMES), keep="nodes")
    back = integrate(field, point, TimeGrid.uniform(FRAMES).reversed(), keep="nodes")
    frames = []
    for flow, what in ((there, "decode"), (back, "encode")):
        for state, time in zip(flow.states, flow.times, strict=True):
            figure, (axes,) = _figure(1, 1, config, width=4.6)
            _lattice(axes, config)
            _points(axes, state, point, config)
            axes.set_title(f"{what}   t = {time:.2f}", fontsize=11, loc="left")
            frames.append(_rendered(figure).quantize(64))
    still = FRAMES + 1
    durations = [900 if k % still in (0, FRAMES) else 60 for k in range(len(frames))]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()


def _figure(rows: int, columns: int, config: ToyConfig, width: float = 3.0) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    size = (width * columns, 0.72 * width * rows + 0.35)
    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes:
        axes.set(xlim=(-1.95, 1.95), ylim=(-1.25, 1.25), aspect="equal")
        axes.tick_params(length=0, labelleft=False, labelbottom=False)
        axes.spines[:].set_visible(False)
    return figure, all_axes


def _lattice(axes: Any, config: ToyConfig) -> None:
    """Draws the borders between cells, which lie halfway between their centres."""
    borders = [config.cell * (k + 0.5) for k in range(-int(3 / config.cell), int(3 / config.cell) + 1)]
    axes.set_xticks([border for border in borders if abs(border) < 1.95])
    axes.set_yticks([border for border in borders if abs(border) < 1.25])
    axes.grid(color="#ededf0", linewidth=0.7)
    axes.set_axisbelow(True)


def _points(axes: Any, state: Tensor, point: Tensor, config: ToyConfig) -> None:
    """Draws states in the colours of the cells their images lie in."""
    import matplotlib

    ramp = matplotlib.colormaps["tab20"]
    cells = to_latent(point, config.cell)
    # Neighbouring cells must differ: 7 and 3 have no common divisor with 20.
    colours = [ramp(int(7 * x + 3 * y) % 20) for x, y in cells.tolist()]
    axes.scatter(*state.T.tolist(), s=9, c=colours, linewidths=0, zorder=2)


def _rendered(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")
