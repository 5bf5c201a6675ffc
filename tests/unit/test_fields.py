"""The fields: shapes, the common input, what is local, what starts at zero, and how big they are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rac.errors import RacError
from rac.fields import ConvField, LdmFieldConfig, LocalFieldConfig, Projector, TinyFieldConfig
from rac.fields.local import ModulatedBlock

TINY = TinyFieldConfig(widths=(8, 8, 8), blocks=(1, 2, 1))
LDM = LdmFieldConfig(widths=(8, 8, 16), layers_per_block=1, groups=4)
LOCAL = LocalFieldConfig(widths=(8, 8), blocks=(1, 1), down=(8,), down_blocks=(1,), embedding=8, carrier=False)
NANO = TinyFieldConfig(position=True, taesd_range=True)


def lively(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double().eval().requires_grad_(False)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seen_by(factor: int = 2, **options: bool) -> tuple[ConvField, list[torch.Tensor]]:
    """A field whose network only notes what it is shown."""
    shown: list[torch.Tensor] = []

    class Network(nn.Module):
        def forward(self, folded: torch.Tensor) -> torch.Tensor:
            shown.append(folded)
            return F.pixel_shuffle(folded[:, : 3 * factor**2], factor)

    return ConvField(Network(), factor, **options), shown


@pytest.mark.parametrize("config", [TINY, LDM, LOCAL], ids=["tiny", "ldm", "local"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (20, 8)])
@pytest.mark.parametrize("channels", [3, 5])
def test_velocity_has_the_shape_of_the_state(config, height, width, channels):
    field = config.build(channels, 4)
    state, time = torch.randn(2, channels, height, width), torch.tensor([0.0, 1.0])
    assert field(state, time).shape == state.shape


@pytest.mark.parametrize("config", [TINY, LDM, LOCAL], ids=["tiny", "ldm", "local"])
def test_the_flow_starts_as_the_identity_and_can_learn(config):
    field = config.build(4, 4)
    state, time = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    velocity = field(state, time)
    assert not velocity.any()
    (velocity - 1).square().mean().backward()
    assert any(bool(parameter.grad.any()) for parameter in field.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("interval", [False, True])
def test_what_the_network_is_shown(position, interval):
    field, shown = seen_by(position=position, interval=interval)
    state, time, length = torch.randn(2, 3, 6, 4), torch.tensor([0.25, 0.75]), torch.tensor([0.5, -0.5])
    field(state, time, *([length] if interval else []))
    folded = list(shown[0].unbind(1))
    assert torch.equal(torch.stack(folded[:12], 1), F.pixel_unshuffle(state, 2))
    rest = folded[12:]
    assert torch.equal(rest.pop(0), time.view(2, 1, 1).expand(2, 3, 2))
    if interval:
        assert torch.equal(rest.pop(0), length.view(2, 1, 1).expand(2, 3, 2))
    if position:
        # 3 x 2 blocks: x runs over (-1, 1), y over (-1, 0, 1).
        across, down = rest.pop(0), rest.pop(0)
        assert torch.allclose(across, 0.01 * torch.tensor([[-1.0, -1]] * 3).expand(2, 3, 2), atol=1e-7)
        assert torch.allclose(down, 0.01 * torch.tensor([[-1.0], [1], [-1]]).expand(2, 3, 2), atol=1e-7)
    assert not rest


@pytest.mark.parametrize("config", [TINY, LDM, LOCAL], ids=["tiny", "ldm", "local"])
def test_time_matters(config):
    field = lively(config.build(4, 4))
    state = torch.randn(1, 4, 8, 8).double()
    assert not torch.allclose(field(state, torch.tensor([0.0])), field(state, torch.tensor([1.0])))


@pytest.mark.parametrize("config", [TINY, LOCAL], ids=["tiny", "local"])
def test_what_is_local_tiles_exactly(config):
    field = lively(config.build(4, 4))
    state, time = torch.randn(1, 4, 64, 64, dtype=torch.float64), torch.tensor([0.5]).double()
    changed = state.clone()
    changed[:, :, :4, :4] += 1
    moved = (field(changed, time) - field(state, time)).abs().amax((0, 1))
    reach = 40  # of the changed corner: 4 sites, and at most 36 more through all convolutions
    assert float(moved[:4, :4].max()) > 0
    assert not moved[reach:].any()
    assert not moved[:, reach:].any()
    # A tile with a margin as wide as the reach gives the same inside.
    tile = field(state[..., :56], time)[..., :16]
    torch.testing.assert_close(tile, field(state, time)[..., :16], rtol=0, atol=1e-12)


def test_patch_leaves_out_the_finest_levels():
    field = lively(TinyFieldConfig(widths=(8, 8), blocks=(1, 1), patch=4).build(3, 8))
    state = torch.randn(1, 3, 16, 8).double()
    assert field(state, torch.tensor([0.5])).shape == state.shape
    assert parameters(field) == parameters(TinyFieldConfig(widths=(8, 8), blocks=(1, 1), patch=4).build(3, 8))


def test_without_a_zero_output_the_flow_starts_somewhere():
    velocity = replace(LOCAL, zero_output=False).build(4, 4)(torch.randn(1, 4, 8, 8), torch.tensor([0.3]))
    assert bool(velocity.any(dim=3).all())


@pytest.mark.parametrize("down", [(), (8,)], ids=["no way down", "a way down"])
@pytest.mark.parametrize("time", ["modulation", "channel"])
@pytest.mark.parametrize("carrier", [False, True])
def test_local_in_all_its_forms(down, time, carrier):
    options = {"down": down, "down_blocks": (1,) * len(down), "time": time, "carrier": carrier, "interval": True}
    field = lively(LocalFieldConfig(widths=(8, 8), blocks=(1, 1), embedding=8, **options).build(4, 4))
    state, early, late = torch.randn(1, 4, 8, 8).double(), torch.zeros(1).double(), torch.ones(1).double()
    velocity = field(state, early)
    assert velocity.shape == state.shape
    assert not torch.allclose(velocity, field(state, late))
    assert not torch.allclose(velocity, field(state, early, late))
    torch.testing.assert_close(velocity, field(state, early, 0 * late))
    for channel in range(4):  # every channel is seen, and every channel moves
        changed = state.clone()
        changed[:, channel, 3, 3] += 1
        moved = (field(changed, early) - velocity).abs().amax((0, 2, 3))
        assert bool((moved > 0).all())


def test_modulation_starts_as_no_modulation():
    """At first the time says nothing, so that weights copied from a decoder decode."""
    field = LOCAL.build(4, 4)
    torch.manual_seed(0)
    nn.init.normal_(field.head.weight)
    state = torch.randn(1, 4, 8, 8)
    assert torch.equal(field(state, torch.zeros(1)), field(state, torch.ones(1)))


def test_modulation_scales_and_shifts_what_a_block_reads():
    block = lively(ModulatedBlock(3, 5))
    features, embedded = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 5).double()
    said = embedded @ block.modulation.weight.T + block.modulation.bias
    read = torch.stack(
        [features[:, k] * (1 + said[:, k, None, None]) + said[:, 3 + k, None, None] for k in range(3)], 1
    )
    torch.testing.assert_close(block(features, embedded), F.relu(block.conv(read) + features))
    assert said.abs().min() > 1e-3


# ------------------------------------------------------------------------------------- figures of REFERENCE.md


def test_nano_field_and_projector_have_the_originals_size():
    assert parameters(NANO.build(4, 8)) == 1_369_988
    assert parameters(Projector(4, 4, 8)) == 88_364


@pytest.mark.parametrize(
    "config", [TinyFieldConfig(), LdmFieldConfig.scaled(0.1), LocalFieldConfig(patch=2, widths=(32, 16, 16))]
)
def test_what_is_computed_in_place_is_not_the_state(config):
    field, state, time = lively(config.build(4, 8)), torch.randn(1, 4, 32, 32).double(), torch.rand(1).double()
    before = state.clone()
    velocity = field(state, time)
    assert torch.equal(state, before)
    assert torch.equal(field(state, time), velocity)


def test_ldm_runs_in_the_faster_layout():
    field, state = lively(LdmFieldConfig.scaled(0.1).build(4, 8)), torch.randn(1, 4, 32, 32).double()
    seen = []
    field.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    velocity = field(state, torch.rand(1).double())
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    field.channels_last = False
    assert torch.allclose(field(state, seen[0][:, 256, 0, 0]), velocity, atol=1e-4)


def test_full_ldm_decoder_differs_from_the_sd_vae_only_at_its_input():
    with torch.device("meta"):
        field = LdmFieldConfig(position=False).build(3, 8)
    decoder, latent_channels = 49_490_179, 4
    first = 512 * 9
    assert parameters(field) - first * (3 * 64 + 1) == decoder - first * latent_channels


@pytest.mark.parametrize(("ratio", "millions"), [(0.1, 4.9), (0.2, 9.9), (0.3, 14.8), (1.0, 49.5)])
def test_scaled_by_parameters(ratio, millions):
    config = LdmFieldConfig.scaled(ratio)
    with torch.device("meta"):
        field = config.build(4, 8)
    own_input = 9 * config.widths[-1] * (4 * 64 + 3 - 4)  # the folded state in place of a 4-channel latent
    assert (parameters(field) - own_input) / 1e6 == pytest.approx(millions, rel=0.06)


def test_projector_shrinks_by_its_factor_at_any_size():
    for factor in (2, 4, 8, 16):
        latent = Projector(3, 5, factor, width=4)(torch.randn(2, 3, 3 * factor, 2 * factor))
        assert latent.shape == (2, 5, 3, 2)


# ------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: TinyFieldConfig().build(4, 16), "but the teacher's factor is 16"),
        (lambda: TinyFieldConfig(widths=(8, 8), blocks=(1,)).build(4, 2), "one length"),
        (lambda: TinyFieldConfig(widths=(8, 8), blocks=(1, 1), patch=2).build(4, 2), "upsample by 4"),
        (lambda: LocalFieldConfig().build(4, 16), "but the teacher's factor is 16"),
        (lambda: LocalFieldConfig(blocks=(1,)).build(4, 8), "one length"),
        (lambda: LocalFieldConfig(down=(8,), down_blocks=(0,)).build(4, 8), "one width less"),
        (lambda: LocalFieldConfig().build(3, 8), "beyond 3, not 3"),
        (lambda: LdmFieldConfig().build(4, 16), "upsample by 8, but the factor is 16"),
        (lambda: LdmFieldConfig(widths=(8, 12), groups=8).build(4, 2), "groups 8 must divide"),
        (lambda: LdmFieldConfig.scaled(0), r"ratio 0 must lie in \(0, 1\]"),
        (lambda: LdmFieldConfig.scaled(1.5), "ratio 1.5"),
        (lambda: LdmFieldConfig.scaled(math.nan), "ratio nan"),
        (lambda: Projector(4, 4, 6), "power of two, not 6"),
        (lambda: Projector(4, 4, 1), "power of two, not 1"),
    ],
)
def test_what_does_not_fit_is_said(build, said):
    with pytest.raises(RacError, match=said):
        build()
