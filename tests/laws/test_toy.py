"""RAC in the plane: trained in seconds, it decodes, encodes, and is undone."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch

from rac.errors import RacError
from rac.experiments.toy import ToyConfig, measure, moons, seed_state, to_latent, train
from rac.flow import Euler, FixedPoint, ReversibleHeun, TimeGrid, integrate
from rac.runtime import generator

CONFIG = ToyConfig(iterations=1_000, batch=256, width=64, lr=4e-3)


@pytest.fixture(scope="module")
def field():  # type: ignore[no-untyped-def]
    return train(CONFIG)[0]


@pytest.fixture
def point() -> torch.Tensor:
    return moons(500, generator(1, "test"))


@pytest.mark.parametrize("noise", [0.0, 0.15, 0.25])
def test_a_seed_state_holds_its_latent(point, noise) -> None:  # type: ignore[no-untyped-def]
    config = ToyConfig(seed_noise=noise)
    latent = to_latent(point, config.cell)
    seed = seed_state(latent, config, generator(0))
    assert torch.equal(to_latent(seed, config.cell), latent)
    assert (noise > 0) == bool((seed != config.cell * latent).any())


def test_the_flow_begins_as_the_identity(point) -> None:  # type: ignore[no-untyped-def]
    from rac.experiments.toy import ToyField

    field = ToyField(0.5, 16)
    assert torch.equal(integrate(field, point, TimeGrid.uniform(3)).end, point)


def test_it_decodes_and_encodes(field, point) -> None:  # type: ignore[no-untyped-def]
    """A decoded cell is nearer to its points than the cell's centre, and encoding finds the cell."""
    centre = CONFIG.cell * to_latent(point, CONFIG.cell)
    bare = float((centre - point).square().sum(1).mean().sqrt())
    for one in measure(field, CONFIG, point, generator(2)):
        assert one.image_error < 0.93 * bare, one
        assert one.latents_found > 0.9, one


def test_more_steps_lose_less_there_and_back(field, point) -> None:  # type: ignore[no-untyped-def]
    found = measure(field, CONFIG, point, generator(2), steps=(2, 4, 8, 16))
    for coarse, fine in pairwise(found):
        assert fine.euler < 0.75 * coarse.euler
        assert fine.state_error < 0.75 * coarse.state_error


def test_the_way_back_ends_at_the_seed(field, point) -> None:  # type: ignore[no-untyped-def]
    """By fixed point and by the reversible solver to 1e-5; reversed Euler is no inverse."""
    field = field.double()
    seed = seed_state(to_latent(point.double(), CONFIG.cell), CONFIG, generator(3))
    grid = TimeGrid.uniform(8)
    there = integrate(field, seed, grid).end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = integrate(field, there, grid.reversed(), FixedPoint(Euler(), tolerance=1e-9)).end
    assert (back - seed).abs().max() < 1e-5
    assert (integrate(field, there, grid.reversed()).end - seed).abs().max() > 1e-3
    heun = integrate(field, seed, grid, ReversibleHeun())
    assert (
        integrate(field, heun.end, grid.reversed(), ReversibleHeun(), carry=heun.carry).end - seed
    ).abs().max() < 1e-9
    field.float()


def test_equal_seeds_equal_fields() -> None:
    short = ToyConfig(iterations=3, batch=8, width=8)
    first, again, other = (train(short, rng_seed)[0].state_dict() for rng_seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("wrong", [{"cell": 0.0}, {"iterations": 0}, {"seed_noise": 0.4}, {"seed_noise": -0.1}])
def test_wrong_settings(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RacError, match=next(iter(wrong))):
        ToyConfig(**wrong)
