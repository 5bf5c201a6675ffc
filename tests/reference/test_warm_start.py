"""A field that begins as TAEF2's decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_taef2 import WEIGHTS, needs_weights
from torch import nn

from rac.coders.rac import RAC, RACConfig
from rac.coders.taesd import TAESD, TAESDConfig
from rac.coders.teacher import load_teacher
from rac.coders.warm_start import copy_decoder
from rac.errors import RacError
from rac.fields import LocalFieldConfig, TinyFieldConfig
from rac.states import expand

SMALL = TAESDConfig(latent_channels=4, width=16)
FIELD = LocalFieldConfig(widths=(16, 16, 16), down=(8, 8))


def coder_of(teacher: TAESD, field: object, spread: str = "beside") -> RAC:
    torch.manual_seed(0)
    return RAC(RACConfig(replace(teacher.spec, range=(-1.0, 1.0)), field, 4, spread))


@pytest.mark.parametrize("pooled", [False, True])
def test_the_field_computes_the_decoders_features(pooled):
    """Without the way down, and without the teacher's clamp and pooling, features agree at stride 2."""
    torch.manual_seed(1)
    teacher = TAESD(replace(SMALL, pooled=pooled)).double().requires_grad_(False)
    coder = coder_of(teacher, replace(FIELD, widths=(20, 16, 16))).double().requires_grad_(False)
    copy_decoder(teacher, coder)
    field = coder.field
    for layer in (field.bottom, *field.joins):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    # What feeds the teacher's channels from elsewhere is small at first; here it is none.
    field.ups[0].weight[:, 16:] = 0
    for block in field.levels[0]:
        for layer in (block.conv[0], block.conv[2], block.conv[4]):
            layer.weight[:16, 16:] = 0
    others = [channel for channel in range(64) if channel not in [slot - 192 for slot in coder.states.slots()]]
    field.stem.weight[:, others] = 0
    latent = torch.randn(1, 4, 3, 3).double()
    reached: list[torch.Tensor] = []
    field.levels[-1][-1].register_forward_hook(lambda module, inputs, output: reached.append(output))
    field(expand(latent, coder.states), torch.zeros(1).double())
    layers = list(teacher.network.decoder)[1:]  # all but the clamp
    expected = latent / teacher.spec.scale
    for layer in layers:
        pooled_block = hasattr(layer, "pool")
        expected = torch.relu(layer.conv(expected) + expected) if pooled_block else layer(expected)
        if expected.shape[-1] == 12 and layer is layers[14]:
            break
    torch.testing.assert_close(reached[0], expected, rtol=0, atol=1e-10)


def test_what_does_not_fit_is_refused():
    teacher = TAESD(SMALL)
    with pytest.raises(RacError, match="local field"):
        copy_decoder(teacher, coder_of(teacher, TinyFieldConfig(widths=(16, 16, 16), blocks=(1, 1, 1), patch=2)))
    with pytest.raises(RacError, match="beside"):
        copy_decoder(teacher, coder_of(teacher, replace(FIELD, carrier=False), "shuffle"))
    with pytest.raises(RacError, match="at least the teacher's 16"):
        copy_decoder(teacher, coder_of(teacher, replace(FIELD, widths=(16, 8, 16))))


@needs_weights
def test_it_loads_from_the_real_one():
    teacher = load_teacher(WEIGHTS)
    assert isinstance(teacher, TAESD)
    coder = coder_of(teacher, LocalFieldConfig())
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    copy_decoder(teacher, coder)
    changed = [name for name, value in coder.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.split(".")[1] for name in changed} == {"stem", "levels", "ups", "joins", "bottom"}
    assert not any(name.startswith(("field.head", "field.coarse_head")) for name in changed)
