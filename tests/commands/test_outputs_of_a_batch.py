"""A folder of pictures ends with as many results as there are good pictures, whatever one of them does."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rac.commands import decode, encode, reconstruct

Run = Callable[..., Any]

FAULTS = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    OSError(5, "Input/output error"),
    UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
]


@pytest.fixture
def folder(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    """Three pictures of one stem, and two others."""
    import rac

    (tmp_path / "photos").mkdir()
    for number, image in enumerate(images(3, 24, 24)):
        rac.write_image(image, tmp_path / "photos" / f"{'xyz'[number]}.png")
    Image.new("RGB", (24, 24), "red").save(tmp_path / "photos" / "x.jpg")
    (tmp_path / "photos" / "x.png.png").write_bytes((tmp_path / "photos" / "y.png").read_bytes())
    return tmp_path / "photos"


def failing(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: Exception, file: str) -> None:
    """Let `module.name(path)` raise `error` for the file called `file`."""
    original = getattr(module, name)

    def call(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path.name == file:
            raise error
        return original(path, *arguments, **settings)

    monkeypatch.setattr(module, name, call)


def test_pictures_of_one_stem_have_results_of_their_own(run: Run, coder_dir: Path, folder: Path) -> None:
    ran = run("encode", folder, "--model", coder_dir, "--out", folder / "latents")
    assert ran.code == 0, ran.err
    names = {file.name for file in (folder / "latents").glob("*.safetensors")}
    assert names == {f"{stem}.safetensors" for stem in ("x.jpg", "x.png", "x.png.png", "y", "z")}
    assert len({line.split(":")[0] for line in ran.out.splitlines()}) == 5
    ran = run("decode", folder / "latents", "--out", folder / "decoded")
    assert ran.code == 0, ran.err
    assert len(list((folder / "decoded").glob("*.png"))) == 5
    ran = run("reconstruct", folder, "--model", coder_dir, "--out", folder / "strips", "--steps", 1)
    assert ran.code == 0, ran.err
    assert len(list((folder / "strips").glob("*-strip.png"))) == 5


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_one_file_does_not_end_encoding(
    run: Run, coder_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing(monkeypatch, encode, "read_image", error, "y.png")
    ran = run("encode", folder, "--model", coder_dir, "--out", folder / "latents")
    assert ran.code == 1
    assert "rac: 1 of 5 files failed:" in ran.err.splitlines()
    assert "y.png: " in ran.err.splitlines()[-1]
    assert len(list((folder / "latents").glob("*.safetensors"))) == 4


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_one_file_does_not_end_reconstructing(
    run: Run, coder_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing(monkeypatch, reconstruct, "read_image", error, "x.png")
    ran = run("reconstruct", folder, "--model", coder_dir, "--out", folder / "out", "--steps", 1)
    assert ran.code == 1
    assert "rac: 1 of 5 files failed:" in ran.err.splitlines()
    with open(folder / "out" / "results.csv", newline="") as file:
        assert {row["image"] for row in csv.DictReader(file)} == {"x.jpg", "x.png.png", "y.png", "z.png"}


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_one_file_does_not_end_decoding(
    run: Run, coder_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    assert run("encode", folder, "--model", coder_dir, "--out", folder / "latents").code == 0
    failing(monkeypatch, decode.LatentFile, "read", error, "z.safetensors")
    ran = run("decode", folder / "latents", "--out", folder / "decoded")
    assert ran.code == 1
    assert "rac: 1 of 5 files failed:" in ran.err.splitlines()
    assert len(list((folder / "decoded").glob("*.png"))) == 4


def test_where_every_file_failed_nothing_was_done(
    run: Run, coder_dir: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        file.write_text("no picture")
    ran = run("encode", folder, "--model", coder_dir, "--out", tmp_path / "latents")
    assert ran.code == 2
    assert "5 of 5 files failed" in ran.err


def test_a_fault_of_the_program_is_not_hidden(
    run: Run, coder_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, encode, "read_image", RuntimeError("shapes do not match"), "y.png")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("encode", folder, "--model", coder_dir, "--out", folder / "latents")


def test_a_batch_says_what_it_passes_over(run: Run, coder_dir: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("no picture")
    (folder / "IMG_1.HEIC").write_text("a picture that cannot be read here")
    (folder / "IMG_2.HEIC").write_text("a picture that cannot be read here")
    (folder / ".hidden").write_text("nobody's business")
    (folder / "more").mkdir()
    said = f"rac: {folder}: passed over 2 .heic files, 1 .txt file, 1 folder"
    for verb, options in (("encode", ()), ("reconstruct", ("--steps", 1))):
        ran = run(verb, folder, "--model", coder_dir, "--out", tmp_path / verb, *options)
        assert ran.code == 0
        assert said in ran.err.splitlines()
    (tmp_path / "encode" / "notes.txt").write_text("no latent")
    ran = run("decode", tmp_path / "encode", "--out", tmp_path / "decoded")
    assert f"rac: {tmp_path / 'encode'}: passed over 1 .txt file" in ran.err.splitlines()
    assert "passed over" not in run("encode", folder / "y.png", "--model", coder_dir, "--out", tmp_path / "one").err


def test_control_characters_of_a_name_break_no_line(run: Run, coder_dir: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a\nb.png", "c\x1b[31m.png", "bad\n.png"):
        Image.new("RGB", (16, 16), (200, 90, 10)).save(pictures / name)
    (pictures / "bad\n.png").write_text("no picture")
    ran = run("encode", pictures, "--model", coder_dir, "--out", tmp_path / "latents")
    assert ran.code == 1
    assert sorted(line.split(":")[0].rpartition("/")[2] for line in ran.out.splitlines()) == [
        "a\\nb.safetensors",
        "c\\x1b[31m.safetensors",
    ]
    assert len(ran.err.splitlines()) == 2  # the count of failures, and the one
    assert "bad\\n.png" in ran.err
    ran = run("evaluate", "--data", pictures, "--model", coder_dir, "--out", tmp_path / "results")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "\x1b" not in ran.out + ran.err


@pytest.mark.parametrize("verb", ["encode", "reconstruct", "decode"])
def test_an_option_that_suits_no_file_is_refused_once(
    run: Run, coder_dir: Path, folder: Path, tmp_path: Path, verb: str
) -> None:
    given = folder
    if verb == "decode":
        given = tmp_path / "latents"
        assert run("encode", folder, "--model", coder_dir, "--out", given).code == 0
    ran = run(verb, given, "--model", coder_dir, "--tile", 7, "--out", tmp_path / "out")
    assert ran.code == 2
    assert ran.err == "rac: error: tile 7 must be a positive multiple of the coder's factor 4, such as 128\n"
    assert not (tmp_path / "out").exists()
    if verb == "decode":  # here the coders are known file by file
        ran = run(verb, given, "--tile", 7, "--out", tmp_path / "out")
        assert ran.code == 2
        assert ran.err.splitlines() == [
            "rac: 5 of 5 files failed, all for the same reason: tile 7 must be a positive multiple of the coder's "
            "factor 4, such as 128"
        ]


FULL = Path("/dev/full")


@pytest.mark.slow
@pytest.mark.skipif(not FULL.is_char_device(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("encode", "DATA", "--model", "CODER", "--out", "OUT"), ("--help",)])
def test_a_full_disk_is_not_the_fault_of_a_picture(
    coder_dir: Path, folder: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    given = {"DATA": str(folder), "CODER": str(coder_dir), "OUT": str(tmp_path / "latents")}
    command = [sys.executable, "-m", "rac", *(given.get(argument, argument) for argument in arguments)]
    with FULL.open("w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "rac: error: the disk is full; free some space, or write to another disk\n"
