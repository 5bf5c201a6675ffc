"""Crops and their latents, prepared once: a frozen teacher need not encode the same image again and again.

A folder of prepared crops holds crops.json (what they were made from), held-out.safetensors, and shards,
00000.safetensors and on, each with a stretch of crops and, in its header, what crops.json says. A shard is a function
of that and of its number, whoever makes it and whenever; so work that was broken off goes on, and several processes
can share it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import differences, from_json, read_json, to_json
from ..errors import RacError
from ..files import make_folder, write_bytes
from ..images import from_pixels
from ..latents import LatentSpec
from ..progress import counting
from ..runtime import reproducible
from ..storage import weights_hash
from .config import DataConfig
from .files import has_scheme
from .prefetch import ahead
from .stream import Batch, Crops, ImageStream, InTurn, Stream, StreamedImages, permutation

PLAN = "crops.json"
"""The file that makes a folder one of prepared crops."""

_HEADER = {"format": "rac crops", "version": 1}
_HELD_OUT = "held-out.safetensors"
_ENCODED_AT_ONCE = 32
_DTYPES = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ABANDONED = 60.0
"""Seconds after which a temporary file has no writer any more."""


class Teacher(Protocol):
    """What the cache asks of a coder that is an `nn.Module` too."""

    @property
    def spec(self) -> LatentSpec:
        """What its latents are."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Image B 3 H W in [-1, 1] -> latent B c h w."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Its weights."""
        ...


@dataclass(frozen=True)
class Layout:
    """What is kept of each crop, and in how large files."""

    whole: bool = False
    """The centres of all pictures, once each, instead of random crops."""
    pixels: bool = True
    """Keep pixels; without, only latents are kept, and crops are cut again from the pictures while training."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the latents."""
    shard_size: int = 1024
    """Crops in a file."""

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.shard_size % _ENCODED_AT_ONCE:
            raise RacError(f"shard_size {self.shard_size} must be a multiple of {_ENCODED_AT_ONCE}")


