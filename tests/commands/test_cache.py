"""`rac cache`, broken off and gone on with, and training on what it makes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_toy import contents as trained

import rac
from rac.coders.klvae import KLVAEConfig
from rac.data import CachedStream, Latents

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, images) -> Path:  # type: ignore[no-untyped-def]
    """Twelve pictures, a random teacher and another."""
    folder = tmp_path_factory.mktemp("material")
    for name, seed in (("teacher", 0), ("other", 1)):
        torch.manual_seed(seed)
        rac.save(KLVAEConfig(widths=(4, 4, 4, 4), latent_channels=4, norm_groups=4).build(), folder / name)
    (folder / "pictures").mkdir()
    for number, image in enumerate(images(12, 40, 40)):
        rac.write_image(image[None], folder / "pictures" / f"{number}.png")
    return folder


def cache(material: Path, out: Path, crops: int = 300) -> list[str]:
    return [
        *("cache", "--teacher", str(material / "teacher"), "--data.paths", str(material / "pictures")),
        *("--data.size", "16", "--data.held-out", "2", "--crops", str(crops), "--shard-size", "32"),
        *("--threads", "1", "--device", "cpu", "--out", str(out)),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def shards(folder: Path) -> int:
    return len(list(folder.glob("[0-9]*.safetensors")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, material: Path) -> Path:
    """Crops made in one go."""
    from rac.cli import main

    out = tmp_path_factory.mktemp("whole") / "crops"
    assert main(cache(material, out)) == 0
    return out


def _heed_interrupts() -> None:
    """Undo what a shell does to the jobs that it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_broken_off_and_gone_on_with_it_ends_with_the_same_bytes(
    tmp_path: Path, material: Path, whole: Path, run: Run, how: signal.Signals
) -> None:
    out = tmp_path / "crops"
    command = [sys.executable, "-m", "rac", *cache(material, out), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    ) as process:
        while shards(out) < 2 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(how)
        _, errors = process.communicate()
    assert 2 <= shards(out) < 10, "killed too late to say anything"
    if how == signal.SIGINT:
        assert (process.returncode, errors.strip()) == (130, "rac: stopped")
    ran = run(*cache(material, out))
    assert ran.code == 0
    assert contents(out) == contents(whole)


def test_processes_share_the_work(tmp_path: Path, material: Path, whole: Path, run: Run) -> None:
    out = tmp_path / "crops"
    first = run(*cache(material, out), "--part", "1/2")
    assert (first.code, first.out) == (0, "")
    assert "5 more shards are left to the other parts" in first.err
    second = run(*cache(material, out), "--part", "0/2", "--workers", "0")
    assert second.code == 0
    assert f": 300 crops of 16 x 16 with latents of {material / 'teacher'}" in second.out
    # About 0.25 MiB; the headers name paths, which are not always of one length.
    assert re.search(r"10 shards, 0\.[23] MiB: ", second.out)
    assert contents(out) == contents(whole)


@pytest.fixture
def training(material: Path) -> list[str]:
    return [
        *("train", "tiny", "--teacher", str(material / "teacher"), "--state-channels", "4", "--data.size", "16"),
        *("--train.iterations", "3", "--train.batch", "4", "--train.threads", "1", "--train.device", "cpu"),
        *("--data.held-out", "2", "--train.no-tensorboard", "--field.widths", "8", "8", "8"),
    ]


def test_training_on_the_folder_is_training_on_crops_prepared_by_the_run(
    tmp_path: Path, material: Path, whole: Path, training: list[str], run: Run
) -> None:
    ran = run(*training, "--data.paths", whole, "--out", tmp_path / "one")
    assert ran.code == 0, ran.err
    pictures = material / "pictures"
    ran = run(*training, "--data.paths", pictures, "--data.cached-crops", 300, "--out", tmp_path / "two")
    assert ran.code == 0, ran.err
    assert trained(tmp_path / "one") == trained(tmp_path / "two")
    assert not (tmp_path / "one.crops").exists()
    assert CachedStream(tmp_path / "two.crops").plan["count"] == 300


