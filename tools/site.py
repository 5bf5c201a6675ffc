"""Hooks of the docs site (mkdocs.yml): a notebook becomes a page, and no page may ask anything of the web."""

from __future__ import annotations

import base64
import json
import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.hooks.site")  # a warning here fails `mkdocs build --strict`

FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc(?:set)?=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?(?:https?:)?//[^>]*>"""
)
"""What a browser would fetch from elsewhere when it opens the page; links that a reader may follow are none."""


def on_files(files: Files, config: Any) -> Files:
    """Add a Markdown page, with its pictures, for each notebook; the notebook itself stays, to be downloaded."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            notebook = json.loads(Path(file.abs_src_path).read_text(encoding="utf-8"))
            stem = file.src_uri.removesuffix(".ipynb")
            page, pictures = page_of(notebook, Path(stem).name)
            files.append(File.generated(config, f"{stem}.md", content=page))
            for name, png in pictures.items():
                files.append(File.generated(config, f"{stem}-{name}", content=png))
    return files


def page_of(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """The notebook `name` as Markdown, and its pictures (PNG) by the end of their names, such as "0.png"."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{len(pictures)}.png"
                pictures[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![what the code above shows]({name}-{picture})")
            else:
                parts.append("```text\n" + "".join(output.get("text", data.get("text/plain", ""))).rstrip() + "\n```")
    parts.append(f"[The notebook itself]({name}.ipynb), to run and to change.")
    return "\n\n".join(parts) + "\n", pictures


def on_post_build(config: Any) -> None:
    """Warn of every page that would fetch something from elsewhere."""
    site = Path(config["site_dir"])
    for page in sorted(site.rglob("*.html")):
        for found in FETCHED.findall(page.read_text(encoding="utf-8")):
            LOG.warning("%s fetches from the web: %s", page.relative_to(site), found)
