"""Whatever is given to the command line: one clear line with the mend, an exit code, nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import rac
from rac import files
from rac.commands.latent_files import LatentFile


def photograph(side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def truncated_jpeg(path: Path) -> None:
    photograph(100).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def animated_gif(path: Path) -> None:
    frames = [Image.new("RGB", (24, 24), (90 * n, 0, 0)) for n in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def cut_pages(path: Path) -> None:
    """A TIFF whose second page is cut off: Pillow raises TypeError when asked for the number of pages."""
    pages = [photograph(60) for _ in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:], compression="tiff_lzw")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# file name: (how it is made, words of the one line)
BAD_PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.png": (lambda path: None, "does not exist"),
    "text.png": (lambda path: path.write_text("no picture"), "not a picture"),
    "empty.png": (lambda path: path.touch(), "not a picture"),
    "truncated.jpg": (truncated_jpeg, "damaged or cut short"),
    "one-pixel.png": (lambda path: Image.new("RGB", (1, 1)).save(path), "too small"),
    "huge.png": (lambda path: Image.new("1", (20_000, 20_000)).save(path), "too large"),
    "animated.gif": (animated_gif, "3 frames"),
    "float.tiff": (lambda path: Image.fromarray(np.zeros((24, 24), np.float32)).save(path), "range is not known"),
    "cut-pages.tiff": (cut_pages, "damaged or cut short"),
}

# file name: (how it is made, what stderr says of it)
OTHER_KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cmyk.jpg": (lambda path: photograph().convert("CMYK").save(path), "is CMYK"),
    "sixteen-bit.png": (lambda path: Image.fromarray(np.zeros((24, 24), np.uint16)).save(path), "is 16-bit grey"),
    "rgba.png": (lambda path: photograph().convert("RGBA").save(path), "laid on white"),
    "grey.png": (lambda path: photograph().convert("L").save(path), "is grey"),
    "palette.gif": (lambda path: photograph().quantize(16).save(path), "is palette"),
}


def listed(folder: Path) -> list[str]:
    """The files in a folder, without the mark of one that holds results."""
    return sorted(name for name in os.listdir(folder) if name != files.MARKER)


def one_line(ran, *words: object) -> None:  # type: ignore[no-untyped-def]
    """The command failed with code 2 and one line on stderr that holds `words`; no traceback, no results."""
    assert ran.code == 2, ran
    assert ran.err.startswith("rac: error: "), ran.err
    assert ran.err.count("\n") == 1, ran.err
    for word in words:
        assert str(word) in ran.err
    assert not ran.out


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_picture(tmp_path: Path, run, coder_dir: Path, name: str, verb: str) -> None:  # type: ignore[no-untyped-def]
    make, words = BAD_PICTURES[name]
    make(tmp_path / name)
    ran = run(verb, tmp_path / name, "--model", coder_dir, "--out", tmp_path / "out", "--device", "cpu")
    one_line(ran, words, name)
    assert not (tmp_path / "out").exists() or not listed(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_kinds_are_converted_and_said_once(tmp_path: Path, run, coder_dir: Path, name: str, verb: str) -> None:  # type: ignore[no-untyped-def]
    make, words = OTHER_KINDS[name]
    folder = tmp_path / "pictures"
    for copy in ("a", "b"):
        folder.mkdir(exist_ok=True)
        make((folder / copy).with_suffix(Path(name).suffix))
    options = ("--model", coder_dir, "--out", tmp_path / "out", "--device", "cpu")
    for _ in range(2):  # each run says it
        ran = run(verb, folder, *options)
        assert ran.code == 0, ran
        said = [line for line in ran.err.splitlines() if "converted" in line]
        assert len(said) == 1
        assert said[0].startswith(f"rac: {folder / 'a'}")
        assert words in said[0]
    ran = run(verb, folder, *options, "--convert")
    assert ran.code == 0
    assert "converted" not in ran.err


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_a_size_that_no_memory_holds(tmp_path: Path, run, photo: Path, coder_dir: Path, verb: str) -> None:  # type: ignore[no-untyped-def]
    ran = run(verb, photo, "--model", coder_dir, "--out", tmp_path / "out", "--size", 100_000)
    one_line(ran, "100000 x 100000", "at most 8,192")
    assert not (tmp_path / "out").exists()


def test_a_batch_goes_on_and_reports_at_the_end(tmp_path: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("text.png", "cut-pages.tiff", "animated.gif"):
        BAD_PICTURES[name][0](folder / name)
    photograph().save(folder / "good.png")
    photograph(32).save(folder / "zebra.png")
    ran = run("encode", folder, "--model", coder_dir, "--out", tmp_path / "out")
    assert ran.code == 1
    assert ran.err.splitlines()[0] == "rac: 3 of 5 files failed:"
    for line, name in zip(ran.err.splitlines()[1:], ("animated.gif", "cut-pages.tiff", "text.png"), strict=True):
        assert name in line
    assert listed(tmp_path / "out") == ["good.safetensors", "zebra.safetensors"]


def test_reconstruct_of_a_batch_reports_the_good_ones(tmp_path: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "pictures"
    folder.mkdir()
    BAD_PICTURES["one-pixel.png"][0](folder / "one-pixel.png")
    photograph().save(folder / "good.png")
    ran = run("reconstruct", folder, "--model", coder_dir, "--out", tmp_path / "out", "--steps", 1)
    assert ran.code == 1
    assert "1 of 2 files failed" in ran.err
    assert "one-pixel.png" in ran.err
    assert listed(tmp_path / "out") == [
        "good-reconstruction.png",
        "good-strip.png",
        "good-trajectory.png",
        "results.csv",
    ]


def test_a_folder_without_pictures(tmp_path: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    one_line(run("encode", tmp_path, "--model", coder_dir), "no pictures")


@pytest.mark.parametrize("arguments", [("",), ("photo.png", "--out", ""), ("photo.png", "--out=")])
def test_an_unset_variable_of_the_shell_is_not_the_working_folder(run, arguments: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    one_line(run("encode", *arguments), "is a shell variable unset?")


def test_the_home_folder_is_known_in_quotes_and_after_an_equals_sign(  # type: ignore[no-untyped-def]
    tmp_path: Path, photo: Path, run, coder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = run("encode", "~/photo.png", "--out=~/latents", "--model", coder_dir)
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "latents" / "photo.safetensors").is_file()


@pytest.mark.parametrize("letter", ["n", "ü", "漢"])
def test_results_take_the_longest_names(tmp_path: Path, letter: str) -> None:
    path = tmp_path / (letter * ((255 - len(".safetensors")) // len(letter.encode())) + ".safetensors")
    files.write_bytes(path, b"whole")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------------ coders


def test_unknown_verb_and_model(photo: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    one_line(run("reconstuct", photo), "did you mean reconstruct?")
    monkeypatch.setattr(rac.hub, "available", lambda: ["klvae-64", "rac-64"])
    one_line(run("encode", photo, "--model", "rac-46"), "rac-46", "did you mean rac-64")


def test_directory_without_weights(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "nothing").mkdir()
    one_line(run("encode", photo, "--model", tmp_path / "nothing"), "nothing")
    shutil.copytree(coder_dir, tmp_path / "config-only")
    next((tmp_path / "config-only").glob("*.safetensors")).unlink()
    one_line(run("encode", photo, "--model", tmp_path / "config-only"), "config-only")


def test_weights_of_another_shape(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(coder_dir, tmp_path / "other")
    weights = next((tmp_path / "other").glob("*.safetensors"))
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(3, 1, 4)
    save_file(tensors, weights)
    one_line(run("encode", photo, "--model", tmp_path / "other"), name, "(3, 1, 4)")


def test_weights_cut_in_half(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(coder_dir, tmp_path / "half")
    weights = next((tmp_path / "half").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    one_line(run("encode", photo, "--model", tmp_path / "half"), weights.name)


# ------------------------------------------------------------------------------------------ latents


@pytest.fixture
def latent_file(tmp_path: Path, photo: Path, run, coder_dir: Path) -> Path:  # type: ignore[no-untyped-def]
    assert run("encode", photo, "--model", coder_dir, "--out", tmp_path).code == 0
    return tmp_path / "photo.safetensors"


def rewritten(path: Path, latent: torch.Tensor) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"latent": latent}, path, metadata)


def test_nan_in_a_latent(tmp_path: Path, latent_file: Path, run) -> None:  # type: ignore[no-untyped-def]
    latent = load_file(latent_file)["latent"]
    latent[0, 0, 0, 0] = torch.nan
    rewritten(latent_file, latent)
    one_line(run("decode", latent_file, "--out", tmp_path / "out"), latent_file.name, "NaN")
    assert not listed(tmp_path / "out")


def test_latent_of_wrong_channels(latent_file: Path, run) -> None:  # type: ignore[no-untyped-def]
    rewritten(latent_file, torch.zeros(1, 5, 5, 7))
    one_line(run("decode", latent_file), "5 channels")


def test_latent_of_wrong_size(latent_file: Path, run) -> None:  # type: ignore[no-untyped-def]
    rewritten(latent_file, torch.zeros(1, 4, 5, 5))
    one_line(run("decode", latent_file), "18 x 25", "5 x 7")


def test_latent_of_another_coder(tmp_path: Path, latent_file: Path, run, make_rac) -> None:  # type: ignore[no-untyped-def]
    other = make_rac(spec=rac.LatentSpec(4, 3))
    rac.save(other, tmp_path / "other")
    one_line(run("decode", latent_file, "--model", tmp_path / "other"), "channels 3, not 4")


def test_cut_foreign_and_missing_latents(tmp_path: Path, latent_file: Path, run) -> None:  # type: ignore[no-untyped-def]
    save_file({"weights": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    one_line(run("decode", tmp_path / "foreign.safetensors"), "not a latent")
    latent_file.write_bytes(latent_file.read_bytes()[:-100])
    one_line(run("decode", latent_file), "cut short")
    one_line(run("decode", tmp_path / "missing.safetensors"), "does not exist")
    (tmp_path / "empty").mkdir()
    one_line(run("decode", tmp_path / "empty"), "no .safetensors")


def test_latent_file_with_damaged_metadata(tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "latent.safetensors"
    LatentFile(torch.zeros(1, 4, 2, 2), rac.LatentSpec(4, 4), (8, 8), "nobody").write(path)
    save_file({"latent": torch.zeros(1, 4, 2, 2)}, path, {"format": "rac-latent-1", "origin": "{"})
    one_line(run("decode", path), "metadata")
    save_file({"latent": torch.zeros(1, 4, 2, 2)}, path, {"format": "rac-latent-1", "origin": '{"height": 3}'})
    one_line(run("decode", path), "metadata")
    save_file({"latent": torch.zeros(1, 4, 2, 2)}, path, {"format": "rac-latent-1"})
    one_line(run("decode", path), "metadata")
    save_file({"other": torch.zeros(1)}, path, {"format": "rac-latent-1", "origin": "{}"})
    one_line(run("decode", path))


# ------------------------------------------------------------------------------------------ numbers, disks


@pytest.mark.parametrize("steps", [0, -3])
def test_steps(photo: Path, latent_file: Path, run, coder_dir: Path, steps: int) -> None:  # type: ignore[no-untyped-def]
    for arguments in (("reconstruct", photo), ("encode", photo), ("decode", latent_file)):
        one_line(run(*arguments, "--model", coder_dir, "--steps", steps), f"steps {steps}", "at least 1")


def test_size_and_device(photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    one_line(run("encode", photo, "--model", coder_dir, "--size", 0), "at least 1 x 1")
    one_line(run("encode", photo, "--model", coder_dir, "--device", "abacus"), "abacus")


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission")])
@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_the_disk_refuses(  # type: ignore[no-untyped-def]
    tmp_path: Path,
    photo: Path,
    run,
    coder_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    number: int,
    words: str,
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", refuse)
    one_line(run(verb, photo, "--model", coder_dir, "--out", tmp_path / "out", "--steps", 1), words)
    assert not listed(tmp_path / "out")


def test_out_is_a_file(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    one_line(run("encode", photo, "--model", coder_dir, "--out", photo), "there is a file where a folder is needed")
    one_line(run("encode", photo, "--model", coder_dir, "--out", photo / "below"), "there is a file where")


def test_unwritable_folder(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("permissions do not bind this user (root)")
    one_line(run("encode", photo, "--model", coder_dir, "--out", locked), "no permission")


def test_training_refuses_in_one_line(tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    one_line(run("train", "nanoo", "--out", tmp_path / "run"), "did you mean nano?")


def test_ctrl_c(photo: Path, run, coder_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rac.hub, "load", interrupt)
    ran = run("encode", photo, "--model", coder_dir)
    assert (ran.code, ran.err) == (130, "rac: stopped\n")
