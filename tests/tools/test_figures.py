"""Tables of the docs that `tools/figures.py` writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from rac.report.document import Table

TOOL = Path(__file__).parents[2] / "tools" / "figures.py"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_keeps_the_columns_that_are_asked_for(figures: ModuleType) -> None:
    table = Table(("coder", "PSNR dB", "SSIM"), (("one, 1 step", "20.10", "0.5"), ("two", "-", "0.75")))
    assert figures.narrowed(table.to_markdown(), None) == table.to_markdown()
    fewer = Table(("SSIM", "coder"), (("0.5", "one, 1 step"), ("0.75", "two")))
    assert figures.narrowed(table.to_markdown(), ("SSIM", "coder")) == fewer.to_markdown()
    with pytest.raises(KeyError, match="LPIPS"):
        figures.narrowed(table.to_markdown(), ("coder", "LPIPS"))


def test_marked_places_are_filled_and_no_others(figures: ModuleType) -> None:
    page = "a\n<!-- figures: one -->\nold\n<!-- /figures -->\nb\n<!-- figures: two -->\nkept\n<!-- /figures -->\n"
    filled = figures.filled(page, {"one": "new", "three": "unused"})
    assert filled == page.replace("\nold\n", "\n\nnew\n\n")
    assert figures.filled(filled, {"one": "new"}) == filled


def test_pages_ask_for_what_is_made(figures: ModuleType) -> None:
    """Each run fills a place, each place has a run, and the pictures are shown."""
    texts = [page.read_text(encoding="utf-8") for page in figures.PAGES]
    places = {found[1] for text in texts for found in figures.MARKED.findall(text)}
    assert places == figures.RUNS.keys() == figures.COLUMNS.keys()
    for picture in figures.PICTURES.values():
        assert any(f"images/{picture})" in text for text in texts), picture
