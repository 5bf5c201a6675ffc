"""Everything that the README and the docs tell people to type is typed here, page by page and in order.

A block that cannot be run says so to the reader too, in its title: ```sh title="Not run in tests: needs ..."
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rac

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "Not run in tests: "
QUICK = {
    "train": "--train.iterations 2 --train.batch 2 --train.warmup 0 --data.size 32",
    "cache": "--data.size 32 --crops 8",
    "ablate": "--train.batch 2 --train.warmup 0 --data.size 32",
    "toy": "--iterations 3",
    "evaluate": "--robustness 0 --count 2 --steps 1 2",
    "bench": "--batch 2 --seconds 0 --precision fp32 --data photos --threads 1",
    "compare": "--robustness 0 --count 2 --steps 1 2",
    "export": "--size 32",
    "generate": "--count 2 --steps 2",
    "gap": "--count 4 --steps 2 --decode-steps 1 2",
}
"""What makes a verb quick without changing what it does."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("python", "sh") and not self.title.startswith(NOT_RUN)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\S*)(?: title=\"([^\"\n]*)\")?\n(.*?)^```$", text, re.S | re.M)
    return [Block(*parts) for parts in found]


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def workplace(tmp_path: Path, images, monkeypatch: pytest.MonkeyPatch) -> Path:  # type: ignore[no-untyped-def]
    """A folder with photo.png, photos/, others/, and pets/ of two classes, as the pages suppose."""
    monkeypatch.chdir(tmp_path)
    rac.write_image(images(1, 150, 140), tmp_path / "photo.png")
    for folder, first in (("photos", 0), ("others", 6)):
        (tmp_path / folder).mkdir()
        for k in range(first, first + 6):
            rac.write_image(images(1, 72, 80, k), tmp_path / folder / f"{k}.png")
    for k in range(8):
        path = tmp_path / "pets" / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rac.write_image(images(1, 72, 80, k), path)
    return tmp_path


def run_python(block: Block, page: Path) -> None:
    with torch.no_grad():
        exec(compile(block.text, str(page), "exec"), {})


@pytest.mark.parametrize(
    "block", [block for block in blocks(README) if block.language == "python"], ids=lambda block: block.text[:30]
)
def test_python_of_the_readme_stands_alone(block: Block, workplace: Path) -> None:
    run_python(block, README)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.runs for b in blocks(page))], ids=ids)
def test_page(page: Path, workplace: Path, run) -> None:  # type: ignore[no-untyped-def]
    for block in (block for block in blocks(page) if block.runs):
        if block.language == "python":
            if page != README:  # its blocks stand alone, see above
                need_modules(block.text)
                run_python(block, page)
            continue
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program:
                PROGRAMS[program](arguments, run)
    if page == README:
        for path in ("reconstructed/results.csv", "latents/photo.safetensors", "decoded/photo.png", "runs/tiny/coder"):
            assert (workplace / path).exists(), path


def need_modules(text: str) -> None:
    """Skip where an extra is missing that the page has told people to install."""
    for module in ("onnxruntime", "gradio"):
        if module in text:
            pytest.importorskip(module, reason=f"an extra is not installed: no {module}")


def run_rac(arguments: list[str], run: Callable[..., object]) -> None:
    verb, *rest = arguments
    if verb == "serve":
        return serve(rest)
    if verb == "export" and "torch-export" not in rest:
        for module in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(module, reason=f"the extra `export` is not installed: no {module}")
    if verb in ("train", "ablate") and not rest[0].startswith("klvae"):
        rest += ["--data.cached-crops", "8"]
    if verb == "ablate":
        rest[rest.index("10m")] = "2"
    ran = run(verb, *rest, *shlex.split(QUICK.get(verb, "")))
    assert ran.code == 0, f"rac {shlex.join(arguments)}: {ran.err}"


def serve(arguments: list[str]) -> None:
    """The page answers, and ends when it is told to."""
    pytest.importorskip("gradio", reason="the extra `serve` is not installed: no gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rac", "serve", *arguments, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert server.poll() is None, server.communicate()[0]
                assert time.monotonic() < deadline, "rac serve does not answer"
                time.sleep(0.5)
        server.terminate()  # Ctrl-C would not arrive where the tests run in the background of a shell
        server.wait(timeout=120)
    finally:
        server.kill()
        server.communicate()


def run_torchrun(arguments: list[str], run: Callable[..., object]) -> None:
    pytest.importorskip("accelerate")
    quick = shlex.split(f"{QUICK['train']} --data.paths photos --data.cached-crops 8 --train.device cpu")
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, *quick]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("The coder is in") == 1
    assert ran.stderr.count("iteration 2, held out") == 1
    assert Path("runs/two/coder/config.json").is_file()


def check_extras(arguments: list[str], run: Callable[..., object]) -> None:
    """`pip install '.[extra]'` is not run; the extras must be there."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert arguments[0] == "install"
    assert arguments[1].startswith((".", "rectified-auto-coder"))
    for extra in re.findall(r"[\w-]+", arguments[1].partition("[")[2]):
        assert re.search(rf"^{extra} = \[", project, re.M), extra


PROGRAMS: dict[str, Callable[[list[str], Callable[..., object]], None]] = {
    "rac": run_rac,
    "torchrun": run_torchrun,
    "pip": check_extras,
}


def test_hardly_a_block_is_left_out() -> None:
    kinds = {"", "text", "json", "python", "sh"}
    assert {block.language for page in PAGES for block in blocks(page)} <= kinds
    tried = [page for page in PAGES if page.name != "recipe_hunt.md"]  # whose commands are trainings, each of minutes
    left_out = [block.title for page in tried for block in blocks(page) if block.title.startswith(NOT_RUN)]
    assert len(left_out) <= 5
    assert all(len(title) > len(NOT_RUN) for title in left_out)


def test_docs_fence_their_code() -> None:
    """What is only indented would not be found, so not be run."""
    for page in PAGES[1:]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        assert not re.search(r"^ {4,}(?:\$ )?(?:rac|python|pip|torchrun|make|import|from|export) ", text, re.M), page


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_what_pages_point_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file(), target


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.ipynb")), ids=ids)
def test_notebook(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nbclient", "ipykernel", "skimage"):
        pytest.importorskip(module, reason=f"notebooks cannot be run without {module}")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["src", *filter(None, [os.environ.get("PYTHONPATH")])]))
    from notebooks import executed

    monkeypatch.chdir(ROOT)
    cells = [cell for cell in executed(path, timeout=600).cells if cell.cell_type == "code"]
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) >= 5
    assert path.stat().st_size < 500_000
