"""Memory of the backward pass: store states instead of activations, or the last state alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import RacError
from .grid import TimeGrid
from .guidance import evaluations_of
from .integrate import Trajectory, integrate
from .solvers import ReversibleHeun, velocity


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps a function of tensors so that the backward pass recomputes its inner results instead of storing them.

    One call then stores only its inputs, so a roll-out of K steps stores K states, at the price of one more forward
    pass. The function must return the same result when it is called again, so pass its random numbers in. Not for
    forward-mode derivatives (`flow.mean` needs the plain field).
    """

    def again(*args: Tensor) -> Tensor:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return again


def retraced(field: nn.Module, state: Tensor, grid: TimeGrid, *, keep: Literal["end", "nodes"] = "end") -> Trajectory:
    """Integrates with `ReversibleHeun`, storing no states: the backward pass retraces them from the end.

    Equals `integrate(field, state, grid, ReversibleHeun())`. Only the end state and its companion are stored, however
    many steps there are: each earlier pair follows from the next one by the solver's own inverse, and one evaluation at
    a time is differentiated. Gradients, to the state and to the field's parameters, are those of plain autograd up to
    rounding (in bfloat16: of the field's), at the price of one more forward pass; a bound condition (`Conditioned`)
    gets its gradient too. There are no second derivatives.

    - `field`: the velocity field, a module.
    - `state`: B C H W, at `grid.nodes[0]`.
    - `grid`: the time nodes.
    - `keep`: "end" returns only the last state; "nodes" the states at all nodes, which take memory as long as they are
      used.

    Raises `RacError` for a field that is not a module, whose parameters could not be found.
    Kidger et al., Efficient and Accurate Gradients for Neural SDEs (arXiv 2105.13493), algorithms 1 and 2.
    """
    if not isinstance(field, nn.Module):
        raise RacError(f"to walk back its states the field must be a module, not a {type(field).__name__}")
    parameters = tuple(one for one in (*field.parameters(), *field.buffers()) if one.requires_grad)
    states = _Retraced.apply(_Walk(field, grid, keep, precision_of(state)), state, *parameters)
    kept = (state, *states) if keep == "nodes" else ()
    evaluations = sum(evaluations_of(field, state.new_full((len(state),), node)) for node in grid.nodes)
    return Trajectory(states[-1], kept, grid.nodes, evaluations)


@dataclass(frozen=True)
class _Walk:
    """The arguments of `_Retraced` that are not tensors."""

    field: nn.Module
    grid: TimeGrid
    keep: Literal["end", "nodes"]
    precision: Callable[[], AbstractContextManager[Any]]
    """Makes the autocast context that was active around the forward pass, for use in the backward pass."""


def precision_of(state: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Returns a function that enters the autocast in force again, without its cache of narrowed weights."""
    device = state.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # Without its cache of narrowed weights: some versions of torch let those made here, without gradients, serve for
    # what comes after.
    return lambda: torch.autocast(device, dtype, enabled, cache_enabled=False)


class _Retraced(torch.autograd.Function):
    """Autograd function (walk, state, parameters) -> the states after each step, or the last of them."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, state: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with walk.precision():
            flow = integrate(walk.field, state, walk.grid, ReversibleHeun(), keep=walk.keep)
        ctx.walk, ctx.parameters = walk, parameters
        ctx.save_for_backward(flow.end, flow.carry.companion)
        return flow.states[1:] if walk.keep == "nodes" else (flow.end,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        walk, parameters = ctx.walk, ctx.parameters
        state, companion = ctx.saved_tensors
        nodes = walk.grid.nodes
        totals: list[Tensor | None] = [None] * len(parameters)

        def ask(where: Tensor, time: float) -> tuple[Tensor, Tensor]:
            """Returns the point as a leaf of a graph of its own, and the velocity there."""
            leaf = where.detach().requires_grad_()
            with torch.enable_grad(), walk.precision():
                return leaf, velocity(walk.field, leaf, time)

        def pull(leaf: Tensor, asked: Tensor, slope: Tensor) -> Tensor:
            """Returns the gradient of the point from that of the velocity, and adds up those of the parameters."""
            found = torch.autograd.grad(asked, (leaf, *parameters), slope.to(asked.dtype), allow_unused=True)
            for index, one in enumerate(found[1:]):
                if one is not None:
                    before = totals[index]
                    totals[index] = one if before is None else before + one
            return torch.zeros_like(leaf) if found[0] is None else found[0]

        # Slopes of the loss by the state, its companion and the velocity there, from the last node to the first.
        d_state, d_companion, d_velocity = slopes[-1], torch.zeros_like(state), torch.zeros_like(state)
        leaf, asked = ask(companion, nodes[-1])
        for k in range(walk.grid.steps - 1, -1, -1):
            h = nodes[k + 1] - nodes[k]
            d_companion = d_companion + pull(leaf, asked, d_velocity + h / 2 * d_state)
            after = asked.detach()
            companion = 2 * state - leaf.detach() - h * after
            leaf, asked = ask(companion, nodes[k])
            state = state - h / 2 * (asked.detach() + after)
            d_velocity = h / 2 * d_state + h * d_companion
            d_state, d_companion = d_state + 2 * d_companion, -d_companion
            if walk.keep == "nodes" and k > 0:
                d_state = d_state + slopes[k - 1]
        d_start = d_state + d_companion + pull(leaf, asked, d_velocity)
        return None, d_start if ctx.needs_input_grad[1] else None, *totals
