"""Leaves the trained weights out of a build where RAC_WEIGHTS=none: code under the MIT licence alone."""

from __future__ import annotations

import os
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WEIGHTS = "/src/rac/weights/*/*"


class WeightsHook(BuildHookInterface):
    """Reads the environment's RAC_WEIGHTS: none, or all (the default)."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Exclude every shipped coder where none is wanted. Raises `ValueError` for a value that is neither."""
        wanted = os.environ.get("RAC_WEIGHTS") or "all"
        if wanted not in ("all", "none"):
            raise ValueError(f"RAC_WEIGHTS is {wanted!r}; expected none or all")
        if wanted == "none":
            self.build_config.target_config.setdefault("exclude", []).append(WEIGHTS)
