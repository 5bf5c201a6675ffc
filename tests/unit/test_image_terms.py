"""Perceptual and adversarial terms, the discriminator, and which gradients go where."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_toy import AdversarialTask, ToyStream, ToyTask

import rac
from rac.coders.klvae import KLVAE, KLVAEConfig
from rac.data import Batch, DataConfig
from rac.draws import Draws
from rac.errors import RacError, WeightsError
from rac.fields import LdmFieldConfig, TinyFieldConfig
from rac.objectives.image_terms import ImageLosses, image_terms
from rac.objectives.klvae import KLVAEWeights, decoder_terms, klvae_terms
from rac.objectives.rac import Coding, RACObjective, RACWeights, rac_terms
from rac.recipes import KLVAERecipe, RACRecipe
from rac.recipes.klvae import KLVAETask
from rac.recipes.rac import RACTask
from rac.representations.lpips import LPIPS
from rac.runtime import generator
from rac.train import TrainConfig, fit, log, read_log
from rac.train.adversary import ImageNetworks, balanced, last_layer
from rac.train.discriminator import DiscriminatorConfig
from rac.train.step import TrainState, train_step

SHORT = TrainConfig(iterations=4, batch=4, device="cpu", log_every=1, gallery_every=4, tensorboard=False)
SMALL = KLVAEConfig(widths=(8, 16), latent_channels=3)
JUDGE = DiscriminatorConfig(width=4, layers=1)


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")


def draws(count: int) -> Draws:
    return Draws.whole(torch.Generator().manual_seed(2), count)


def small_coder() -> KLVAE:
    torch.manual_seed(0)
    return SMALL.build()


def distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().mean(dim=(1, 2, 3))


def bits(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------ terms


def test_hinge_values_by_hand() -> None:
    """Logits are the images' first channel: real ones (2, 0.5) and (-1, 1), decoded ones (0, -3) and (0.5, -0.5)."""
    real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 1, 2).repeat(1, 3, 1, 1)
    decoded = torch.tensor([[0.0, -3.0], [0.5, -0.5]]).view(2, 1, 1, 2).repeat(1, 3, 1, 1)
    terms = image_terms(ImageLosses(discriminator=lambda image: image[:, :1]), decoded, real)
    assert float(terms["adversarial"]) == pytest.approx(3.0 / 4)
    on_real = (0 + 0.5 + 2 + 0) / 4
    on_decoded = (1 + 0 + 1.5 + 0.5) / 4
    assert float(terms["discriminator"]) == pytest.approx((on_real + on_decoded) / 2)


def test_each_term_needs_its_network(images) -> None:
    one, other = images(2, 8, 8), images(2, 8, 8, rng_seed=1)
    assert image_terms(ImageLosses(), one, other) == {}
    terms = image_terms(ImageLosses(perceptual=distance), one, other)
    assert terms.keys() == {"perceptual"}
    torch.testing.assert_close(terms["perceptual"], (one - other).square().mean())


def test_the_discriminators_term_gives_the_decoded_image_no_gradient(images) -> None:
    decoded, judge = images(2, 8, 8).requires_grad_(), JUDGE.build()
    terms = image_terms(ImageLosses(discriminator=judge), decoded, images(2, 8, 8, rng_seed=1))
    terms["discriminator"].backward()
    assert decoded.grad is None
    assert all(parameter.grad is not None for parameter in judge.parameters())
    terms["adversarial"].backward()
    assert decoded.grad.abs().max() > 0


def test_the_judges_see_the_image_that_is_compared_and_nothing_is_decoded_twice(images, monkeypatch) -> None:
    coder, image, seen, decoded = small_coder(), images(2, 16, 16), [], []
    decode = coder.decode
    monkeypatch.setattr(coder, "decode", lambda latent: decoded.append(decode(latent)) or decoded[-1])
    losses = ImageLosses(lambda one, other: seen.append(one) or distance(one, other), JUDGE.build())
    terms = klvae_terms(coder, image, draws(2), losses)
    assert terms.keys() == {"l1", "kl", "perceptual", "adversarial", "discriminator"}
    assert len(decoded) == len(seen) == 1
    torch.testing.assert_close(terms["l1"], (seen[0] - image).abs().mean(), rtol=0, atol=0)
    alone = klvae_terms(coder, image, draws(2))
    assert torch.equal(alone["l1"], terms["l1"])
    latent = coder.encode(image)
    expected = (coder.decode(latent) - image).abs().mean()
    torch.testing.assert_close(decoder_terms(coder, image, latent)["l1"], expected)


