"""`rac demo`: the shipped RAC on real photographs, as a report."""

from __future__ import annotations

import io
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..coders.rac import RAC
from ..data.files import find_pictures
from ..evaluate.comparison import short_name
from ..evaluate.demo_report import INTRODUCTION, sections, shown
from ..evaluate.one_image import Loaded, Results, means, per_image
from ..files import make_output, write_bytes
from ..images import check_size, read_image
from ..progress import watched
from ..report.document import Figure, Section, html_report, utf8
from ..runtime import pick_device
from .shared import DEFAULT_CODER, load_coder, load_teacher, need_trained, show

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "motorcycle_left.png")
"""Names of the scikit-image photographs that the demo shows."""


@dataclass(frozen=True)
class Command:
    """Reconstruct scikit-image's photographs with the shipped RAC, and write an HTML report.

    Writes report.html, which holds its pictures itself, and the same pictures as PNG files beside it.
    """

    out: Path = Path("demo")
    """Folder for the report; created if it does not exist."""
    model: str = DEFAULT_CODER
    """A shipped RAC (see `rac models`), or a directory."""
    size: int = 256
    """Photographs are scaled and cropped to squares of this side."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Write the report, print its table; the exit code. Raises `RacError`."""
        check_size(self.size)
        coder = RAC.of(load_coder(self.model, self.device))
        need_trained(coder, self.model, "encode")
        teacher = load_teacher(coder, self.device)
        loaded = Loaded(short_name(self.model), coder, teacher, short_name(coder.teacher or ""))
        images = self._photographs()
        make_output(self.out)
        with closing(watched(list(images), str)) as names:
            photographs = {name: shown(loaded, images[name], name) for name in names}
        results = {name: one.versions for name, one in photographs.items()}
        self._write(sections(coder, photographs), results)
        show(means(results), f"{self.model}: {len(results)} photographs at {self.size} x {self.size}, means")
        print(f"\nThe report, with pictures: {self.out / 'report.html'}")
        return 0

    def _photographs(self) -> dict[str, Tensor]:
        device = pick_device(self.device)
        found = {picture.name: picture for picture in find_pictures(())}
        return {
            name: read_image(io.BytesIO(found[name].read()), self.size, convert=True).to(device) for name in PHOTOGRAPHS
        }

    def _write(self, contents: list[Section], results: Results) -> None:
        page = html_report(f"{self.model}: a rectified flow auto coder", INTRODUCTION, contents)
        figures = [content for section in contents for content in section.contents if isinstance(content, Figure)]
        for figure in figures:
            write_bytes(self.out / f"{figure.name}.png", figure.png)
        write_bytes(self.out / "table.md", utf8(means(results).to_markdown()))
        write_bytes(self.out / "results.csv", utf8(per_image(results).to_csv()))
        write_bytes(self.out / "report.html", utf8(page))
