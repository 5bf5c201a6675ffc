"""Names of results: one for each picture, found in one go."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac.commands.outputs import result_names

FOLDER = Path("photos")


def named(*names: str) -> list[str]:
    return list(result_names([FOLDER / name for name in names]).values())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png", "b.jpg"], ["a", "b"]),
        (["a.png", "a.jpg"], ["a.png", "a.jpg"]),
        (["a.jpg", "a.png", "a.png.png"], ["a.jpg", "a.png", "a.png.png"]),
        (["a.png.png", "a.png", "b.png"], ["a.png.png", "a", "b"]),
        (["A.png", "a.jpg"], ["A.png", "a.jpg"]),
        (["a", "a.png", "b"], ["a", "a.png", "b"]),
    ],
)
def test_results_are_called_by_the_stem_where_that_is_the_files_own(names: list[str], expected: list[str]) -> None:
    assert named(*names) == expected


def test_names_of_results_are_utf_8_though_the_pictures_are_not() -> None:
    assert named("z\udcff.png", "z\udcfe.png", "a.png") == ["z\ufffd", "z\ufffd-2", "a"]


def test_files_of_one_name_are_numbered() -> None:
    files = [Path(folder) / name for folder in "xyz" for name in ("a.png", "b.png")]
    assert list(result_names(files).values()) == ["a.png", "b.png", "a.png-2", "b.png-2", "a.png-3", "b.png-3"]


@given(st.lists(st.text("aA.-2", min_size=1, max_size=6), unique=True))
def test_no_two_results_share_a_name(names: list[str]) -> None:
    files = {FOLDER / spelled for name in names for spelled in (name, f"{name}.png", f"{name}.jpg")}
    found = result_names(sorted(files))
    assert len({name.casefold() for name in found.values()}) == len(files)


def test_naming_does_not_slow_down_with_the_square_of_the_number() -> None:
    def seconds(count: int) -> float:
        files = [FOLDER / f"{k:06d}.png" for k in range(count)]
        start = time.process_time()
        assert len(set(result_names(files).values())) == count
        return time.process_time() - start

    seconds(1_000)
    assert seconds(40_000) < 3, "comparing each with each took 17 s"
