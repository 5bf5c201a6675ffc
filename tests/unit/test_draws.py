"""Random numbers of a batch: the same however it is cut, and drawn row by row where the whole would be too large."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rac import draws as module
from rac.draws import Draws
from rac.runtime import generator

TOTAL, SHAPE = 7, (3, 4, 5)


def drawn(first: int, count: int, dtype: torch.dtype = torch.float32, again: int | None = None) -> Tensor:
    """The second draw of a part, so that the generators are seen to stand where they should."""
    draws = Draws(generator(3, "shared"), generator(3, "own"), TOTAL, first, count)
    like = torch.empty(count, *SHAPE, dtype=dtype)
    draws.normal(like)
    return draws.normal(like, again)


def test_small_draws_are_rows_of_one_draw_of_the_whole_batch() -> None:
    own = generator(3, "own")
    torch.randn(TOTAL, *SHAPE, generator=own)
    expected = torch.randn(TOTAL, *SHAPE, generator=own)
    assert torch.equal(drawn(0, TOTAL), expected)
    assert torch.equal(drawn(2, 3), expected[2:5])


@pytest.mark.parametrize("again", [None, 11])
@pytest.mark.parametrize("large", [False, True])
def test_image_i_meets_the_same_numbers_however_the_batch_is_cut(
    monkeypatch: pytest.MonkeyPatch, large: bool, again: int | None
) -> None:
    monkeypatch.setattr(module, "LARGE", 1 if large else 2**26)
    whole = drawn(0, TOTAL, again=again)
    for parts in ((0, 3, 7), (0, 1, 2, 3, 4, 5, 6, 7)):
        cut = [drawn(first, last - first, again=again) for first, last in pairwise(parts)]
        assert torch.equal(torch.cat(cut), whole)
    assert len({row.numpy().tobytes() for row in whole}) == TOTAL


def test_large_draws_are_standard_normal_and_of_the_type_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 1)
    draws = Draws.whole(generator(0), 8)
    numbers = draws.normal(torch.empty(8, 4096, dtype=torch.float64))
    assert numbers.dtype == torch.float64
    assert abs(float(numbers.mean())) < 0.02
    assert float(numbers.std()) == pytest.approx(1, abs=0.02)


def test_a_part_of_a_large_batch_does_not_draw_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch of 1024 latents of 768 x 16 x 16 a part of two never holds more than its own rows."""
    asked: list[int] = []
    randn = torch.randn

    def counted(*size: object, **rest: object) -> Tensor:
        numbers = randn(*size, **rest)  # type: ignore[call-overload]
        asked.append(numbers.numel())
        return numbers

    monkeypatch.setattr(torch, "randn", counted)
    like = torch.empty(2, 768, 16, 16)
    Draws(generator(0), generator(0), 1024, 6, 2).normal(like)
    assert sum(asked) == like.numel()
