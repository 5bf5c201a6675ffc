"""DGAE: its sizes, its encoder, its flow against the formula, noise, what it starts from, and what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from tiny import smooth_images, untrained_dgae

import rac
from rac.coders.dgae import DGAE, DGAEConfig
from rac.coders.klvae import KLVAE, KLVAEConfig
from rac.errors import RacError, WeightsError
from rac.evaluate.cost import count, parameters
from rac.fields import UNetConfig
from rac.flow import Euler, Heun, TimeGrid
from rac.latents import LatentSpec, Statistics

ENCODER = KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4)


@pytest.fixture
def coder() -> DGAE:
    return untrained_dgae(0.05, statistics=Statistics.of(0.2, 0.5)).eval()


def vae() -> KLVAE:
    torch.manual_seed(3)
    return KLVAE.from_config({**ENCODER.build().config, "scaling_factor": 0.25, "shift_factor": 0.5})


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(("width", "millions"), [(128, 157.09), (192, 310.65), (256, 525.61)], ids=["B", "M", "L"])
def test_whole_sizes_are_the_published_ones(width: int, millions: float) -> None:
    with torch.device("meta"):
        coder = DGAEConfig(decoder=UNetConfig(width=width)).build()
    assert parameters(coder) / 1e6 == pytest.approx(millions, abs=0.005)
    assert coder.spec.factor == 8


@pytest.mark.parametrize(
    ("multiples", "channels", "encoder", "numbers"),
    [
        ((1, 2, 4, 4), 4, 34_163_592, 4096),
        ((1, 2, 2, 4, 4), 8, 37_152_912, 2048),
        ((1, 2, 2, 4, 4, 4), 16, 49_029_792, 1024),
    ],
    ids=["f8", "f16", "f32"],
)
def test_encoders_and_latents_at_each_compression(
    multiples: tuple[int, ...], channels: int, encoder: int, numbers: int
) -> None:
    config = KLVAEConfig(
        tuple(128 * multiple for multiple in multiples), 2, channels, norm_groups=32, middle_attention=True
    )
    with torch.device("meta"):
        coder = DGAEConfig(config).build()
        vae = config.build()
    assert parameters(coder.encoder) == encoder == parameters(vae.network.encoder)
    assert parameters(coder.quant_conv) == parameters(vae.network.quant_conv)
    latent = coder.encode(torch.empty(1, 3, 256, 256, device="meta"))
    assert latent.numel() == numbers


def test_the_published_encoder_costs_what_the_sd_vae_s_does() -> None:
    with torch.device("meta"):
        coder = DGAEConfig().build()
    assert count(coder.encoder, (1, 3, 256, 256)).gmacs == pytest.approx(136.4, abs=0.1)


# ------------------------------------------------------------------------------------------------ formulas


def test_decoding_is_euler_s_sum_from_noise_with_the_raw_latent_beside(coder: DGAE) -> None:
    latent, noise = torch.randn(2, 4, 3, 4), torch.randn(2, 3, 12, 16)
    raw_latent = latent / 0.5 + 0.2
    condition = raw_latent.repeat_interleave(4, dim=-2).repeat_interleave(4, dim=-1)
    state, nodes = noise, (0.0, 0.1, 0.6, 1.0)
    for t, end in itertools.pairwise(nodes):
        state = state + (end - t) * coder.field(torch.cat([state, condition], dim=1), torch.full((2,), t))
    found = coder.decode(latent, TimeGrid.of(nodes), Euler(), noise=noise)
    torch.testing.assert_close(found, state)
    flow = coder.trajectory(latent, 3, noise=noise)
    assert torch.equal(flow.states[0], noise)
    assert flow.evaluations == 3
    assert coder.decoded(latent, coder.walk("decode", 2, Heun())).evaluations == 4


def test_its_first_velocity_is_zero_so_that_decoding_begins_as_the_noise() -> None:
    coder = untrained_dgae()
    noise = torch.randn(1, 3, 8, 8)
    assert torch.equal(coder.decode(torch.randn(1, 4, 2, 2), noise=noise), noise)


def test_the_latent_is_the_mean_of_the_posterior(coder: DGAE) -> None:
    image = smooth_images(2, 16, 16)
    posterior = coder.posterior(image)
    assert torch.equal(coder.encode(image), coder.statistics.normalise(posterior.mean))
    assert posterior.kl().shape == (2,)
    assert coder.walk("encode") is None


def test_statistics_make_the_latents_standard_and_leave_the_images_alone(coder: DGAE) -> None:
    image = smooth_images(4, 16, 16)
    noise = coder.noise_of(coder.encode(image), range(4))
    before = coder.decode(coder.encode(image), noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        coder.fit_statistics([image])
    coder.fit_statistics(image.split(3))
    latent = coder.encode(image)
    assert float(latent.detach().mean().abs()) < 1e-5
    assert float((latent.detach().var(correction=0) - 1).abs()) < 1e-4
    torch.testing.assert_close(coder.decode(latent, noise=noise), before, rtol=1e-4, atol=1e-5)


def test_same_noise_same_image_in_any_batch(coder: DGAE) -> None:
    latent = coder.encode(smooth_images(5, 16, 24)).detach()
    names = ["a", "b", "c", "d", "e"]
    together = coder.decode(latent, noise=coder.noise_of(latent, names, rng_seed=4))
    for order in ([0], [3, 1], [4, 0, 2]):
        some = latent[order]
        noise = coder.noise_of(some, [names[place] for place in order], rng_seed=4)
        torch.testing.assert_close(coder.decode(some, noise=noise), together[order], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ starts, files


def test_it_takes_the_encoder_of_a_kl_vae() -> None:
    coder, start, image = untrained_dgae(0.05), vae(), smooth_images(2, 16, 16)
    field = {name: one.clone() for name, one in coder.field.state_dict().items()}
    coder.take_encoder(start)
    assert torch.equal(coder.encode(image), start.encode(image))
    assert coder.spec == start.spec
    assert all(torch.equal(field[name], one) for name, one in coder.field.state_dict().items())


def test_it_takes_all_of_another_dgae(coder: DGAE) -> None:
    other = untrained_dgae()
    other.take_encoder(coder)
    latent = coder.encode(smooth_images(1, 16, 16))
    assert torch.equal(other.decode(latent), coder.decode(latent))
    assert other.spec == coder.spec


def test_a_frozen_encoder_leaves_the_field_to_learn(coder: DGAE) -> None:
    coder.requires_grad_(True).freeze_encoder()
    trained = {name.split(".")[0] for name, one in coder.named_parameters() if one.requires_grad}
    assert trained == {"field"}


@pytest.fixture
def directory(coder: DGAE, tmp_path: Path) -> Path:
    rac.save(coder, tmp_path / "coder")
    return tmp_path / "coder"


def rewritten(directory: Path, **changes: object) -> Path:
    """The directory with other values in its config.json; `config__steps` stands for the steps in its config."""
    path = directory / "config.json"
    data = json.loads(path.read_text())
    for name, value in changes.items():
        place, *rest = name.split("__")
        inner = data
        for key in [place, *rest][:-1]:
            inner = inner[key]
        inner[[place, *rest][-1]] = value
    path.write_text(json.dumps(data))
    return directory


# ------------------------------------------------------------------------------------------------ thirty bad inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "dga"}, "cannot tell the coder"),
        ({"version": 9}, "has version 9, expected 1"),
        ({"extra": 1}, "unknown keys, extra"),
        ({"config": None}, "config.json"),
        ({"config": []}, "config.json"),
        ({"config__steps": 0}, "at least 1"),
        ({"config__steps": "many"}, "steps"),
        ({"config__flow": 3}, "flow"),
        ({"config__encoder__widths": [8, 8]}, "unknown tensor|lacks tensor"),
        ({"config__encoder__latent_channels": 0}, "latent_channels must be at least 1"),
        ({"config__encoder__norm_groups": 3}, "does not divide into norm_groups 3"),
        ({"config__decoder__width": 16}, "has shape"),
        ({"config__decoder__width": 6}, "norm_groups 4"),
        ({"config__decoder__multiples": []}, "one positive width per stride"),
        ({"config__decoder__blocks": 2}, "tensor"),
    ],
)
def test_damaged_configurations_are_refused(directory: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        rac.load(rewritten(directory, **changes))


def test_damaged_weights_are_refused(directory: Path) -> None:
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        rac.load(directory)
    weights.unlink()
    with pytest.raises(WeightsError, match="no weights"):
        rac.load(directory)


def test_starts_of_other_shapes_are_refused(make_rac) -> None:  # type: ignore[no-untyped-def]
    coder = untrained_dgae()
    with pytest.raises(RacError, match="expected a KL-VAE"):
        coder.take_encoder(make_rac())
    wider = KLVAEConfig(widths=(8, 8, 16), latent_channels=4, norm_groups=4).build()
    with pytest.raises(RacError, match="another network: block_out_channels"):
        coder.take_encoder(wider)
    with pytest.raises(RacError, match="another network: width"):
        coder.take_encoder(untrained_dgae(decoder=UNetConfig(width=16, multiples=(1, 1), blocks=1, norm_groups=4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": torch.zeros(2, 3, 8, 8)}, "noise has shape"),
        ({"noise": torch.zeros(1, 4, 8, 8)}, "noise has shape"),
        ({"noise": torch.zeros(1, 3, 8, 4)}, "noise has shape"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "at least 1"),
        ({"steps": TimeGrid.of((1, 0))}, "rising grid"),
    ],
)
def test_decoding_refuses(coder: DGAE, settings: dict[str, object], message: str) -> None:
    with pytest.raises(RacError, match=message):
        coder.decode(torch.zeros(1, 4, 2, 2), **settings)


def test_encoding_refuses_steps_and_latents_have_the_coder_s_channels(coder: DGAE) -> None:
    with pytest.raises(RacError, match="encodes in one pass"):
        coder.encode(smooth_images(1, 16, 16), 4)
    with pytest.raises(RacError, match="encodes in one pass"):
        coder.encode_trajectory(smooth_images(1, 16, 16), 4)
    with pytest.raises(RacError, match="5 channels"):
        coder.decode(torch.zeros(1, 5, 2, 2))
    with pytest.raises(RacError, match="statistics of 3 channels"):
        coder.set_statistics(Statistics.of([0.0] * 3, [1.0] * 3), LatentSpec(4, 4))
    with pytest.raises(RacError, match="no images"):
        coder.fit_statistics([])
