"""Two processes train as one does, and end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_recipes
import training_toy
from safetensors.torch import load_file
from torch import Tensor, nn
from training_toy import SLOW, ToyStream, ToyTask

from rac import runtime
from rac.coders.klvae import KLVAEConfig
from rac.coders.rac import RAC, RACConfig
from rac.commands.ablate import run as ablate
from rac.data import Batch, batches
from rac.errors import RacError
from rac.fields import LdmFieldConfig
from rac.latents import LatentSpec
from rac.train import TrainConfig, fit, read_log
from rac.train.processes import Processes, blocks

# Who reads what


class Counting(ToyStream):
    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def _image(self, draw: int) -> Tensor:
        self.read.append(draw)
        return super()._image(draw)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_image_is_read_once_by_one_process_whatever_their_number(count: int) -> None:
    whole = list(batches(ToyStream(), 5, 2, 6))
    streams = [Counting() for _ in range(count)]
    shares = [
        list(batches(stream, 5, 2, 6, workers=rank % 2, rows=Processes(rank, count).rows(5)))
        for rank, stream in enumerate(streams)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
    assert sorted(draw for stream in streams for draw in stream.read) == list(range(10, 30))


def test_a_batch_too_small_for_its_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Processes, "join", classmethod(lambda cls, device, patience: cls(0, 3)))
    settings = TrainConfig(batch=5, accumulate=2, device="cpu")
    with pytest.raises(RacError, match=r"a batch of 5 cannot be split over 3 processes into 2 part\(s\) each"):
        fit(ToyTask(), ToyStream(), settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What each of them is


def test_processes_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    runtime.set_threads(0)
    assert chosen == []  # alone: torch's own choice
    for here, asked in ((2, 0), (3, 0), (16, 0), (2, 7)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        runtime.set_threads(asked)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as torchrun sets it
    runtime.set_threads(0)
    assert chosen == [4, 2, 1, 7, 1]


def test_each_process_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert runtime.pick_device("auto") == torch.device("cuda")  # one process, whatever the environment says of its rank
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [runtime.pick_device(name) for name in ("auto", "cuda")] == [torch.device("cuda:2")] * 2
    assert runtime.pick_device("cpu") == torch.device("cpu")


def test_several_processes_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(RacError, match=r"2 processes needs accelerate; run pip install '\.\[distributed\]'"):
        Processes.join()


def test_an_ablation_is_for_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RacError, match="rac ablate runs in one process"):
        ablate(["tiny", "--vary", "steps=1,2", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def coders() -> Iterator[nn.Module]:
    yield KLVAEConfig(widths=(8, 8), norm_groups=4, middle_attention=True).build()
    for field in (training_recipes.recipes(Path())["rac"].field, LdmFieldConfig(widths=(8, 8, 8), groups=4)):
        yield RAC(RACConfig(LatentSpec(4, 4), field, contraction="projector"))
    yield training_toy.one_layer()


@pytest.mark.parametrize("coder", list(coders()), ids=["klvae", "tiny", "ldm", "layer"])
def test_every_weight_lies_in_one_block(coder: nn.Module) -> None:
    held = [id(parameter) for block in blocks(coder) for parameter in block.parameters()]
    assert sorted(held) == sorted(id(parameter) for parameter in coder.parameters())


# Two processes


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "localhost"}


def start_two(script: str, *arguments: object) -> list[subprocess.Popen[str]]:
    pytest.importorskip("accelerate")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, script, *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=environment(rank, port), **pipes) for rank in range(2)]  # type: ignore[call-overload]


def ends(processes: Sequence[subprocess.Popen[str]], seconds: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes, and what was said on stderr; fails if they do not end."""
    try:
        said = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def until_saved(run: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait for a first checkpoint."""
    until = time.monotonic() + 300
    while not list(run.glob("checkpoints/0*")) and not any(process.poll() for process in processes):
        assert time.monotonic() < until
        time.sleep(0.01)


def losses(run: Path) -> list[dict[str, float]]:
    records = [record["train"] for record in read_log(run / "log.jsonl") if "train" in record]
    assert len(records) == 20
    return records


def train(workplace: Path, jobs: Sequence[str], processes: int) -> None:
    if processes == 2:
        codes, said = ends(start_two(training_recipes.__file__, workplace, *jobs), 1200)
        assert codes == [0, 0], "\n".join(said)
        assert "held out" not in said[1], "only the first process talks"
    else:
        command = [sys.executable, training_recipes.__file__, str(workplace), *jobs]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs on one process, on two, and begun on the one and ended on the other."""
    folder = tmp_path_factory.mktemp("processes")
    training_recipes.prepare(folder)
    train(folder, ["rac:none:rac-one:20", "klvae:none:klvae-one:20", "rac:none:rac-widened:10"], 1)
    whole = [f"{name}:{shard}:{name}-{shard}:20" for name in ("rac", "klvae") for shard in ("none", "fsdp")]
    begun = ["rac:none:rac-none-narrowed:10", "klvae:fsdp:klvae-fsdp-narrowed:10"]
    train(folder, [*whole, *begun, "rac:fsdp:rac-widened:20"], 2)
    train(folder, ["rac:none:rac-none-narrowed:20", "klvae:none:klvae-fsdp-narrowed:20"], 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    ["rac-none", "rac-fsdp", "klvae-none", "klvae-fsdp", "rac-widened", "rac-none-narrowed", "klvae-fsdp-narrowed"],
)
def test_two_processes_train_as_one(workplace: Path, run: str) -> None:
    """Also where a run was begun on two and ended on one ("narrowed"), or the other way round."""
    one = workplace / f"{run.split('-')[0]}-one"
    for ours, theirs in zip(losses(workplace / run), losses(one), strict=True):
        steep = {"gradient", "gradient_discriminator", "balance"}  # rounding grows in them
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-3 if name in steep else 1e-5, abs=1e-7), name
        assert ours.keys() == theirs.keys()


