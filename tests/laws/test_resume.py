"""Training that is broken off and resumed ends as if it had not been: bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_toy
from torch import nn
from training_toy import SLOW, AdversarialTask, ToyStream, ToyTask, contents

from rac.data import Batch
from rac.errors import RacError, WeightsError
from rac.train import TrainConfig, fit, log, read_log

PLAIN = TrainConfig(iterations=4, batch=4, device="cpu", tensorboard=False)
HARD = replace(
    PLAIN, accumulate=3, schedule="cosine", warmup=2, weight_decay=0.1, bf16=True, channels_last=True, log_every=1
)


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the training here, and is no part of this law."""
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")


def deep() -> nn.Module:
    """Channels enough for a channels-last layout, statistics in buffers, and randomness of the module's own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.2), nn.Conv2d(8, 3, 1))


@pytest.mark.parametrize("start", [0, 1, 3])  # it comes in at once, before the break, after it
def test_the_same_against_a_discriminator(tmp_path: Path, start: int) -> None:
    fit(AdversarialTask(deep(), start=start), ToyStream(), HARD, tmp_path / "whole")
    fit(AdversarialTask(deep(), start=start), ToyStream(), HARD, tmp_path / "broken", stop_at=2)
    fit(AdversarialTask(deep(), start=start), ToyStream(), HARD, tmp_path / "broken", resume=True)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert {"00000004/discriminator.safetensors", "00000004/discriminator_optimizer.safetensors"} <= contents(
        tmp_path / "whole"
    ).keys()


@pytest.mark.parametrize(("settings", "module"), [(PLAIN, training_toy.one_layer), (HARD, deep)], ids=["plain", "hard"])
def test_four_iterations_equal_two_and_two_more(tmp_path: Path, settings: TrainConfig, module) -> None:
    fit(ToyTask(module()), ToyStream(), settings, tmp_path / "whole")
    assert fit(ToyTask(module()), ToyStream(), settings, tmp_path / "broken", stop_at=2).iteration == 2
    fit(ToyTask(module()), ToyStream(), replace(settings, workers=0), tmp_path / "broken", resume=True)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_in_the_middle_ends_with_the_same_weights(tmp_path: Path) -> None:
    fit(ToyTask(), ToyStream(), SLOW, tmp_path / "whole")

    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, training_toy.__file__, str(killed), "1"], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while len(list(killed.glob("checkpoints/0*"))) < 2 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = max(int(path.name) for path in killed.glob("checkpoints/0*"))
    assert 0 < reached < SLOW.iterations, "the process was to be killed between its first checkpoint and its end"

    fit(ToyTask(), ToyStream(), SLOW, killed, resume=True)
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    fit(ToyTask(), ToyStream(), PLAIN, tmp_path / "whole")
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "recipe.json").write_bytes((tmp_path / "whole" / "recipe.json").read_bytes())
    (killed / "checkpoints" / ".coming").mkdir(parents=True)
    (killed / "log.jsonl").write_text('{"iteration": 0, "held_out": {"psnr": 1.0}}\n{"iterat')
    fit(ToyTask(), ToyStream(), PLAIN, killed, resume=True)
    assert contents(killed) == contents(tmp_path / "whole")
    assert not (killed / "checkpoints" / ".coming").exists()


@pytest.mark.parametrize(
    ("number", "ends_with"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
    ids=["int", "term", "hup"],
)
def test_a_signal_finishes_the_iteration_saves_and_can_be_resumed(
    tmp_path: Path, number: int, ends_with: type[BaseException], capsys, request: pytest.FixtureRequest
) -> None:
    class Interrupted(ToyStream):
        def batch(self, first: int, count: int) -> Batch:
            if first == PLAIN.batch:  # while the second batch is read, in the main thread
                signal.raise_signal(number)
            return super().batch(first, count)

    settings = replace(PLAIN, workers=0)
    # Under nohup, and in background jobs, these signals come ignored.
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    found = signal.signal(number, before)
    request.addfinalizer(lambda: signal.signal(number, found))
    with pytest.raises(ends_with) as ended:
        fit(ToyTask(), Interrupted(), settings, tmp_path / "run")
    assert getattr(ended.value, "code", 0) == 0  # of SIGTERM: the system may end what it asked to end
    assert signal.getsignal(number) == before
    assert "stopped after iteration 2 of 4; --resume" in capsys.readouterr().err
    fit(ToyTask(), ToyStream(), settings, tmp_path / "run", resume=True)
    fit(ToyTask(), ToyStream(), settings, tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model", "model_ema", "model_optimizer", "discriminator", "discriminator_optimizer"])
def test_a_checkpoint_cut_in_half_gives_way_to_the_one_before(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    fit(AdversarialTask(), ToyStream(), PLAIN, run, stop_at=1)
    fit(AdversarialTask(), ToyStream(), PLAIN, run, stop_at=3, resume=True)
    cut(run / "checkpoints" / "00000003" / f"{name}.safetensors")
    with pytest.warns(UserWarning, match=r"00000003 is damaged.*trying the checkpoint before it"):
        fit(AdversarialTask(), ToyStream(), PLAIN, run, resume=True)
    fit(AdversarialTask(), ToyStream(), PLAIN, tmp_path / "whole")
    assert contents(run) == contents(tmp_path / "whole")

    for path in (run / "checkpoints").glob(f"*/{name}.safetensors"):
        cut(path)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(WeightsError, match="no checkpoint in"),
    ):
        fit(AdversarialTask(), ToyStream(), PLAIN, run, resume=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    fit(ToyTask(), ToyStream(), replace(PLAIN, checkpoint_minutes=0), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["00000003", "00000004"]


def test_the_log_of_a_broken_run_tells_every_iteration_once(tmp_path: Path) -> None:
    run, settings = tmp_path / "run", replace(PLAIN, log_every=1)
    fit(ToyTask(), ToyStream(), settings, run, stop_at=2)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"iteration": 3, "train": {"loss": 1.0}}\n')  # from beyond the checkpoint, where the run was killed
    fit(ToyTask(), ToyStream(), settings, run, resume=True)
    assert [record["iteration"] for record in read_log(run / "log.jsonl") if "train" in record] == [1, 2, 3, 4]
    assert [record["iteration"] for record in read_log(run / "log.jsonl") if "held_out" in record] == [0, 4]


def test_another_recipe_is_refused_by_the_fields_that_differ(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(ToyTask(), ToyStream(), PLAIN, run, stop_at=2)
    other = replace(PLAIN, lr=0.1, betas=(0.5, 0.99))
    with pytest.raises(RacError, match=r"lr 0\.1, was 0\.0003; betas \[0\.5, 0\.99\], was \[0\.9, 0\.99\]"):
        fit(ToyTask(), ToyStream(), other, run, resume=True)
    with pytest.raises(RacError, match="iterations"):  # the cosine hangs on the run's length
        fit(ToyTask(), ToyStream(), replace(PLAIN, schedule="cosine", iterations=6), run, resume=True)
    longer = replace(PLAIN, iterations=6, log_every=3, checkpoint_minutes=1, workers=2)
    assert fit(ToyTask(), ToyStream(), longer, run, resume=True).iteration == 6


def test_a_directory_that_is_not_empty_and_one_without_a_run(tmp_path: Path) -> None:
    fit(ToyTask(), ToyStream(), PLAIN, tmp_path / "run", stop_at=1)
    with pytest.raises(RacError, match="is not empty; --resume"):
        fit(ToyTask(), ToyStream(), PLAIN, tmp_path / "run")
    with pytest.raises(RacError, match="holds no run to resume"):
        fit(ToyTask(), ToyStream(), PLAIN, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_finished_run_is_resumed_without_doing_anything(tmp_path: Path) -> None:
    first = fit(ToyTask(), ToyStream(), PLAIN, tmp_path / "run")
    before = contents(tmp_path / "run")
    again = fit(ToyTask(), ToyStream(), PLAIN, tmp_path / "run", resume=True)
    assert (again.iteration, again.metrics) == (4, first.metrics)
    assert contents(tmp_path / "run") == before
