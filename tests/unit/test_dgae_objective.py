"""DGAE's terms against their formulas, the way of its gradients, and its presets against the published settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import smooth_images, untrained_dgae, untrained_rac
from torch.nn import functional as F

import rac
from rac.coders.dgae import DGAE
from rac.coders.klvae import KLVAEConfig
from rac.data import Batch
from rac.draws import Draws
from rac.errors import RacError
from rac.fields import UNetConfig
from rac.latents import Statistics
from rac.objectives.dgae import DGAEWeights, decoder_terms, dgae_terms, one_step_end
from rac.objectives.image_terms import ImageLosses
from rac.recipes import RECIPES, DGAERecipe, KLVAERecipe


@pytest.fixture
def coder() -> DGAE:
    return untrained_dgae(0.05, statistics=Statistics.of(0.2, 0.5))


@pytest.fixture
def images() -> torch.Tensor:
    return smooth_images(4, 16, 24)


def draws(count: int = 4) -> Draws:
    return Draws.whole(torch.Generator().manual_seed(2), count)


def squared(decoded: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Stands for LPIPS."""
    return (decoded - image).square().mean(dim=(1, 2, 3))


LOSSES = ImageLosses(squared)


def test_the_end_of_one_step() -> None:
    state, velocity, time = torch.full((1, 3, 2, 2), 2.0), torch.full((1, 3, 2, 2), -1.0), torch.tensor([0.25])
    assert torch.equal(one_step_end(state, velocity, time), torch.full((1, 3, 2, 2), 1.25))


def test_terms_are_the_formulas(coder: DGAE, images: torch.Tensor) -> None:
    terms = dgae_terms(coder, images, draws(), LOSSES)
    generator = torch.Generator().manual_seed(2)
    mean, log_variance = coder.quant_conv(coder.encoder(images)).chunk(2, dim=1)
    z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
    time = torch.rand(4, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    t = time.view(-1, 1, 1, 1)
    state = (1 - t) * noise + t * images
    velocity = coder.field(torch.cat([state, F.interpolate(z, scale_factor=4)], dim=1), time)
    torch.testing.assert_close(terms["velocity"], (velocity - (images - noise)).square().mean())
    torch.testing.assert_close(terms["perceptual"], (state + (1 - t) * velocity - images).square().mean())
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    torch.testing.assert_close(terms["kl"], kl.sum() / len(images))
    assert terms.keys() == {"velocity", "perceptual", "kl"}
    assert dgae_terms(coder, images, draws()).keys() == {"velocity", "kl"}


def test_gradients_reach_the_encoder_through_z_alone(coder: DGAE, images: torch.Tensor) -> None:
    encoder = [*coder.encoder.parameters(), *coder.quant_conv.parameters()]

    def loss(latent: torch.Tensor) -> torch.Tensor:
        terms = decoder_terms(coder, images, latent, draws(), LOSSES)
        return terms["velocity"] + terms["perceptual"]

    latent = coder.encode(images)
    found = torch.autograd.grad(loss(latent), encoder, retain_graph=True)
    assert float(sum(one.abs().sum() for one in found)) > 0
    # The same through z: the gradient of the loss by a latent of its own, carried back through the encoder.
    apart = latent.detach().requires_grad_()
    (by_latent,) = torch.autograd.grad(loss(apart), apart)
    for one, two in zip(found, torch.autograd.grad(latent, encoder, by_latent), strict=True):
        torch.testing.assert_close(one, two)
    assert set(torch.autograd.grad(loss(latent.detach()), encoder, allow_unused=True)) == {None}


def test_terms_do_not_depend_on_how_the_batch_is_cut(coder: DGAE, images: torch.Tensor) -> None:
    whole = dgae_terms(coder, images, draws(), LOSSES)
    halves = [
        dgae_terms(coder, images[first : first + 2], replace(draws(), first=first, count=2), LOSSES) for first in (0, 2)
    ]
    for name, term in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, term)


def test_the_perceptual_term_sees_float32_and_no_clamp(coder: DGAE, images: torch.Tensor) -> None:
    seen = []

    def spy(decoded: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        seen.append((decoded, F.conv2d(decoded, torch.ones(1, 3, 1, 1))))
        return squared(decoded, image)

    with torch.autocast("cpu", torch.bfloat16):
        terms = dgae_terms(coder, images[..., :13, :19], draws(), ImageLosses(spy))
    ((decoded, convolved),) = seen
    assert (decoded.dtype, convolved.dtype) == (torch.float32, torch.float32)
    assert float(decoded.detach().abs().max()) > 1.5
    assert decoded.shape == (4, 3, 16, 20)  # padded to multiples of the factor
    assert {term.dtype for term in terms.values()} == {torch.float32}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in coder.parameters())


def test_times_are_of_the_distribution_asked_for(coder: DGAE, images: torch.Tensor) -> None:
    uniform, arcsine = (dgae_terms(coder, images, draws(), times=times) for times in ("uniform", "arcsine"))
    assert not torch.equal(uniform["velocity"], arcsine["velocity"])
    assert torch.equal(uniform["kl"], arcsine["kl"])