def test_rac_is_judged_by_the_image_of_its_reconstruction(make_rac, images) -> None:
    coder, image = make_rac(lively=0.05), images(2, 16, 16)
    latent, seen, asked = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), [], []

    def field(state: Tensor, time: Tensor) -> Tensor:
        asked.append(time)
        return coder.field(state, time)

    losses = ImageLosses(lambda one, other: seen.append(one) or distance(one, other), JUDGE.build())
    coding = Coding(field, coder.states, coder.contract, None, losses=losses)
    objective = RACObjective(RACWeights(reconstruction=1, perceptual=1, adversarial=1), steps=(3, 3), memory="store")
    terms = rac_terms(coding, image, latent, objective, draws(2))
    assert list(terms) == ["reconstruction", "perceptual", "adversarial", "discriminator"]
    assert len(asked) == 3
    torch.testing.assert_close((seen[0] - image).square().mean(), terms["reconstruction"])
    torch.testing.assert_close(terms["perceptual"], terms["reconstruction"])

    before_it_starts = coding._replace(losses=ImageLosses(distance))
    assert "adversarial" not in rac_terms(before_it_starts, image, latent, objective, draws(2))
    with pytest.raises(RacError, match="perceptual term needs LPIPS"):
        rac_terms(coding._replace(losses=ImageLosses()), image, latent, objective, draws(2))


# ------------------------------------------------------------------------------------------------ networks


def test_the_discriminator_judges_patches_of_each_image_alone(images) -> None:
    torch.manual_seed(0)
    judge, image = DiscriminatorConfig(width=8, layers=2).build().eval(), images(3, 64, 64)
    logits = judge(image)
    assert logits.shape == (3, 1, 14, 14)
    torch.testing.assert_close(torch.cat([judge(one) for one in image.split(1)]), logits)
    plain = DiscriminatorConfig(width=8, layers=2, norm_groups=0).build()
    for rows, first, last in ((slice(34, None), 3, 13), (slice(0, 1), 0, 2)):  # logit i sees rows 4 i - 11 to 4 i + 22
        other = image.clone()
        other[..., rows, :] = 0
        changed = (plain(other) != plain(image)).any(dim=(0, 1, 3)).nonzero().flatten()
        assert (int(changed[0]), int(changed[-1])) == (first, last)


def test_the_discriminators_least_size_is_told(images) -> None:
    for layers in (1, 2, 3):
        judge = DiscriminatorConfig(width=4, layers=layers).build()
        assert judge(images(1, judge.least, judge.least)).numel() > 0
        with pytest.raises(RacError, match=rf"at least {judge.least} pixels"):
            judge(images(1, judge.least - 1, 64))
        with pytest.raises(RuntimeError):
            judge.stages(images(1, judge.least - 1, 64))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_cannot_be(weight: float) -> None:
    for kind in (RACWeights, KLVAEWeights):
        with pytest.raises(RacError, match=f"the weight perceptual {weight} must be at least 0"):
            kind(perceptual=weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers 0 must be at least 1"),
        ({"start": -1}, "start -1"),
        ({"width": 6}, "width 6 does not divide into norm_groups 4"),
        ({"betas": (0.5, 1.0)}, "betas"),
    ],
)
def test_discriminators_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RacError, match=message):
        DiscriminatorConfig(**changes)


def test_the_last_layer_is_the_one_that_makes_the_output() -> None:
    for config in (TinyFieldConfig(widths=(8, 8), blocks=(1, 1), patch=2), LdmFieldConfig(widths=(8, 8, 8), groups=4)):
        module = nn.ModuleDict({"field": config.build(4, 4)})
        weight = module.get_parameter(last_layer(module, "field"))
        assert not weight.any(), "the fields' last convolution starts at zero, and no other does"
    coder = small_coder()
    assert last_layer(coder, "network.decoder") == "network.decoder.conv_out.weight"
    with pytest.raises(RacError, match="is frozen"):
        last_layer(coder.requires_grad_(False), "network.decoder")


