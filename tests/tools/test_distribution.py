"""What a built distribution holds: licences, and weights or none."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def wheel(folder: Path, weights: str) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "RAC_WEIGHTS": weights}, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["all", "none"])
def test_a_wheel_says_its_licences_and_has_weights_only_if_wanted(tmp_path, weights):
    names = wheel(tmp_path, weights).namelist()
    assert "rac/cli.py" in names
    assert any(name.startswith("rac/weights/") for name in names) == (weights == "all")
    for notice in ("LICENSE", "LICENSE-WEIGHTS.md", "THIRD_PARTY_NOTICES.md"):
        assert any(name.endswith(f"licenses/{notice}") for name in names)


@pytest.mark.slow
def test_another_value_is_refused(tmp_path):
    pytest.importorskip("hatchling")
    with pytest.raises(RuntimeError, match="expected none or all"):
        wheel(tmp_path, "some")
