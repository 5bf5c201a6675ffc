"""What cannot be trained is refused before any work is done, and one run is trained by one process at a time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_toy
from torch import nn
from training_toy import ToyStream, ToyTask, contents

import rac
from rac.coders.klvae import KLVAEConfig
from rac.config import to_json
from rac.data import DataConfig, cache
from rac.data.stream import Batch
from rac.errors import RacError, WeightsError
from rac.files import locked
from rac.objectives.klvae import KLVAEWeights
from rac.objectives.rac import RACObjective, RACWeights
from rac.recipes import RECIPES, KLVAERecipe, RACRecipe
from rac.recipes.rac import check_latents
from rac.train import TrainConfig, fit, log
from rac.train.discriminator import DiscriminatorConfig

SETTINGS = TrainConfig(iterations=3, batch=4, device="cpu", tensorboard=False)


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever prepares or reads an image fails."""

    def opened(*arguments: object, **options: object) -> None:
        pytest.fail("images were asked for before the refusal")

    monkeypatch.setattr("rac.recipes.recipe.open_stream", opened)


def rac_recipe(**changes: object) -> RACRecipe:
    recipe = RECIPES["tiny"][1].tiny()
    assert isinstance(recipe, RACRecipe)
    return replace(recipe, **changes)


@pytest.mark.usefixtures("no_images")
def test_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    with pytest.raises(RacError, match="is not empty; --resume"):
        rac_recipe().run(tmp_path / "run")
    with pytest.raises(RacError, match="was trained with other settings"):
        rac_recipe().run(tmp_path / "run", resume=True)
    with pytest.raises(RacError, match="holds no run to resume"):
        rac_recipe().run(tmp_path / "other", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("no_images")
def test_what_the_recipe_cannot_be(tmp_path: Path) -> None:
    refused = {
        "size 20 must be a multiple of the teacher's factor 8": rac_recipe(data=DataConfig(size=20)),
        "start klvae-f8d4 is not a RAC": rac_recipe(start="klvae-f8d4"),
        "at least 24 pixels, not 16": rac_recipe(
            data=DataConfig(size=32, further_sizes=(16,)),
            objective=RACObjective(RACWeights(reconstruction=1.0, adversarial=0.1)),
            discriminator=DiscriminatorConfig(layers=3, start=500),
        ),
        "no coder 'nowhere'": rac_recipe(teacher="nowhere"),
    }
    for message, recipe in refused.items():
        with pytest.raises(RacError, match=message):
            recipe.run(tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_images")
@pytest.mark.parametrize("kind", ["klvae", "rac"])
def test_a_missing_lpips_names_the_setting_that_goes_without(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAC_WEIGHTS_DIR", raising=False)
    if kind == "klvae":
        recipe, option = KLVAERecipe(weights=KLVAEWeights(perceptual=1.0)), "--weights.perceptual 0"
    else:
        objective = RACObjective(RACWeights(reconstruction=1.0, perceptual=1.0))
        recipe, option = rac_recipe(objective=objective), "--objective.weights.perceptual 0"
    with pytest.raises(WeightsError, match=f"without the perceptual term: {option}"):
        recipe.run(tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs folder locks")
def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, training_toy.__file__, str(run), "1"], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not list(run.glob("checkpoints/0*")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(RacError, match=r"another process is training in .*run; wait for its end"):
            fit(ToyTask(), ToyStream(), training_toy.SLOW, run, resume=True)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    finally:
        process.kill()
        process.wait()
    # With its holder the lock is gone, and nothing is left of it.
    assert fit(ToyTask(), ToyStream(), training_toy.SLOW, run, resume=True).iteration == training_toy.SLOW.iterations
    assert {path.name for path in run.iterdir()} <= {
        *(".rac-output", "recipe.json", "pictures.json", "log.jsonl", "losses.png", "checkpoints", "coder"),
        *("gallery-000000.png", "gallery-000200.png"),
    }


@pytest.mark.skipif(sys.platform == "win32", reason="needs folder locks")
def test_a_recipe_meets_the_lock_before_it_prepares(tmp_path: Path, no_images: None) -> None:
    recipe, run = rac_recipe(), tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps(to_json(recipe)))
    with locked(run, "held"), pytest.raises(RacError, match="another process is training"):
        recipe.run(run, resume=True)


@pytest.mark.skipif(sys.platform == "win32", reason="knows no SIGHUP")
def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    class HungUp(ToyStream):
        def batch(self, first, count):  # type: ignore[no-untyped-def]
            if first == SETTINGS.batch:
                signal.raise_signal(signal.SIGHUP)
            return super().batch(first, count)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert fit(ToyTask(), HungUp(), replace(SETTINGS, workers=0), tmp_path / "run").iteration == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_does_not_keep_a_run_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    fit(ToyTask(), ToyStream(), SETTINGS, tmp_path / "whole")
    monkeypatch.setattr("builtins.print", closed)
    fit(ToyTask(), ToyStream(), SETTINGS, tmp_path / "run")
    monkeypatch.undo()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


# The teacher's scale


def scaled_teacher(folder: Path, deviation: float) -> str:
    """A random teacher whose latents have this deviation on the photographs of the recipe."""
    torch.manual_seed(0)
    coder = KLVAEConfig(widths=(8, 8, 8, 8), latent_channels=8, norm_groups=4).build()
    images = cache.fresh_stream(rac_recipe().data, 0).batch(0, 8).images
    coder.fit_statistics([images])
    scale = coder.network.config.scaling_factor * deviation
    coder.network.register_to_config(scaling_factor=scale)
    rac.save(coder, folder)
    return str(folder)


@pytest.mark.parametrize("deviation", [0.045, 1.0])
def test_a_teacher_of_the_wrong_scale_is_warned_of_with_the_scale_that_fits(
    deviation: float, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    name = scaled_teacher(tmp_path / "teacher", deviation)
    recipe = rac_recipe(teacher=name, train=replace(rac_recipe().train, iterations=1, device="cpu"))
    recipe.run(tmp_path / "run")
    said = [str(one.message) for one in recwarn if "latents of teacher" in str(one.message)]
    assert len(said) == (deviation != 1.0)
    recwarn.clear()
    if said:
        fitting = float(said[0].split("scaling_factor ")[1].split(" ")[0])
        expected = rac.load(name).network.config.scaling_factor / deviation
        assert fitting == pytest.approx(expected, rel=0.5)
        longer = replace(recipe, train=replace(recipe.train, minutes=60.0))
        longer.run(tmp_path / "run", resume=True)
        assert not [one for one in recwarn if "latents of teacher" in str(one.message)], "said once, at the start"


def test_pictures_of_a_single_colour_do_not_cast_doubt_on_a_teacher(recwarn: pytest.WarningsRecorder) -> None:
    colours = torch.tensor([[-1.0, 1.0, -1.0]] * 5).view(5, 3, 1, 1).expand(5, 3, 64, 64)
    teacher = rac.load("klvae-f8d4")
    check_latents(teacher, "klvae-f8d4", Batch(colours))
    assert not recwarn.list
    # They would be taken for badly scaled, as a noisy picture of them shows.
    noisy = colours + 0.05 * torch.randn(colours.shape, generator=torch.Generator().manual_seed(0))
    check_latents(teacher, "klvae-f8d4", Batch(noisy))
    assert len(recwarn.list) == 1


# The gallery


def test_a_gallery_asks_each_network_once_for_each_picture(make_rac, images) -> None:  # type: ignore[no-untyped-def]
    from rac.recipes.rac import RACTask

    torch.manual_seed(0)
    teacher = KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build()
    coder = make_rac(lively=0.05)
    counted: list[nn.Module] = []
    for module in (coder.field, teacher.network.encoder, teacher.network.decoder):
        module.register_forward_hook(lambda module, *_: counted.append(module))
    task = RACTask(coder, teacher, RACObjective(RACWeights(velocity=1.0)))
    with torch.no_grad():
        picture, metrics = task.gallery({"coder": coder}, images(3, 16, 16))
    steps = coder.config.steps
    assert steps > 1
    # One step, all steps from the teacher's latent; encoding and decoding alone.
    assert counted.count(coder.field) == 1 + steps + 2 * steps
    assert counted.count(teacher.network.encoder) == counted.count(teacher.network.decoder) == 1
    assert picture.shape[:2] == (1, 3)
    assert list(metrics) == ["psnr_teacher", "psnr_1_step", "psnr", "psnr_round_trip", "explained_variance"]
