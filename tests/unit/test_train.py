"""The loop, beyond what the laws of resuming and accumulation hold."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_toy import ToyStream, ToyTask, contents, one_layer

from rac.data import Batch, Stream
from rac.draws import Draws
from rac.errors import RacError
from rac.files import MARKER
from rac.images import read_image
from rac.train import TrainConfig, fit, log, read_log
from rac.train.checkpoint import whole_folder
from rac.train.config import ema_decay, learning_rate

SHORT = TrainConfig(iterations=4, batch=4, device="cpu", log_every=2, gallery_every=2, tensorboard=False)


@pytest.fixture(autouse=True)
def _without_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the training here; one test looks at it."""
    if request.function is not test_training_lowers_the_loss_and_shows_it:
        monkeypatch.setattr(log, "draw_curves", lambda records: b"")


def test_training_lowers_the_loss_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = replace(SHORT, iterations=150, lr=1e-2, gallery_every=75, log_every=25)
    fitted = fit(ToyTask(), ToyStream(), settings, tmp_path / "run")
    records = read_log(tmp_path / "run" / "log.jsonl")
    train = [record["train"] for record in records if "train" in record]
    held_out = [record["held_out"]["psnr"] for record in records if "held_out" in record]
    assert all(train[-1][name] < train[0][name] / 2 for name in ("clean", "loss"))
    assert train[-1]["loss"] == pytest.approx(train[-1]["clean"] + 0.5 * train[-1]["faint"], rel=1e-4)
    assert held_out[-1] > held_out[0] + 6
    assert fitted.metrics == {"psnr": held_out[-1]}
    assert [record["images"] for record in records if "train" in record][-1] == 600
    for name in ("gallery-000000.png", "gallery-000075.png", "gallery-000150.png", "losses.png"):
        assert read_image(tmp_path / "run" / name, convert=True).shape[1] == 3
    shown = capsys.readouterr().err
    assert "150/150" in shown
    assert "img/s" in shown
    assert "clean 0." in shown


