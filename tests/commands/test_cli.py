"""Every verb, once, on a tiny coder."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import rac
from rac import cli
from rac.cli import VERBS
from rac.errors import RacError
from rac.files import MARKER, explained
from rac.flow import RK4
from rac.images import to_pixels
from rac.latents import Statistics
from rac.progress import watched


def test_overview_and_version(run) -> None:  # type: ignore[no-untyped-def]
    for arguments in ((), ("--help",)):
        ran = run(*arguments)
        assert ran.code == 0
        assert all(verb in ran.out for verb in VERBS)
    assert run("--version").out == f"rac {rac.__version__}\n"


def test_public_names_are_there_though_nothing_is_imported_ahead() -> None:
    assert all(getattr(rac, name) is not None for name in rac.__all__)
    assert set(rac.__all__) <= set(dir(rac))
    assert rac.images.read_image is rac.read_image
    with pytest.raises(AttributeError, match="no_such_name"):
        rac.no_such_name  # noqa: B018 - the access is what is tested


@pytest.mark.parametrize("verb", VERBS)
def test_help(run, verb: str) -> None:  # type: ignore[no-untyped-def]
    ran = run(verb, "--help")
    assert ran.code == 0
    assert f"rac {verb}" in ran.out


def test_wrong_option_is_a_usage_error(run) -> None:  # type: ignore[no-untyped-def]
    assert run("encode", "--no-such-option").code == 2


def test_the_command_itself(tmp_path: Path) -> None:
    """As a process, and without heavy imports for its help."""
    for arguments in (["--help"], ["--version"], ["no-such-verb"]):
        code = f"import sys; from rac.cli import main; main({arguments}); print(sorted(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        for heavy in ("torch", "numpy", "PIL", "diffusers", "matplotlib", "huggingface_hub", "tyro", "rich"):
            assert f"'{heavy}'" not in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "rac", "encode", "missing.png"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("rac: error: missing.png does not exist")
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------ encode, decode


def test_encode_and_decode(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    """The files hold what the library computes, and decoding crops back to the picture's size."""
    options = ("--model", coder_dir, "--steps", 3, "--solver", "rk4", "--device", "cpu")
    assert run("encode", photo, *options, "--out", tmp_path / "latents").code == 0
    coder, image = rac.load(coder_dir), rac.read_image(photo)
    with safe_open(tmp_path / "latents" / "photo.safetensors", framework="pt") as file:
        latent, metadata = file.get_tensor("latent"), file.metadata()
    assert torch.equal(latent, coder.encode(image, steps=3, solver=RK4()))
    origin = json.loads(metadata["origin"])
    assert (origin["height"], origin["width"], origin["steps"], origin["solver"]) == (18, 25, 3, "rk4")
    assert (origin["spec"]["factor"], origin["spec"]["channels"]) == (4, 4)

    assert run("decode", tmp_path / "latents", "--out", tmp_path / "images").code == 0
    written = rac.read_image(tmp_path / "images" / "photo.png")
    expected = coder.reconstruct(image, steps=3, solver=RK4()).clamp(-1, 1)
    assert written.shape == image.shape
    assert (written - expected).abs().max() <= 1.001 / 255


