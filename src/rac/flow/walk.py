"""A time grid together with the solver of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field

from .grid import TimeGrid
from .invert import FixedPoint
from .solvers import Euler, Solver


@dataclass(frozen=True)
class Walk:
    """A time grid in the direction in which it is walked, and the solver of its steps.

    A rising grid leads from the seed state to the image state (decoding), a falling one back (encoding).
    """

    grid: TimeGrid
    solver: Solver = dataclass_field(default_factory=Euler)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.grid.steps

    @property
    def backwards(self) -> bool:
        """Whether the grid falls, from the image state to the seed state."""
        return self.grid.nodes[0] > self.grid.nodes[-1]

    def inverse(self) -> Walk:
        """Returns the walk over the same nodes in the other direction; `FixedPoint(s)` becomes `s`."""
        solver = self.solver.solver if isinstance(self.solver, FixedPoint) else self.solver
        return Walk(self.grid.reversed(), solver)
