"""The recipe of SiT: what it asks of coder and pictures, and that it reads no pixel."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import classed_photos, untrained_klvae

import rac
from rac.cli import main
from rac.data import Batch
from rac.data.class_words import IMAGENETTE, in_words
from rac.draws import Draws
from rac.errors import RacError
from rac.recipes import RECIPES, SiTRecipe
from rac.train import log
from rac.train.step import TrainState, train_step


@pytest.fixture
def recipe(tmp_path: Path) -> SiTRecipe:
    untrained_klvae().save(tmp_path / "coder")
    small = RECIPES["sit-64"][1].tiny()
    assert isinstance(small, SiTRecipe)
    return replace(
        small,
        coder=str(tmp_path / "coder"),
        field=replace(small.field, classes=2),
        data=replace(small.data, paths=(classed_photos(tmp_path),), smallest_crop=None),
        train=replace(small.train, device="cpu", tensorboard=False, iterations=2, gallery_every=100),
    )


def test_it_trains_on_prepared_posteriors_and_labels_alone(
    recipe: SiTRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    options = ["--teacher", recipe.coder, "--data.paths", tmp_path / "photos", "--data.size", "32"]
    options += ["--data.held-out", "2", "--out", tmp_path / "crops", "--crops", "8", "--no-pixels", "--moments"]
    assert main(["cache", *map(str, options)]) == 0
    # Nothing is left that could be decoded, and latents are all that training asks for.
    shutil.rmtree(tmp_path / "photos")
    prepared = replace(recipe, data=replace(recipe.data, paths=(tmp_path / "crops",), cached_crops=0))
    fitted = prepared.run(tmp_path / "run")
    assert fitted.iteration == 2
    generator = rac.load_generator(tmp_path / "run")
    assert generator.classes == ("bird", "fish")
    assert generator.kind.side == 4
    # Of the posterior's mean alone there is nothing to sample.
    means = replace(prepared, sample_posterior=False)
    assert means.run(tmp_path / "means").iteration == 2


def test_pictures_of_another_number_of_classes_are_refused_before_crops_are_prepared(
    recipe: SiTRecipe, tmp_path: Path
) -> None:
    three = replace(recipe, field=replace(recipe.field, classes=3))
    with pytest.raises(RacError, match=r"2 classes \(bird, fish\), not of 3; give --field.classes 2"):
        three.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.crops").exists()


def test_without_classes_no_labels_are_asked_for(
    recipe: SiTRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    for path in (tmp_path / "photos").glob("*/*.png"):
        path.rename(tmp_path / "photos" / path.name)
    bare = replace(recipe, field=replace(recipe.field, classes=0))
    bare.run(tmp_path / "run")
    generator = rac.load_generator(tmp_path / "run")
    assert generator.classes == ()
    assert generator.sample([1]).latent.shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": 8}, "give --channels 4 --factor 8"),
        ({"factor": 16}, "4 channels and factor 8, not 4 and 16"),
        ({"size": 40}, "size 40 must be a multiple of 16"),
        ({"further_sizes": (64,)}, "leave out further_sizes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(recipe: SiTRecipe, changes: dict[str, object], words: str) -> None:
    if {"size", "further_sizes"} & changes.keys():
        changes = {"data": replace(recipe.data, **changes)}  # type: ignore[arg-type]
    with pytest.raises(RacError, match=words):
        replace(recipe, **changes).task()  # type: ignore[arg-type]


def test_it_trains_no_coder(recipe: SiTRecipe) -> None:
    coder = rac.load(recipe.coder)
    assert not recipe.trains(coder)
    with pytest.raises(RacError, match="leaves their coder as it is"):
        recipe.task(coder)


def test_ablations_and_reconstructions_say_that_a_generator_is_none_of_theirs(
    recipe: SiTRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", "sit-64", "--vary", "train.lr=0.1,0.2", "--out", str(tmp_path / "a")]) == 2
    assert "sit-64 trains a generator" in capsys.readouterr().err


def test_its_term_is_that_of_the_field_with_labels_left_out(recipe: SiTRecipe) -> None:
    task = replace(recipe, objective=replace(recipe.objective, label_dropout=1.0)).task()
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    latents = torch.randn(4, 4, 4, 4)

    def term(labels: list[int]) -> float:
        draws = Draws.whole(torch.Generator().manual_seed(0), 4)
        (terms,) = task.terms(Batch(latents=latents, labels=torch.tensor(labels)), draws, 0)
        return terms.terms["velocity"].item()

    assert term([0, 1, 0, 1]) == term([1, 1, 1, 1])
    task.objective = replace(task.objective, label_dropout=0.0)
    assert term([0, 1, 0, 1]) != term([1, 1, 1, 1])


def test_numbers_of_classes_become_words() -> None:
    assert in_words(("n01440764", "zebra")) == ("tench", "zebra")
    assert in_words(("n01440764", "tench")) == ("n01440764", "tench")
    assert len({*IMAGENETTE.values()}) == 10


def test_a_batch_in_parts_trains_like_a_whole_one(recipe: SiTRecipe) -> None:
    batch = Batch(latents=torch.randn(6, 4, 4, 4), labels=torch.arange(6) % 2)
    found = []
    for accumulate in (1, 3):
        settings = replace(recipe.train, batch=6, accumulate=accumulate, bf16=False)
        task = recipe.task()
        state = TrainState.start(task, settings, torch.device("cpu"))
        values = [train_step(task, state, batch, settings) for _ in range(2)]
        found.append((values[-1]["velocity"], state.finished()["generator"].state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-4, atol=1e-6)
