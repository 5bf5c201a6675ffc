"""Quality of coders: named protocols, metrics, sets of images, results, comparisons.

    import rac.evaluate

    comparison = rac.evaluate.compare(["rac-64", "klvae-f8d4"], "photos", "pixels-64", steps=(1, 4))
    print(comparison.table().to_markdown())

What is named here is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison, compare
    from .image_sets import FeatureMoments, ImageSet, Preprocessing
    from .protocol import PROTOCOLS, Protocol
    from .reconstruction import evaluate, measure
    from .result import Result

__all__ = [
    "PROTOCOLS",
    "Comparison",
    "FeatureMoments",
    "ImageSet",
    "Preprocessing",
    "Protocol",
    "Result",
    "compare",
    "evaluate",
    "measure",
]

_HOMES = {
    "PROTOCOLS": "protocol",
    "Comparison": "comparison",
    "FeatureMoments": "image_sets",
    "ImageSet": "image_sets",
    "Preprocessing": "image_sets",
    "Protocol": "protocol",
    "Result": "result",
    "compare": "comparison",
    "evaluate": "reconstruction",
    "measure": "reconstruction",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