def test_lpips_is_wanted_before_anything_is_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("RAC_WEIGHTS_DIR", raising=False)
    with pytest.raises(WeightsError, match=r"vgg16.*RAC_WEIGHTS_DIR"):
        KLVAERecipe(weights=KLVAEWeights(perceptual=1.0)).run(tmp_path / "run")
    objective = RACObjective(RACWeights(reconstruction=1.0, perceptual=1.0))
    with pytest.raises(WeightsError, match="lpips_vgg16"):
        RACRecipe(teacher="klvae-f8d4", objective=objective).run(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_lpips_teaches_the_decoder_and_learns_nothing(images, tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks, coder = ImageNetworks(lpips=LPIPS("vgg16")), small_coder()
    task = KLVAETask(coder, KLVAEWeights(l1=0, kl=0, perceptual=1.0), 2, networks)
    before, decoder = bits(networks.lpips), bits(coder.network.decoder)
    settings = replace(SHORT, iterations=2, batch=2, bf16=True, channels_last=True)

    class Larger(ToyStream):
        def batch(self, first: int, count: int) -> Batch:
            return Batch(images(count, 16, 16, rng_seed=first))

        def held_out(self) -> Tensor:
            return images(2, 16, 16)

    fitted = fit(task, Larger(), settings, tmp_path / "run")
    assert equal(bits(networks.lpips), before)
    assert all(parameter.grad is None for parameter in networks.lpips.parameters())
    assert not equal(bits(coder.network.decoder), decoder)
    expected = float(networks.lpips(fitted.module.reconstruct(images(2, 16, 16)), images(2, 16, 16)).mean())
    assert fitted.metrics["lpips_vgg16"] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------ the two sides


def one_step(task: AdversarialTask, images: Batch, **settings: float) -> tuple[TrainState, dict[str, float]]:
    """One iteration on all of `images`."""
    config = replace(SHORT, batch=len(images.images), **settings)
    state = TrainState.start(task, config, torch.device("cpu"))
    return state, train_step(task, state, images, config)


def drawn(images: Batch) -> Draws:
    """The draws of that iteration."""
    shared, own = (generator(SHORT.rng_seed, name, 0) for name in ("shared", "own"))
    return Draws(shared, own, len(images.images), 0, len(images.images))


def test_the_balance_against_autograd_by_hand() -> None:
    torch.manual_seed(0)
    task = AdversarialTask(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).double())
    task.weights = {"clean": 1.0}
    parameters = list(task.module.parameters())
    batch = ToyStream(dtype=torch.float64).batch(0, 3)
    made = task.module(batch.images + 0.3 * drawn(batch).normal(batch.images))
    others = torch.autograd.grad((made - batch.images).square().mean(), parameters, retain_graph=True)
    adversarial = torch.autograd.grad(-task.judge(made).mean(), parameters)
    last = next(place for place, one in enumerate(parameters) if one is task.module[2].weight)
    balance = float(others[last].square().sum().sqrt() / (adversarial[last].square().sum().sqrt() + 1e-4))
    assert 0.01 < balance < 1e4

    state, values = one_step(task, batch, clip=0.0, lr=0.0)
    assert values["balance"] == pytest.approx(balance, rel=1e-6)
    for parameter, one, other in zip(parameters, others, adversarial, strict=True):
        torch.testing.assert_close(parameter.grad, one + 0.7 * balance * other, rtol=1e-5, atol=1e-12)
    adaptive = state.parts["model"].adaptive
    assert adaptive is not None
    assert not adaptive.sums


def test_the_balance_is_bounded() -> None:
    assert float(balanced(torch.full((3,), 1e6), torch.zeros(3))) == 1e4
    assert float(balanced(torch.zeros(3), torch.ones(3))) == 0.0
    assert float(balanced(torch.tensor([3.0, 4.0]), torch.zeros(2))) == pytest.approx(1e4)
    assert float(balanced(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 10.0]))) == pytest.approx(5 / 10.0001)


