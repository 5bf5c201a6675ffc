"""What waits for the backward pass: states instead of activations, or the last state alone."""

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
    """The same function of tensors, whose inner results are not stored for the backward pass but computed again in it.

    One call then stores its inputs alone, so a roll-out of K steps stores K states, at the price of one more forward
    pass. The function must give the same result when it is called again, so bring its random numbers along. Not for
    forward-mode derivatives (`flow.mean` wants the plain field).
    """

    def again(*args: Tensor) -> Tensor:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return again


def retraced(field: nn.Module, state: Tensor, grid: TimeGrid, *, keep: Literal["end", "nodes"] = "end") -> Trajectory:
    """`integrate(field, state, grid, ReversibleHeun())`, whose backward pass walks the states back from the end.

    The end state and its companion are all that is stored, however many steps there are: each earlier pair follows
    from the next one by the solver's own inverse, and one evaluation at a time is differentiated. Gradients, to the
    state and to the field's parameters, are those of plain autograd up to rounding (in bfloat16: of the field's), at
    the price of one more forward pass; a bound condition (`Conditioned`) gets its gradient too. States that are kept
    are results, and stay for as long as they are used.

    Raises `RacError` for a field that is no module, whose parameters could not be found. No second derivatives.
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
    """What is no tensor."""

    field: nn.Module
    grid: TimeGrid
    keep: Literal["end", "nodes"]
    precision: Callable[[], AbstractContextManager[Any]]
    """The autocast in force outside, for the way back as well."""


def precision_of(state: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast in force, to be entered again, but without its cache of narrowed weights."""
    device = state.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # Without its cache of narrowed weights: some versions of torch let those made here, without gradients, serve for
    # what comes after.
    return lambda: torch.autocast(device, dtype, enabled, cache_enabled=False)


class _Retraced(torch.autograd.Function):
    """walk, state, parameters -> the states after each step, or the last of them."""

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
            """The point as a leaf of a graph of its own, and the velocity there."""
            leaf = where.detach().requires_grad_()
            with torch.enable_grad(), walk.precision():
                return leaf, velocity(walk.field, leaf, time)

        def pull(leaf: Tensor, asked: Tensor, slope: Tensor) -> Tensor:
            """The slope of the point, given that of the velocity; those of the parameters are added up."""
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
