"""Statistics of latents, and the spec that carries their hash."""

from __future__ import annotations

import math

import pytest
import torch

from rac.errors import RacError
from rac.latents import LatentSpec, Statistics, read_spec

PER_POSITION = torch.arange(1.0, 17.0).view(1, 4, 4).expand(2, 4, 4)


@pytest.mark.parametrize(
    ("scale", "shift", "mean", "std"),
    [
        (1.0, 0.0, None, None),
        (0.18215, 0.0, None, None),
        (0.3611, 0.1159, None, None),
        (1.0, 0.0, (0.5, -2.0), (3.0, 0.1)),
        (2.0, 0.5, (0.5, -2.0), (3.0, 0.1)),
    ],
)
def test_statistics_in_diffusers_terms_are_the_formula_and_its_inverse(scale, shift, mean, std):
    statistics = Statistics.scaled(scale, shift, mean, std)
    raw = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    means, stds = torch.tensor(mean or (0, 0)).view(2, 1, 1), torch.tensor(std or (1, 1)).view(2, 1, 1)
    expected = ((raw - shift) * scale - means.double()) / stds.double()
    torch.testing.assert_close(statistics.normalise(raw), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(statistics.denormalise(statistics.normalise(raw)), raw, rtol=0, atol=1e-12)


def test_statistics_for_each_position_and_another_grid():
    statistics = Statistics.of(0.0, PER_POSITION)
    ones = torch.ones(1, 2, 4, 4)
    assert torch.equal(statistics.normalise(ones)[0], PER_POSITION)
    wide = statistics.normalise(torch.ones(1, 2, 8, 8))
    assert torch.equal(wide[0, 0, ::7, ::7], PER_POSITION[0, ::3, ::3])  # corners
    torch.testing.assert_close(statistics.denormalise(wide), torch.ones(1, 2, 8, 8))


def test_the_hash_tells_values_and_shapes_apart():
    values = [(0.0, 1.0), (0.0, 2.0), (2.0, 1.0), ([0.0, 0.0], 1.0), ([0.0, 0.0], [1.0, 2.0]), (0.0, PER_POSITION)]
    found = [Statistics.of(*pair).hash() for pair in values]
    assert len(set(found)) == len(found)
    assert all(len(one) == 16 for one in found)
    assert Statistics.of(-0.0, 1.0).hash() == Statistics.identity().hash() == Statistics.identity().double().hash()
    # The same number written with more digits than float32 has.
    assert Statistics.of(0.0, 1 / 0.85).hash() == Statistics.of(0.0, 1.1764706).hash()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_statistics_alone(dtype):
    statistics = Statistics.of(0.1, [0.3, 0.7])
    before = statistics.hash()
    assert statistics.to(dtype).hash() == before
    assert statistics.scale.dtype == torch.float32
    assert not statistics.state_dict()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Statistics.of(0.0, 0.0), "scale 0"),
        (lambda: Statistics.scaled(0.0), "scale 0"),
        (lambda: Statistics.scaled(math.nan), "finite, not nan"),
        (lambda: Statistics.of(math.inf, 1.0), "finite, not inf"),
        (lambda: Statistics.scaled(1.0, std=(1.0, 0.0)), "std must be positive"),
        (lambda: Statistics.of(torch.zeros(2, 2), 1.0), r"not \(2, 2\)"),
        (lambda: LatentSpec(0, 4), "factor 0"),
        (lambda: LatentSpec(8, 0), "channels 0"),
        (lambda: LatentSpec(8, 4, side=0), "side 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, said):
    with pytest.raises(RacError, match=said):
        make()


def test_specs_differ_in_what_matters_alone():
    spec = LatentSpec(8, 4, statistics="a" * 16)
    assert spec.compatible(spec)
    assert spec.compatible(LatentSpec(8, 4))
    assert LatentSpec(8, 4).compatible(spec)
    other = LatentSpec(16, 8, 16, "b" * 16)
    words = spec.differences(other)
    assert [word.split()[0] for word in words] == ["factor", "channels", "side", "statistics"]
    assert words[0] == "factor 8, not 16"


def test_the_first_version_of_a_spec_had_numbers_and_a_range():
    old = {"factor": 8, "channels": 2, "scale": 0.5, "shift": 0.1, "mean": None, "std": [1.0, 2.0], "range": [0.0, 1.0]}
    spec, statistics = read_spec(old, "a file")
    assert statistics is not None
    assert spec == LatentSpec(8, 2, statistics=Statistics.of([0.1, 0.1], [0.5, 0.25]).hash())
    assert spec.statistics == statistics.hash()
    new, none = read_spec({"factor": 8, "channels": 2, "statistics": "c" * 16}, "a file")
    assert (new, none) == (LatentSpec(8, 2, statistics="c" * 16), None)
    with pytest.raises(RacError, match="a file"):
        read_spec({**old, "more": 1}, "a file")
