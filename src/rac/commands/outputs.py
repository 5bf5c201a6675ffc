"""What the results of a verb are called, one name for each picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def result_names(files: Sequence[Path]) -> dict[Path, str]:
    """Returns for each file the name that its results begin with, no two alike.

    The name is the file's stem where no other file has that stem or is called so itself, else the file's whole name:
    a.png, a.jpg and a.png.png give a.png, a.jpg and a.png.png. Files of one name from several folders are numbered.
    Names that differ in upper and lower case alone count as equal, since some file systems take them so. Bytes of a
    name that are not UTF-8 become U+FFFD, since readers of safetensors files accept only UTF-8.
    """
    stems = Counter(file.stem.casefold() for file in files)
    whole = Counter(file.name.casefold() for file in files)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    tried: Counter[str] = Counter()
    for file in files:
        stem = file.stem.casefold()
        alone = stems[stem] == 1 and whole[stem] == (file.name.casefold() == stem)
        name = first = _in_utf8(file.stem if alone else file.name)
        while name.casefold() in taken:
            tried[first] += 1
            name = f"{first}-{tried[first] + 1}"
        taken.add(name.casefold())
        names[file] = name
    return names


def _in_utf8(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
