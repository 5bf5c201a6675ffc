"""The table, the plot and the sheet of pictures of the gap between reconstruction and generation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from ..report.document import Table
from ..report.pictures import Panel, sheet, strip
from ..report.plots import BLACK, PALETTE, Series, line_panels
from .gap import GENERATED, RECONSTRUCTED, GapExperiment, GapResult, GapRow
from .resampling import Estimate


def table(result: GapResult) -> Table:
    """Returns the table for people: a row for each metric and decoder."""
    kinds = list(result.rows[0].values)
    columns = ("metric, decoder", "real", *kinds, "gap", "95 %", "of teacher's", "95 %")
    rows = []
    for row in result.rows:
        cells = [_text(row.metric, row.real), *(_text(row.metric, row.values[kind]) for kind in kinds)]
        cells += [_text(row.metric, row.gap), _span(row.metric, row.gap)]
        cells += [_number(row.ratio.value, 2), f"{_number(row.ratio.low, 2)} to {_number(row.ratio.high, 2)}"]
        rows.append((f"{_title(row.metric)}, {row.decoder}", *cells))
    return Table(columns, tuple(rows))


def markdown(result: GapResult) -> str:
    """Returns the table with the words that it needs to be understood."""
    sampling = result.sampling
    classes = f" of {', '.join(result.classes[:10])}" if result.classes else ""
    return (
        f"# The gap between reconstruction and generation\n\n"
        f"{result.count} images a set{classes}, {result.size} x {result.size}; latents of {result.encoder}, generated "
        f"by {result.generator}: {sampling['method']}, {sampling['steps']} steps, guidance {sampling['guidance']:g}, "
        f"rng_seed {result.rng_seed}.\n"
        f"Reconstructed: {result.source}. Compared with: {result.reference}, other pictures, as many.\n\n"
        f"`{result.command}`\n\n{table(result).to_markdown()}\n{_LEGEND.format(resamples=result.resamples)}"
    )


def plot(result: GapResult) -> Image.Image | None:
    """Draws, for each metric, the gap and its ratio to the teacher's against the decoder's steps, with intervals.

    A decoder without steps is a level. Intervals of ratios are those of paired resamples, and much narrower. Returns
    None if there is nothing to draw: with very few images no gap may be a number.
    """
    coders = list(dict.fromkeys(row.coder for row in result.rows))
    colours = dict(zip(coders, (BLACK, *(PALETTE * len(coders))), strict=False))
    panels: dict[str, list[Series]] = {}
    for metric in result.metrics:
        families = {coder: [row for row in result.of(metric) if row.coder == coder] for coder in coders}
        gaps = {coder: [_scaled(row.gap, _scale(metric)) for row in rows] for coder, rows in families.items()}
        ratios = {coder: [row.ratio for row in rows] for coder, rows in families.items()}
        for title, values in ((f"gap, {_title(metric)} ↓", gaps), (f"of teacher's, {metric} ↓", ratios)):
            # A ratio to a gap of 0 is not drawn.
            if all(_drawable(one) for estimates in values.values() for one in estimates):
                panels[title] = [_series(families[coder], values[coder], colours[coder]) for coder in coders]
    if not panels:
        return None
    steps = sorted({row.steps for row in result.rows if row.steps is not None})
    return line_panels(panels, "steps of the decoder", "log2" if steps else "linear", steps)


def _series(rows: Sequence[GapRow], estimates: Sequence[Estimate], colour: str) -> Series:
    """Returns the estimates of one coder against its steps."""
    level = rows[0].steps is None
    return Series(
        rows[0].coder,
        [row.steps or 1 for row in rows],
        [one.value for one in estimates],
        colour,
        dashed=level,
        level=level,
        spans=[(one.low, one.high) for one in estimates],
    )


def _drawable(estimate: Estimate) -> bool:
    return all(map(math.isfinite, (estimate.value, estimate.low, estimate.high)))


def _scaled(estimate: Estimate, scale: float) -> Estimate:
    return Estimate(scale * estimate.value, scale * estimate.low, scale * estimate.high)


def pictures(experiment: GapExperiment) -> Image.Image:
    """Draws the first images of each kind, one row for each latent and one column for each decoder."""
    strips = []
    originals = experiment.originals()
    for kind in experiment.kinds:
        columns = [experiment.pictures(kind, decoder) for decoder in experiment.decoders]
        for place in range(len(originals) if kind in (RECONSTRUCTED, GENERATED) else 1):
            panels = [Panel(originals[place], "original")] if kind != GENERATED else []
            panels += [
                Panel(column[place], decoder.label)
                for column, decoder in zip(columns, experiment.decoders, strict=True)
            ]
            strips.append(strip(panels, kind if place == 0 else ""))
    return sheet(strips)


def _scale(metric: str) -> float:
    return 1000.0 if metric.startswith("KID") else 1.0


def _title(metric: str) -> str:
    return f"{metric} x 1000" if metric.startswith("KID") else metric


def _text(metric: str, estimate: Estimate) -> str:
    return _number(_scaled(estimate, _scale(metric)).value, _digits(metric))


def _span(metric: str, estimate: Estimate) -> str:
    scaled = _scaled(estimate, _scale(metric))
    return f"{_number(scaled.low, _digits(metric))} to {_number(scaled.high, _digits(metric))}"


def _digits(metric: str) -> int:
    return 3 if metric.startswith("accuracy") else 2


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


_LEGEND = """- Distances compare images with the references: decoded ones, and as `real` the originals. Less is better.
- `accuracy` is the share of images whose class that network tells among those of the data. More is better.
- `gap` is how much worse images of generated latents are than images of encoded ones, by the same decoder.
- `of teacher's` is the gap over that of the first decoder, the teacher's.
- Intervals hold 95 % of {resamples:,} resamples of the images, which all decoders share.
"""
