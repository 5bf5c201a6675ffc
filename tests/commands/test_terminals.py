"""Tables and help at any width, and names and outputs that are not Unicode."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import rac
from rac.cli import VERBS
from rac.commands.cost import cost_table
from rac.commands.models import shipped_table
from rac.commands.shared import show
from rac.evaluate.cost import reference_rows
from rac.report.document import Table, utf8
from rac.report.terminal import table_text

WIDE = Table(
    ("coder", "PSNR dB", "latent variance explained", "parameters", "GMACs per step", "GMACs in all", "img/s"),
    (
        ("rac-64, 1 step", "21.95", "0.9876", "783,224", "1.38", "2.76", "104"),
        ("rac-64, 16 steps, teacher's latents", "22.00", "-", "783,224", "1.38", "44.2", "6.5"),
    ),
)
TABLES = {
    "compare": WIDE,
    "reconstruct": Table(
        ("coder", "PSNR dB", "SSIM", "evaluations", "GMACs"), (("teacher", "21.67", "0.612", "2", "7"),)
    ),
    "bench": Table(
        ("coder", "job", "what the time goes into"), (("a", "train", "data 1 %, field 40 %, backward 59 %"),)
    ),
}


def tables() -> dict[str, Table]:
    return {**TABLES, "models": shipped_table(), "cost": cost_table(reference_rows())}


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 60, 40])
def test_no_figure_is_cut_at_any_width(width: int) -> None:
    for name, table in tables().items():
        text = table_text(table, width)
        for line in text.splitlines():
            assert len(line) <= width, (name, line)
        words = text.split()
        for row in table.rows:
            for cell in row:
                assert set(cell.split()) <= set(words), (name, cell)
        for column in table.columns[1:]:
            assert set(column.split()) <= set(words), (name, column)


def test_wide_terminals_have_one_line_a_row() -> None:
    lines = table_text(WIDE, 240).splitlines()
    assert len(lines) == 1 + len(WIDE.rows)
    assert lines[0].split("  ")[0] == "coder"
    narrower = table_text(WIDE, 110).splitlines()
    assert len(narrower) == 3 + len(WIDE.rows)
    assert max(map(len, narrower)) <= 110
    # Figures stand at the right edge of their column.
    assert len(lines[1]) == len(lines[2])


def test_records_name_every_figure() -> None:
    assert table_text(WIDE, 40).splitlines()[:4] == [
        "rac-64, 1 step",
        "  PSNR dB                    21.95",
        "  latent variance explained  0.9876",
        "  parameters                 783,224",
    ]
    assert table_text(WIDE, 30).splitlines()[2:4] == ["  latent variance  0.9876", "  explained"]
    empty = Table(("name", "teacher", "note"), (("a", "", "b"),))
    assert table_text(empty, 20).splitlines()[-1].split() == ["a", "b"]


def test_letters_of_two_columns_are_counted() -> None:
    table = Table(("name", "value"), (("画像", "1.0"), ("abcd", "2.0")))
    first, second = table_text(table, 40).splitlines()[1:]
    assert first == "画像    1.0"
    assert second == "abcd    2.0"


def test_show_asks_the_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    show(WIDE, "a title")
    narrow = capsys.readouterr().out
    assert max(len(re.sub("\033.*?m", "", line)) for line in narrow.splitlines()) <= 60
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    show(WIDE)
    assert len(capsys.readouterr().out.splitlines()) == 3


# ------------------------------------------------------------------------------------------- help


def rac_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "rac", *map(os.fsencode, map(str, arguments))]
    return subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize("verb", ["encode", "evaluate", "train tiny"])
def test_help_ends_at_any_width(verb: str, run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "1")
    told = run(*verb.split(), "--help")
    assert told.code == 0
    assert len(told.out.splitlines()) < 2_000
    assert os.environ["COLUMNS"] == "1"


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"train", "ablate"}))
def test_help_describes_its_options_at_80_columns(verb: str, run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "80")
    told = run(verb, "--help").out
    words = re.sub(r"[│╭╰─╮╯\s]+", " ", told)
    if "--device" in told:
        assert "auto, cpu, cuda, cuda:1 or mps." in words
    assert "show this help message" in words


@pytest.mark.parametrize("verb", ["", "train", "ablate", "encode", "cache", "export", "train tiny", "ablate tiny"])
def test_help_fills_its_lines_and_keeps_to_the_width(verb: str, run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(*verb.split(), "--help").out.splitlines()
    assert max(map(len, lines)) <= 80
    for line, following in pairwise(line.rstrip("│ ") for line in lines):
        text, more = line.lstrip("│ "), following.lstrip("│ ")
        indent = len(line) - len(text)
        if indent >= 6 and indent == len(following) - len(more):  # two lines of one text
            assert len(line) + 1 + len(more.split()[0]) > 78, line


# ------------------------------------------------------------------------------------------- names that are not Unicode


@pytest.fixture
def odd_pictures(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    """A folder with a picture whose name is no UTF-8, and one whose name only UTF-8 has."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for index, name in enumerate((b"z\xff.png", "☃.png".encode())):
        rac.write_image(images(1, 24, 24, index), tmp_path / "picture.png")
        try:
            os.rename(tmp_path / "picture.png", os.path.join(os.fsencode(folder), name))
        except OSError:
            pytest.skip("this file system takes no such names")
    return folder


def test_reconstruct_takes_names_that_are_not_unicode(odd_pictures: Path, tmp_path: Path, coder_dir: Path, run) -> None:  # type: ignore[no-untyped-def]
    told = run("reconstruct", odd_pictures, "--model", coder_dir, "--steps", 1, "--out", tmp_path / "out")
    assert told.code == 0, told
    text = (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")
    assert r"z\udcff.png" in text
    assert "☃.png" in text
    assert len(list((tmp_path / "out").glob("*-reconstruction.png"))) == 2


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_evaluate_takes_names_that_are_not_unicode(odd_pictures, tmp_path, coder_dir, run, posterior) -> None:  # type: ignore[no-untyped-def]
    import json
    from dataclasses import replace

    from rac.config import to_json
    from rac.evaluate import Preprocessing, Protocol, Result

    protocol = replace(Protocol("odd", Preprocessing(24, "centre")), posterior=posterior)
    (tmp_path / "odd.json").write_text(json.dumps(to_json(protocol)))
    options = ("--data", odd_pictures, "--protocol", tmp_path / "odd.json", "--out", tmp_path / "out")
    told = run("evaluate", "--model", coder_dir.parent / "teacher", *options, "--device", "cpu")
    assert told.code == 0, told
    (path,) = (tmp_path / "out" / "results").iterdir()
    assert "z\udcff.png" in Result.load(path).images
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


def test_files_hold_escapes_for_what_is_not_unicode() -> None:
    table = Table(("image", "psnr"), (("z\udcff.png", "1"),))
    for text in (table.to_csv(), table.to_markdown(), table.to_html()):
        assert rb"z\udcff.png" in utf8(text)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_output_in_another_encoding_is_escaped(
    odd_pictures: Path, tmp_path: Path, coder_dir: Path, encoding: str
) -> None:
    out = tmp_path / "o ☃"
    ran = rac_process("encode", odd_pictures, "--model", coder_dir, "--out", out, PYTHONIOENCODING=encoding)
    assert ran.returncode == 0, ran.stderr
    assert rb"\u2603" in ran.stdout
    assert len(list(out.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_no_fault(closed: str) -> None:
    ran = subprocess.run(
        ["/bin/sh", "-c", f'"{sys.executable}" -m rac models {closed}'], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stderr) == (0, "")