def test_a_few_iterations_lower_the_loss(images: torch.Tensor) -> None:
    coder = untrained_dgae()
    optimiser = torch.optim.AdamW(coder.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = dgae_terms(coder, images, draws())["velocity"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("name", "value"), [("velocity", -1.0), ("kl", float("nan")), ("perceptual", float("inf"))])
def test_bad_weights_are_refused(name: str, value: float) -> None:
    with pytest.raises(RacError, match=f"the weight {name}"):
        DGAEWeights(**{name: value})


# ------------------------------------------------------------------------------------------------ recipes


def test_published_settings() -> None:
    found = {name: recipe for name, (_, recipe) in RECIPES.items() if name.startswith(("dgae-b", "dgae-m", "dgae-l"))}
    assert len(found) == 9
    for name, recipe in found.items():
        assert isinstance(recipe, DGAERecipe)
        train, size = recipe.train, name.split("-")[1]
        assert (train.lr, train.lr * train.final_lr, train.warmup, train.schedule) == (1e-4, 1e-5, 10_000, "cosine")
        assert (train.betas, train.weight_decay, train.clip, train.batch) == ((0.9, 0.95), 0.1, 1.0, 96)
        assert (train.bf16, train.ema, recipe.data.size, recipe.data.flip) == (True, 0.9999, 256, True)
        assert recipe.decoder.width == {"b": 128, "m": 192, "l": 256}[size]
        assert (recipe.weights, recipe.times, recipe.steps) == (DGAEWeights(1.0, 1e-6, 1.0), "uniform", 50)


@pytest.mark.parametrize("compression", ["f8d4", "f8d2", "f16d8", "f16d4"])
def test_small_counterparts_share_encoder_data_and_budget(compression: str) -> None:
    ours, theirs = RECIPES[f"dgae-64-{compression}"][1], RECIPES[f"klvae-64-{compression}"][1]
    assert isinstance(ours, DGAERecipe)
    assert isinstance(theirs, KLVAERecipe)
    assert (ours.encoder, ours.data, ours.train) == (theirs.network, theirs.data, theirs.train)
    assert 2 ** (len(ours.encoder.widths) - 1) == int(compression[1:].split("d")[0])
    assert ours.encoder.latent_channels == int(compression.split("d")[1])


def test_three_decoders_have_one_network_and_one_cost() -> None:
    rows = {name: RECIPES[f"decoder-{name}"][1].costs(name, 64) for name in ("plain", "rac", "rac-noise", "dgae")}
    fields = {name: next(row for row in found if row.name.endswith("field")) for name, found in rows.items()}
    for field in fields.values():
        assert field.parameters == pytest.approx(fields["plain"].parameters, rel=1e-3)
        assert field.cost.macs == pytest.approx(fields["plain"].cost.macs, rel=2e-3)
    assert {RECIPES[f"decoder-{name}"][1].latents_of for name in rows} == {"klvae-f8d4"}


SMALL = DGAERecipe(
    encoder=KLVAEConfig((8, 8, 8), latent_channels=4), decoder=UNetConfig(8, (1, 1), 1, 4), weights=DGAEWeights(1, 1, 0)
)


def test_recipes_refuse_what_does_not_go_together(make_rac) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RacError, match="no encoder to keep"):
        replace(SMALL, train_encoder=False).task()
    with pytest.raises(RacError, match="expected a KL-VAE"):
        replace(SMALL, start="taef2").task()
    with pytest.raises(RacError, match="another network"):
        replace(SMALL, start="klvae-f8d4").task()
    with pytest.raises(RacError, match="trains a DGAE, not a RAC"):
        SMALL.task(make_rac())
    with pytest.raises(RacError, match="no coder"):
        replace(SMALL, start="nowhere").task()
    with pytest.raises(RacError, match="at least 1"):
        replace(SMALL, steps=0).task()
    with pytest.raises(RacError, match="no term"):
        replace(SMALL, weights=DGAEWeights(0, 0, 0)).task()
    assert SMALL.trains(untrained_dgae())
    assert not SMALL.trains(untrained_rac())


def test_a_frozen_encoder_and_its_latents_stay_bit_for_bit(tmp_path, coder: DGAE) -> None:  # type: ignore[no-untyped-def]
    rac.save(coder, tmp_path)
    recipe = replace(
        SMALL,
        encoder=coder.config.encoder,
        decoder=coder.config.decoder,
        start=str(tmp_path),
        train_encoder=False,
    )
    task, image = recipe.task(), smooth_images(2, 16, 16)
    assert task.module.teacher == str(tmp_path)
    assert task.encoder is task.frozen[0]
    assert set(task.parts["coder"].weights) == {"velocity", "perceptual"}
    batch = task.prepare(Batch(image))
    assert torch.equal(batch.need("latents"), coder.encode(image))
    (terms,) = task.terms(batch, draws(2), 0)
    terms.terms["velocity"].backward()
    assert all(one.grad is None for one in task.module.encoder.parameters())
    assert all(one.grad is not None for one in task.module.field.parameters())
    assert task.module.spec == coder.spec


@pytest.mark.slow
def test_what_is_trained_is_what_decodes() -> None:
    """From noise it never met, through several steps: nearer to its image than the best image that is one for all."""
    images = smooth_images(8, 16, 16)
    coder = untrained_dgae(decoder=UNetConfig(width=16, multiples=(1, 2), blocks=1, norm_groups=4))
    optimiser = torch.optim.AdamW(coder.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        loss = dgae_terms(coder, images, Draws.whole(generator, 8))["velocity"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    coder.eval().requires_grad_(False)
    latent = coder.encode(images)
    errors = {}
    for steps in (1, 4, 16):
        decoded = coder.decode(latent, steps, noise=coder.noise_of(latent, range(8), rng_seed=5))
        errors[steps] = float((decoded - images).square().mean())
    one_for_all = float((images.mean(dim=0) - images).square().mean())
    assert max(errors.values()) < 0.3 * one_for_all, (errors, one_for_all)
    others = coder.decode(latent.roll(1, dims=0), 4, noise=coder.noise_of(latent, range(8)))
    assert float((others - images).square().mean()) > one_for_all  # the latent decides the image
