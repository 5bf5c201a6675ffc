"""field -> field: store a state instead of a network's activations."""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .solvers import Field


def recomputed(field: Field) -> Field:
    """The same field, whose activations are not stored for the backward pass but computed again in it.

    One evaluation then stores its inputs alone, so a roll-out of K steps stores K states, at the price of one more
    forward pass. Not for forward-mode derivatives (`flow.mean` wants the plain field).
    """

    def again(*args: Tensor) -> Tensor:
        # No field draws random numbers, so their state need not be kept.
        return checkpoint(field, *args, use_reentrant=False, preserve_rng_state=False)

    return again
