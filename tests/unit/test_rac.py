"""The RAC coder: sizes, steps, ranges, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

import rac
from rac.coders.klvae import KLVAEConfig
from rac.coders.rac import RAC, RACConfig
from rac.errors import RacError
from rac.fields import LdmFieldConfig, LocalFieldConfig, TinyFieldConfig
from rac.flow import RK4, Euler, FixedPoint, Heun, Midpoint, ReversibleHeun, TimeGrid
from rac.latents import LatentSpec, Statistics
from rac.states import PAD, contract, expand

CARRIER = LocalFieldConfig(widths=(8, 8), blocks=(1, 1), down=(8,), down_blocks=(0,), embedding=8)


@pytest.fixture(scope="module")
def coder(make_rac):
    return make_rac(lively=0.03).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- shapes and sizes


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (4, 4)])
@pytest.mark.parametrize("spread", ["nearest", "centre", "shuffle", "beside"])
@pytest.mark.parametrize("contraction", ["inverse", "projector"])
def test_shapes(make_rac, images, spread, contraction, height, width):
    coder = make_rac(spread=spread, contraction=contraction)
    latent = coder.encode(images(2, height, width))
    assert latent.shape == (2, 4, height // 4, width // 4)
    assert coder.decode(latent).shape == (2, 3, height, width)
    assert latent.dtype == coder.decode(latent).dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 16), (15, 18), (3, 5)])
def test_other_sizes_are_padded_by_reflection_and_cropped_back(coder, images, height, width):
    image = images(1, height, width)
    latent = coder.encode(image)
    rows, columns = math.ceil(height / 4), math.ceil(width / 4)
    assert latent.shape == (1, 4, rows, columns)
    padded = torch.from_numpy(
        np.pad(image, ((0, 0), (0, 0), (0, rows * 4 - height), (0, columns * 4 - width)), mode="reflect")
    )
    assert torch.equal(latent, coder.encode(padded))
    assert coder.reconstruct(image).shape == image.shape
    assert torch.equal(coder.reconstruct(image), coder.decode(latent)[..., :height, :width])


def test_noise_in_the_seed_is_one_for_all_images_and_can_be_drawn_anew(make_rac):
    coder = make_rac(spread="beside", seed_noise=0.5, lively=0.03).eval().requires_grad_(False)
    latent = torch.randn(3, 4, 2, 2)
    seed = coder.seed_state(latent)
    assert torch.equal(contract(seed, coder.states), latent)
    assert torch.equal(seed[0, :3], seed[2, :3])
    assert float(seed[0, :3].std()) == pytest.approx(0.5, rel=0.3)
    torch.testing.assert_close(coder.decode(latent)[:1], coder.decode(latent[:1]))
    assert torch.equal(coder.trajectory(latent).states[0], seed)
    noise = torch.randn(coder.noise_shape(latent), generator=torch.Generator().manual_seed(1))
    other = coder.trajectory(latent, noise=noise).states[0]
    assert not torch.equal(other, seed)
    assert torch.equal(other, coder.seed_state(latent, noise))
    assert torch.equal(contract(other, coder.states), latent)


# ------------------------------------------------------------------------------------------- steps and solvers


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_any_number_of_steps_from_the_same_weights(coder, images, steps):
    latent = coder.encode(images(1, 16, 16), steps)
    flow = coder.trajectory(latent, steps)
    assert flow.evaluations == steps
    assert len(flow.states) == len(flow.times) == steps + 1
    assert flow.times[0] == 0
    assert flow.times[-1] == 1
    assert torch.equal(flow.states[0], expand(latent, coder.states))
    assert torch.equal(flow.end, flow.states[-1])
    assert torch.equal(flow.end[:, :3], coder.decode(latent, steps))


def test_steps_default_to_the_configuration(make_rac, images):
    coder = make_rac(lively=0.03, steps=3)
    latent = coder.encode(images(1, 8, 8))
    assert torch.equal(latent, coder.encode(images(1, 8, 8), 3))
    assert coder.trajectory(latent).evaluations == coder.encode_trajectory(images(1, 8, 8)).evaluations == 3
    assert not torch.equal(latent, coder.encode(images(1, 8, 8), 1))


def test_a_grid_and_a_solver_can_be_given(coder, images):
    image = images(1, 8, 8)
    grid = TimeGrid.of((0, 0.2, 1))
    assert coder.encode_trajectory(image, grid).times == (1, 0.2, 0)
    for solver in (Euler(), Midpoint(), Heun(), RK4(), ReversibleHeun(), FixedPoint()):
        latent = coder.encode(image, grid, solver)
        assert coder.decode(latent, grid, Euler()).shape == image.shape
        assert torch.isfinite(coder.reconstruct(image, 2, Heun())).all()
    assert not torch.equal(coder.decode(latent, 4, Heun()), coder.decode(latent, 4))


def test_encoding_starts_from_the_image_state(coder, images):
    flow = coder.encode_trajectory(images(2, 8, 8), 2)
    assert torch.equal(flow.states[0][:, :3], images(2, 8, 8))
    assert bool((flow.states[0][:, 3:] == PAD).all())


def test_projector_or_inverse_contracts(make_rac, images):
    coder = make_rac(contraction="projector")
    state = torch.randn(1, 4, 8, 8)
    assert torch.equal(coder.contract(state), coder.projector(state))
    assert make_rac().projector is None


# ------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize("level", [0, 255], ids=["black", "white"])
def test_a_black_and_a_white_square_come_back(one_layer_coder, level, tmp_path):
    """From file to file through a coder that loses nothing: any confusion of [0, 1] and [-1, 1] shows."""
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / "square.png")
    image = rac.read_image(tmp_path / "square.png")
    assert torch.equal(image, torch.full((1, 3, 8, 8), -1.0 if level == 0 else 1.0))
    again = one_layer_coder.reconstruct(image)
    torch.testing.assert_close(again, image)
    rac.write_image(again, tmp_path / "again.png")
    assert bool((np.asarray(Image.open(tmp_path / "again.png")) == level).all())


@pytest.mark.parametrize("name", rac.available())
@pytest.mark.parametrize("level", [-1.0, 1.0], ids=["black", "white"])
def test_shipped_coders_keep_black_and_white_apart(name, level):
    coder = rac.load(name)
    side = 8 * coder.spec.factor
    again = coder.reconstruct(torch.full((1, 3, side, side), level))
    assert float((again - level).abs().mean()) < 0.5


# ------------------------------------------------------------------------------------------- its config


def test_what_it_says_of_itself():
    field = TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1))
    statistics = Statistics.of(0.0, 0.5)
    coder = RAC(RACConfig(LatentSpec(4, 4), field, teacher="some/teacher"), statistics)
    assert coder.spec == coder.config.spec == LatentSpec(4, 4, statistics=statistics.hash())
    assert coder.teacher == "some/teacher"
    assert isinstance(coder, torch.nn.Module)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec": LatentSpec(4, 16)}, "16 latent channels do not fit"),
        ({"spec": LatentSpec(8, 4)}, "but the teacher's factor is 8"),
        ({"state_channels": 2}, "state_channels 2"),
        ({"seed_noise": math.nan}, "seed_noise nan"),
        ({"seed_noise": -1.0}, "seed_noise -1.0"),
        ({"field": TinyFieldConfig(widths=(8, 8, -8), blocks=(1, 1, 1))}, "no network can be built of TinyFieldConfig"),
        ({"field": LdmFieldConfig(widths=(8, 8, 8), groups=0)}, "no network can be built of LdmFieldConfig"),
        ({"field": LdmFieldConfig(widths=(8, 8), groups=8)}, "but the factor is 4"),
        (
            {"contraction": "projector", "spec": LatentSpec(1, 4), "field": TinyFieldConfig(widths=(8,), blocks=(1,))},
            "not 1",
        ),
        ({"spec": LatentSpec(4, 4), "field": CARRIER, "spread": "nearest"}, "give spread beside, or carrier False"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(make_rac, changes, said):
    with pytest.raises(RacError, match=said):
        make_rac(**changes)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("steps", [0, -3, 2.5, "4"])
def test_wrong_steps(coder, images, steps):
    for call in (coder.encode, coder.reconstruct):
        with pytest.raises(RacError, match="at least 1"):
            call(images(1, 8, 8), steps)
    for call in (coder.decode, coder.trajectory):
        with pytest.raises(RacError, match="at least 1"):
            call(torch.zeros(1, 4, 2, 2), steps)


@pytest.mark.parametrize(
    ("latent", "said"),
    [
        (torch.zeros(1, 3, 2, 2), "3 channels, but this coder's latents have 4"),
        (torch.zeros(4, 2, 2), "4 dimensions"),
        (torch.full((1, 4, 2, 2), math.nan), "16 values that are NaN"),
        (torch.full((1, 4, 1, 1), math.inf), "4 values that are NaN or infinite"),
        (np.zeros((1, 4, 2, 2), np.float32), "is a tensor B c h w, not ndarray"),
    ],
)
def test_wrong_latents(coder, latent, said):
    for call in (coder.decode, coder.trajectory):
        with pytest.raises(RacError, match=said):
            call(latent)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.zeros(1, 1, 8, 8), "B 3 H W"),
        (torch.zeros(3, 8, 8), "B 3 H W"),
        (torch.zeros(1, 3, 1, 1), "1 x 1 is too small"),
        (torch.zeros(1, 3, 2, 8), "8 x 2 is too small"),
        (np.zeros((1, 3, 8, 8), np.float32), "is a tensor B 3 H W, not ndarray"),
        (None, "not NoneType; rac.read_image gives one"),
        ("photo.png", "not str; rac.read_image gives one"),
    ],
)
def test_wrong_images(coder, image, said):
    with pytest.raises(RacError, match=said):
        coder.encode(image)


def test_reconstruct_decodes_by_the_solver_that_a_fixed_point_undoes(make_rac, images):
    coder, image = make_rac(lively=0.05), images(1, 16, 16)
    latent = coder.encode(image, 4, FixedPoint(Heun()))
    torch.testing.assert_close(coder.reconstruct(image, 4, FixedPoint(Heun())), coder.decode(latent, 4, Heun()))


def test_a_coder_without_a_flow_says_so(images):
    torch.manual_seed(0)
    coder = KLVAEConfig(widths=(8, 8), latent_channels=4, norm_groups=4).build().eval()
    image = images(1, 16, 16)
    for call in (
        lambda: coder.encode(image, steps=4),
        lambda: coder.decode(coder.encode(image), solver=Heun()),
        lambda: coder.reconstruct(image, steps=1),
        lambda: coder.trajectory(coder.encode(image), steps=4),
    ):
        with pytest.raises(RacError, match="KLVAE"):
            call()
