"""Words for classes that data sets name by numbers of WordNet."""

from __future__ import annotations

from collections.abc import Sequence

IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""The ten classes of Imagenette, a part of ImageNet that is used for trying things out."""


def in_words(classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of classes, in words where they are known here, unless two would then be called alike."""
    words = tuple(IMAGENETTE.get(name, name) for name in classes)
    return words if len(set(words)) == len(words) else tuple(classes)
