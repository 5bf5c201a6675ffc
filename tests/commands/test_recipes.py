"""Every named recipe, at a size that runs in seconds."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rac
from rac.coders.adapter import TinyCoder
from rac.coders.klvae import KLVAEConfig
from rac.coders.taesd import TAESD, TAESDConfig
from rac.errors import RacError, WeightsError
from rac.fields import ConvField
from rac.recipes import RECIPES, RACRecipe
from rac.recipes.recipe import in_seconds
from rac.representations.lpips import FILES
from rac.representations.weight_files import find_weights


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small random stand-ins for the teachers that would have to be downloaded, by the names that recipes give."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teachers")
    small = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    stand_ins = {
        "stabilityai/sd-vae-ft-ema": KLVAEConfig(widths=(8, 8, 8, 8), latent_channels=4, norm_groups=4).build(),
        "madebyollin/taesd": TinyCoder(AutoencoderTiny(**small)),
        "taef2_decoder.pth": TAESD(TAESDConfig(latent_channels=32, pooled=True)),
        "klvae-128": KLVAEConfig(latent_channels=4).build(),
    }
    for number, coder in enumerate(stand_ins.values()):
        rac.save(coder, folder / str(number))
    return {name: str(folder / str(number)) for number, name in enumerate(stand_ins)}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_saves_and_loads(name: str, teachers: dict[str, str], tmp_path: Path) -> None:
    recipe = in_seconds(RECIPES[name][1])
    weights = recipe.objective.weights if isinstance(recipe, RACRecipe) else recipe.weights
    if weights.perceptual:
        try:
            find_weights(None, FILES["vgg16"])
        except WeightsError as error:
            pytest.skip(f"LPIPS is among the terms: {error}")
    if isinstance(recipe, RACRecipe):
        recipe = replace(recipe, teacher=teachers.get(recipe.teacher, recipe.teacher))
    fitted = recipe.run(tmp_path / "run")
    assert fitted.iteration == recipe.train.iterations
    assert fitted.metrics["psnr"] > 0
    coder = rac.load(tmp_path / "run" / "coder")
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert coder.reconstruct(image).shape == image.shape
    assert coder.teacher == (recipe.teacher if isinstance(recipe, RACRecipe) else None)


def test_a_second_stage_starts_from_the_first(tmp_path: Path) -> None:
    first = in_seconds(RECIPES["tiny"][1])
    assert isinstance(first, RACRecipe)
    first.run(tmp_path / "first")
    begun = rac.load(tmp_path / "first" / "coder")
    second = replace(first, start=str(tmp_path / "first" / "coder"), train=replace(first.train, iterations=1, lr=0.0))
    again = second.run(tmp_path / "second").module
    for name, value in begun.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_start_of_another_shape_is_refused(tmp_path: Path) -> None:
    first = in_seconds(RECIPES["tiny"][1])
    assert isinstance(first, RACRecipe)
    first.run(tmp_path / "first")
    other = replace(first, state_channels=9, start=str(tmp_path / "first" / "coder"))
    with pytest.raises(RacError, match="another field"):
        other.run(tmp_path / "second")


def one_iteration(compiled: bool) -> RACRecipe:
    recipe = in_seconds(RECIPES["tiny"][1])
    assert isinstance(recipe, RACRecipe)
    train = replace(recipe.train, iterations=1, gallery_every=1, bf16=False, compile=compiled)
    return replace(recipe, objective=replace(recipe.objective, steps=(1, 1)), train=train)


def test_the_field_is_compiled_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: asked.append(module))
    for compiled in (False, True):
        one_iteration(compiled).run(tmp_path / str(compiled))
        assert [type(module) for module in asked] == [ConvField] * compiled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_field_trains_as_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A build that was cut off stays broken in the common cache.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    one, two = (one_iteration(compiled).run(tmp_path / str(compiled)).module for compiled in (False, True))
    assert list(one.state_dict()) == list(two.state_dict())
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=2e-3)  # Adam's step is lr, or minus it
