"""Every named recipe, at a size that runs in seconds."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rac
from rac.errors import RacError
from rac.fields import LocalField
from rac.recipes import RECIPES, RACRecipe


def test_a_second_stage_starts_from_the_first(tmp_path: Path) -> None:
    first = RECIPES["tiny"][1].tiny()
    assert isinstance(first, RACRecipe)
    first.run(tmp_path / "first")
    begun = rac.load(tmp_path / "first" / "coder")
    second = replace(first, start=str(tmp_path / "first" / "coder"), train=replace(first.train, iterations=1, lr=0.0))
    again = second.run(tmp_path / "second").module
    for name, value in begun.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_start_of_another_shape_is_refused(tmp_path: Path) -> None:
    first = RECIPES["tiny"][1].tiny()
    assert isinstance(first, RACRecipe)
    first.run(tmp_path / "first")
    other = replace(first, state_channels=9, start=str(tmp_path / "first" / "coder"))
    with pytest.raises(RacError, match="another field"):
        other.run(tmp_path / "second")


def one_iteration(compiled: bool) -> RACRecipe:
    recipe = RECIPES["tiny"][1].tiny()
    assert isinstance(recipe, RACRecipe)
    train = replace(recipe.train, iterations=1, gallery_every=1, bf16=False, compile=compiled)
    return replace(recipe, objective=replace(recipe.objective, steps=(1, 1)), train=train)


def test_the_field_is_compiled_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: asked.append(module))
    for compiled in (False, True):
        one_iteration(compiled).run(tmp_path / str(compiled))
        assert [type(module) for module in asked] == [LocalField] * compiled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_field_trains_as_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A build that was cut off stays broken in the common cache.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    one, two = (one_iteration(compiled).run(tmp_path / str(compiled)).module for compiled in (False, True))
    assert list(one.state_dict()) == list(two.state_dict())
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=2e-3)  # Adam's step is lr, or minus it
