"""Pictures hold what they are given: plots, heat maps, scale bars."""

from __future__ import annotations

import numpy as np
import torch

from rac.report.pictures import scale_bar
from rac.report.plots import BLACK, PALETTE, Series, Walk, heat, line_panels, shades, walk_panels


def inked(picture, colour: str) -> int:  # type: ignore[no-untyped-def]
    """How many pixels have exactly this colour."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return int((np.asarray(picture) == wanted).all(axis=2).sum())


def test_every_series_is_drawn_and_panels_wrap() -> None:
    series = [
        Series("one", (1, 2, 4), (3.0, 2.0, 1.0), PALETTE[0], marks=("1", "2", "4")),
        Series("level", (1, 2, 4), (2.5,), BLACK, dashed=True, level=True),
    ]
    sizes = {}
    for count in (1, 3, 4):
        picture = line_panels({f"figure {n}": series for n in range(count)}, "steps", "log2", (1, 2, 4))
        assert inked(picture, PALETTE[0]) > 100 * count
        assert inked(picture, BLACK) > 50 * count
        sizes[count] = picture.size
    assert sizes[3][0] > 2 * sizes[1][0]
    assert sizes[4][0] < sizes[3][0]
    assert sizes[4][1] > 1.5 * sizes[3][1]


def test_walks_are_drawn_in_their_colours() -> None:
    ends = ([1.0, 2.0], [2.0, -1.0])
    walks = [Walk(torch.tensor([[0.0, 0.0], end]), colour) for end, colour in zip(ends, PALETTE, strict=False)]
    picture = walk_panels({"left": walks, "right": walks[1:]}, [("x", "y")] * 2, "ring: start")
    assert inked(picture, PALETTE[0]) > 10
    assert inked(picture, PALETTE[1]) > 10


def test_shades_darken() -> None:
    brightness = [sum(int(colour[start : start + 2], 16) for start in (1, 3, 5)) for colour in shades(4)]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(shades(4))) == 4
    assert len(shades(1)) == 1


def test_heat_rises_and_ends_at_its_full_scale() -> None:
    colours = heat(torch.tensor([[0.0, 0.1, 0.2, 0.4, 9.0]]), 0.4)
    assert colours.shape == (3, 1, 5)
    assert float(colours.min()) >= -1
    assert float(colours.max()) <= 1
    brightness = colours.mean(dim=0)[0]
    assert bool((brightness.diff()[:3] > 0).all())
    assert torch.equal(colours[..., 3], colours[..., 4])


def test_scale_bar_shows_both_ends() -> None:
    picture = np.asarray(scale_bar(lambda share: heat(share, 1.0), 0.25))
    black, pale = (np.asarray(heat(torch.tensor([[end]]), 1.0))[:, 0, 0] for end in (0.0, 1.0))
    for end in (black, pale):
        pixels = np.rint((end + 1) * 127.5).astype(np.uint8)
        assert (picture == pixels).all(axis=2).any()
