"""`rac evaluate`: one coder under a named protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..evaluate.comparison import short_name
from .evaluation import EvaluationOptions
from .shared import DEFAULT_CODER


@dataclass(frozen=True)
class Command(EvaluationOptions):
    """Measure a coder on images under a protocol, which states everything that the metrics depend on.

    Writes for each number of steps a JSON file with the metrics, the protocol, the hash of the images, versions and
    command; a table; and a report with pictures. Metrics of sets are named after the features that they compare: only
    the one called FID uses those of the published FID.
    """

    model: str = DEFAULT_CODER
    """A shipped coder (see `rac models`), a directory, or a name on the hub."""
    out: Path = Path("evaluated")
    """Folder for the results; created if it does not exist."""

    def run(self) -> int:
        """Evaluate; the exit code. Raises `RacError`."""
        return self.evaluate_all([self.model], self.out, f"{short_name(self.model)}, evaluated")
