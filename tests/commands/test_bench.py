"""`rac bench`: what it measures adds up, whatever the machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import rac
from rac.commands import bench
from rac.evaluate.cost import count
from rac.experiments.speed import Setting, Speed, best_convolution, coding_speeds

QUICK = ("--size", 16, "--batch", 2, "--seconds", 0, "--device", "cpu", "--threads", 1)


@pytest.fixture(autouse=True)
def _a_known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "best_convolution", lambda setting: 200.0 if setting.bf16 else 100.0)


@pytest.fixture
def photos(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(10):
        rac.write_image(images(1, 24, 24, k), folder / f"{k}.png")
    return folder


def test_a_rac_and_its_teacher(run, coder_dir: Path, photos: Path) -> None:  # type: ignore[no-untyped-def]
    teacher, before = coder_dir.parent / "teacher", torch.get_num_threads()
    ran = run("bench", coder_dir, teacher, *QUICK, "--data", photos, "--steps", 3, "--format", "json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    speeds = {(one["coder"], one["job"], one["precision"]): one for one in told["speeds"]}
    assert len(speeds) == 12
    for (_, job, precision), one in speeds.items():
        assert one["images_per_second"] == pytest.approx(2 / one["seconds"])
        assert one["gflops"] == pytest.approx(one["flops"] / one["seconds"] / 1e9)
        assert one["share"] == pytest.approx(one["gflops"] / {"fp32": 100, "bf16": 200}[precision])
        assert bool(one["parts"]) == (job == "train")
        # The parts of a step are the step; each is a median of its own.
        if one["parts"]:
            assert 0.3 < sum(one["parts"].values()) / one["seconds"] < 3
            assert all(seconds > 0 for seconds in one["parts"].values())
    field = rac.load(coder_dir).field
    one_evaluation = 2 * count(field, (2, 4, 16, 16), (2,)).macs
    for precision in ("fp32", "bf16"):
        assert speeds[str(coder_dir), "decode", precision]["flops"] == 3 * one_evaluation
        assert speeds[str(coder_dir), "encode", precision]["flops"] == 3 * one_evaluation
        # The recipe's one evaluation; backward takes twice a forward, the first layer's input apart.
        training = speeds[str(coder_dir), "train", precision]
        encoder = count(rac.load(teacher).network.encoder, (2, 3, 16, 16)).macs
        assert 2.2 * one_evaluation < training["flops"] - 2 * encoder < 3.2 * one_evaluation
        assert list(training["parts"]) == ["data", "teacher", "field", "terms", "backward", "optimiser"]
        assert list(speeds[str(teacher), "train", precision]["parts"]) == ["data", "forward", "backward", "optimiser"]
    assert torch.get_num_threads() == before


def test_the_table_and_the_threads(run, coder_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(bench.runtime, "_cores", lambda: 1)
    ran = run("bench", coder_dir, *QUICK, "--threads", 0, "--jobs", "decode", "--precision", "fp32")
    assert ran.code == 0, ran.err
    assert "16 x 16, batch 2, cpu, 1 thread" in ran.out
    assert "best convolution in fp32: 100 GFLOP/s" in ran.out
    assert "ms with 1 thread" in ran.out
    assert "encode" not in ran.out
    ran = run("bench", coder_dir, *QUICK, "--jobs", "decode", "--precision", "fp32", "--format", "csv")
    assert ran.out.count("\n") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "nothing"), "no recipe 'nothing'"),
        (("--batch", 0), "--batch 0"),
        (("--size", 18), "--size 18 must be a multiple"),
        (("--steps", 0), "steps 0"),
        (("--threads", -2), "threads -2"),
    ],
)
def test_bad_options(run, coder_dir: Path, options: tuple[object, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    ran = run("bench", coder_dir, *QUICK, *options)
    assert ran.code == 2
    assert message in ran.err


def test_the_best_convolution_is_finite_and_positive() -> None:
    found = best_convolution(Setting(torch.device("cpu"), seconds=0.0, rounds=1))
    assert 0 < found < math.inf


def test_rates() -> None:
    speed = Speed(images=6, seconds=2.0, flops=4_000_000_000)
    assert (speed.images_per_second, speed.gflops) == (3.0, 2.0)


def test_layout_and_precision_reach_the_networks(make_rac, images) -> None:  # type: ignore[no-untyped-def]
    coder, seen = make_rac(lively=0.1).eval(), []
    coder.field.network.layers[0].register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        seen.clear()
        found = coding_speeds(coder, images(1, 16, 16), Setting(torch.device("cpu"), bf16, 0.0, 1), steps=1)
        assert seen[-1] == dtype
        assert set(found) == {"encode", "decode"}
