"""`rac toy` on the command line."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from PIL import Image

from rac.experiments import toy
from rac.files import MARKER


def test_toy(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("rac.experiments.toy_report.FRAMES", 2)
    ran = run("toy", "--out", tmp_path / "toy", "--iterations", 3)
    assert ran.code == 0, ran
    assert sorted(os.listdir(tmp_path / "toy")) == [
        *(MARKER, "errors.png", "figures.csv", "film.gif", "flow.png", "paths.png")
    ]
    with Image.open(tmp_path / "toy" / "film.gif") as film:
        assert film.n_frames == 6
    rows = list(csv.DictReader((tmp_path / "toy" / "figures.csv").open()))
    assert [int(row["steps"]) for row in rows] == [1, 2, 4, 8]
    for row in rows:
        assert f"{float(row['image_error']):.3f}" in ran.out


def test_toy_refuses_and_stops(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    ran = run("toy", "--out", tmp_path / "toy", "--seed-noise", 3)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "0 to 0.25" in ran.err
    for cell in (1e-9, "inf", "nan"):
        ran = run("toy", "--out", tmp_path / "toy", "--cell", cell)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert "0.02 to 10" in ran.err

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "moons", interrupt)
    ran = run("toy", "--out", tmp_path / "toy")
    assert (ran.code, ran.err) == (130, "rac: stopped\n")
    assert os.listdir(tmp_path / "toy") == [MARKER]
