"""The sentence that tells how to install an extra."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rac.errors import install_extra

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src/rac").rglob("*.py"))


def test_the_sentence_names_a_command_that_works_in_the_source_folder() -> None:
    assert install_extra("serve") == "run pip install '.[serve]' in the folder of rac's source code"


def test_every_extra_that_is_advised_exists() -> None:
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    advised = {extra for path in SOURCES for extra in re.findall(r"install_extra\(['\"](\w+)", path.read_text())}
    assert advised >= {"serve", "export", "photos"}
    for extra in advised:
        assert re.search(rf"^{extra} = ", declared, re.MULTILINE), extra


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_installs_from_a_registry(path: Path) -> None:
    assert "rectified-auto-coder[" not in path.read_text()
