"""`rac cost`: what every preset, shipped coder and generator, and well-known autoencoder costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from .. import hub
from ..errors import RacError
from ..evaluate.cost import CostRow, coder_rows, field_row, generator_row, reference_rows
from ..fields import LdmFieldConfig
from ..progress import watched
from ..recipes import RECIPES
from ..report.document import Table
from .shared import show

SCALES = (0.1, 0.2, 0.3, 1.0)
"""Fractions of the SD-VAE decoder's parameters that the fields of the paper have."""


@dataclass(frozen=True)
class Command:
    """Count parameters and MACs of every recipe's networks, of what ships, and of well-known autoencoders.

    MACs (multiply-accumulates, which papers call GFLOPs) are for one evaluation of one image; a flow needs one
    evaluation for each step, in each direction. Networks are neither run nor downloaded, so large ones take no time.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Coders and generators to count: shipped names, directories, names on the hub; or recipes. None: everything."""
    side: int = 256
    """Side of the square images; a multiple of 32."""
    format: Literal["table", "markdown", "csv", "json"] = "table"
    """Format of the output."""

    def run(self) -> int:
        """Print the tables; the exit code. Raises `RacError`."""
        if self.side < 32 or self.side % 32:
            raise RacError(f"--side {self.side} must be a multiple of 32, which is the largest factor in the table")
        with closing(watched(list(self._sections().items()), lambda section: section[0])) as shown:
            sections = {title: rows for title, count in shown if (rows := count())}
        if self.format == "json":
            print(json.dumps({title: [_as_dict(row) for row in rows] for title, rows in sections.items()}, indent=2))
        elif self.format == "csv":
            print(cost_table([row for rows in sections.values() for row in rows]).to_csv(), end="")
        elif self.format == "markdown":
            print(
                "\n".join(
                    f"{self._title(title)}\n\n{cost_table(rows).to_markdown()}" for title, rows in sections.items()
                )
            )
        else:
            for title, rows in sections.items():
                show(cost_table(rows), self._title(title))
                print()
        return 0

    def _sections(self) -> dict[str, Callable[[], list[CostRow]]]:
        if self.models:
            return {"Networks": lambda: self._rows(self.models)}
        return {
            "Recipes": lambda: recipe_rows("coder", self.side),
            "Recipes of generators": lambda: recipe_rows("generator", self.side),
            "Fields of the SD-VAE decoder's shape, 4 state channels": lambda: scaled_rows(self.side),
            "Shipped coders": lambda: self._rows(hub.available()),
            "Shipped generators": lambda: self._rows(hub.available_generators()),
            "Well-known networks": lambda: reference_rows(self.side),
        }

    def _rows(self, names: Sequence[str]) -> list[CostRow]:
        return [row for name in names for row in model_rows(name, self.side)]

    def _title(self, section: str) -> str:
        return f"{section}, at {self.side} x {self.side}"


def model_rows(name: str, side: int = 256) -> list[CostRow]:
    """The networks of a coder, of a generator, or else of a recipe. Raises `RacError` if there is none of this name."""
    if name in RECIPES and name not in hub.available() and not Path(name).exists():
        return RECIPES[name][1].costs(name, side)
    if hub.is_generator(name):
        return [generator_row(name, hub.load_generator(name), side)]
    return coder_rows(name, hub.load(name), side)


def recipe_rows(product: str, side: int = 256) -> list[CostRow]:
    """The networks of every recipe for a "coder" or a "generator", before training."""
    chosen = {name: recipe for name, (_, recipe) in RECIPES.items() if recipe.product == product}
    return [row for name, recipe in chosen.items() for row in recipe.costs(name, side)]


def scaled_rows(side: int = 256) -> list[CostRow]:
    """The `ldm` fields at the paper's scales, with widths that train."""
    rows = []
    for scale in SCALES:
        config = LdmFieldConfig.scaled(scale)
        with torch.device("meta"):
            field = config.build(4, config.factor)
        widths = " ".join(str(width) for width in config.widths)
        rows.append(field_row(f"ldm field at {scale:.1f}", field, 4, side, f"widths {widths}"))
    return rows


def cost_table(rows: list[CostRow]) -> Table:
    """The rows as text, MACs with and without the products of attention."""
    return Table(
        ("network", "parameters", "GMACs", "without attention", "note"),
        tuple(
            (
                row.name,
                f"{row.parameters:,}",
                f"{row.cost.gmacs:.2f}" if row.cost else "",
                f"{row.cost.gmacs_without_attention:.2f}" if row.cost else "",
                row.note,
            )
            for row in rows
        ),
    )


def _as_dict(row: CostRow) -> dict[str, object]:
    macs = {} if row.cost is None else {"macs": row.cost.macs, "attention_macs": row.cost.attention_macs}
    return {"network": row.name, "parameters": row.parameters, **macs, "note": row.note}