def test_a_kl_vae_trains_on_the_pixels(tmp_path: Path, whole: Path, run: Run) -> None:
    ran = run(
        *(
            "train",
            "klvae-f8d4",
            "--data.paths",
            whole,
            "--data.size",
            16,
            "--data.held-out",
            2,
            "--train.no-tensorboard",
        ),
        *("--network.widths", 4, 4, 4, "--network.norm-groups", 4, "--out", tmp_path / "run"),
        *("--train.iterations", 2, "--train.batch", 2, "--train.warmup", 0),
    )
    assert ran.code == 0, ran.err


def test_a_foreign_teacher_is_refused(
    tmp_path: Path, material: Path, whole: Path, training: list[str], run: Run
) -> None:
    ran = run(*training, "--data.paths", whole, "--teacher", material / "other", "--out", tmp_path / "run")
    assert ran.code == 2
    assert f"holds latents of the teacher {material / 'teacher'} (weights" in ran.err
    assert f"not of {material / 'other'} (weights" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--crops", "0"), "give --crops with the number"),
        (("--whole",), "give --crops with the number"),
        (("--shard-size", "100"), "shard_size 100 must be a multiple of 32"),
        (("--part", "4/4"), "part '4/4' must be k/n with k from 0 to n - 1"),
        (("--part", "all"), "part 'all' must be"),
        (("--workers", "-1"), "workers -1 must be 0"),
        (("--data.size", "18"), "size 18 must be a multiple of the teacher's factor 8"),
        (("--teacher", "nothing"), "no coder 'nothing'"),
        (("--data.paths", "nowhere-{0..3}.tar"), "nowhere-0.tar does not exist"),
        (("--data.paths", "http://host/a.tar"), "is not a local file"),
        (("--rng-seed", "1"), "was prepared with other settings: data"),
    ],
)
def test_mistakes_cost_one_line(material: Path, whole: Path, run: Run, changes: tuple[str, ...], message: str) -> None:
    before = contents(whole)
    ran = run(*cache(material, whole), *changes)
    assert ran.code == 2
    assert message.replace("settings: data", "settings: rng_seed 1, was 0") in ran.err
    assert ran.err.count("\n") == 1
    assert contents(whole) == before


def test_nothing_to_prepare(material: Path, tmp_path: Path, run: Run) -> None:
    pictures = material / "pictures"
    ran = run("cache", "--data.paths", pictures, "--whole", "--no-pixels", "--out", tmp_path / "crops")
    assert ran.code == 2
    assert "there is nothing to prepare; give a teacher" in ran.err
    assert not (tmp_path / "crops").exists()


def test_moments_are_kept_labelled_and_sampled(material: Path, tmp_path: Path, run: Run) -> None:
    for number, picture in enumerate(sorted((material / "pictures").iterdir())):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture.name).write_bytes(picture.read_bytes())
    asked = ("--data.paths", tmp_path / "photos", "--data.held-out", 2, "--data.size", 16, "--crops", 20)
    ran = run(
        "cache", *asked, "--teacher", material / "teacher", "--moments", "--no-pixels", "--out", tmp_path / "crops"
    )
    assert ran.code == 0, ran.err
    assert "20 crops of 16 x 16 with moments of" in ran.out
    coder = rac.load(material / "teacher")
    samples, means = (
        CachedStream(
            tmp_path / "crops", wants={"latents", "labels"}, latents=Latents(coder, "teacher", posterior=posterior)
        ).batch(0, 20)
        for posterior in ("sample", "mean")
    )
    images = CachedStream(tmp_path / "crops", wants={"images"}).batch(0, 20).need("images")
    with torch.no_grad():
        torch.testing.assert_close(means.need("latents"), coder.encode(images), rtol=1e-4, atol=1e-4)
    assert samples.need("latents").sub(means.need("latents")).abs().mean() > 0.01
    assert set(samples.need("labels").tolist()) == {0, 1}
    ran = run("cache", *asked, "--moments", "--out", tmp_path / "other")
    assert (ran.code, "with moments, a teacher is needed; give --teacher" in ran.err) == (2, True)


def test_whole_pictures(material: Path, tmp_path: Path, run: Run) -> None:
    ran = run("cache", "--data.paths", material / "pictures", "--data.size", 16, "--whole", "--out", tmp_path / "crops")
    assert ran.code == 0
    assert len(CachedStream(tmp_path / "crops")) == 9
