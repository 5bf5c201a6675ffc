"""A run that its minutes end goes on as if it had not been broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from training_toy import ToyStream, ToyTask, contents

from rac.errors import RacError
from rac.train import TrainConfig, fit, log

SETTINGS = TrainConfig(iterations=4, batch=4, schedule="cosine", device="cpu", tensorboard=False)


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")


def test_out_of_time_and_on_again_equals_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(ToyTask(), ToyStream(), SETTINGS, tmp_path / "whole")
    assert "time is up" not in capsys.readouterr().err
    # So short a time that each call does one iteration; a limit far away stops nothing.
    hurried = replace(SETTINGS, minutes=1e-9)
    done = [fit(ToyTask(), ToyStream(), hurried, tmp_path / "run", resume=k > 0).iteration for k in range(2)]
    assert done == [1, 2]
    assert "time is up after iteration 2 of 4; --resume" in capsys.readouterr().err
    last = fit(ToyTask(), ToyStream(), replace(SETTINGS, minutes=60.0), tmp_path / "run", resume=True)
    assert last.iteration == 4
    assert last.metrics["psnr"] > 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_negative_time_is_refused() -> None:
    with pytest.raises(RacError, match="minutes -1"):
        TrainConfig(minutes=-1.0)
