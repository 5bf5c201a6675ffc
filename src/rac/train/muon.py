"""The optimizer Muon, for networks whose weights are mostly matrices and kernels of convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
"""Decay of the average of the gradients of matrices."""

RMS = 0.2
"""Root mean square of a matrix's update, as a multiple of the learning rate: that of AdamW's updates in practice, so
that one learning rate serves both (arXiv 2502.16982, equation 4)."""

FEWEST = 8
"""A weight with no more inputs or outputs than this (images, masks) is not treated as a matrix."""


def matrices(module: nn.Module) -> Iterator[Tensor]:
    """Yields the weights of `module` that `Muon` orthogonalises: those of linear layers and of 2-d convolutions.

    Layers with at most 8 inputs or outputs are left out, and so are embeddings.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and min(layer.weight.shape[:2]) > FEWEST:
            yield layer.weight


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) for matrices, AdamW for everything else.

    The average of a matrix's gradients (with Nesterov's correction) is replaced by the nearest orthogonal matrix,
    roughly, before it is applied, so that all its directions advance alike. A kernel counts as the matrix of its
    outputs by everything else.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        matrices: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
    ) -> None:
        """Takes the parameters to train.

        - `parameters`: all of them.
        - `matrices`: those of them to orthogonalise.
        - `lr`: the learning rate of all; a matrix's update has a root mean square of 0.2 times it.
        - `betas`: the decays of AdamW's two moments.
        - `weight_decay`: the share of each weight taken off per iteration, in units of the learning rate.
        """
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._matrices = {id(matrix) for matrix in matrices}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Changes the weights by their gradients; those without one stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = _orthogonal_update if id(parameter) in self._matrices else _adam_update
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * update(parameter.grad, self.state[parameter], group["betas"]))


def _orthogonal_update(gradient: Tensor, state: dict[str, Any], _: tuple[float, float]) -> Tensor:
    """Returns the direction of a matrix's update, and changes its average."""
    momentum = state.setdefault("momentum", torch.zeros_like(gradient))
    momentum.lerp_(gradient, 1 - MOMENTUM)
    flat = gradient.lerp(momentum, MOMENTUM).flatten(1)
    return RMS * max(flat.shape) ** 0.5 * orthogonalised(flat).view_as(gradient)


def _adam_update(gradient: Tensor, state: dict[str, Any], betas: tuple[float, float]) -> Tensor:
    """Returns AdamW's direction, and changes the moments."""
    first = state.setdefault("exp_avg", torch.zeros_like(gradient))
    second = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
    step = state.setdefault("step", torch.zeros(()))
    step += 1
    first.lerp_(gradient, 1 - betas[0])
    second.lerp_(gradient.square(), 1 - betas[1])
    return first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + 1e-8)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Returns, roughly, the nearest orthogonal matrix U V^T of `matrix` = U S V^T, m x n.

    By five Newton-Schulz iterations with the coefficients of Jordan et al.; singular values come out between about 0.7
    and 1.2. A matrix of zeros stays one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
