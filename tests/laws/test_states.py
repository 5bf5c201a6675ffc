"""image -> state -> image and latent -> state -> latent lose nothing."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rac.errors import RacError
from rac.states import PAD, Spread, StateSpec, contract, expand, image_of, image_state

SPREADS = get_args(Spread)
sides = st.integers(1, 4)


@given(
    spread=st.sampled_from(SPREADS),
    factor=st.integers(1, 9),
    latent_channels=st.integers(1, 40),
    state_channels=st.integers(3, 12),
    batch=st.integers(1, 3),
    height=sides,
    width=sides,
    rng_seed=st.integers(0, 2**31),
    magnitude=st.sampled_from((1e-3, 1.0, 1e6)),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
)
def test_contract_undoes_expand_exactly(
    spread, factor, latent_channels, state_channels, batch, height, width, rng_seed, magnitude, dtype
):
    area = factor**2
    room = {"shuffle": state_channels * area, "beside": (state_channels - 3) * area}.get(spread, state_channels)
    assume(latent_channels <= room)
    assume(spread == "shuffle" or state_channels >= 4)
    generator = torch.Generator().manual_seed(rng_seed)
    latent = (magnitude * torch.randn(batch, latent_channels, height, width, generator=generator)).to(dtype)
    spec = StateSpec(factor, latent_channels, state_channels, spread)
    state = expand(latent, spec)
    assert state.shape == (batch, state_channels, height * factor, width * factor)
    assert state.dtype == dtype
    again = contract(state, spec)
    assert again.shape == latent.shape
    assert torch.equal(again, latent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [3, 5, 7, 8])
def test_the_block_mean_of_equal_numbers_is_that_number(factor, dtype):
    """Adding up f^2 floats rounds, though rarely enough to slip through a small test."""
    latent = torch.randn(1, 1, 150, 150, generator=torch.Generator().manual_seed(0)).to(dtype) / 3
    spec = StateSpec(factor, 1, 4, "nearest")
    assert torch.equal(contract(expand(latent, spec), spec), latent)


@given(
    spread=st.sampled_from(SPREADS),
    factor=st.integers(1, 6),
    latent_channels=st.integers(1, 4),
    state_channels=st.integers(4, 6),
    height=sides,
    width=sides,
)
def test_sites_without_latent_hold_the_pad(spread, factor, latent_channels, state_channels, height, width):
    assume(spread != "beside" or latent_channels <= (state_channels - 3) * factor**2)
    latent = 10 + torch.rand(2, latent_channels, height, width, dtype=torch.float64)
    spec = StateSpec(factor, latent_channels, state_channels, spread)
    state = expand(latent, spec)
    copies = factor**2 if spread == "nearest" else 1
    assert int((state >= 10).sum()) == latent.numel() * copies
    assert bool((state[state < 10] == PAD).all())
    fill = torch.rand(state.shape, dtype=torch.float64)
    kept = fill.clone()
    filled = expand(latent, spec, fill)
    assert torch.equal(filled, torch.where(state >= 10, state, fill))
    assert torch.equal(fill, kept)


@given(spread=st.sampled_from(SPREADS), factor=st.integers(1, 6), rng_seed=st.integers(0, 2**31))
def test_every_latent_value_stays_in_its_own_block(spread, factor, rng_seed):
    generator = torch.Generator().manual_seed(rng_seed)
    assume(spread != "beside" or factor > 1)
    latent = torch.randn(1, 3, 3, 4, generator=generator, dtype=torch.float64)
    spec = StateSpec(factor, 3, 4, spread)
    changed = latent.clone()
    changed[0, 1, 2, 3] += 1
    where = (expand(changed, spec) != expand(latent, spec)).nonzero()
    assert len(where) > 0
    assert set(where[:, 2].tolist()) <= set(range(2 * factor, 3 * factor))
    assert set(where[:, 3].tolist()) <= set(range(3 * factor, 4 * factor))


def test_nearest_repeats_over_the_block_and_contracts_by_the_mean():
    latent = torch.arange(4.0).view(1, 1, 2, 2)
    state = expand(latent, factor=2, state_channels=4, spread="nearest")
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]).float()
    assert torch.equal(state[0, 0], expected)
    assert bool((state[:, 1:] == PAD).all())
    state[0, 0, 0, 0] = 4
    assert contract(state, factor=2, latent_channels=1, spread="nearest")[0, 0, 0, 0] == 1


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_centre_puts_each_value_at_the_centre_of_its_block_and_channel(factor):
    latent = torch.randn(2, 4, 3, 2)
    state = expand(latent, factor=factor, state_channels=5, spread="centre")
    assert torch.equal(state[:, :4, factor // 2 :: factor, factor // 2 :: factor], latent)


def test_shuffle_shares_the_latent_evenly_over_the_state_channels():
    spec = StateSpec(factor=4, latent_channels=32, state_channels=4, spread="shuffle")
    state = expand(torch.full((1, 32, 2, 2), 9.0), spec)
    assert (state == 9).sum(dim=(0, 2, 3)).tolist() == [32, 32, 32, 32]


def test_beside_leaves_the_image_channels_to_the_image():
    spec = StateSpec(factor=4, latent_channels=8, state_channels=5, spread="beside")
    state = expand(torch.full((1, 8, 2, 2), 9.0), spec)
    assert (state == 9).sum(dim=(0, 2, 3)).tolist() == [0, 0, 0, 16, 16]


@given(
    channels=st.integers(3, 8),
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    rng_seed=st.integers(0, 2**31),
)
def test_image_state_and_back(channels, batch, height, width, rng_seed):
    image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(rng_seed)).double() * 2 - 1
    state = image_state(image, channels)
    assert state.shape == (batch, channels, height, width)
    assert bool((state[:, 3:] == PAD).all())
    assert torch.equal(image_of(state), image)


def test_spec_and_names_say_the_same():
    latent = torch.randn(1, 4, 2, 2)
    for spread in SPREADS:
        spec = StateSpec(4, 4, 5, spread)
        state = expand(latent, spec)
        assert torch.equal(state, expand(latent, factor=4, state_channels=5, spread=spread))
        assert torch.equal(contract(state, spec), contract(state, factor=4, latent_channels=4, spread=spread))


@pytest.mark.parametrize("spread", SPREADS)
def test_gradients_pass_both_ways(spread):
    spec = StateSpec(2, 3, 4, spread)
    latent = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: expand(value, spec), (latent,))
    assert torch.autograd.gradcheck(lambda value: contract(value, spec), (state,))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda: StateSpec(8, 4, 2), "state_channels 2"),
        (lambda: StateSpec(8, 16, 4, "nearest"), "at least 16"),
        (lambda: StateSpec(8, 16, 4, "centre"), "at least 16"),
        (lambda: StateSpec(2, 17, 4, "shuffle"), "at least 5"),
        (lambda: StateSpec(0, 4, 4), "factor 0"),
        (lambda: StateSpec(8, 0, 4), "latent_channels 0"),
        (lambda: StateSpec(8, 4, 4, "center"), "'center'"),
        (lambda: expand(torch.zeros(1, 3, 2, 2), StateSpec(8, 4, 4)), r"\(1, 3, 2, 2\)"),
        (lambda: expand(torch.zeros(4, 2, 2), StateSpec(8, 4, 4)), r"\(4, 2, 2\)"),
        (lambda: contract(torch.zeros(1, 3, 8, 8), StateSpec(8, 4, 4)), r"\(1, 3, 8, 8\)"),
        (lambda: contract(torch.zeros(1, 4, 8, 12), StateSpec(8, 4, 4)), "multiples of the factor 8"),
        (lambda: image_state(torch.zeros(1, 4, 8, 8), 4), r"\(1, 4, 8, 8\)"),
        (lambda: image_state(torch.zeros(3, 8, 8), 4), r"\(3, 8, 8\)"),
        (lambda: image_state(torch.zeros(1, 3, 8, 8), 2), "2"),
    ],
)
def test_what_does_not_fit_is_said(what, said):
    with pytest.raises(RacError, match=said):
        what()
