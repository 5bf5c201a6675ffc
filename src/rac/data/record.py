"""The record of the pictures that a run trains on, so that a resume on others is noticed."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import from_json, read_json, to_json
from ..errors import RacError
from ..files import write_bytes
from .pictures import Fingerprint

RECORD = "pictures.json"
"""The file in a run's folder that holds the fingerprint of its pictures."""


def check_pictures(fingerprint: Fingerprint, directory: Path) -> None:
    """Writes which pictures the run in `directory` trains on, or checks that they are still the ones it began with.

    Other pictures would be drawn in another order, and some that were held out would be trained on. Raises `RacError`
    naming what changed. A run that was begun without such a record gets one.
    """
    path = directory / RECORD
    if not path.exists():
        write_bytes(path, (json.dumps(to_json(fingerprint)) + "\n").encode())
        return
    before = from_json(Fingerprint, read_json(path), str(path))
    if before.hash != fingerprint.hash:
        raise RacError(
            f"the pictures changed since the run in {directory} began: {fingerprint.changes(before)}; "
            "give it the pictures that it had, or start a new run with another --out"
        )
