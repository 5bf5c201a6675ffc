"""Everything the README tells people to type is typed here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rac

README = Path(__file__).parents[2] / "README.md"
PROCESSES = README.parent / "docs" / "processes.md"
QUICK = {
    "train": "--train.iterations 2 --train.batch 2 --train.warmup 0 --data.size 32 --data.held-out 2",
    "cache": "--data.size 32 --data.held-out 2",
    "ablate": "--train.batch 2 --train.warmup 0 --data.size 32 --data.held-out 2",
    "toy": "--iterations 3",
    "evaluate": "--correction 0 --count 2 --steps 1 2",
    "bench": "--batch 2 --seconds 0 --precision fp32 --data photos --threads 1",
    "compare": "--correction 0 --count 2 --steps 1 2",
}
"""What makes a verb quick without changing what it does."""


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def workplace(tmp_path: Path, images, monkeypatch: pytest.MonkeyPatch) -> Path:  # type: ignore[no-untyped-def]
    """A folder with photo.png and photos/, as the README supposes."""
    monkeypatch.chdir(tmp_path)
    rac.write_image(images(1, 150, 140), tmp_path / "photo.png")
    (tmp_path / "photos").mkdir()
    for k in range(6):
        rac.write_image(images(1, 72, 80, k), tmp_path / "photos" / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split("\n")[0])
def test_python(block: str, workplace: Path) -> None:
    with torch.no_grad():
        exec(compile(block, str(README), "exec"), {})


@pytest.mark.slow
def test_command_lines(workplace: Path, run) -> None:  # type: ignore[no-untyped-def]
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("rac ")]
    assert len(lines) > 8
    for line in (line for line in lines if not line.startswith("rac export")):
        verb, *arguments = shlex.split(line)[1:]
        if verb in ("train", "ablate") and "klvae" not in arguments:
            arguments += ["--data.cached-crops", "8"]
        if verb == "ablate":
            arguments[arguments.index("10m")] = "2"
        ran = run(verb, *arguments, *shlex.split(QUICK.get(verb, "")))
        assert ran.code == 0, f"{line}: {ran.err}"
    for path in ("reconstructed/results.csv", "latents/photo.safetensors", "decoded/photo.png", "runs/tiny/coder"):
        assert (workplace / path).exists(), path


@pytest.mark.slow
def test_command_lines_of_several_processes(workplace: Path) -> None:
    pytest.importorskip("accelerate")
    lines = [line for block in blocks("sh", PROCESSES) for line in block.splitlines()]
    assert lines
    for line in lines:
        launcher, *arguments = shlex.split(line)
        assert launcher == "torchrun"
        quick = shlex.split(f"{QUICK['train']} --data.paths photos --data.cached-crops 8 --train.device cpu")
        command = [sys.executable, "-m", "torch.distributed.run", *arguments, *quick]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("The coder is in") == 1
        assert ran.stderr.count("iteration 2, held out") == 1
        assert (workplace / "runs" / "two" / "coder" / "config.json").is_file()


@pytest.mark.slow
def test_export_lines(workplace: Path, run) -> None:  # type: ignore[no-untyped-def]
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason=f"the extra `export` is not installed: no {module}")
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    for line in (line for line in lines if line.startswith("rac export")):
        ran = run(*shlex.split(line)[1:], "--size", 32)
        assert ran.code == 0, f"{line}: {ran.err}"
    assert {path.name for path in workplace.glob("*.onnx")} == {"coder-encode.onnx", "coder-decode.onnx"}


@pytest.mark.parametrize("page", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_what_pages_point_to_is_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        assert (page.parent / target).is_file(), target
