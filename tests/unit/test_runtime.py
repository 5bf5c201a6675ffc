from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from rac import runtime
from rac.errors import RacError
from rac.train import TrainConfig


def test_auto_finds_a_device_and_cpu_is_always_there() -> None:
    assert runtime.pick_device().type in {"cpu", "cuda", "mps"}
    assert runtime.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(RacError, match=f"device '{name}' is (unknown|not available)"):
        runtime.pick_device(name)


def test_generators_are_told_apart_by_every_part_of_their_name() -> None:
    names = [(0,), (1,), (0, 0), (0, 1), (0, "crop", 1), (0, "crop", 11), (0, "crop", 1, 1), (-1,)]
    numbers = [torch.rand((), generator=runtime.generator(*name)).item() for name in names]
    assert len(set(numbers)) == len(names)
    assert numbers == [torch.rand((), generator=runtime.generator(*name)).item() for name in names]


def test_derived_seeds_never_change() -> None:
    # A run started with one version of the library is resumed with the next.
    assert runtime.derived_seed(0, "crop", 17) == 2185686900259196363


def test_bf16_is_a_choice() -> None:
    layer, images = nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 2, 2)
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with runtime.autocast(torch.device("cpu"), bf16):
            assert layer(images).dtype == dtype


def test_layout_is_a_choice() -> None:
    layer = runtime.place(nn.Conv2d(8, 8, 3), torch.device("cpu"), channels_last=True)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    runtime.place(layer, torch.device("cpu"))
    assert layer.weight.is_contiguous()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_kept_memory_is_used_again() -> None:
    """In a process of its own: the setting cannot be taken back."""
    code = """
import resource, torch
from rac import runtime
assert runtime.keep_memory()
torch.set_num_threads(1)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    kept = [torch.ones(n << 20) for n in (4, 5, 6, 7)]
    torch.relu(kept[0] + 1)
for turn in range(6):
    before = faults()
    work()
print(faults() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    # 22 MiB are 5,632 pages, and the sum another 1,024; glibc's own choice takes all of them anew, now and then.
    assert int(ran.stdout) < 2_500


def test_threads() -> None:
    before = torch.get_num_threads()
    runtime.set_threads(0)
    assert torch.get_num_threads() == before
    with pytest.raises(RacError, match="threads -2"):
        runtime.set_threads(-2)
    with pytest.raises(RacError, match="threads -2"):
        TrainConfig(threads=-2)
    for ask in (runtime.set_threads, lambda count: TrainConfig(threads=count)):
        with pytest.raises(RacError, match="threads 100000 are more than 1,024"):
            ask(100_000)


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_threads_are_measured_by_turns(cores: int, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    before, used = torch.get_num_threads(), []
    monkeypatch.setattr(runtime, "_cores", lambda: cores)
    seconds = runtime.seconds_by_threads(lambda: used.append(torch.get_num_threads()), rounds=3)
    assert used == 4 * counts
    assert list(seconds) == counts
    assert torch.get_num_threads() == before

    def failing() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        runtime.seconds_by_threads(failing)
    assert torch.get_num_threads() == before


def test_the_fastest_number_of_threads_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(runtime, "seconds_by_threads", lambda work: work() or {1: 0.3, 2: 0.1, 4: 0.2})
    runtime.set_threads(runtime.MEASURED)
    assert taken == [2]
