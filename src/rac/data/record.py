"""The record of the pictures that a run trains on, so that a resume on other pictures is noticed."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import from_json, read_json, to_json
from ..errors import RacError
from ..files import write_bytes
from .pictures import Fingerprint

RECORD = "pictures.json"
"""Name of the file in a run's folder that holds the fingerprint of its pictures."""


def check_pictures(fingerprint: Fingerprint, directory: Path) -> None:
    """Records which pictures the run in `directory` trains on, or checks that they are the ones it began with.

    Other pictures would be drawn in another order, and some that were held out would be trained on. A run that was
    begun without such a record gets one. Raises `RacError` naming what changed.
    """
    path = directory / RECORD
    if not path.exists():
        write_bytes(path, (json.dumps(to_json(fingerprint)) + "\n").encode())
        return
    before = from_json(Fingerprint, read_json(path), str(path))
    if before.hash != fingerprint.hash:
        raise RacError(
            f"the pictures have changed since the run in {directory} began: {fingerprint.changes(before)}; give it the "
            "pictures that it had, or start a new run with another --out"
        )