def test_exact_prints_the_residual(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("encode", photo, "--model", coder_dir, "--exact", "--out", tmp_path)
    assert ran.code == 0
    assert "photo.png: largest residual" in ran.out
    ran = run("encode", photo, "--model", coder_dir, "--exact", "--solver", "reversible-heun", "--out", tmp_path)
    assert ran.code == 2


def test_a_teacher_encodes_and_decodes_too(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    teacher = coder_dir.parent / "teacher"
    assert run("encode", photo, "--model", teacher, "--out", tmp_path / "latents").code == 0
    assert run("decode", tmp_path / "latents" / "photo.safetensors", "--out", tmp_path / "images").code == 0
    assert rac.read_image(tmp_path / "images" / "photo.png").shape == (1, 3, 18, 25)
    ran = run("decode", tmp_path / "latents", "--model", coder_dir, "--out", tmp_path / "by-rac")
    assert ran.code == 0, ran
    assert run("encode", photo, "--model", teacher, "--exact").code == 2


def test_steps_that_change_nothing_are_said_once(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    folder, teacher = tmp_path / "pictures", coder_dir.parent / "teacher"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.open(photo).save(folder / name)
    ran = run("encode", folder, "--model", teacher, "--steps", 3, "--out", tmp_path / "latents")
    assert (ran.code, ran.err) == (0, f"rac: {teacher} encodes in one pass, so --steps changes nothing\n")
    ran = run("decode", tmp_path / "latents", "--steps", 3, "--out", tmp_path / "images")
    assert (ran.code, ran.err) == (0, f"rac: {teacher} decodes in one pass, so --steps changes nothing\n")


# ------------------------------------------------------------------------------------------ reconstruct


def test_a_number_of_steps_given_twice_counts_once(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("reconstruct", photo, "--model", coder_dir, "--steps", 2, 1, 2, "--out", tmp_path / "out")
    assert ran.code == 0
    with (tmp_path / "out" / "results.csv").open() as file:
        versions = [tuple(row.values())[:2] for row in csv.DictReader(file)]
    assert len(versions) == len(set(versions)) == 5  # the teacher, and two numbers of steps from each latent


def test_reconstruct(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    ran = run("reconstruct", photo, "--model", coder_dir, "--steps", 1, 3, "--out", out)
    assert ran.code == 0
    assert not ran.err
    assert sorted(os.listdir(out)) == [
        MARKER,
        "photo-reconstruction.png",
        "photo-strip.png",
        "photo-trajectory.png",
        "results.csv",
    ]
    rows = list(csv.DictReader((out / "results.csv").open()))
    name = coder_dir.parent.name  # as a training run is called, whose coder lies in "coder"
    assert [row["coder"] for row in rows] == [
        *("teacher", f"{name}, 1 step", f"{name}, 3 steps"),
        *(f"{name}, 1 step, from the teacher's latent", f"{name}, 3 steps, from the teacher's latent"),
    ]
    assert [int(row["evaluations"]) for row in rows] == [2, 2, 6, 2, 4]
    for row in rows:
        assert row["coder"] in ran.out
    coder, image = rac.load(coder_dir), rac.read_image(photo)
    from rac.evaluate.image_metrics import psnr, ssim

    made = coder.reconstruct(image, steps=3)
    assert float(rows[2]["psnr"]) == pytest.approx(float(psnr(made, image)), abs=1e-4)
    assert float(rows[2]["ssim"]) == pytest.approx(float(ssim(made, image)), abs=1e-4)
    assert int(rows[2]["macs"]) == 3 * int(rows[1]["macs"])
    # The picture is that of the most steps, of the original's size.
    written = rac.read_image(out / "photo-reconstruction.png")
    assert float((written - made.clamp(-1, 1)).abs().max()) < 1 / 127


def test_reconstruct_computes_nothing_twice(tmp_path, photo, run, coder_dir, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Both ways at 1 and 3 steps, and the teacher's latent decoded at each; the trajectory costs nothing more."""
    from rac.commands import reconstruct

    calls = []

    def watched(name: str, device: str):  # type: ignore[no-untyped-def]
        coder = rac.load(name)
        coder.field.register_forward_hook(lambda *_: calls.append(1))
        return coder

    monkeypatch.setattr(reconstruct, "load_coder", watched)
    assert run("reconstruct", photo, "--model", coder_dir, "--steps", 1, 3, "--out", tmp_path / "out").code == 0
    assert len(calls) == 2 + 6 + 1 + 3


def test_reconstruct_a_folder(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "a.webp", "b.png"):
        Image.open(photo).save(folder / name)
    out = tmp_path / "out"
    ran = run("reconstruct", folder, "--model", coder_dir, "--steps", 2, "--size", 16, "--out", out)
    assert ran.code == 0
    assert "mean of 3 images" in ran.out
    assert sorted(path.name for path in out.glob("*-strip.png")) == [
        "a.png-strip.png",
        "a.webp-strip.png",
        "b-strip.png",
    ]


def test_reconstruct_without_the_teacher(tmp_path: Path, photo: Path, run, make_rac) -> None:  # type: ignore[no-untyped-def]
    rac.save(make_rac(teacher="no-such-teacher"), tmp_path / "coder")
    ran = run("reconstruct", photo, "--model", tmp_path / "coder", "--steps", 1, "--out", tmp_path / "out")
    assert ran.code == 0
    assert "continuing without the teacher" in ran.err
    assert ran.err.count("\n") == 1
    assert "teacher" not in ran.out


def test_reconstruct_by_a_teacher(tmp_path: Path, photo: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("reconstruct", photo, "--model", coder_dir.parent / "teacher", "--out", tmp_path / "out")
    assert ran.code == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        MARKER,
        "photo-reconstruction.png",
        "photo-strip.png",
        "results.csv",
    ]


# ------------------------------------------------------------------------------------------ models, demo, train


def test_models(run) -> None:  # type: ignore[no-untyped-def]
    ran = run("models")
    assert ran.code == 0
    for figure in ("34,163,592", "49,490,179", "311.09", "31.28", "62.27", "93.67", "1,369,988", "17.86", "40.84 %"):
        assert figure in ran.out
    for name in rac.available():
        assert name in ran.out


def test_demo(tmp_path: Path, run, coder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("skimage", reason="scikit-image, whose photographs the demo shows, is not installed")
    ran = run("demo", "--model", coder_dir, "--size", 32, "--out", tmp_path / "demo")
    assert ran.code == 0, ran
    for words in ("PSNR", "SSIM", "evaluations", "GMACs", f"{coder_dir.parent.name}, 4 steps each way", "report.html"):
        assert words in ran.out
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 6
    assert "http" not in page
    for words in ("There and back", "Quality and cost", "On the way", "The latent"):
        assert words in page
    assert len(list((tmp_path / "demo").glob("strip-*.png"))) == 3
    assert (tmp_path / "demo" / "latent.png").is_file()


def test_train_lists_recipes(run) -> None:  # type: ignore[no-untyped-def]
    from rac.recipes import RECIPES

    listing = run("train").out
    assert not [name for name in RECIPES if name not in listing]


@pytest.mark.slow
def test_train_explains_recipes(run) -> None:  # type: ignore[no-untyped-def]
    from rac.recipes import RECIPES

    for name, (_, recipe) in RECIPES.items():
        ran = run("train", name, "--help")
        assert ran.code == 0
        for option in ("--out", "--resume", "--train.iterations", "--data.paths"):
            assert option in ran.out, recipe


def test_long_work_is_told_off_the_terminal_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(range(0, 100, 3))
    monkeypatch.setattr("rac.progress.time.monotonic", lambda: next(seconds))
    assert list(watched(["a", "b"], str.upper)) == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == ["1/2  A", "2/2  B"]


def test_a_folder_that_is_there_is_not_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(RacError, match="choose another folder"), explained(tmp_path / "x"):
        raise FileNotFoundError(2, "No such file or directory")
    with pytest.raises(RacError, match="create it first"), explained(tmp_path / "none" / "x"):
        raise FileNotFoundError(2, "No such file or directory")


# ------------------------------------------------------------------------------------------ what a coder can do


@pytest.fixture
def decoder_dir(tmp_path: Path, coder_dir: Path) -> Path:
    """The random RAC, said to be trained to decode alone."""
    shutil.copytree(coder_dir, tmp_path / "decoder")
    path = tmp_path / "decoder" / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "config": {**said["config"], "ways": ["decode"]}}))
    return tmp_path / "decoder"


def test_a_coder_that_only_decodes_is_not_asked_to_encode(tmp_path: Path, photo: Path, run, decoder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("encode", photo, "--model", decoder_dir, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "was trained to decode only" in ran.err
    assert "encode with its teacher" in ran.err
    assert not (tmp_path / "out").exists()
    assert run("demo", "--model", decoder_dir, "--out", tmp_path / "out").code == 2
    assert not (tmp_path / "out").exists()


def test_it_is_shown_on_its_teachers_latents(tmp_path: Path, photo: Path, run, decoder_dir: Path) -> None:  # type: ignore[no-untyped-def]
    ran = run("reconstruct", photo, "--model", decoder_dir, "--steps", 1, 2, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "so its teacher" in ran.err
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()[1:]
    assert len(rows) == 3
    assert sum("from the teacher's latent" in row for row in rows) == 2
    config = json.loads((decoder_dir / "config.json").read_text())
    config["config"]["teacher"] = "nowhere"
    (decoder_dir / "config.json").write_text(json.dumps(config))
    ran = run("reconstruct", photo, "--model", decoder_dir, "--out", tmp_path / "other")
    assert ran.code == 2
    assert "was trained to decode only" in ran.err
    assert not (tmp_path / "other").exists()


def test_a_shipped_decoder_says_so(run) -> None:  # type: ignore[no-untyped-def]
    assert rac.load("rac-taef2").trained_ways == {"decode"}
    assert "RAC, decodes only" in run("models").out


def test_exact_falls_back_where_no_fixed_point_is_found(tmp_path: Path, photo: Path, run, make_rac) -> None:  # type: ignore[no-untyped-def]
    steep = make_rac(lively=2.0)
    rac.save(steep, tmp_path / "steep")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran = run("encode", photo, "--model", tmp_path / "steep", "--exact", "--steps", 2, "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert ran.err.count("does not converge") == 1
    assert "largest residual" not in ran.out
    with safe_open(tmp_path / "photo.safetensors", framework="pt") as file:
        latent = file.get_tensor("latent")
    assert torch.equal(latent, rac.load(tmp_path / "steep").encode(rac.read_image(photo), 2))
    (tmp_path / "two").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(photo, tmp_path / "two" / name)
    ran = run("encode", tmp_path / "two", "--model", tmp_path / "steep", "--exact", "--steps", 2, "--out", tmp_path)
    assert ran.err.count("does not converge") == 1
    assert "a.png and 1 more" in ran.err


def test_old_latent_files_decode_with_any_coder_of_their_statistics(tmp_path: Path, run, make_rac) -> None:  # type: ignore[no-untyped-def]
    """They had the range of the encoder's own network among the statistics, in which no decoder need agree."""
    coder = make_rac(lively=0.05, statistics=Statistics.of(0.0, 1 / 0.85))
    rac.save(coder, tmp_path / "student")
    latent = torch.randn(1, 4, 2, 3)
    spec = {"factor": 4, "channels": 4, "scale": 1 / 0.85, "shift": 0.0, "mean": None, "std": None, "range": [0.0, 1.0]}
    origin = {"spec": spec, "height": 8, "width": 12, "coder": "elsewhere"}
    metadata = {"format": "rac-latent-1", "origin": json.dumps(origin)}
    save_file({"latent": latent}, tmp_path / "old.safetensors", metadata)
    ran = run("decode", tmp_path / "old.safetensors", "--model", tmp_path / "student", "--out", tmp_path)
    assert ran.code == 0, ran.err
    decoded = to_pixels(rac.load(tmp_path / "student").decode(latent))
    assert np.array_equal(to_pixels(rac.read_image(tmp_path / "old.png")), decoded)
    rac.save(make_rac(statistics=Statistics.of(0.0, 2.0)), tmp_path / "other")
    ran = run("decode", tmp_path / "old.safetensors", "--model", tmp_path / "other", "--out", tmp_path)
    assert ran.code == 2
    assert "statistics" in ran.err


def test_a_warning_is_printed_once(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def warned(arguments: object) -> int:
        for folder in ("a", "a", "b"):
            warnings.warn(f"{folder}: passed over", stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "_dispatch", warned)
    assert run("models").err == "rac: warning: a: passed over\nrac: warning: b: passed over\n"
