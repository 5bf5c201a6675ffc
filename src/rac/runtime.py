"""Devices, precision, memory layout, threads and random generators.

The only module that chooses any of these. float32 on the CPU is right everywhere; the rest is speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn

from .errors import RacError


def pick_device(name: str = "auto") -> torch.device:
    """Returns the device called `name`: "cpu", "cuda", "cuda:1", "mps", or "auto" for the fastest one present.

    Where several processes were started on this machine, each takes the CUDA device of its own number. Raises
    `RacError` for a name torch does not know and for a device this machine (or this torch) lacks.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps and processes_here() == 1 else "cpu"
    if name == "cuda" and processes_here() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RacError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:1 or mps") from None
    present = {"cpu": True, "mps": mps, "cuda": cuda and (device.index or 0) < torch.cuda.device_count()}
    if not present.get(device.type, False):
        raise RacError(f"device {name!r} is not available to this torch ({torch.__version__}); use auto or cpu")
    return device


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Runs matrix products and convolutions in bfloat16 if `bf16`; weights and reductions stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Makes new tensors float32 and on the CPU within the block, whatever torch's defaults are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def reproducible() -> Iterator[None]:
    """Runs the block without gradients, in full float32, by deterministic algorithms.

    They do not depend on timing, nor on an autocast outside.
    """
    precision = torch.get_float32_matmul_precision()
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def choose_kernels(device: torch.device) -> None:
    """Lets cuDNN time its algorithms and keep the fastest for each shape: training meets the same shapes all the time.

    No effect elsewhere than on CUDA. Convolutions in float32 use TF32 there by torch's own default.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def memory_format(channels_last: bool) -> torch.memory_format:
    """Returns the memory format of 4-dimensional tensors; channels last is faster for convolutions in bfloat16."""
    return torch.channels_last if channels_last else torch.contiguous_format


def place(module: nn.Module, device: torch.device, channels_last: bool = False) -> nn.Module:
    """Moves `module` itself to `device`, its weights in the memory layout asked for, and returns it."""
    move: Any = module.to  # its stubs do not know memory_format
    move(device=device, memory_format=memory_format(channels_last))
    return module


KEPT = 1 << 30
"""Bytes of freed memory that `keep_memory` lets a process hold on to."""

LARGEST_KEPT = 32 << 20
"""Bytes from which a block is given back all the same: the most that every version of glibc allows."""


def keep_memory() -> bool:
    """Let this process use freed memory again rather than return it to the system; whether it could be done.

    glibc returns large blocks at once, and the next tensor of that size waits while the system hands out and clears the
    same pages again: about a quarter of the time of decoding on one thread. No number changes. Elsewhere nothing
    happens. It concerns the whole process, so a library does not call it unasked: `rac` does, and
    programs that decode or train may.
    """
    if sys.platform != "linux":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(trim_threshold, KEPT) and mallopt(mmap_threshold, LARGEST_KEPT))


MEASURED = -1
"""Number of threads that stands for the fastest measured."""

MOST_THREADS = 1_024
"""Threads that torch is asked for at most: with very many it ends the process without a word."""


def check_threads(count: int) -> None:
    """Raises `RacError` unless `count` is `MEASURED`, 0 (torch chooses), or a number up to `MOST_THREADS`."""
    if count < MEASURED:
        raise RacError(f"threads {count} must be -1 (measured), 0 (torch chooses) or more")
    if count > MOST_THREADS:
        raise RacError(f"threads {count} are more than {MOST_THREADS:,}; 0 lets torch choose")


def set_threads(count: int) -> None:
    """Lets torch compute with `count` threads in this process; 0 leaves its choice, -1 takes the fastest number here.

    Torch's choice is all cores, so where several processes were started on this machine, 0 is at most an equal share.
    Raises `RacError` as `check_threads`.
    """
    check_threads(count)
    if count == MEASURED:
        seconds = seconds_by_threads(_convolve)
        count = min(seconds, key=seconds.__getitem__)
    if count == 0 and processes_here() > 1:
        count = min(torch.get_num_threads(), max(1, _cores() // processes_here()))
    if count:
        torch.set_num_threads(count)


def processes() -> int:
    """Returns the number of processes that torchrun, or accelerate, started on all machines; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """Returns the number of processes that torchrun, or accelerate, started on this machine; 1 without them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Returns whether this process is the only one, or the first of those started together, which prints."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


def seconds_by_threads(work: Callable[[], object], rounds: int = 5) -> dict[int, float]:
    """Measures the median seconds that `work` takes with 1, 2, 4, ... threads, up to one for each available processor.

    More threads are not always faster: where others compute too, all wait for the one that waits. The counts take
    turns, so that a busy moment hits them alike. The number of threads is afterwards what it was.
    """
    cores, before = _cores(), torch.get_num_threads()
    counts = sorted({*(1 << k for k in range(cores.bit_length())), cores})
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for turn in range(rounds + 1):
            for count in counts:
                torch.set_num_threads(count)
                start = time.perf_counter()
                work()
                if turn:  # the first is for warming up
                    seconds[count].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return {count: median(taken) for count, taken in seconds.items()}


def _cores() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _convolve() -> None:
    """Computes what networks here do most: a convolution and its derivative."""
    image, weight = torch.ones(4, 64, 32, 32), torch.ones(64, 64, 3, 3, requires_grad=True)
    with torch.enable_grad():
        torch.autograd.grad(nn.functional.conv2d(image, weight, padding=1).sum(), weight)


def derived_seed(rng_seed: int, *stream: int | str) -> int:
    """Returns a 63-bit seed that is a pure function of `rng_seed` and the names and numbers of a stream."""
    key = "/".join(map(str, (rng_seed, *stream)))
    return (
        int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little") >> 1
    )


def generator(rng_seed: int, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a fresh generator for one stream, such as `generator(rng_seed, "crop", 17)`.

    Nothing has to be stored to go on after an interruption: the numbers of iteration 17 come from 17.
    """
    return torch.Generator(device).manual_seed(derived_seed(rng_seed, *stream))
