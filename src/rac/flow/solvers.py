"""One-step rules: how a state at t0 becomes a state at t1. Backwards is t1 < t0, nothing else.

A solver is asked for `step(field, state, t0, t1, carry)`. `carry` is what it hands from step to step; only the
reversible solver has any. `order` is the global order of accuracy, which the tests measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor


class Field(Protocol):
    """A velocity field: field(state B C H W, time B) -> velocity B C H W.

    A mean-velocity field takes a third argument, the signed interval B. Anything callable will do; what it depends on
    besides is bound before (`rac.flow.Conditioned`).
    """

    def __call__(self, *args: Any, **condition: Any) -> Any:
        """The velocity, of the state's shape."""
        ...


class Step(NamedTuple):
    """What a solver returns."""

    state: Tensor
    carry: Any = None
    residual: float | None = None
    """For implicit rules: what is left of the equation, as the largest absolute value."""


class Solver(Protocol):
    """A one-step rule."""

    @property
    def order(self) -> int:
        """Global order of accuracy."""
        ...

    @property
    def reversible(self) -> bool:
        """Whether walking the reversed grid, with the carry of the end, undoes it exactly."""
        ...

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any) -> Step:
        """The state at t1, given the state at t0."""
        ...


def velocity(field: Field, state: Tensor, time: float) -> Tensor:
    """The field at one time, which is handed over as one number per image."""
    return field(state, state.new_full((state.shape[0],), time))


@dataclass(frozen=True)
class Euler:
    """s1 = s0 + h v(s0, t0). One evaluation."""

    order = 1
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """See `Solver.step`."""
        return Step(state + (t1 - t0) * velocity(field, state, t0))


@dataclass(frozen=True)
class MeanEuler:
    """s1 = s0 + h u(s0, t0, h) with u the mean velocity over [t0, t0 + h], h signed. One evaluation.

    Exact in a single step where the field is. MeanFlow (arXiv 2505.13447), equation 12, in this library's direction of
    time.
    """

    order = 1
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """See `Solver.step`."""
        times = state.new_full((state.shape[0],), t0)
        return Step(state + (t1 - t0) * field(state, times, state.new_full((state.shape[0],), t1 - t0)))


@dataclass(frozen=True)
class Midpoint:
    """The explicit midpoint rule. Two evaluations."""

    order = 2
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """See `Solver.step`."""
        h = t1 - t0
        middle = state + h / 2 * velocity(field, state, t0)
        return Step(state + h * velocity(field, middle, t0 + h / 2))


@dataclass(frozen=True)
class Heun:
    """Heun's rule (the explicit trapezium). Two evaluations."""

    order = 2
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """See `Solver.step`."""
        h = t1 - t0
        v0 = velocity(field, state, t0)
        v1 = velocity(field, state + h * v0, t1)
        return Step(state + h / 2 * (v0 + v1))


@dataclass(frozen=True)
class RK4:
    """The classical Runge-Kutta rule. Four evaluations."""

    order = 4
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """See `Solver.step`."""
        h = t1 - t0
        k1 = velocity(field, state, t0)
        k2 = velocity(field, state + h / 2 * k1, t0 + h / 2)
        k3 = velocity(field, state + h / 2 * k2, t0 + h / 2)
        k4 = velocity(field, state + h * k3, t1)
        return Step(state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))


class HeunCarry(NamedTuple):
    """The companion state of `ReversibleHeun` and the velocity there."""

    companion: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class ReversibleHeun:
    """Reversible Heun: algebraically its own inverse. One evaluation per step, and one to begin.

    A companion state walks along; given both, the reversed grid retraces every step up to rounding:
    `integrate(field, there.end, grid.reversed(), solver, carry=there.carry)`. From the end state alone the companion is
    not known, and the way back is only as accurate as the solver, as with any other.
    Kidger et al., Efficient and Accurate Gradients for Neural SDEs (arXiv 2105.13493), algorithms 1 and 2.
    """

    order = 2
    reversible = True

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: HeunCarry | None = None) -> Step:
        """See `Solver.step`."""
        h = t1 - t0
        companion, v0 = carry or HeunCarry(state, velocity(field, state, t0))
        companion = 2 * state - companion + h * v0
        v1 = velocity(field, companion, t1)
        return Step(state + h / 2 * (v0 + v1), HeunCarry(companion, v1))


SolverName = Literal["euler", "midpoint", "heun", "rk4", "reversible-heun"]

SOLVERS: dict[SolverName, Solver] = {
    "euler": Euler(),
    "midpoint": Midpoint(),
    "heun": Heun(),
    "rk4": RK4(),
    "reversible-heun": ReversibleHeun(),
}
"""The one-step rules that need no settings, by the names that protocols and the command line use."""
