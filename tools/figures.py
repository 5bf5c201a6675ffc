"""Make anew what the docs show of the shipped coders: python tools/figures.py DATA [--out FOLDER] [--only RUN ...].

Runs `rac demo` and the comparisons of docs/comparison.md, writes their tables between the marks
`<!-- figures: NAME -->` and `<!-- /figures -->` of the README and the docs, and their pictures into docs/images. DATA
is a folder with imagenet-dev-256.tar and imagenette-dev-224.tar; LPIPS and Inception weights are looked for as `rac
weights` says. The notebook is made anew by tools/notebooks.py, the cards by hand.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rac.report.document import Table

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
IMAGES = ROOT / "docs" / "images"
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)

NATIVE = "--data {data}/imagenet-dev-256.tar --protocol native --count 24 --no-pictures"
RUNS = {
    "demo": "demo",
    "rac-256": f"compare rac-256 taef2 {NATIVE} --latents teacher own --steps 1 2 4 --robustness 8",
    "rac-taef2": f"compare rac-taef2 taef2 {NATIVE} --latents teacher --steps 1 --robustness 0",
    "rac-64": "compare rac-64 klvae-f8d4 --data {data}/imagenette-dev-224.tar --protocol dev-64 --count 200"
    " --latents teacher own --no-pictures",
}
"""Arguments of `rac` by the name of a run; it writes to a folder of that name."""

QUALITY = ("coder", "PSNR dB", "SSIM", "LPIPS Alex", "latent variance explained", "GMACs decoding", "GMACs in all")
COLUMNS: Mapping[str, tuple[str, ...] | None] = {
    "demo": None,
    "rac-256": QUALITY,
    "rac-taef2": (*QUALITY[:4], "GMACs decoding"),
    "rac-64": (*QUALITY[:4], "KID-768", *QUALITY[4:6]),
}
"""Columns of the table of each run, which has the run's name in the pages; None: all."""

PICTURES = {
    "demo/strip-astronaut.png": "strip.png",
    "demo/decoding.png": "decoding.png",
    "demo/latent.png": "latent.png",
    "rac-256/robustness-taef2.png": "rac-256-noise.png",
    "rac-64/quality-against-steps.png": "rac-64-steps.png",
    "rac-64/robustness-klvae-f8d4.png": "rac-64-noise.png",
}
"""Names in docs/images of pictures that the runs make."""


def narrowed(markdown: str, columns: tuple[str, ...] | None) -> str:
    """Returns a Markdown table with these columns only. Raises `KeyError` for a column that it lacks."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in markdown.splitlines()]
    head, body = rows[0], rows[2:]
    for column in set(columns or ()) - set(head):
        raise KeyError(f"no column {column!r} among {head}")
    places = [head.index(column) for column in columns or head]
    return Table(columns or tuple(head), tuple(tuple(row[k] for k in places) for row in body)).to_markdown()


def filled(page: str, tables: Mapping[str, str]) -> str:
    """Returns a page whose marked places hold `tables`, by name; places of other names stay as they are."""

    def place(found: re.Match[str]) -> str:
        before, name, after = found.groups()
        return f"{before}\n{tables[name].strip()}\n\n{after}" if name in tables else found[0]

    return MARKED.sub(place, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the pictures")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for what the runs write")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="runs to make")
    options = parser.parse_args()
    tables = {}
    for name in options.only:
        arguments = RUNS[name].format(data=options.data).split()
        subprocess.run([sys.executable, "-m", "rac", *arguments, "--out", str(options.out / name)], check=True)
        tables[name] = narrowed((options.out / name / "table.md").read_text(encoding="utf-8"), COLUMNS[name])
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    for source, picture in PICTURES.items():
        if source.split("/")[0] in options.only:
            shutil.copyfile(options.out / source, IMAGES / picture)


if __name__ == "__main__":
    main()
