"""`rac models`: the shipped coders, and what coders cost."""

from __future__ import annotations

from dataclasses import dataclass

from .. import hub
from ..coders.rac import RAC
from ..evaluate.cost import count, parameters, reference_rows
from ..report.document import Table
from .cost import cost_table
from .shared import show


@dataclass(frozen=True)
class Command:
    """List the shipped coders, and count parameters and MACs of well-known coders beside RAC's fields.

    MACs (multiply-accumulates, which papers print as GFLOPs) are for one evaluation at 256 x 256.
    """

    def run(self) -> int:
        """Print both tables."""
        show(shipped_table(), "Shipped coders")
        print()
        show(cost_table(reference_rows()), "Costs at 256 x 256, one evaluation")
        return 0


def shipped_table() -> Table:
    """One row for each of `rac.available()`."""
    rows = []
    for name in hub.available():
        coder = hub.load(name)
        spec = coder.spec
        gmacs, teacher = "", ""
        if isinstance(coder, RAC):
            cost = count(coder.field, (1, coder.config.state_channels, 256, 256), (1,))
            gmacs, teacher = f"{cost.gmacs:.2f}", coder.teacher or ""
        size = f"{parameters(coder):,}"
        rows.append((name, type(coder).__name__, f"f{spec.factor}d{spec.channels}", size, gmacs, teacher))
    return Table(("name", "kind", "latent", "parameters", "GMACs per evaluation", "teacher"), tuple(rows))
