"""Training on several processes: which rows each one reads, what is summed over them, and which one writes.

Every process ("rank") processes rows of its own of each iteration's batch, with the random numbers that those rows have
on one process (`rac.draws`). Its loss is weighed by its share of the batch, so the sum of all gradients is the gradient
of the whole batch, and a run on two processes equals the run on one up to the order of additions. Changes of buffers,
such as running statistics, are summed in the same way (`rac.train.step.train_step`).

Gradients are summed once an iteration, after the last backward pass, in a few large buffers, rather than by torch's
DistributedDataParallel: that wrapper expects one forward call for each backward pass, while an objective here calls the
field many times, recomputes it within the backward pass, reaches past `forward` to an encoder or a decoder, and takes a
second backward pass for an adversarial term. Nothing of that concerns a sum at the end. The price is that communication
does not overlap with the backward pass.

`shard="fsdp"` spreads weights, gradients and moments over the processes with torch's `fully_shard` (FSDP2), block by
block: each block gathers its weights when it is called, whoever calls it, so it does not mind any of the above either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import runtime
from ..errors import RacError, install_extra

_BUFFER = 2**25
"""Most bytes of gradients that are summed in one message, unless a single tensor is larger."""
_PREPARING = timedelta(days=2)
"""Longest time that the others wait while the first process prepares data; they notice anyway if it ends."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; `join` makes one."""

    rank: int = 0
    count: int = 1
    messages: Any = None
    """The group, of CPU tensors, in which processes agree; None on a single one."""

    @classmethod
    def join(cls, device: str = "auto", patience: float = 900.0) -> Processes:
        """Joins the processes that `torchrun` or `accelerate launch` started, or returns this one alone.

        No process waits longer than `patience` seconds for another one. Raises `RacError` without accelerate.
        """
        count = runtime.processes()
        if count == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError:
            raise RacError(f"training on {count} processes needs accelerate; {install_extra('distributed')}") from None
        longest = timedelta(seconds=patience)
        with answered():
            state = PartialState(cpu=runtime.pick_device(device).type == "cpu", timeout=longest)
            return cls(state.process_index, state.num_processes, _messages(longest))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def rows(self, size: int) -> slice:
        """Returns this process's share of a batch of `size`."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Lets the first process run the block, however long that takes, before the others do."""
        if not self.first:
            self._meet(_PREPARING)
        yield
        if self.first:
            self._meet(_PREPARING)

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """Returns the largest value over all processes, number by number."""
        if self.count == 1:
            return list(numbers)
        largest = torch.tensor(numbers)
        with answered():
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.messages)
        return largest.tolist()

    def gather(self, thing: Any) -> list[Any]:
        """Returns the values of `thing` on all processes, in their order."""
        if self.count == 1:
            return [thing]
        found: list[Any] = [None] * self.count
        with answered():
            torch.distributed.all_gather_object(found, thing, group=self.messages)
        return found

    @torch.no_grad()
    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes.

        Sharded ones are left alone: theirs are summed already.
        """
        if self.count == 1:
            return
        for buffer in _buffers(tensor for tensor in tensors if not is_sharded(tensor)):
            flat = torch.cat([tensor.flatten() for tensor in buffer])
            with answered():
                torch.distributed.all_reduce(flat)
            for tensor, piece in zip(buffer, flat.split([tensor.numel() for tensor in buffer]), strict=True):
                tensor.copy_(piece.view(tensor.shape))

    @torch.no_grad()
    def spread(self, module: nn.Module) -> None:
        """Copies the first process's weights and buffers to all: equal seeds make them equal only on equal machines."""
        if self.count > 1:
            with answered():
                for tensor in (*module.parameters(), *module.buffers()):
                    whole = tensor.contiguous()
                    torch.distributed.broadcast(whole, 0)
                    tensor.copy_(whole)

    def _meet(self, patience: timedelta) -> None:
        if self.count > 1:
            with answered():
                torch.distributed.monitored_barrier(self.messages, patience)


def leave() -> None:
    """Leaves the group of processes, if there is one, at the end of a program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState().destroy_process_group()
        _messages.cache_clear()


@cache
def _messages(longest: timedelta) -> Any:
    """Makes a group for messages beside the device's, so that no message waits for a device."""
    return torch.distributed.new_group(backend="gloo", timeout=longest)


@contextmanager
def answered() -> Iterator[None]:
    """Turns torch's errors when another process is gone, or does not answer, into one `RacError`."""
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise RacError(
            "another process of this training has ended or does not answer, so this process ends too "
            f"({str(error).splitlines()[0]}); see the output of the other process for its error; --resume continues "
            "from the last checkpoint, with any number of processes"
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower() or "Rank " in str(error)


def _buffers(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields runs of tensors of one type, each run of about `_BUFFER` bytes."""
    buffer: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if buffer and (buffer[0].dtype != tensor.dtype or size + tensor.nbytes > _BUFFER):
            yield buffer
            buffer, size = [], 0
        buffer.append(tensor)
        size += tensor.nbytes
    if buffer:
        yield buffer


# Sharded weights


def shard(module: nn.Module) -> None:
    """Spreads the weights of `module` over the processes, in place, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in list(blocks(module)):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def blocks(module: nn.Module, listed: bool = False) -> Iterator[nn.Module]:
    """Yields the parts of `module` that hold its weights, each weight in one of them, and are always called as a whole.

    Those are the items of lists and sequences of modules, and whatever else has weights of its own.
    """
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    if listed and not is_list:
        if any(True for _ in module.parameters()):
            yield module
        return
    for child in module.children():
        yield from blocks(child, is_list)
    if any(True for _ in module.parameters(recurse=False)):
        yield module


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is spread over the processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor, on every process; to be called by all of them together."""
    spread: Any = tensor
    return spread.full_tensor() if is_sharded(tensor) else tensor


def alike(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor, or this process's piece of it where `like` is sharded. Nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor

    spread: Any = like
    mesh = spread.device_mesh
    pieces, place = tensor.to(like.device).chunk(mesh.size(), dim=0), mesh.get_local_rank()
    piece = pieces[place] if place < len(pieces) else tensor[:0].to(like.device)
    return DTensor.from_local(
        piece.clone(), mesh, spread.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
