"""One-step rules, which carry a state from t0 to t1. Backwards is t1 < t0, nothing else.

The integration calls `step(field, state, t0, t1, carry)`. `carry` is what a solver hands from step to step; only the
reversible solver has any. `order` is the global order of accuracy, which the tests measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor


class Field(Protocol):
    """A velocity field: field(state B C H W, time B) -> velocity B C H W.

    A mean-velocity field takes a third argument, the signed interval B. Any callable is a field; further inputs, such
    as a label, are bound to it beforehand (`rac.flow.Conditioned`).
    """

    def __call__(self, *args: Any, **condition: Any) -> Any:
        """Returns the velocity, of the state's shape."""
        ...


class Step(NamedTuple):
    """Result of one step of a solver."""

    state: Tensor
    carry: Any = None
    residual: float | None = None
    """Remaining error of an implicit rule's equation, as the largest absolute value; None for explicit rules."""


class Solver(Protocol):
    """A one-step rule of integration."""

    @property
    def order(self) -> int:
        """Global order of accuracy."""
        ...

    @property
    def reversible(self) -> bool:
        """Whether integrating over the reversed grid, with the `carry` of the end, undoes the steps exactly."""
        ...

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any) -> Step:
        """Carries `state` at t0 to the state at t1."""
        ...


def velocity(field: Field, state: Tensor, time: float) -> Tensor:
    """Returns the velocity at one time, which the field gets as one number per image."""
    return field(state, state.new_full((state.shape[0],), time))


@dataclass(frozen=True)
class Euler:
    """Euler's rule: s1 = s0 + h v(s0, t0). One evaluation."""

    order = 1
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """Carries `state` from t0 to t1 in one explicit step."""
        return Step(state + (t1 - t0) * velocity(field, state, t0))


@dataclass(frozen=True)
class MeanEuler:
    """Euler's rule with a mean velocity: s1 = s0 + h u(s0, t0, h), u over [t0, t0 + h], h signed. One evaluation.

    Exact in a single step where the field is. MeanFlow (arXiv 2505.13447), equation 12, in this library's direction of
    time.
    """

    order = 1
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """Carries `state` from t0 to t1 along the mean velocity of that interval."""
        times = state.new_full((state.shape[0],), t0)
        return Step(state + (t1 - t0) * field(state, times, state.new_full((state.shape[0],), t1 - t0)))


@dataclass(frozen=True)
class Midpoint:
    """The explicit midpoint rule. Two evaluations."""

    order = 2
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """Carries `state` from t0 to t1 along the velocity at the midpoint."""
        h = t1 - t0
        middle = state + h / 2 * velocity(field, state, t0)
        return Step(state + h * velocity(field, middle, t0 + h / 2))


@dataclass(frozen=True)
class Heun:
    """Heun's rule (the explicit trapezium). Two evaluations."""

    order = 2
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """Carries `state` from t0 to t1 along the mean of the velocities at both ends."""
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
        """Carries `state` from t0 to t1 along the weighted mean of four velocities."""
        h = t1 - t0
        k1 = velocity(field, state, t0)
        k2 = velocity(field, state + h / 2 * k1, t0 + h / 2)
        k3 = velocity(field, state + h / 2 * k2, t0 + h / 2)
        k4 = velocity(field, state + h * k3, t1)
        return Step(state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))


class HeunCarry(NamedTuple):
    """Companion state of `ReversibleHeun` and the velocity there."""

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
        """Carries `state`, and the companion in `carry`, from t0 to t1.

        Without `carry` the companion begins at `state`.
        """
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
"""The one-step rules without settings, by the names that protocols and the command line use."""