def test_terms_without_weight_are_logged_and_train_nothing(tmp_path: Path) -> None:
    only = ToyTask(weights={"clean": 1.0, "faint": 0.5})
    fit(only, ToyStream(), SHORT, tmp_path / "only")
    fit(ToyTask(), ToyStream(), SHORT, tmp_path / "all")
    assert contents(tmp_path / "only") == contents(tmp_path / "all")
    assert "unused" in read_log(tmp_path / "only" / "log.jsonl")[-2]["train"]


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_weights(tmp_path: Path) -> None:
    class Diverging(ToyTask):
        def losses(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
            terms = super().losses(batch, draws, iteration)
            return terms if iteration < 2 else {**terms, "clean": terms["clean"] * math.nan}

    task = Diverging()
    with pytest.raises(RacError, match=r"diverged at iteration 3: clean nan.*lower lr"):
        fit(task, ToyStream(), replace(SHORT, checkpoint_minutes=0), tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in task.module.parameters())
    assert (tmp_path / "run" / "checkpoints" / "00000002").is_dir()


def test_frozen_parts_get_no_gradient_though_it_flows_through_them(tmp_path: Path) -> None:
    class Through(ToyTask):
        def losses(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
            return {"clean": (self.frozen[0](self.module(batch.images)) - batch.images).square().mean()}

    teacher = one_layer()
    before = [parameter.clone() for parameter in teacher.parameters()]
    task = Through(frozen=(teacher,), weights={"clean": 1.0})
    start = task.module.weight.detach().clone()
    fit(task, ToyStream(), SHORT, tmp_path / "run")
    assert not torch.equal(task.module.weight, start)
    for parameter, was in zip(teacher.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, was)


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    class Full(ToyTask):
        def save(self, modules: Mapping[str, nn.Module], stream: Stream, directory: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run"
    fit(ToyTask(), ToyStream(), SHORT, run, stop_at=2)
    before = contents(run)
    with pytest.raises(RacError, match="the disk is full"):
        fit(Full(), ToyStream(), SHORT, run, resume=True)
    assert contents(run) == before
    assert [path.name for path in run.glob(".*")] == [MARKER]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with whole_folder(target) as temporary:
        (temporary / "file").write_text("first")
    with pytest.raises(ZeroDivisionError), whole_folder(target) as temporary:
        (temporary / "file").write_text(str(1 / 0))
    assert (target / "file").read_text() == "first"
    with whole_folder(target) as temporary:
        (temporary / "other").write_text("second")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/other"]


def test_the_learning_rate_warms_up_and_falls() -> None:
    constant = TrainConfig(iterations=10, lr=1.0, warmup=4)
    assert [learning_rate(constant, k) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = replace(constant, schedule="cosine", final_lr=0.1)
    rates = [learning_rate(cosine, k) for k in range(4, 11)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[3], rates[-1]) == (1.0, pytest.approx(0.55), pytest.approx(0.1))


def test_the_average_is_quick_at_first_and_slow_in_the_end() -> None:
    decays = [ema_decay(0.99, k) for k in (0, 90, 10_000)]
    assert decays == [0.1, pytest.approx(0.91), 0.99]


def test_the_average_follows_the_definition(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    class Watched(ToyTask):
        def losses(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
            seen.append(self.module.weight.detach().double().numpy().copy())
            return super().losses(batch, draws, iteration)

    task = Watched()
    fitted = fit(task, ToyStream(), SHORT, tmp_path / "run")
    seen.append(task.module.weight.detach().double().numpy())
    average = seen[0]
    for k, weight in enumerate(seen[1:]):
        decay = ema_decay(SHORT.ema, k)
        average = decay * average + (1 - decay) * weight
    np.testing.assert_allclose(fitted.module.weight.numpy(), average, rtol=1e-5, atol=1e-7)


def test_every_iteration_has_draws_of_its_own(tmp_path: Path) -> None:
    seen: list[tuple[float, ...]] = []

    class Watched(ToyTask):
        def losses(self, batch: Batch, draws: Draws, iteration: int) -> dict[str, Tensor]:
            assert iteration == len(seen)
            shared = torch.rand((), generator=draws.shared)
            seen.append((*draws.normal(batch.images).flatten()[:2].tolist(), float(shared)))
            return super().losses(batch, draws, iteration)

    fit(Watched(), ToyStream(), SHORT, tmp_path / "run")
    assert all(len(set(numbers)) == SHORT.iterations for numbers in zip(*seen, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations 0 must be at least 1"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"lr": math.nan}, "lr nan"),
        ({"lr": math.inf}, "lr inf must be at least 0, and finite"),
        ({"clip": math.inf}, "clip inf"),
        ({"batch": 2, "accumulate": 3}, "cannot be split into 3 parts"),
        ({"ema": 1.0}, "ema 1.0"),
        ({"betas": (0.9, 1.5)}, "betas 1.5"),
        ({"optimizer": "adam"}, "optimizer 'adam' is unknown; expected adamw, muon"),
        ({"optimizer": "muon", "shard": "fsdp"}, "optimizer muon needs whole matrices"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RacError, match=message):
        TrainConfig(**changes)


def test_an_unreadable_stream_ends_the_run_with_its_error(tmp_path: Path) -> None:
    class Broken(ToyStream):
        def batch(self, first: int, count: int) -> Batch:
            raise RacError("no picture can be read")

    with pytest.raises(RacError, match="no picture can be read"):
        fit(ToyTask(), Broken(), SHORT, tmp_path / "run")


def test_a_replacement_cut_between_its_two_renamings_loses_nothing(tmp_path: Path) -> None:
    """What a killed process leaves: the old folder out of the way, the new one not yet in its place."""
    (tmp_path / ".going").mkdir()
    (tmp_path / ".going" / "kept").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "coder"):
        raise KeyboardInterrupt
    assert (tmp_path / "coder" / "kept").read_text() == "old"
