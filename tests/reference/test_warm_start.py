"""A field that begins as its teacher's decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_taef2 import WEIGHTS, needs_weights

import rac
from rac.coders.rac import RAC, RACConfig
from rac.coders.taesd import TAESD, TAESDConfig
from rac.coders.warm_start import copy_decoder
from rac.errors import RacError
from rac.fields import FieldConfig, LocalFieldConfig, TinyFieldConfig
from rac.recipes import RECIPES, RACRecipe

FIELD = LocalFieldConfig(widths=(16,) * 4, blocks=(3, 3, 3, 1), down=(8, 8, 8), down_blocks=(0, 0, 0), patch=1)


def coder_of(teacher: TAESD, field: FieldConfig, spread: str = "beside") -> RAC:
    torch.manual_seed(0)
    coder = RAC(RACConfig(teacher.spec, field, 4, spread), teacher.statistics)
    return coder.requires_grad_(False)


@pytest.mark.parametrize("pooled", [False, True])
def test_one_step_does_what_the_decoder_does(pooled):
    torch.manual_seed(1)
    teacher = TAESD(TAESDConfig(latent_channels=5, pooled=pooled, width=16)).double().requires_grad_(False)
    clamp = 3 * float(teacher.statistics.scale)
    coder = coder_of(teacher, replace(FIELD, pooled=pooled, clamp=clamp)).double()
    latent = 2 * torch.randn(2, 5, 3, 4).double()
    copy_decoder(teacher, coder)
    expected = teacher.decode(latent)
    torch.testing.assert_close(coder.decode(latent, 1), expected, rtol=0, atol=1e-10)
    # The latent is read off the carrier at every time, so before any training more steps change nothing.
    torch.testing.assert_close(coder.decode(latent, 4), expected, rtol=0, atol=1e-10)


def test_fewer_hidden_channels_keep_the_heaviest():
    torch.manual_seed(1)
    teacher = TAESD(TAESDConfig(latent_channels=5, width=16)).requires_grad_(False)
    block = [layer for layer in teacher.network.decoder if hasattr(layer, "conv")][-1]
    for place in (0, 2):  # ten of the sixteen inner channels say nothing, so nothing is lost without them
        block.conv[place].weight[3:13] = 0
        block.conv[place].bias[3:13] = 0
    coder = coder_of(teacher, replace(FIELD, clamp=3.0, hidden=6))
    copy_decoder(teacher, coder)
    latent = torch.randn(1, 5, 3, 3)
    torch.testing.assert_close(coder.decode(latent, 1), teacher.decode(latent), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused():
    teacher = TAESD(TAESDConfig(latent_channels=5, width=16))
    with pytest.raises(RacError, match="local field"):
        copy_decoder(teacher, coder_of(teacher, TinyFieldConfig(widths=(16, 16, 16), blocks=(1, 1, 1), patch=2)))
    with pytest.raises(RacError, match="beside"):
        copy_decoder(teacher, coder_of(teacher, replace(FIELD, carrier=False), "shuffle"))
    with pytest.raises(RacError, match=r"give widths \(16, 16, 16, 16\)"):
        copy_decoder(teacher, coder_of(teacher, replace(FIELD, widths=(16, 8, 16, 16))))
    with pytest.raises(RacError, match=r"blocks \(3, 3, 3, 1\), patch"):
        copy_decoder(teacher, coder_of(teacher, replace(FIELD, blocks=(1, 3, 3, 3))))


@needs_weights
def test_the_recipes_field_is_the_real_decoder():
    teacher = rac.load(WEIGHTS)
    recipe = RECIPES["rac-taef2"][1]
    assert isinstance(teacher, TAESD)
    assert isinstance(recipe, RACRecipe)
    assert isinstance(recipe.field, LocalFieldConfig)
    coder = coder_of(teacher, replace(recipe.field, hidden=None))
    copy_decoder(teacher, coder)
    latent = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(coder.decode(latent, 1), teacher.decode(latent), rtol=0, atol=1e-4)
