"""Every benchmark runs, at a size that says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "training_memory.py": ["--size", "8", "--steps", "1", "4"],
    "training_step.py": ["--size", "8", "--batch", "1", "--steps", "1", "--rounds", "1"],
    "decode_peers.py": ["--size", "8", "--rounds", "1"],
    "tiled_decode.py": ["--side", "64", "--tile", "32", "--steps", "1"],
}
TAKES_JSON = {"training_step.py", "decode_peers.py"}
DATA = {"data.py", "make_shards.py"}
"""The benchmark of reading, and what makes its shards."""


def test_all_are_here() -> None:
    assert {path.name for path in BENCHMARKS.glob("*.py")} - DATA == SMALL.keys()
    told = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert all(f"python benchmarks/{name}" in told for name in SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str) -> None:
    command = [sys.executable, str(BENCHMARKS / name), *SMALL[name], "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(unit in done.stdout for unit in ("GMACs", "MiB", "GiB"))
    if name in TAKES_JSON:
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["threads"] == 1


@pytest.mark.slow
def test_reading_runs(tmp_path: Path) -> None:
    small = ["--images", "200", "--draws", "64", "--workers", "0", "--keep-mb", "1", "--crops", "32"]
    command = [sys.executable, str(BENCHMARKS / "data.py"), str(tmp_path), *small]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MiB" in done.stdout
