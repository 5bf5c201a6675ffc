"""Where the weights of metrics lie: nothing is downloaded, and nothing but small ones is shipped."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import WeightsError

VARIABLE = "RAC_WEIGHTS_DIR"
"""Environment variable that names the folder of weight files."""


def find_weights(given: str | Path | None, *names: str) -> Path:
    """The file `given`, or the first of `names` that lies in the weights folder. Raises `WeightsError`."""
    if given is not None:
        return Path(given)
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise WeightsError(f"{' or '.join(names)} is needed; name the folder that holds it in {VARIABLE}")
    found = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
    if not found:
        raise WeightsError(f"no {' or '.join(names)} in {folder}; name the folder that holds it in {VARIABLE}")
    return found[0]
