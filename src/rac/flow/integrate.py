"""Integration of a state along a velocity field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..tensors import check_dense
from .grid import TimeGrid
from .guidance import evaluations_of
from .solvers import Euler, Field, Solver

__all__ = ["Field", "Trajectory", "integrate"]


@dataclass(frozen=True)
class Trajectory:
    """Result of an integration: the states it reached, and what it cost."""

    end: Tensor
    """The last state, B C H W."""
    states: tuple[Tensor, ...]
    """The states at the nodes, the first one included; empty if only the end was kept."""
    times: tuple[float, ...]
    """The nodes of the grid."""
    evaluations: int
    """Network evaluations for each image: calls of the field, times the evaluations of one call (2 if guided)."""
    carry: Any = None
    """Final `carry` of the solver; pass it on with the reversed grid to retrace a reversible solver's steps."""
    residuals: tuple[float, ...] = ()
    """Residual of each step of an implicit solver (largest absolute value); empty for explicit ones."""


def integrate(
    field: Field,
    state: Tensor,
    grid: TimeGrid,
    solver: Solver = Euler(),  # noqa: B008 - frozen and without state
    *,
    keep: Literal["end", "nodes"] = "end",
    carry: Any = None,
) -> Trajectory:
    """Integrates `state` along `field` over the nodes of `grid` (RAC, equations 4 to 6).

    Gradients flow through all steps.

    - `field`: called as field(state B C H W, time B), returns velocities B C H W.
    - `state`: B C H W, at `grid.nodes[0]`.
    - `grid`: the time nodes; a falling grid (`grid.reversed()`) integrates backwards.
    - `solver`: the rule of each step.
    - `keep`: "end" keeps only the last state, "nodes" the states at all nodes.
    - `carry`: the `carry` of an earlier trajectory, for a reversible solver to retrace its steps.

    Raises `RacError` for a sparse state.
    """
    check_dense(state, "a state")
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
