"""Pictures of the demo's report."""

from __future__ import annotations

import pytest
import torch

from rac.evaluate.demo_report import most_different
from rac.report.pictures import LINE, MARGIN, Panel, strip


@pytest.mark.parametrize(("height", "width", "side"), [(64, 64, 16), (40, 64, 10), (64, 40, 10)])
def test_the_detail_is_where_images_differ_most(height: int, width: int, side: int) -> None:
    images = [torch.zeros(1, 3, height, width) for _ in range(3)]
    images[0][..., 2, 3] = 2.0  # a single pixel, however large, is less than a whole square
    images[1][..., 20 : 20 + side, 9 : 9 + side] = 0.5
    assert most_different(images) == (20, 9, side)


def test_the_detail_of_images_too_small_to_have_one() -> None:
    assert most_different([torch.zeros(1, 3, 3, 2)]) == (0, 0, 1)


def test_a_strip_without_writing_leaves_no_room_for_any() -> None:
    image = torch.zeros(3, 200, 200)
    assert strip([Panel(image)]).height == 200 + 2 * MARGIN
    assert strip([Panel(image, "original")]).height == 200 + 2 * MARGIN + 2 * LINE + 4