def test_neither_side_gets_the_others_gradient() -> None:
    task, batch = AdversarialTask(), ToyStream().batch(0, 3)
    terms = task.losses(batch, drawn(batch), 0)
    alone = torch.autograd.grad(terms["discriminator"], list(task.judge.parameters()))
    state, values = one_step(task, batch, clip=0.0)
    for parameter, gradient in zip(task.judge.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert values["gradient_discriminator"] == pytest.approx(float(nn.utils.get_total_norm(alone)))
    assert state.parts["discriminator"].optimizer.param_groups[0]["lr"] == pytest.approx(2 * SHORT.lr)


def test_each_side_learns_without_the_other(tmp_path: Path) -> None:
    """At rate 0 the discriminator stays and the module feels it; at weight 0 it is the other way round."""
    fixed, unheard, never = AdversarialTask(rate=0.0), AdversarialTask(adversarial=0.0), AdversarialTask(start=99)
    judge = bits(fixed.judge)
    for name, task in {"fixed": fixed, "unheard": unheard, "never": never}.items():
        fit(task, ToyStream(), SHORT, tmp_path / name)
    assert equal(bits(fixed.judge), judge)
    assert not equal(bits(fixed.module), bits(never.module))
    assert equal(bits(unheard.module), bits(never.module))
    assert not equal(bits(unheard.judge), judge)


def test_nothing_of_it_happens_before_its_start(tmp_path: Path) -> None:
    late, never = AdversarialTask(start=2), AdversarialTask(start=99)
    first = bits(late.judge)
    fit(late, ToyStream(), SHORT, tmp_path / "late", stop_at=2)
    fit(never, ToyStream(), SHORT, tmp_path / "never", stop_at=2)
    assert equal(bits(late.judge), first)
    assert equal(bits(late.module), bits(never.module))
    fit(late, ToyStream(), SHORT, tmp_path / "late", resume=True)
    fit(never, ToyStream(), SHORT, tmp_path / "never", resume=True)
    assert not equal(bits(late.judge), first)
    assert not equal(bits(late.module), bits(never.module))
    train = [record["train"] for record in read_log(tmp_path / "late" / "log.jsonl") if "train" in record]
    assert ["balance" in values and "discriminator" in values for values in train] == [False, False, True, True]
    assert not list((tmp_path / "late" / "coder").glob("*discriminator*"))


def test_a_value_of_some_iterations_is_logged_as_their_mean(tmp_path: Path) -> None:
    fit(AdversarialTask(start=3), ToyStream(), SHORT, tmp_path / "each")
    fit(AdversarialTask(start=3), ToyStream(), replace(SHORT, log_every=4), tmp_path / "once")
    each, once = (
        [record["train"] for record in read_log(tmp_path / name / "log.jsonl") if "train" in record][-1]
        for name in ("each", "once")
    )
    assert once["discriminator"] == each["discriminator"]


def test_its_gradient_is_clipped_by_itself() -> None:
    task = AdversarialTask()
    _, values = one_step(task, ToyStream().batch(0, 3), clip=1e-3)
    found = torch.stack([parameter.grad.norm() for parameter in task.judge.parameters()]).norm()
    assert values["gradient_discriminator"] > 2e-3
    assert float(found) == pytest.approx(1e-3, rel=1e-3)


def test_against_a_discriminator_the_toy_ends_elsewhere_but_still_learns(tmp_path: Path) -> None:
    settings = replace(SHORT, iterations=100, lr=1e-2, log_every=50, gallery_every=100)
    opposed = fit(AdversarialTask(), ToyStream(), settings, tmp_path / "opposed")
    plain = fit(ToyTask(), ToyStream(), settings, tmp_path / "plain")
    assert not equal(bits(opposed.module), bits(plain.module))
    held_out = [r["held_out"]["psnr"] for r in read_log(tmp_path / "opposed" / "log.jsonl") if "held_out" in r]
    assert held_out[-1] > held_out[0] + 3


@pytest.mark.parametrize("kind", ["KL-VAE", "RAC"])
def test_the_tasks_bring_their_discriminator(kind: str, make_rac, images, tmp_path: Path) -> None:
    networks = ImageNetworks.build({"perceptual": 0.0, "adversarial": 0.3}, JUDGE, 0, "weights")
    if kind == "KL-VAE":
        task = KLVAETask(small_coder(), KLVAEWeights(adversarial=0.3), 2, networks)
        last = task.module.network.decoder.conv_out.weight
    else:
        teacher = KLVAEConfig(widths=(8, 8, 8), latent_channels=4).build()
        weights = RACWeights(reconstruction=1.0, adversarial=0.3)
        task = RACTask(make_rac(lively=0.05), teacher, RACObjective(weights, steps=(2, 2)), networks)
        last = task.module.field.network.layers[-2].weight
    assert list(task.parts) == ["coder", "discriminator"]
    coder = task.parts["coder"]
    assert coder.adaptive is not None
    assert coder.module.get_parameter(coder.adaptive.layer) is last
    assert (coder.adaptive.term, coder.adaptive.weight) == ("adversarial", 0.3)
    assert "adversarial" not in coder.weights
    judge = bits(networks.discriminator)
    fit(task, ToyStream(), replace(SHORT, iterations=2), tmp_path / "run")
    values = [record["train"] for record in read_log(tmp_path / "run" / "log.jsonl") if "train" in record][-1]
    assert {"adversarial", "discriminator", "balance"} <= values.keys()
    assert not equal(bits(networks.discriminator), judge)


def test_the_adversarial_term_needs_another(make_rac) -> None:
    with pytest.raises(RacError, match="nothing to balance it against"):
        KLVAETask(small_coder(), KLVAEWeights(l1=0, adversarial=1.0), 2, train_encoder=False)
    with pytest.raises(RacError, match="nothing to balance it against"):
        RACTask(make_rac(), small_coder(), RACObjective(RACWeights(adversarial=1.0)))


# ------------------------------------------------------------------------------------------------ the decoder alone


def photographs(folder: Path, images) -> DataConfig:
    for number, image in enumerate(images(8, 24, 24)):
        rac.write_image(image[None], folder / f"{number}.png")
    return DataConfig(paths=(folder,), size=16, held_out=2)


@pytest.mark.parametrize("cached_crops", [0, 6])
def test_a_frozen_encoder_keeps_its_latents_bit_for_bit(images, tmp_path: Path, cached_crops: int) -> None:
    start = small_coder()
    start.fit_statistics([images(4, 16, 16)])
    rac.save(start, tmp_path / "start")
    (tmp_path / "photos").mkdir()
    recipe = KLVAERecipe(
        network=SMALL,
        start=str(tmp_path / "start"),
        train_encoder=False,
        weights=KLVAEWeights(adversarial=0.5),
        discriminator=JUDGE,
        data=replace(photographs(tmp_path / "photos", images), cached_crops=cached_crops),
        train=replace(SHORT, weight_decay=0.1, lr=1e-2),
    )
    recipe.run(tmp_path / "run")
    after, image = rac.load(tmp_path / "run" / "coder"), images(3, 32, 40, rng_seed=5)
    assert after.spec == start.spec
    assert torch.equal(after.encode(image), start.encode(image))
    decoder = dict(after.network.decoder.named_parameters())
    for name, value in start.network.decoder.named_parameters():
        assert not torch.equal(decoder[name], value), name
    assert not torch.equal(after.network.post_quant_conv.weight, start.network.post_quant_conv.weight)
    values = [record["train"] for record in read_log(tmp_path / "run" / "log.jsonl") if "train" in record]
    assert values[0].keys() >= {"l1", "adversarial"}
    assert "kl" not in values[0]


def test_a_frozen_encoder_is_not_asked_where_latents_are_prepared(images, monkeypatch) -> None:
    task = KLVAETask(small_coder(), KLVAEWeights(), 2, train_encoder=False)
    image = images(2, 16, 16)
    prepared = Batch(image, task.module.encode(image))

    def terms(batch: Batch) -> dict[str, Tensor]:
        return dict(next(task.terms(task.prepare(batch), draws(2), 0)).terms)

    fresh = terms(Batch(image))
    monkeypatch.setattr(task.module, "encode", None)
    cached = terms(prepared)
    assert torch.equal(cached["l1"], fresh["l1"])
    fresh["l1"].backward()
    network = task.module.network
    assert all(one.grad is None for part in (network.encoder, network.quant_conv) for one in part.parameters())
    assert all(one.grad is not None for part in (network.decoder, network.post_quant_conv) for one in part.parameters())


def test_a_klvae_starts_where_another_ended(images, tmp_path: Path) -> None:
    start = small_coder()
    rac.save(start, tmp_path / "start")
    (tmp_path / "photos").mkdir()
    data = photographs(tmp_path / "photos", images)
    recipe = KLVAERecipe(
        SMALL, str(tmp_path / "start"), data=data, train=replace(SHORT, iterations=1, lr=0.0, log_every=1)
    )
    module = recipe.run(tmp_path / "run").module
    assert equal(bits(module), bits(start))
    with pytest.raises(RacError, match=r"another network: latent_channels 5, was 3"):
        replace(recipe, network=replace(SMALL, latent_channels=5)).run(tmp_path / "other")
    with pytest.raises(RacError, match="is not a KL-VAE"):
        replace(recipe, start="rac-64").run(tmp_path / "other")
    with pytest.raises(RacError, match="no encoder to keep"):
        replace(recipe, start=None, train_encoder=False).run(tmp_path / "other")
    assert not (tmp_path / "other").exists()
