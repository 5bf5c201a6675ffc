"""`rac models`: the shipped coders and generators, and what networks cost."""

from __future__ import annotations

from dataclasses import dataclass

from .. import hub
from ..evaluate.cost import coder_rows, generator_row, parameters, reference_rows
from ..report.document import Table
from .cost import cost_table
from .shared import show


@dataclass(frozen=True)
class Command:
    """List the shipped coders and generators, and count parameters and MACs of well-known coders beside RAC's fields.

    MACs (multiply-accumulates, which papers call GFLOPs) are for one evaluation at 256 x 256.
    """

    def run(self) -> int:
        """Print the tables; that of generators only if there are any."""
        show(shipped_table(), "Shipped coders")
        print()
        if hub.available_generators():
            show(generator_table(), "Shipped generators")
            print()
        show(cost_table(reference_rows()), "Costs at 256 x 256, one evaluation")
        return 0


def shipped_table() -> Table:
    """One row for each of `rac.available()`."""
    rows = []
    for name in hub.available():
        coder = hub.load(name)
        spec = coder.spec
        teacher, gmacs = coder.teacher or "", ""
        if coder.walk("decode") is not None:
            gmacs = next(
                f"{row.cost.gmacs:.2f}" for row in coder_rows(name, coder) if row.cost is not None and row.note
            )
        size = f"{parameters(coder):,}"
        kind = type(coder).__name__
        if len(coder.trained_ways) == 1:
            kind += f", {next(iter(coder.trained_ways))}s only"
        rows.append((name, kind, f"f{spec.factor}d{spec.channels}", size, gmacs, teacher))
    return Table(("name", "kind", "latent", "parameters", "GMACs per evaluation", "teacher"), tuple(rows))


def generator_table() -> Table:
    """One row for each of `rac.hub.available_generators()`."""
    rows = []
    for name in hub.available_generators():
        generator = hub.load_generator(name)
        kind, cost = generator.kind, generator_row(name, generator).cost
        side = kind.side * kind.spec.factor
        rows.append(
            (
                name,
                f"f{kind.spec.factor}d{kind.spec.channels}",
                f"{side} x {side}",
                f"{len(kind.classes)}",
                f"{parameters(generator):,}",
                f"{cost.gmacs:.2f}" if cost else "",
                generator.sampling.in_words(),
                kind.coder or "",
            )
        )
    columns = ("name", "latent", "images", "classes", "parameters", "GMACs per evaluation", "sampling", "coder")
    return Table(columns, tuple(rows))
