"""Store a state instead of a network's activations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of tensors, whose inner results are not stored for the backward pass but computed again in it.

    One call then stores its inputs alone, so a roll-out of K steps stores K states, at the price of one more forward
    pass. The function must give the same result when it is called again, so bring its random numbers along. Not for
    forward-mode derivatives (`flow.mean` wants the plain field).
    """

    def again(*args: Tensor) -> Tensor:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return again
