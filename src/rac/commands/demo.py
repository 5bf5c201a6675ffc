"""`rac demo`: the shipped RAC on real photographs, as a report."""

from __future__ import annotations

import io
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..coders.protocol import Coder
from ..coders.rac import RAC
from ..data.files import find_pictures
from ..evaluate.pictures import curves, trajectory_strip
from ..evaluate.reconstructions import rac_reconstructions
from ..evaluate.report import Figure, Section, Table, html_report
from ..evaluate.reversal import Reversal, euler_errors, reversals, slope
from ..files import make_folder, write_bytes
from ..images import check_size, read_image, write_picture
from ..runtime import pick_device
from .common import DEFAULT_CODER, load_coder, load_teacher, need_rac, show, watched
from .reconstruct import Results, comparison, means, per_image

STEPS = (1, 2, 4, 8)
ERROR_STEPS = (2, 4, 8, 16)
PHOTOGRAPHS = 4


@dataclass(frozen=True)
class Command:
    """A tour of the shipped RAC on photographs that come with scikit-image.

    Writes report.html, which holds its pictures itself, and the same pictures as PNG files beside it.
    """

    out: Path = Path("demo")
    """Folder for the report; made if it is not there."""
    model: str = DEFAULT_CODER
    """A shipped RAC (see `rac models`), or a directory."""
    size: int = 128
    """Photographs are scaled and cropped to squares of this side."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def run(self) -> int:
        """Write the report, print its table; the exit code. Raises `RacError`."""
        check_size(self.size)
        coder = need_rac(load_coder(self.model, self.device), self.model)
        teacher = load_teacher(coder, self.device)
        photographs = self._photographs()
        make_folder(self.out)
        results = _reconstruct(coder, teacher, photographs)
        image = next(iter(photographs.values()))
        with torch.no_grad():
            latent = coder.encode(image) if teacher is None else teacher.encode(image)
        sections = [
            _there_and_back(photographs, results),
            Section("Quality and cost", _QUALITY, [means(results)]),
            _on_the_way(coder, image, latent),
            _back_to_the_latent(coder, latent),
        ]
        self._write(sections, results)
        show(means(results), f"{self.model}: {len(results)} photographs at {self.size} x {self.size}, means")
        print(f"\nThe report, with pictures: {self.out / 'report.html'}")
        return 0

    def _photographs(self) -> dict[str, Tensor]:
        device = pick_device(self.device)
        return {
            picture.name: read_image(io.BytesIO(picture.read()), self.size, convert=True).to(device)
            for picture in find_pictures(())[:PHOTOGRAPHS]
        }

    def _write(self, sections: list[Section], results: Results) -> None:
        page = html_report(f"{self.model}: a rectified flow auto coder", _INTRODUCTION, sections)
        figures = [content for section in sections for content in section.contents if isinstance(content, Figure)]
        for figure in figures:
            write_picture(figure.picture, self.out / f"{figure.name}.png")
        write_bytes(self.out / "results.csv", per_image(results).to_csv().encode())
        write_bytes(self.out / "report.html", page.encode())


def _reconstruct(coder: RAC, teacher: Coder | None, photographs: dict[str, Tensor]) -> Results:
    with closing(watched(list(photographs), str)) as shown:
        return {name: rac_reconstructions(coder, photographs[name], STEPS, teacher=teacher) for name in shown}


def _there_and_back(photographs: dict[str, Tensor], results: Results) -> Section:
    figures = [
        Figure(comparison(image, results[name], name), f"strip-{Path(name).stem}")
        for name, image in photographs.items()
    ]
    return Section("There and back", _THERE_AND_BACK, figures)


def _on_the_way(coder: RAC, image: Tensor, latent: Tensor) -> Section:
    """States while decoding and while encoding."""
    with torch.no_grad():
        decoding = coder.trajectory(latent, max(STEPS))
        encoding = coder.encode_trajectory(image, max(STEPS))
    figures = [
        Figure(trajectory_strip(decoding, title="decoding: from the seed state to the image"), "decoding"),
        Figure(trajectory_strip(encoding, title="encoding: from the image to the seed state"), "encoding"),
    ]
    return Section("On the way", _ON_THE_WAY, figures)


def _back_to_the_latent(coder: RAC, latent: Tensor) -> Section:
    """How far each way back ends from the latent that was decoded."""
    found = reversals(coder, latent, coder.config.steps)
    table = Table(
        ("way back", "starts from", "evaluations", "largest error in the latent", "residual"),
        tuple(_reversal_row(one) for one in found),
    )
    contents: list[Table | Figure] = [table]
    errors = euler_errors(coder, latent, ERROR_STEPS)
    if min(errors) > 0:  # a field of zeros makes none, and has no order
        plot = curves({"reversed Euler": (ERROR_STEPS, errors)}, "steps", "distance from the seed state (RMS)")
        order = slope(ERROR_STEPS, errors)
        caption = (
            f"Reversed Euler misses the seed state it came from; the error falls with the steps at order {order:.2f}."
        )
        contents.append(Figure(plot, "reversal-error", caption))
    return Section("Back to the latent", _BACK, contents)


def _reversal_row(one: Reversal) -> tuple[str, ...]:
    residual = "" if one.residual is None else f"{one.residual:.1e}" + ("" if one.converged else ", did not converge")
    return one.name, one.start, str(one.evaluations), f"{one.error:.1e}", residual


_INTRODUCTION = (
    "RAC replaces the decoder of an image autoencoder by a velocity field. Followed forwards, it carries a seed state, "
    "laid out from the latent, to the image; followed backwards, it is the encoder. Every picture and figure below was "
    "computed on this machine, just now."
)
_THERE_AND_BACK = (
    "Each photograph is encoded by running the flow backwards and decoded by running it forwards, with as many steps "
    "each way. The teacher is the autoencoder whose latents this RAC learned to imitate. Small pictures are enlarged "
    "without smoothing."
)
_QUALITY = (
    "Means over the photographs. An evaluation is one pass through a network, encoding and decoding together; GMACs "
    "are the 10^9 multiply-accumulates of all of them."
)
_ON_THE_WAY = "The first three channels of the states at each time node, clamped to the range of an image."
_BACK = (
    "A latent is decoded, and sought again from the result. Reversed Euler is not the inverse of Euler. A fixed-point "
    "iteration inverts each of its steps, and a reversible solver retraces its own, if they may start from the whole "
    "final state. From the image alone, which is all an encoder has, the state's other channels are unknown, and the "
    "way back is as good as training made it."
)
