"""Run the notebooks of the docs and keep what they show: python tools/notebooks.py [NOTEBOOK ...]."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


def executed(path: Path, timeout: int = 300) -> Any:
    """The notebook at `path` with the outputs of a fresh run; nbclient's error where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False).execute()
    for cell in notebook.cells:
        if "outputs" in cell:  # warnings speak of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            # A picture is enough; beside it stands how Python would print it, with an address in memory.
            if "image/png" in output.get("data", {}):
                output["data"] = {"image/png": smaller(output["data"]["image/png"])}
    notebook.metadata["language_info"] = {"name": "python"}  # without the version it was run with
    return notebook


def smaller(png: str) -> str:
    """The same picture, base64 as it came, in 256 colours: a third of the bytes."""
    picture, written = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(NOTEBOOKS.glob("*.ipynb"))):
        nbformat.write(executed(path), path)
