"""The promises that every field keeps; a new one adds a line to `FIELDS`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rac.config import from_json, to_json
from rac.errors import RacError
from rac.fields import (
    CarriersFieldConfig,
    DDTFieldConfig,
    FieldConfig,
    LdmFieldConfig,
    LocalFieldConfig,
    SiTFieldConfig,
    TinyFieldConfig,
    UNetConfig,
    UNetFieldConfig,
)

FACTOR, CHANNELS = 4, 5

_LOCAL = {"widths": (8, 8), "blocks": (1, 1), "down": (8,), "down_blocks": (1,), "embedding": 8}
_UNET = UNetConfig(width=8, multiples=(1, 2, 1, 2), blocks=1, norm_groups=4)
_SIT = {"depth": 2, "width": 16, "heads": 2, "patch": FACTOR}
_DDT = {**_SIT, "head_depth": 1, "head_width": 24, "head_heads": 3}
_CARRIERS = {"latent_channels": 7, "width": 8, "blocks": (1, 1, 1), "down_blocks": (1, 1, 1), "embedding": 8}
FIELDS: dict[str, FieldConfig] = {
    "tiny": TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1)),
    "tiny, position": TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1), position=True),
    "tiny, interval": TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 1, 1), interval=True),
    "ldm": LdmFieldConfig(widths=(8, 8, 8), layers_per_block=1, groups=4),
    "ldm, interval": LdmFieldConfig(widths=(8, 8, 8), layers_per_block=1, groups=4, interval=True),
    "local": LocalFieldConfig(**_LOCAL, carrier=False),
    "local, carrier": LocalFieldConfig(**_LOCAL),
    "local, pooled": LocalFieldConfig(**_LOCAL, pooled=True),
    "local, interval": LocalFieldConfig(**_LOCAL, interval=True),
    "local, time as a channel": LocalFieldConfig(**_LOCAL, time="channel"),
    "carriers": CarriersFieldConfig(**_CARRIERS, interval=False),
    "carriers, interval": CarriersFieldConfig(**_CARRIERS, pooled=True),
    "unet": UNetFieldConfig(
        network=UNetConfig(width=8, multiples=(1, 2, 1, 2), blocks=1, norm_groups=4), factor=FACTOR
    ),
    "sit": SiTFieldConfig(**_SIT, classes=3),
    "sit, interval": SiTFieldConfig(**_SIT, interval=True),
    "sit, rms": SiTFieldConfig(**_SIT, style="rms"),
    "ddt": DDTFieldConfig(**_DDT, classes=3),
    "ddt, interval": DDTFieldConfig(**_DDT, interval=True),
}


@pytest.fixture(params=FIELDS.values(), ids=FIELDS.keys())
def config(request) -> FieldConfig:
    return request.param


@pytest.fixture
def field(config) -> nn.Module:
    """In float64, with weights that are all alive."""
    torch.manual_seed(0)
    field = config.build(CHANNELS, FACTOR).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return field


def states(batch: int = 3, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    state = torch.randn(batch, CHANNELS, height, width, generator=rng, dtype=torch.float64)
    return state, torch.linspace(0, 1, batch, dtype=torch.float64)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 12), (20, 8)])
def test_velocity_has_the_shape_of_the_state_at_any_size(field, height, width):
    state, time = states(2, height, width)
    assert field(state, time).shape == state.shape


def test_image_i_does_not_know_its_batch(field):
    state, time = states()
    together = field(state, time)
    assert float(together.detach().abs().max()) > 1e-3
    for i in range(len(state)):
        torch.testing.assert_close(together[i : i + 1], field(state[i : i + 1], time[i : i + 1]), rtol=1e-9, atol=1e-9)


def test_time_matters(field):
    state, _ = states(1)
    one, other = (field(state, torch.tensor([t], dtype=torch.float64)) for t in (0.2, 0.8))
    assert not torch.allclose(one, other)


def test_gradients_reach_the_state_and_every_parameter(field):
    state, time = states()
    state.requires_grad_()
    field(state, time).square().sum().backward()
    assert torch.isfinite(state.grad).all()
    assert float(state.grad.abs().max()) > 0
    still = [name for name, parameter in field.named_parameters() if parameter.grad is None]
    assert not still


def test_it_takes_an_interval_exactly_if_it_was_built_for_one(config, field):
    state, time = states()
    interval = torch.full_like(time, 0.25)
    if not config.interval:
        with pytest.raises(RacError, match="interval"):
            field(state, time, interval)
        return
    assert torch.equal(field(state, time), field(state, time, torch.zeros_like(time)))
    assert not torch.allclose(field(state, time), field(state, time, interval))


def test_sides_that_do_not_divide_are_refused(field):
    state, time = states(1, 8, 10)
    with pytest.raises(RacError, match="multiples"):
        field(state, time)


def test_a_factor_that_is_not_its_own_is_refused(config):
    with pytest.raises(RacError, match="factor"):
        config.build(CHANNELS, 2 * FACTOR)


def test_derivative_in_time_equals_a_finite_difference(config, field):
    if config.kind in ("ldm", "unet"):
        pytest.skip("its group normalisation has no forward-mode derivative in torch; mean velocities take differences")
    state, _ = states(2)
    time, h = torch.tensor([0.3, 0.6], dtype=torch.float64), 1e-5

    def along(t: Tensor) -> Tensor:
        return field(state, t)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
        exact = torch.func.jvp(along, (time,), (torch.ones_like(time),))[1]
    difference = (along(time + h) - along(time - h)) / (2 * h)
    torch.testing.assert_close(exact, difference, rtol=1e-4, atol=1e-6 * float(exact.abs().max()))


def test_it_can_be_counted_without_being_computed(field):
    abstract = copy.deepcopy(field).to("meta")
    state, time = (one.to("meta") for one in states())
    assert abstract(state, time).shape == state.shape


def test_its_configuration_survives_json(config):
    assert from_json(type(config), to_json(config), "the field") == config
    assert config.build(CHANNELS, FACTOR).state_dict().keys() == config.build(CHANNELS, FACTOR).state_dict().keys()
