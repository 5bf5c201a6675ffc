"""What changes while training, and the one step that changes it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import runtime
from ..data import Batch
from ..draws import Draws
from ..errors import RacError
from ..objectives.judged import ADVERSARIAL
from .config import TrainConfig, ema_decay, learning_rate
from .contest import Contest
from .task import Task


@dataclass
class TrainState:
    """Everything a run carries from one iteration to the next; all else is a function of the iteration's number."""

    module: nn.Module
    ema: nn.Module
    optimizer: torch.optim.AdamW
    contest: Contest | None = None
    """With the task's opponent, if it has one."""
    iteration: int = 0
    """Iterations done."""

    @classmethod
    def start(cls, task: Task, settings: TrainConfig, device: torch.device) -> TrainState:
        """The state before the first iteration, with the task's modules moved to `device`."""
        for part in task.frozen:
            runtime.place(part, device, settings.channels_last).eval().requires_grad_(False)
        module = runtime.place(task.module, device, settings.channels_last)
        ema = copy.deepcopy(module).eval().requires_grad_(False)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        contest = None
        if task.opponent is not None:
            runtime.place(task.opponent.module, device, settings.channels_last).train()
            contest = Contest.start(task.opponent, trained, settings)
        return cls(module, ema, optimizer, contest)


def train_step(task: Task, state: TrainState, batch: Batch, settings: TrainConfig) -> dict[str, float]:
    """One iteration on `batch`: gradients over all its parts, clip, optimiser, average; the same for an opponent.

    Returns the mean unweighted terms, their weighted sum "loss" (the adversarial term apart, whose weight is "balance"
    times its own) and the norm of the gradient "gradient". Raises `RacError`, and leaves the weights as they were, if
    the loss or a gradient is not finite.
    """
    device = next(state.module.parameters()).device
    batch = batch.to(device, runtime.memory_format(settings.channels_last))
    # For modules that draw on their own, such as dropout.
    torch.manual_seed(runtime.derived_seed(settings.rng_seed, "global", state.iteration))
    state.module.train()
    state.optimizer.zero_grad()
    contest: Contest | None = None
    totals: dict[str, Tensor] = {}
    for rows, share, draws in _parts(len(batch.images), state.iteration, settings, device):
        with runtime.autocast(device, settings.bf16):
            terms = task.terms(batch.rows(rows), draws, state.iteration)
            loss = torch.stack([weight * terms[name].float() for name, weight in task.weights.items() if weight]).sum()
        contest = state.contest if ADVERSARIAL in terms else None
        (share * loss).backward(retain_graph=contest is not None)
        if contest:
            contest.add_part(terms, share)
        for name, term in {**terms, "loss": loss}.items():
            totals[name] = totals.get(name, 0) + share * term.detach().float()
    if contest:
        totals |= contest.settle(settings.clip)
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    totals["gradient"] = nn.utils.clip_grad_norm_(parameters, settings.clip or float("inf")).float()
    # One transfer, and the only time the processor waits for the device.
    values = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
    _check_finite(values, state.iteration + 1)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(settings, state.iteration)
    state.optimizer.step()
    if contest:
        contest.step(settings, state.iteration)
    _average(state.ema, state.module, 1 - ema_decay(settings, state.iteration))
    state.iteration += 1
    return values


def _parts(
    size: int, iteration: int, settings: TrainConfig, device: torch.device
) -> Iterator[tuple[slice, float, Draws]]:
    """The parts of a batch of `size`: their rows, their share of it, and their draws."""
    for part in range(settings.accumulate):
        rows = slice(size * part // settings.accumulate, size * (part + 1) // settings.accumulate)
        draws = Draws(
            shared=runtime.generator(settings.rng_seed, "shared", iteration),
            own=runtime.generator(settings.rng_seed, "own", iteration, device=device),
            total=size,
            first=rows.start,
            count=rows.stop - rows.start,
        )
        yield rows, (rows.stop - rows.start) / size, draws


@torch.no_grad()
def _average(ema: nn.Module, module: nn.Module, weight: float) -> None:
    # One call for all: small networks have many parameters, and none of them is large.
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), weight)
    for kept, buffer in zip(ema.buffers(), module.buffers(), strict=True):
        kept.copy_(buffer)


def _check_finite(values: dict[str, float], iteration: int) -> None:
    if not all(map(math.isfinite, values.values())):
        found = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        raise RacError(
            f"training diverged at iteration {iteration}: {found}; earlier checkpoints are sound, but start anew "
            "with a lower lr, a longer warmup, a lower clip, or without bf16"
        )