def open_stream(
    config: DataConfig,
    rng_seed: int = 0,
    *,
    batch: int = 1,
    cache: Path | None = None,
    teacher: Teacher | None = None,
    teacher_name: str | None = None,
    device: torch.device | None = None,
) -> Stream:
    """The stream a `DataConfig` asks for: always new crops, or prepared ones; of several sizes, every `batch` another.

    `config.cached_crops` crops are read from the folder `cache`, and those that are not there are made first: crops as
    pixels, and the latents that `teacher` (on `device`) gives for them. Where `config.paths` is a folder that
    `rac cache` made, it is read. Without a teacher, or without prepared crops, batches carry no latents. Raises
    `RacError` if a folder was made from other data or by another teacher, or is damaged.
    """
    if config.further_sizes:
        alone = replace(config, further_sizes=(), keep_mb=config.keep_mb // len(config.sizes))
        streams = [
            open_stream(
                replace(alone, size=size),
                rng_seed,
                cache=None if cache is None else cache / str(size),
                teacher=teacher,
                teacher_name=teacher_name,
                device=device,
            )
            for size in config.sizes
        ]
        return InTurn(streams, batch)
    if prepared := _prepared(config.paths):
        stream = CachedStream(prepared, rng_seed, latents=teacher is not None, held_out=config.held_out)
        _check_use(stream, config, teacher, teacher_name)
        return stream
    if not config.cached_crops:
        return fresh_stream(config, rng_seed)
    if cache is None:
        raise RacError(f"cached_crops is {config.cached_crops}, but no folder was named to keep them in; give cache")
    asked = plan_of(config, rng_seed, teacher, teacher_name)
    if not _is_whole(cache, asked):
        prepare(cache, asked, fresh_stream(config, rng_seed), teacher, device)
    return CachedStream(cache, rng_seed)


def fresh_stream(config: DataConfig, rng_seed: int = 0) -> Crops:
    """Always new crops, each a function of `rng_seed` and its number. Raises `RacError` where there are no pictures."""
    if len(config.paths) == 1 and has_scheme(config.paths[0], "hf-stream"):
        return StreamedImages(config, rng_seed)
    return ImageStream(config, rng_seed)


def held_out_images(config: DataConfig) -> Tensor:
    """What `Stream.held_out` of this configuration gives."""
    prepared = _prepared(config.paths)
    return (CachedStream(prepared, held_out=config.held_out) if prepared else fresh_stream(config)).held_out()


class CachedStream:
    """Prepared crops, each once an epoch, with their latents where a teacher encoded them.

    They stay on the disk until they are asked for. Without `latents` those are left there, and of the held-out images
    all but the first `held_out`. Raises `RacError` if the folder is no such cache, is unfinished, or damaged.
    """

    def __init__(self, folder: Path, rng_seed: int = 0, *, latents: bool = True, held_out: int | None = None) -> None:
        self.folder = folder
        self.plan = _read_plan(folder)
        self._rng_seed = rng_seed
        self._held_out = _Rows.of(folder / _HELD_OUT, self.plan, "pixels").all()[:held_out]
        shards = _shards(folder, self.plan)
        kept, coded = self.plan["layout"]["pixels"], self.plan["teacher"] is not None and latents
        self._pixels = [_Rows.of(path, self.plan, "pixels") for path in shards if kept]
        self._latents = [_Rows.of(path, self.plan, "latents") for path in shards if coded]
        self._source = None if kept else self._reopen()

    def __len__(self) -> int:
        """Prepared crops."""
        return self.plan["count"]

    @property
    def skipped(self) -> Mapping[str, str]:
        """Damaged pictures met when crops are cut again; those met while preparing were named then."""
        return {} if self._source is None else self._source.skipped

    def batch(self, first: int, count: int) -> Batch:
        """Draws `first` to `first + count - 1`."""
        places = (divmod(draw, len(self)) for draw in range(first, first + count))
        chosen = [int(permutation(len(self), self._rng_seed, epoch)[place]) for epoch, place in places]
        images = from_pixels(np.stack([self._crop(number) for number in chosen]))
        if not self._latents:
            return Batch(images)
        return Batch(images, torch.stack([self._row(self._latents, number) for number in chosen]).float())

    def held_out(self) -> Tensor:
        """The held-out images of the stream that the crops came from."""
        return from_pixels(self._held_out.numpy())

    def _crop(self, number: int) -> NDArray[np.uint8]:
        if self._source is None:
            return self._row(self._pixels, number).numpy()
        return _cut(self._source, number, self.plan)

    def _row(self, shards: Sequence[_Rows], number: int) -> Tensor:
        shard, row = divmod(number, self.plan["layout"]["shard_size"])
        return shards[shard].read(row, 1)[0]

    def _reopen(self) -> Crops:
        source = fresh_stream(from_json(DataConfig, self.plan["data"]), self.plan["rng_seed"])
        if _pictures(source) != self.plan["pictures"]:
            paths = ", ".join(self.plan["data"]["paths"]) or "scikit-image"
            raise RacError(
                f"{self.folder} holds latents alone, not of the pictures that are in {paths} now; prepare them again"
            )
        return source


def _check_use(stream: CachedStream, config: DataConfig, teacher: Teacher | None, name: str | None) -> None:
    """Raise `RacError` unless the crops are what `config` and `teacher` ask for, as far as they ask."""
    folder, plan = stream.folder, stream.plan
    made = from_json(DataConfig, plan["data"], str(folder / PLAN))
    for field in fields(DataConfig):
        asked, found = getattr(config, field.name), getattr(made, field.name)
        free = field.name in ("paths", "cached_crops", "keep_mb") or (field.name == "held_out" and asked <= found)
        if not free and asked != found and (asked != field.default or field.name == "size"):
            raise RacError(f"{folder} was prepared with {field.name} {found}, not {asked}; give {found}")
    if teacher is not None and plan["teacher"] is not None:
        ours, theirs = _teacher_identity(teacher, name), plan["teacher"]
        if (ours["weights"], ours["spec"]) != (theirs["weights"], theirs["spec"]):
            raise RacError(
                f"{folder} holds latents of the teacher {theirs['name']} (weights {theirs['weights']}), not of "
                f"{ours['name']} (weights {ours['weights']}); give --teacher {theirs['name']}, or prepare others with "
                f"rac cache --teacher {ours['name']}"
            )


# ------------------------------------------------------------------------------------------------------------- making


def plan_of(
    config: DataConfig, rng_seed: int, teacher: Teacher | None, name: str | None, layout: Layout | None = None
) -> dict[str, Any]:
    """What `config.cached_crops` crops are made from, as JSON; all of it is known before a picture is read."""
    if config.further_sizes:
        raise RacError(f"a folder of prepared crops has one size, not {config.sizes}; leave out further_sizes")
    if teacher is not None and config.size % teacher.spec.factor:
        raise RacError(f"size {config.size} must be a multiple of the teacher's factor {teacher.spec.factor}")
    schemes = [has_scheme(path, "hf", "hf-stream") for path in config.paths]
    paths = [path if named else path.expanduser().resolve() for path, named in zip(config.paths, schemes, strict=True)]
    return {
        **_HEADER,
        "data": to_json(replace(config, paths=tuple(paths), keep_mb=0)),
        "rng_seed": rng_seed,
        "teacher": None if teacher is None else _teacher_identity(teacher, name),
        "layout": asdict(layout or Layout()),
        "count": config.cached_crops,
    }


def prepare(
    folder: Path,
    asked: dict[str, Any],
    stream: Crops,
    teacher: Teacher | None,
    device: torch.device | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    workers: int = 1,
) -> list[Path]:
    """Make the shards that `folder` lacks, or every n-th of them, from the k-th on, where `part` is (k, n).

    Each appears whole or not at all, so a process that is killed loses the shard in hand; `workers` threads read
    ahead. Returns the shards that are still to be made, by other parts. Raises `RacError` where the folder holds
    crops made otherwise, or something else, or a damaged shard.
    """
    plan = {**asked, "pictures": _pictures(stream)}
    _enter(folder, plan)
    if not _exists(folder / _HELD_OUT, plan):
        _write(folder / _HELD_OUT, {"pixels": [torch.from_numpy(stream.held_out_pixels)]}, plan)
    shards = _shards(folder, plan)
    mine = [number for number in range(part[0], len(shards), part[1]) if not _exists(shards[number], plan)]
    _write_shards(folder, plan, mine, stream, teacher, device or torch.device("cpu"), workers)
    return [path for path in shards if not path.exists()]


def _write_shards(
    folder: Path,
    plan: dict[str, Any],
    numbers: Sequence[int],
    stream: Crops,
    teacher: Teacher | None,
    device: torch.device,
    workers: int,
) -> None:
    count, layout, paths = plan["count"], Layout(**plan["layout"]), _shards(folder, plan)
    starts = [
        first
        for number in numbers
        for first in range(number * layout.shard_size, min((number + 1) * layout.shard_size, count), _ENCODED_AT_ONCE)
    ]

    def cut(first: int) -> NDArray[np.uint8]:
        return np.stack([_cut(stream, draw, plan) for draw in range(first, min(first + _ENCODED_AT_ONCE, count))])

    parts: dict[str, list[Tensor]] = {}
    done, total = 0, sum(min(count - first, _ENCODED_AT_ONCE) for first in starts)
    with counting(f"preparing {total:,} crops") as progress, closing(ahead(cut, starts, workers)) as supply:
        for first, pixels in zip(starts, supply, strict=True):
            if layout.pixels:
                parts.setdefault("pixels", []).append(torch.from_numpy(pixels))
            if teacher is not None:
                parts.setdefault("latents", []).append(_encode(teacher, pixels, device, layout))
            done, end = done + len(pixels), first + len(pixels)
            progress(done, total)
            if end % layout.shard_size == 0 or end == count:
                _write(paths[first // layout.shard_size], parts, plan)
                parts = {}


def _encode(teacher: Teacher, pixels: NDArray[np.uint8], device: torch.device, layout: Layout) -> Tensor:
    with reproducible():
        latents = teacher.encode(from_pixels(pixels).to(device)).float().cpu().to(getattr(torch, layout.dtype))
    if not torch.isfinite(latents).all():
        raise RacError(f"the teacher gives latents that are no numbers in {layout.dtype}; take float32 or bfloat16")
    return latents


def _cut(stream: Crops, number: int, plan: dict[str, Any]) -> NDArray[np.uint8]:
    if not plan["layout"]["whole"]:
        return stream.crop(number)
    assert isinstance(stream, ImageStream)
    return stream.whole(number)


def _write(path: Path, parts: dict[str, list[Tensor]], plan: dict[str, Any]) -> None:
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > _ABANDONED:
            left.unlink(missing_ok=True)
    tensors = {name: torch.cat(part).contiguous() for name, part in parts.items()}
    write_bytes(path, safetensors.torch.save(tensors, {"made_from": json.dumps(plan)}))


def _enter(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or check that it was begun from the same."""
    if (folder / PLAN).exists():
        _check(folder, plan)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RacError(f"{folder} is damaged or holds no prepared crops; delete it to prepare them again")
    else:
        make_folder(folder)
        write_bytes(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())


def _pictures(stream: Crops) -> dict[str, Any]:
    """What tells the same pictures, found again, from others."""
    if not isinstance(stream, ImageStream):
        return {"count": None, "fingerprint": None}
    return {"count": len(stream), "fingerprint": stream.files.fingerprint()}


def _teacher_identity(teacher: Teacher, name: str | None) -> dict[str, Any]:
    return {"name": name, "spec": to_json(teacher.spec), "weights": weights_hash(teacher.state_dict())}


# ------------------------------------------------------------------------------------------------------------ reading


def _prepared(paths: Sequence[Path]) -> Path | None:
    """The folder of prepared crops that `paths` is, if it is one."""
    found = [path for path in map(Path.expanduser, paths) if (path / PLAN).is_file()]
    if found and len(paths) > 1:
        raise RacError(f"{found[0]} holds prepared crops, which go alone; leave out the other paths")
    return found[0] if found else None


def _is_whole(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether everything is there; raises `RacError` if what is there was made otherwise."""
    if not (folder / PLAN).exists():
        return False
    _check(folder, asked)
    return all(path.exists() for path in (folder / _HELD_OUT, *_shards(folder, asked)))


def _check(folder: Path, asked: dict[str, Any]) -> None:
    found = _read_plan(folder)
    if changed := differences(asked, {name: found.get(name) for name in asked}):
        raise RacError(f"{folder} was prepared otherwise: {'; '.join(changed)}; delete it to prepare it again")


def _read_plan(folder: Path) -> dict[str, Any]:
    try:
        plan = read_json(folder / PLAN)
        known = {name: plan[name] for name in _HEADER} == _HEADER
        if known and {"data", "rng_seed", "teacher", "layout", "count", "pictures"} <= plan.keys():
            return plan
    except (RacError, TypeError, KeyError):
        pass
    raise RacError(f"{folder} is damaged or holds no prepared crops of this version; delete it to prepare them again")


def _shards(folder: Path, plan: dict[str, Any]) -> list[Path]:
    return [folder / f"{number:05d}.safetensors" for number in range(-(-plan["count"] // plan["layout"]["shard_size"]))]


def _exists(path: Path, plan: dict[str, Any]) -> bool:
    if path.exists():
        _header(path, plan)
        return True
    return False


@dataclass(frozen=True)
class _Rows:
    """One tensor of a shard, on the disk.

    Read with plain file reads: pages of a memory-mapped file would count as this process's memory once touched.
    """

    path: Path
    start: int
    """First byte."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, path: Path, plan: dict[str, Any], name: str) -> _Rows:
        """Tensor `name` of a file that is whole and made from `plan`. Raises `RacError`."""
        header, length = _header(path, plan)
        try:
            found = header[name]
            return cls(path, length + found["data_offsets"][0], tuple(found["shape"]), _DTYPES[found["dtype"]])
        except KeyError:
            raise RacError(f"{path} lacks {name}; delete it to prepare it again") from None

    def read(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count - 1`; any thread may ask."""
        row = math.prod(self.shape[1:])
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + first * row * self.dtype.itemsize)
            data = bytearray(count * row * self.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise RacError(f"{self.path} became shorter while it was read; prepare it again")
        return torch.frombuffer(data, dtype=self.dtype).view(count, *self.shape[1:])

    def all(self) -> Tensor:
        """All rows."""
        return self.read(0, self.shape[0])


def _header(path: Path, plan: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The header of a shard that is whole and made from `plan`, and its length. Raises `RacError`."""
    if not path.exists():
        raise RacError(f"{path} is not there yet: the crops were not all prepared; give the same rac cache again")
    try:
        with safe_open(path, "pt"):  # refuses what is no safetensors file, or cut short
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        found = json.loads(header["__metadata__"]["made_from"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError):
        raise RacError(f"{path} is damaged or holds no prepared crops; delete it to prepare them again") from None
    if changed := differences(plan, found):
        raise RacError(f"{path} belongs to other crops: {'; '.join(changed)}; delete it to prepare it again")
    return header, 8 + length
