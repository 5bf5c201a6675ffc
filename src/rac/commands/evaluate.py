"""`rac evaluate`: one coder under a named protocol, or generated images beside real ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..config import read_json
from ..data.cache import CachedStream, Latents
from ..data.files import find_pictures
from ..errors import RacError
from ..evaluate.comparison import file_name, metric_text, short_name
from ..evaluate.generation import GeneratedResult, evaluate_generated, of_sets_alone
from ..evaluate.image_sets import ImageSet, read_reference
from ..evaluate.latent_metrics import LatentDistance, latent_distance
from ..evaluate.suite import MetricSuite
from ..files import check_output, make_folder, make_output, write_bytes
from ..latents import read_spec
from ..progress import counting
from ..report.document import Table, utf8
from ..runtime import pick_device
from .evaluation import EvaluationOptions
from .generate import RECORD
from .latent_files import LatentFile
from .shared import DEFAULT_CODER, say, show

OF_CODERS = ("data", "model", "steps", "latents", "robustness", "pictures")
"""Options that concern coders, and no generated images."""


@dataclass(frozen=True)
class Command(EvaluationOptions):
    """Measure a coder on images under a protocol, which states everything that the metrics depend on.

    Writes for each number of steps a JSON file with the metrics, the protocol, the hash of the images, versions and
    command; a table; and a report with pictures. Metrics of sets are named after the features that they compare: only
    the one called FID uses those of the published FID.

    With --generated, generated images are measured beside the real ones of --reference instead.
    """

    model: str = DEFAULT_CODER
    """A shipped coder (see `rac models`), a directory, or a name on the hub."""
    generated: tuple[Path, ...] = ()
    """Folders of generated images, such as `rac generate` makes, in place of a coder's reconstructions."""
    latent_reference: Path | None = None
    """A folder that `rac cache` made, whose latents those of `rac generate --latents` are compared with."""
    out: Path = Path("evaluated")
    """Folder for the results; created if it does not exist."""

    def run(self) -> int:
        """Evaluate; the exit code. Raises `RacError`."""
        if self.generated:
            return self._evaluate_generated()
        if self.latent_reference is not None:
            raise RacError("--latent-reference has no use without --generated; leave it out, or give both")
        return self.evaluate_all([self.model], self.out, f"{short_name(self.model)}, evaluated")

    def _evaluate_generated(self) -> int:
        for option in (field for field in fields(self) if field.name in OF_CODERS):
            if getattr(self, option.name) != option.default:
                raise RacError(f"--{option.name} concerns coders; leave it out, or leave out --generated")
        if self.reference is None:
            raise RacError("generated images are compared with real ones; give --reference PICTURES, or an .npz file")
        protocol = of_sets_alone(self._protocol())
        check_output(self.out, self.generated)
        folders = [folder for path in self.generated for folder in _image_folders(path)]
        if twice := [folder for folder in folders if folders.count(folder) > 1]:
            raise RacError(f"{twice[0]} is given twice; give each folder once")
        for folder in folders:
            find_pictures([folder])
        records = {folder: _record(folder) for folder in folders}
        latents = {folder: self._latent_distance(folder) for folder in folders}
        suite = MetricSuite.load(protocol.metrics, protocol.extractor, pick_device(self.device))
        with counting("reading the reference") as progress:
            reference = read_reference(self.reference, protocol.preprocessing, progress)
        results = []
        for folder in folders:
            with counting(f"reading {folder}") as progress:
                images = ImageSet.read([folder], protocol.preprocessing, protocol.count, progress)
            with counting(f"features of {folder}") as counted:
                result = evaluate_generated(
                    images,
                    reference,
                    protocol,
                    suite,
                    name=str(folder),
                    made_by=records[folder],
                    latents=latents[folder],
                    batch=self.batch,
                    device=pick_device(self.device),
                    progress=counted,
                )
            results.append(result)
            kept = make_folder(make_output(self.out) / "results")
            result.save(kept / f"{file_name(str(folder))[-120:]}.json")
        table = _table(results)
        write_bytes(self.out / "table.md", utf8(table.to_markdown()))
        show(table, f"{protocol.name}: generated images beside {results[0].compared_with.name}")
        say(f"{self.out}: table.md, and a result for each folder")
        return 0

    def _latent_distance(self, folder: Path) -> LatentDistance | None:
        """Returns the distance of the latents that were kept beside the images; None where none is asked for."""
        if self.latent_reference is None:
            return None
        kept = _made_in(folder) / "latents"
        files = sorted(kept.glob("*.safetensors"))
        if not files:
            raise RacError(f"{folder} has no latents beside it (in {kept}); make them with rac generate --latents")
        with counting(f"reading latents of {folder}") as progress:
            read = []
            for done, file in enumerate(files, 1):
                read.append(LatentFile.read(file))
                progress(done, len(files))
        generated = torch.cat([one.latent for one in read])
        return latent_distance(generated, _encoded(self.latent_reference, read[0], 2 * len(read)))


def _encoded(cache: Path, like: LatentFile, most: int) -> torch.Tensor:
    """Returns up to `most` latents of a folder of `rac cache`. Raises `RacError` for those of another coder."""
    plan = CachedStream(cache, wants=()).plan
    if plan["teacher"] is None:
        raise RacError(f"{cache} holds no latents; prepare them with rac cache --teacher")
    spec, _ = read_spec(plan["teacher"]["spec"], str(cache))
    if differ := like.spec.differences(spec):
        raise RacError(
            f"the latents in {cache} are not of the kind that was generated: {'; '.join(differ)}; give those that the "
            "generator was trained on"
        )
    name = plan["teacher"]["name"]
    latents = None
    if plan["layout"]["moments"]:
        latents = Latents(hub.load(name), name, posterior="sample")
    stream = CachedStream(cache, wants={"latents"}, latents=latents)
    found = stream.batch(0, min(most, len(stream))).need("latents")
    return found.float()


def _image_folders(path: Path) -> list[Path]:
    """Returns the folders of images in a folder of `rac generate`; any other folder, or file, as it is."""
    return sorted(one for one in path.glob("images*") if one.is_dir()) if (path / RECORD).is_file() else [path]


def _made_in(folder: Path) -> Path:
    return folder.parent if (folder.parent / RECORD).is_file() else folder


def _record(folder: Path) -> Mapping[str, Any] | None:
    path = _made_in(folder) / RECORD
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else None


def _table(results: list[GeneratedResult]) -> Table:
    """Returns a row for each folder, and one of real images beside others."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    latent = next((result.latents.name for result in results if result.latents is not None), None)
    columns = ("images", *names, *([latent] if latent else []), "count", "evaluations")
    rows = []
    for result in results:
        made = result.made_by or {}
        cells = [metric_text(name, result.metrics[name]) for name in names]
        cells += [f"{result.latents.value:.2f}" if result.latents else "-"] if latent else []
        rows.append((result.name, *cells, str(result.images.count), str(made.get("evaluations", "-"))))
    last = results[-1]
    if last.floor:
        cells = [metric_text(name, last.floor[name]) if name in last.floor else "-" for name in names]
        cells += [f"{last.latents.floor:.2f}" if last.latents else "-"] if latent else []
        rows.append(("real beside real", *cells, str(last.floor_count), "-"))
    return Table(columns, tuple(rows))
