"""What every recipe promises: its presets train at a small size, resume bit for bit, and say what they depend on."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import smooth_images

import rac
from rac import hub
from rac.coders.adapter import TinyCoder
from rac.coders.klvae import KLVAEConfig
from rac.coders.protocol import Coder
from rac.coders.rae import RAEConfig, ViTDecoderConfig
from rac.config import from_json, to_json
from rac.data import Batch
from rac.draws import Draws
from rac.errors import WeightsError
from rac.recipes import RECIPES, Recipe
from rac.recipes.ddt import PUBLISHED_CODER
from rac.representations.lpips import FILES
from rac.representations.weight_files import find_weights
from rac.train import log
from rac.train.step import TrainState, train_step


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small random coders in place of those that would have to be downloaded, by the names that recipes give."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stand-ins")
    small = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    coders = {
        "stabilityai/sd-vae-ft-ema": KLVAEConfig(widths=(8, 8, 8, 8), latent_channels=4, norm_groups=4).build(),
        "madebyollin/taesd": TinyCoder(AutoencoderTiny(**small)),
        "klvae-128": KLVAEConfig(latent_channels=4).build(),
        "rae-128": small_rae(),
        PUBLISHED_CODER: KLVAEConfig(widths=(8,) * 5, latent_channels=768).build(),
    }
    for number, coder in enumerate(coders.values()):
        rac.save(coder, folder / str(number))
    found = {name: str(folder / str(number)) for number, name in enumerate(coders)}
    if importlib.util.find_spec("transformers") is not None:
        from transformers import Dinov2Config, Dinov2Model

        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
        Dinov2Model(Dinov2Config(**small, image_size=56)).save_pretrained(folder / "dinov2")
        found["facebook/dinov2-base"] = str(folder / "dinov2")
    return {**found, "dinov2-b": str(small_dinov2(folder / "dinov2-b"))}


def small_rae() -> Coder:
    """An RAE of EfficientNet-Lite0, or, where that is missing, another coder of as many channels."""
    try:
        coder = RAEConfig("efficientnet-lite0", ViTDecoderConfig(1, 32, 2, 64)).build()
    except WeightsError:
        return KLVAEConfig(widths=(8,) * 5, latent_channels=112).build()
    coder.fit_statistics([smooth_images(8, 32, 32)])
    return coder


def small_dinov2(folder: Path) -> Path:
    """One block of DINOv2 of size B; where transformers is missing, an empty folder, and tests that load it fail."""
    try:
        import transformers
    except ImportError:
        return folder
    config = transformers.Dinov2WithRegistersConfig(num_hidden_layers=1, mlp_ratio=1, image_size=28)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory, images) -> Path:  # type: ignore[no-untyped-def]
    """Pictures of two classes, for generators."""
    folder = tmp_path_factory.mktemp("labelled")
    for number in range(8):
        path = folder / ("fish", "n03028079")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        rac.write_image(images(1, 40, 48, number), path)
    return folder


def small(name: str, stand_ins: dict[str, str], labelled: Path) -> Recipe:
    """The preset called `name` at a small size, with coders and pictures that are at hand."""
    recipe: Any = RECIPES[name][1].tiny()
    if recipe.product == "generator":
        data = replace(recipe.data, paths=(labelled,))
        recipe = replace(recipe, data=data, field=replace(recipe.field, classes=2))
    given = {key: value for key, value in to_json(recipe).items() if isinstance(value, str) and value in stand_ins}
    recipe = replace(recipe, **{key: stand_ins[value] for key, value in given.items()})
    if name.startswith(("sit", "repae")) and recipe.align.representation in stand_ins:
        recipe = replace(recipe, align=replace(recipe.align, representation=stand_ins[recipe.align.representation]))
    return replace(recipe, train=replace(recipe.train, device="cpu", tensorboard=False))


def skip_without_weights(recipe: Recipe) -> None:
    try:
        recipe.task()
    except WeightsError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        try:
            find_weights(None, FILES["vgg16"])
        except WeightsError:
            pytest.skip(f"LPIPS is among the terms: {error}")
        raise


def contents(run: Path, product: str) -> dict[str, bytes]:
    newest = max((run / "checkpoints").iterdir())
    files = [path for folder in (newest, run / product) for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", RECIPES)
def test_it_says_what_it_depends_on(name: str) -> None:
    recipe = RECIPES[name][1]
    assert recipe.product in hub.PRODUCTS
    assert from_json(type(recipe), to_json(recipe)) == recipe
    assert recipe.tiny().tiny() == recipe.tiny()
    # What is prepared depends on data, order and the coder of the latents, and on nothing else.
    prepared = json.dumps(recipe.prepares())
    assert json.dumps(from_json(type(recipe), to_json(recipe)).prepares()) == prepared
    assert json.dumps(replace(recipe, train=replace(recipe.train, lr=0.5, iterations=7)).prepares()) == prepared
    assert json.dumps(replace(recipe, train=replace(recipe.train, rng_seed=99)).prepares()) != prepared
    assert json.dumps(replace(recipe, data=replace(recipe.data, flip=not recipe.data.flip)).prepares()) != prepared
    assert (recipe.latents_of is None) or recipe.latents_of in prepared
    if recipe.steps_field is not None:
        assert getattr(recipe, recipe.steps_field) >= 1
    assert all(row.parameters > 0 for row in recipe.costs(name, 256))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_its_parts_learn_from_their_own_terms_and_frozen_networks_not_at_all(
    name: str, stand_ins: dict[str, str], labelled: Path, images
) -> None:  # type: ignore[no-untyped-def]
    recipe = small(name, stand_ins, labelled)
    skip_without_weights(recipe)
    task, settings = recipe.task(), recipe.train
    owned = {part: {id(one) for one in it.module.parameters()} for part, it in task.parts.items()}
    owned["frozen"] = {id(one) for module in task.frozen for one in module.parameters()}
    assert not any(one & other for one, other in combinations(owned.values(), 2))
    state = TrainState.start(task, settings, torch.device("cpu"))
    state.iteration = 2  # late enough for a discriminator
    batch = Batch(images(2, 32, 32), labels=torch.tensor([0, 1]))
    draws = Draws.whole(torch.Generator().manual_seed(0), 2)
    given = list(task.terms(task.prepare(batch), draws, state.iteration))
    assert {terms.part for terms in given} == task.parts.keys()
    names = [name for terms in given for name in terms.terms]
    assert len(names) == len(set(names))
    for part, terms, _ in given:
        assert {name for name, weight in task.parts[part].weights.items() if weight} <= terms.keys()
    frozen = [one.clone() for module in task.frozen for one in module.state_dict().values()]
    values = train_step(task, state, batch, settings)
    assert all(value == value for value in values.values())
    assert all(one.grad is None for module in task.frozen for one in module.parameters())
    after = [one for module in task.frozen for one in module.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(frozen, after, strict=True))
    assert all(any(one.grad is not None for one in it.module.parameters()) for it in task.parts.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_resumes_bit_for_bit_and_loads(
    name: str, stand_ins: dict[str, str], labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    recipe = small(name, stand_ins, labelled)
    skip_without_weights(recipe)
    crops = tmp_path / "crops"
    fitted = recipe.run(tmp_path / "whole", crops=crops)
    assert fitted.iteration == recipe.train.iterations
    assert next(iter(fitted.metrics.values())) > 0
    hurried = replace(recipe, train=replace(recipe.train, minutes=1e-9))
    assert hurried.run(tmp_path / "broken", crops=crops).iteration == 1
    recipe.run(tmp_path / "broken", resume=True, crops=crops)
    assert contents(tmp_path / "broken", recipe.product) == contents(tmp_path / "whole", recipe.product)
    if recipe.product == "generator":
        generator = rac.load_generator(tmp_path / "whole")
        assert generator.classes == ("fish", "church")
        assert generator.kind.coder is not None
        assert recipe.latents_of in (None, generator.kind.coder)
        coder = rac.load(generator.kind.coder)
        generator.check_coder(coder, generator.kind.coder)
        assert coder.decode(generator.sample([0], [1]).latent).shape == (1, 3, 32, 32)
        return
    coder, image = rac.load(tmp_path / "whole"), torch.rand(1, 3, 32, 32) * 2 - 1
    assert coder.reconstruct(image).shape == image.shape
    assert recipe.trains(coder)
