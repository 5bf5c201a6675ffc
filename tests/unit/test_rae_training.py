"""Training of an RAE: noise, augmentation, the discriminator on features, its balance and its start."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rac.coders.rae import ViTDecoderConfig
from rac.data import Batch
from rac.draws import Draws
from rac.errors import RacError, WeightsError
from rac.objectives.rae import (
    RAEWeights,
    augmented,
    decoder_terms,
    discriminator_term,
    noised,
    rounded,
    translated,
)
from rac.recipes.rae import RAERecipe, RAETask, rae_128
from rac.representations import load_levels
from rac.representations.levels import DINO, DINOLevels
from rac.representations.weight_files import convert
from rac.train.feature_discriminator import FeatureDiscriminator, FeatureDiscriminatorConfig, PlaceNorm
from rac.train.step import TrainState, train_step

pytest.importorskip("efficientnet_lite_pytorch", reason="the metrics extra is not installed")


def draws(count: int, rng_seed: int = 0) -> Draws:
    return Draws.whole(torch.Generator().manual_seed(rng_seed), count)


# ------------------------------------------------------------------------------------------------ noise, colours


def test_noise_has_one_deviation_for_each_image_up_to_tau():
    raw = torch.zeros(400, 8, 8, 8)
    found = noised(raw, 0.8, draws(400)).std(dim=(1, 2, 3))
    assert found.max() < 0.85
    assert found.mean() == pytest.approx(0.4, abs=0.03)
    assert found.std() == pytest.approx(0.8 / math.sqrt(12), abs=0.03)
    assert noised(raw, 0.0, draws(400)) is raw


def test_translation_moves_whole_images_and_lets_zeros_in():
    image = torch.rand(3, 3, 16, 24) + 1
    # Of 16 pixels at most 2, of 24 at most 3; 0 is the lowest draw, just under 1 the highest.
    moved = translated(image, torch.tensor([0.0, 0.5, 0.999]), torch.tensor([0.5, 0.0, 0.999]))
    assert torch.equal(moved[0, :, 2:, :], image[0, :, :-2, :])
    assert not moved[0, :, :2].any()
    assert torch.equal(moved[1, :, :, 3:], image[1, :, :, :-3])
    assert not moved[1, :, :, :3].any()
    assert torch.equal(moved[2, :, :-2, :-3], image[2, :, 2:, 3:])
    assert not moved[2, :, -2:].any()
    still = translated(image, torch.full((3,), 0.5), torch.full((3,), 0.5))
    assert torch.equal(still, image)


def test_colours_change_by_the_published_formula(monkeypatch: pytest.MonkeyPatch):
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    numbers = iter([torch.full((2,), 0.5)] * 2 + [torch.tensor([0.7, 0.1]), torch.tensor([0.2, 0.9]), torch.rand(2)])
    kept: list[Tensor] = []

    def uniform(self: Draws, like: Tensor) -> Tensor:
        kept.append(next(numbers))
        return kept[-1]

    monkeypatch.setattr(Draws, "uniform", uniform)
    found = augmented(image, draws(2))
    for i in range(2):
        light, colour, contrast = (float(one[i]) for one in kept[2:])
        expected = image[i] + (light - 0.5)
        grey = expected.mean(dim=0)
        expected = grey + 2 * colour * (expected - grey)
        expected = expected.mean() + (contrast + 0.5) * (expected - expected.mean())
        torch.testing.assert_close(found[i], expected)


def test_augmentation_passes_gradients_and_does_not_know_the_batch():
    image = (torch.rand(4, 3, 16, 16) * 2 - 1).requires_grad_()
    whole = augmented(image, draws(4))
    whole.square().sum().backward()
    assert image.grad is not None
    assert (image.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    generator = torch.Generator().manual_seed(0)
    part = augmented(image[2:], Draws(generator, generator, 4, 2, 2))
    assert torch.equal(part, whole[2:])


def test_rounding_is_that_of_a_file():
    image = torch.tensor([-1.5, -1.0, -0.998, 0.0, 0.5, 1.0, 2.0])
    expected = ((image.clamp(-1, 1) + 1) / 2 * 255).round() / 255 * 2 - 1
    torch.testing.assert_close(rounded(image), expected)


def test_terms_are_what_they_say():
    image, raw = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 1, 1)

    def decode(raw: Tensor) -> Tensor:
        return raw.mean(dim=1, keepdim=True).expand(-1, 3, 16, 16)

    from rac.objectives.image_terms import ImageLosses

    losses = ImageLosses(lambda one, other: (one - other).square().mean(dim=(1, 2, 3)), lambda one: one.mean((2, 3)))
    decoded = decode(raw)
    terms = decoder_terms(decode, image, raw, losses)
    torch.testing.assert_close(terms["l1"], (decoded - image).abs().mean())
    torch.testing.assert_close(terms["perceptual"], (decoded - image).square().mean())
    torch.testing.assert_close(terms["adversarial"], -decoded.mean())
    assert decoder_terms(decode, image, raw, ImageLosses())["perceptual"] == 0
    real, made = image.mean((2, 3)), rounded(decoded).mean((2, 3))
    expected = ((1 - real).relu().mean() + (1 + made).relu().mean()) / 2
    torch.testing.assert_close(discriminator_term(decode, image, raw, lambda one: one.mean((2, 3))), expected)


# ------------------------------------------------------------------------------------------------ the discriminator


def test_the_published_discriminator_has_the_published_sizes():
    with torch.device("meta"):
        levels = DINOLevels()
        discriminator = FeatureDiscriminator(levels, 9)
    # With the last norm, which no feature passes, they are 21,670,272.
    assert sum(one.numel() for one in levels.parameters()) + 2 * 384 == 21_670_272
    assert sum(one.numel() for one in discriminator.heads.parameters()) == 7_386_245


class SmallDINO(DINOLevels):
    width, patch, depth, heads = 16, 56, 4, 2
    taken = (1, 3)


def published_dino() -> dict[str, Tensor]:
    """Random weights of a small DINO under the names of its authors."""
    rng, width = torch.Generator().manual_seed(0), 16
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width), "patch_embed.proj.weight": (width, 3, 56, 56)}
    shapes |= {"patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    for block in (f"blocks.{number}" for number in range(4)):
        for name, out, into in (("attn.qkv", 48, 16), ("attn.proj", 16, 16), ("mlp.fc1", 64, 16), ("mlp.fc2", 16, 64)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
    return {name: 0.2 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def test_features_of_dino_are_those_of_the_formula(tmp_path: Path):
    w = published_dino()
    torch.save(w, tmp_path / "dino_deitsmall8_pretrain.pth")
    path = convert(DINO, tmp_path, tmp_path / "weights")
    assert path is not None
    levels, image = SmallDINO.load(path), torch.rand(2, 3, 100, 60) * 2 - 1
    found = levels(image)

    def normed(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, (16,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    pixels = nn.functional.interpolate(image, (224, 224), mode="bilinear", align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((pixels + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    patches = nn.functional.unfold(pixels, 56, stride=56).mT
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(2, 1, 16), x], dim=1) + w["pos_embed"]
    expected = []
    for block in (f"blocks.{number}" for number in range(4)):
        bias = w[f"{block}.attn.qkv.bias"].clone()
        bias[16:32] = 0  # of the keys
        qkv = normed(x, f"{block}.norm1") @ w[f"{block}.attn.qkv.weight"].T + bias
        q, k, v = qkv.reshape(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = (torch.softmax(q @ k.mT / math.sqrt(8), dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ w[f"{block}.attn.proj.weight"].T + w[f"{block}.attn.proj.bias"]
        a = normed(x, f"{block}.norm2") @ w[f"{block}.mlp.fc1.weight"].T + w[f"{block}.mlp.fc1.bias"]
        gelu = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x = x + gelu @ w[f"{block}.mlp.fc2.weight"].T + w[f"{block}.mlp.fc2.bias"]
        expected.append(x[:, 1:].mT)
    assert len(found) == 3
    for one, other in zip(found, (expected[3], expected[1], expected[3]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_files_that_are_no_dino_are_refused(tmp_path: Path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "dino_deitsmall8_pretrain.pth")
    with pytest.raises(WeightsError, match="lack the tensor"):
        convert(DINO, tmp_path, tmp_path)


def test_its_answer_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    discriminator = FeatureDiscriminatorConfig("efficientnet-lite0").build().train()
    discriminator.heads.eval()  # singular vectors rest
    image = torch.rand(3, 3, 48, 64) * 2 - 1
    together = discriminator(image)
    assert together.shape == (3, 784 + 2 * 196 + 2 * 49)
    for i in range(3):
        torch.testing.assert_close(discriminator(image[i : i + 1])[0], together[i], rtol=1e-3, atol=1e-4)


def test_features_stay_in_evaluation_mode_and_kernels_have_norm_one():
    discriminator = FeatureDiscriminatorConfig("efficientnet-lite0", kernel=5).build().train()
    assert discriminator.heads.training
    assert not any(part.training for part in discriminator.levels.modules())
    for _ in range(20):
        discriminator(torch.rand(1, 3, 32, 32))
    convolutions = [part for part in discriminator.heads.modules() if isinstance(part, nn.Conv1d)]
    assert len(convolutions) == 15
    for convolution in convolutions[:6]:
        assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    assert convolutions[1].padding_mode == "circular"


def test_norm_of_places_is_that_of_one_image():
    norm, x = PlaceNorm(4), 3 * torch.randn(2, 4, 10) + 1
    with torch.no_grad():
        norm.weight.fill_(2.0)
        norm.bias.fill_(0.5)
    expected = 2 * (x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt() + 0.5
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ the task


@pytest.fixture(scope="module")
def recipe() -> RAERecipe:
    small = rae_128().tiny()
    return replace(
        small,
        decoder=ViTDecoderConfig(1, 16, 2, 16),
        weights=RAEWeights(0.5, 0.0, 0.75),
        discriminator=replace(small.discriminator, kernel=3, start=1, decoder_start=2),
        train=replace(small.train, device="cpu", bf16=False, clip=0.0, batch=2),
    )


@pytest.fixture(scope="module")
def batch(images) -> Batch:  # type: ignore[no-untyped-def]
    return Batch(images(2, 32, 32, 4))


def names(task: RAETask, batch: Batch, iteration: int) -> list[set[str]]:
    given = task.terms(task.prepare(batch), draws(2), iteration)
    return [set(part.terms) for part in given]


def test_discriminator_and_decoder_begin_when_they_should(recipe, batch):
    task = recipe.task()
    assert names(task, batch, 0) == [{"l1", "perceptual"}]
    assert names(task, batch, 1) == [{"l1", "perceptual"}, {"discriminator"}]
    assert names(task, batch, 2) == [{"l1", "perceptual", "adversarial"}, {"discriminator"}]


def test_the_balance_is_that_of_two_explicit_gradients(recipe, batch):
    task = recipe.task()
    state = TrainState.start(task, recipe.train, torch.device("cpu"))
    state.iteration = 2
    torch.manual_seed(0)
    layer, discriminator = task.coder.decoder.out.weight, task.networks.discriminator
    before = {name: one.clone() for name, one in discriminator.state_dict().items()}
    found = train_step(task, state, batch, replace(recipe.train, lr=0.0))
    discriminator.load_state_dict(before)

    from rac.train.step import _pieces

    ((_, _, own),) = _pieces(state.processes, 2, recipe.train, torch.device("cpu"))
    terms = next(task.terms(task.prepare(batch), own, 2)).terms
    rest = torch.autograd.grad(0.5 * terms["l1"], layer, retain_graph=True)[0].norm()
    opposed = torch.autograd.grad(terms["adversarial"], layer)[0].norm()
    assert found["balance"] == pytest.approx(float(rest / (opposed + 1e-6)), rel=1e-4)


def test_a_batch_in_parts_trains_like_a_whole_one(recipe, batch):
    found = []
    for accumulate in (1, 2):
        task, settings = recipe.task(), replace(recipe.train, accumulate=accumulate)
        state = TrainState.start(task, settings, torch.device("cpu"))
        state.iteration = 2
        train_step(task, state, batch, settings)
        found.append({**task.coder.decoder.state_dict(), **task.networks.discriminator.heads.state_dict()})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": 768}, "tokens of 112 channels, not 768; give --channels 112"),
        ({"size": 40}, "size 40 must be a multiple of 16"),
        ({"further_sizes": (64,)}, "leave out further_sizes"),
        ({"tau": -1.0}, "tau -1.0"),
        ({"statistics_images": 0}, "statistics_images 0"),
        ({"start": 5}, "decoder_start 2 is before start 5"),
        ({"kernel": 4}, "kernel 4 must be odd"),
        ({"rate": -1.0}, "rate -1.0"),
        ({"betas": (0.5, 1.0)}, "betas"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe, changes, words):
    inner = {"size": "data", "further_sizes": "data"}
    inner |= dict.fromkeys(("start", "kernel", "rate", "betas"), "discriminator")

    def task() -> RAETask:
        name = next(iter(changes))
        part = {inner[name]: replace(getattr(recipe, inner[name]), **changes)} if name in inner else changes
        return replace(recipe, **part).task()

    with pytest.raises(RacError, match=words):
        task()


def test_other_coders_and_missing_features_are_refused(recipe, make_rac, tmp_path, monkeypatch):
    with pytest.raises(RacError, match="trains an RAE, not a RAC"):
        recipe.task(make_rac())
    assert not recipe.trains(make_rac())
    monkeypatch.setenv("RAC_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(WeightsError, match=r"dino_vits8.safetensors.*or choose --discriminator.features effici"):
        replace(recipe, discriminator=FeatureDiscriminatorConfig("dino-vits8")).task()
    with pytest.raises(RacError, match="features 'vgg' are not known"):
        load_levels("vgg")  # type: ignore[arg-type]


def test_a_finished_coder_can_be_trained_further(recipe):
    coder = recipe.task().coder
    coder.requires_grad_(False)
    task = recipe.task(coder)
    assert task.coder is coder
    assert all(one.requires_grad for one in coder.decoder.parameters())
    assert not any(one.requires_grad for one in coder.encoder.parameters())