@pytest.mark.slow
@pytest.mark.parametrize("run", ["rac-none", "rac-fsdp", "klvae-none", "klvae-fsdp"])
def test_checkpoints_do_not_tell_how_many_processes_wrote_them(workplace: Path, run: str) -> None:
    newest, one = (workplace / name / "checkpoints" / "00000020" for name in (run, f"{run.split('-')[0]}-one"))
    assert sorted(path.name for path in newest.iterdir()) == sorted(path.name for path in one.iterdir())
    for path in newest.glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(one / path.name)
        assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}
        if path.stem in ("coder", "coder_ema"):
            # Keys of attention have no say in their bias: its gradient is nothing but rounding.
            known = [name for name in ours if not name.endswith("to_k.bias")]
            torch.testing.assert_close(
                [ours[name] for name in known], [theirs[name] for name in known], rtol=1e-3, atol=2e-5
            )
    assert (workplace / run / "coder" / "config.json").is_file()
    assert (workplace / run / "gallery-000020.png").is_file()


@pytest.mark.slow
def test_when_one_process_dies_the_other_ends_with_the_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start_two(training_toy.__file__, run, 5)
    until_saved(run, processes)
    processes[1].kill()
    codes, said = ends(processes)
    assert codes == [1, -signal.SIGKILL]
    assert "another process of this training has ended or does not answer" in said[0]
    # The last checkpoint is whole, and one process alone goes on from it.
    assert 0 < max(int(path.name) for path in run.glob("checkpoints/0*")) < SLOW.iterations
    assert fit(ToyTask(), ToyStream(), SLOW, run, resume=True).iteration == SLOW.iterations


@pytest.mark.slow
def test_when_one_process_hangs_the_other_ends_with_the_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start_two(training_toy.__file__, run, 0.2)
    until_saved(run, processes)
    processes[1].send_signal(signal.SIGSTOP)
    codes, said = ends(processes[:1], 60)
    processes[1].kill()
    processes[1].communicate()
    assert codes == [1]
    assert "another process of this training has ended or does not answer" in said[0]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_well(tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start_two(training_toy.__file__, run, 5)
    until_saved(run, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ends(processes)
    assert codes == [0, 0]
    newest = max(int(path.name) for path in run.glob("checkpoints/0*"))
    assert f"stopped after iteration {newest} of 200; --resume" in said[0]
    assert "stopped" not in said[1]


@pytest.mark.slow
def test_a_diverging_image_of_one_process_stops_both(tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes, said = ends(start_two(training_toy.__file__, run, 5, 6))
    assert codes == [1, 1]
    assert all("training diverged at iteration 7" in one for one in said)
    kept = [load_file(run / f"diverged-00000007{which}.safetensors")["images"] for which in ("", "-process-1")]
    assert [bool(images.isfinite().all()) for images in kept] == [True, False]
    assert torch.equal(kept[0], Batch(ToyStream().batch(24, 2).images).images)
    # One process, told to skip it, goes on.
    skipping = replace(SLOW, on_divergence="skip", iterations=20)
    assert fit(ToyTask(), training_toy.PoisonedStream(poisoned=(6,)), skipping, run, resume=True).iteration == 20
