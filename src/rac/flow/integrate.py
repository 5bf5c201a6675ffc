"""The only integration loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .grid import TimeGrid
from .guidance import evaluations_of
from .solvers import Euler, Field, Solver

__all__ = ["Field", "Trajectory", "integrate"]


@dataclass(frozen=True)
class Trajectory:
    """Where an integration went, and what it cost."""

    end: Tensor
    """The last state, B C H W."""
    states: tuple[Tensor, ...]
    """The states at the nodes, the first one included; empty if only the end was kept."""
    times: tuple[float, ...]
    """The nodes of the grid."""
    evaluations: int
    """Network evaluations for each image: calls of the field, times what one call costs (a guided one two)."""
    carry: Any = None
    """What the solver carried; hand it back with the reversed grid to retrace a reversible solver's steps."""
    residuals: tuple[float, ...] = ()
    """For implicit rules: the residual of each step (largest absolute value)."""


def integrate(
    field: Field,
    state: Tensor,
    grid: TimeGrid,
    solver: Solver = Euler(),  # noqa: B008 - frozen and without state
    *,
    keep: Literal["end", "nodes"] = "end",
    carry: Any = None,
) -> Trajectory:
    """Carry `state` along `field` over the nodes of `grid`.

    `state` is B C H W at `grid.nodes[0]`; a falling grid (`grid.reversed()`) integrates backwards. `field` is called as
    field(state B C H W, time B) and gives velocities B C H W. `keep` decides what is kept: the end alone, or the states
    at all nodes. `carry` is that of an earlier trajectory, for a reversible solver to retrace its steps. Gradients flow
    through all steps. RAC, equations 4 to 6.
    """
    evaluations = 0

    def counted(state: Tensor, time: Tensor, *interval: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += evaluations_of(field, time)
        return field(state, time, *interval)

    states = [state]
    residuals = []
    for t0, t1 in zip(grid.nodes[:-1], grid.nodes[1:], strict=True):
        state, carry, residual = solver.step(counted, state, t0, t1, carry)
        if keep == "nodes":
            states.append(state)
        if residual is not None:
            residuals.append(residual)
    kept = tuple(states) if keep == "nodes" else ()
    return Trajectory(state, kept, grid.nodes, evaluations, carry, tuple(residuals))
