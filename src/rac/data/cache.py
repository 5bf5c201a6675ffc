"""Crops, their latents, labels and features, prepared once: no frozen network has to see the same image twice.

A folder of prepared crops holds crops.json (their origin), held-out.safetensors, and shards, 00000.safetensors and on,
each with a stretch of crops and, in its header, a copy of crops.json. A shard is a function of that and of its number,
whoever makes it and whenever; so interrupted work can continue, and several processes can share it. Latents are kept
finished, or as raw moments of the posterior, from which they are finished when read. Features are those of one
representation.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import differences, from_json, read_json, to_json
from ..errors import RacError
from ..files import home_expanded, make_folder, write_bytes
from ..images import from_pixels
from ..latents import LatentSpec
from ..progress import counting
from ..runtime import generator, reproducible
from ..storage import weights_hash
from .config import DataConfig
from .files import find_pictures, has_scheme
from .pictures import Fingerprint, Pictures
from .prefetch import ahead
from .stream import IMAGES, Batch, Crop, Crops, ImageStream, InTurn, Stream, StreamedImages, Want, permutation

PLAN = "crops.json"
"""Name of the file that marks a folder of prepared crops and says what they were made from."""

_HEADER = {"format": "rac crops", "version": 2}
_HELD_OUT = "held-out.safetensors"
_ENCODED_AT_ONCE = 32
_DTYPES = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
_ABANDONED = 60.0
"""Seconds after which a temporary file is taken to have no writer any more."""


class LatentCoder(Protocol):
    """The interface of a coder that the cache uses; the coder is an `nn.Module` too."""

    @property
    def spec(self) -> LatentSpec:
        """Shape and statistics of the coder's latents."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Encodes an image B 3 H W in [-1, 1] to a latent B c h w."""
        ...

    def moments(self, image: Tensor) -> Tensor:
        """Returns the raw moments B m h w of an image B 3 H W in [-1, 1].

        They are the raw latent, or the posterior's mean and log-variance.
        """
        ...

    def finish(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns latents B c h w from raw moments B m h w: of the mean, or of mean + std * `noise` (B c h w)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the coder's weights."""
        ...


class Describer(Protocol):
    """The interface of what gives features, such as the targets of alignment; it is an `nn.Module` too."""

    def identity(self) -> dict[str, Any]:
        """Returns the JSON that distinguishes these features from others."""
        ...

    def __call__(self, image: Tensor) -> Tensor:
        """Returns the features B C h w of images B 3 H W in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Latents:
    """The latents that batches carry: the coder they come from, and how they are taken from its posterior."""

    coder: LatentCoder
    name: str | None = None
    """Name of the coder, for messages and the record of the preparation."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The device that the coder is on."""
    posterior: Literal["mean", "sample"] = "mean"
    """Take the mean of the posterior, always the same, or a new sample at each draw."""

    def identity(self) -> dict[str, Any]:
        """Returns the JSON that distinguishes these latents from another coder's."""
        return {"name": self.name, "spec": to_json(self.coder.spec), "weights": weights_hash(self.coder.state_dict())}

    def prepared(self, pixels: NDArray[np.uint8], layout: Layout) -> Tensor:
        """Returns the tensor to store for pixels B H W 3: raw moments B m h w, or latents B c h w, on the CPU.

        Raises `RacError` if the number type that they are stored in cannot hold them.
        """
        with reproducible():
            images = from_pixels(pixels).to(self.device)
            coded = self.coder.moments(images) if layout.moments else self.coder.encode(images)
            kept = coded.float().cpu().to(getattr(torch, layout.dtype))
        if not torch.isfinite(kept).all():
            raise RacError(
                f"some latents of the teacher are NaN or too large for {layout.dtype}; choose float32 or bfloat16"
            )
        return kept

    def finished(self, moments: Tensor, rng_seed: int, draws: Sequence[int]) -> Tensor:
        """Returns latents B c h w from raw moments B m h w.

        A sample depends only on `rng_seed` and the number of its draw.
        """
        noise = None
        if self.posterior == "sample":
            shape = (self.coder.spec.channels, *moments.shape[-2:])
            own = [torch.randn(shape, generator=generator(rng_seed, "posterior", draw)) for draw in draws]
            noise = torch.stack(own).to(self.device)
        with torch.no_grad():
            return self.coder.finish(moments.to(self.device), noise)


@dataclass(frozen=True)
class Features:
    """The features that batches carry: what gives them, and the device that it is on."""

    describer: Describer
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def prepared(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Returns the features of pixels B H W 3, B C h w in float16 on the CPU.

        Raises `RacError` if float16 cannot hold them.
        """
        with reproducible():
            kept = self.describer(from_pixels(pixels).to(self.device)).half().cpu()
        if not torch.isfinite(kept).all():
            raise RacError("some features are NaN or too large for float16; train on images without prepared features")
        return kept


@dataclass(frozen=True)
class Layout:
    """Contents and size of the files of prepared crops."""

    centre_crops: bool = False
    """Store the centres of all pictures, once each, instead of random crops."""
    pixels: bool = True
    """Store pixels. Without them, a training that needs images cuts them again from the pictures."""
    moments: bool = False
    """Store the raw moments of the posterior instead of finished latents, so that it can be sampled when they are read:
    twice the room for a coder that has a variance.
    """
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the stored latents or moments."""
    shard_size: int = 1024
    """Number of crops in a file."""

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.shard_size % _ENCODED_AT_ONCE:
            raise RacError(f"shard_size {self.shard_size} must be a multiple of {_ENCODED_AT_ONCE}")


def open_stream(
    config: DataConfig,
    rng_seed: int = 0,
    *,
    wants: Collection[Want] = IMAGES,
    batch: int = 1,
    cache: Path | None = None,
    latents: Latents | None = None,
    features: Features | None = None,
) -> Stream:
    """Opens the stream of images that a `DataConfig` describes: always new crops, or prepared ones.

    Args:
        config: where pictures are, and how crops are drawn. Of several sizes every batch has the next one. A path that
            is a folder made by `rac cache` is read as prepared crops.
        rng_seed: chooses crops, their order and samples of the posterior.
        wants: what every batch must hold. Latents must then be prepared; pixels are read for images alone.
        batch: images of a batch, with several sizes.
        cache: folder in which `config.cached_crops` crops are kept; those that are not there are made first.
        latents: the coder whose latents to prepare. Where crops are prepared with latents, batches carry them, whether
            `wants` names them or not; where they are cut anew they do not, and it is left to the caller to encode.
        features: the features to prepare. Batches carry them, or else images, of which the caller can make them.

    Raises `RacError` if a folder was made from other pictures or by another coder, or is damaged, if latents are wanted
    and not prepared, and if labels are wanted and a picture has none.
    """
    wants = frozenset(wants)
    if config.further_sizes:
        alone = replace(config, further_sizes=(), keep_mb=config.keep_mb // len(config.sizes))
        folders = {size: None if cache is None else cache / str(size) for size in config.sizes}
        sizes = [
            open_stream(
                replace(alone, size=size),
                rng_seed,
                wants=wants,
                cache=folders[size],
                latents=latents,
                features=features,
            )
            for size in config.sizes
        ]
        return InTurn(sizes, batch)
    if prepared := _prepared(config.paths):
        if latents is not None and _read_plan(prepared)["teacher"] is not None:
            wants |= {"latents"}
        if features is not None:
            wants |= {"features"} if _read_plan(prepared).get("features") is not None else {"images"}
        stream = CachedStream(prepared, rng_seed, wants=wants, latents=latents, held_out=config.held_out)
        _check_use(stream, config, latents, features)
        return stream
    if config.cached_crops:
        return _cached(config, rng_seed, wants, cache, latents, features)
    if "latents" in wants:
        raise RacError(
            "latents are needed, but none are prepared; set cached_crops, or give a folder that rac cache made"
        )
    return fresh_stream(config, rng_seed, wants if features is None else wants | {"images"})


def _cached(
    config: DataConfig,
    rng_seed: int,
    wants: frozenset[Want],
    cache: Path | None,
    latents: Latents | None,
    features: Features | None,
) -> CachedStream:
    """Returns the crops in the folder `cache`, preparing them first if they are not there."""
    if cache is None:
        raise RacError(f"cached_crops is {config.cached_crops}, but no folder was named to keep them in; give cache")
    if "latents" in wants and latents is None:
        raise RacError("latents are needed, but no coder was named to make them; give latents")
    cache = home_expanded(cache)
    layout = Layout(moments=latents is not None and latents.posterior == "sample")
    asked = plan_of(config, rng_seed, latents, layout, features)
    if not _is_streamed(config):  # other pictures in the same place make other crops
        pictures = find_pictures(config.paths).of_classes(config.classes, config.without_classes)
        asked = {**asked, **_collection(pictures)}
    if not _is_whole(cache, asked):
        prepare(cache, asked, fresh_stream(config, rng_seed), latents, features)
    if latents is not None:
        wants |= {"latents"}
    if features is not None:
        wants |= {"features"}
    return CachedStream(cache, rng_seed, wants=wants, latents=latents)


def fresh_stream(config: DataConfig, rng_seed: int = 0, wants: Collection[Want] = IMAGES) -> Crops:
    """Opens a stream of always new crops, each a function of `rng_seed` and its number. Raises as `open_stream`."""
    return (StreamedImages if _is_streamed(config) else ImageStream)(config, rng_seed, wants)


def held_out_images(config: DataConfig) -> Tensor:
    """Returns the held-out images of the stream that this configuration describes, N 3 S S in [-1, 1]."""
    prepared = _prepared(config.paths)
    if prepared:
        return CachedStream(prepared, wants=(), held_out=config.held_out).held_out()
    return fresh_stream(config).held_out()


class CachedStream:
    """A stream of prepared crops, each once an epoch, with the latents, labels and features stored with them.

    They stay on the disk until they are asked for. Batches hold what `wants` names (None: images, latents and features
    if there are any, and labels if every crop has one); without images no pixel is read. The coder of `latents` makes
    latents of raw moments. Only the first `held_out` of the held-out images are used. Raises `RacError` if the folder
    is not such a cache, lacks what is needed, is unfinished, or damaged.
    """

    def __init__(
        self,
        folder: Path,
        rng_seed: int = 0,
        *,
        wants: Collection[Want] | None = None,
        latents: Latents | None = None,
        held_out: int | None = None,
    ) -> None:
        self.folder = folder
        self.plan = _read_plan(folder)
        self.layout = Layout(**self.plan["layout"])
        self.classes: tuple[str, ...] = tuple(self.plan["classes"])
        """Names of the classes that labels stand for; empty if no picture belonged to any."""
        self.wants = self._held() if wants is None else frozenset(wants)
        self._rng_seed, self._latents, self._first_held_out = rng_seed, latents, held_out
        self._check_wants()
        shards = _shards(folder, self.plan)
        _header(folder / _HELD_OUT, self.plan)
        for path in shards:
            _header(path, self.plan)
        kept = {
            "images": "pixels" if self.layout.pixels else None,
            "latents": "moments" if self.layout.moments else "latents",
            "labels": "labels",
            "features": "features",
        }
        self._rows = {
            want: [_Rows.of(path, self.plan, name) for path in shards] for want in self.wants if (name := kept[want])
        }
        self._labels = torch.cat([rows.all() for rows in self._rows.pop("labels", ())] or [torch.empty(0)])
        self._source = self._reopen() if "images" in self.wants and not self.layout.pixels else None

    def __len__(self) -> int:
        """Returns the number of prepared crops."""
        return self.plan["count"]

    @property
    def skipped(self) -> Mapping[str, str]:
        """Damaged pictures met when crops are cut again; those met while preparing were named then."""
        return {} if self._source is None else self._source.skipped

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the pictures that the crops were cut from."""
        return Fingerprint(self.plan["pictures"]["count"], str(self.plan["pictures"]["hash"]))

    def batch(self, first: int, count: int) -> Batch:
        """Returns draws `first` to `first + count - 1`."""
        draws = range(first, first + count)
        places = (divmod(draw, len(self)) for draw in draws)
        chosen = [int(permutation(len(self), self._rng_seed, epoch)[place]) for epoch, place in places]
        images = latents = features = None
        if "images" in self.wants:
            images = from_pixels(np.stack([self._pixels(number) for number in chosen]))
        if "latents" in self.wants:
            latents = torch.stack([self._row("latents", number) for number in chosen]).float()
            if self.layout.moments and self._latents is not None:
                latents = self._latents.finished(latents, self._rng_seed, draws)
        if "features" in self.wants:
            features = torch.stack([self._row("features", number) for number in chosen]).float()
        return Batch(images, latents, self._labels[chosen] if "labels" in self.wants else None, features)

    def held_out(self) -> Tensor:
        """Returns the held-out images of the stream that the crops came from, N 3 S S in [-1, 1]."""
        return from_pixels(self._held_out.numpy())

    @cached_property
    def _held_out(self) -> Tensor:
        return _Rows.of(self.folder / _HELD_OUT, self.plan, "pixels").all()[: self._first_held_out]

    def _held(self) -> frozenset[Want]:
        """Everything that batches can hold."""
        found: dict[Want, bool] = {
            "images": True,
            "latents": self.plan["teacher"] is not None,
            "labels": bool(self.classes) and self.plan["unlabelled"] is None,
            "features": self.plan.get("features") is not None,
        }
        return frozenset(want for want, there in found.items() if there)

    def _check_wants(self) -> None:
        if "labels" in self.wants and not self.classes:
            raise RacError(
                f"labels are needed, but the crops in {self.folder} have none; prepare crops of pictures in folders of "
                "classes"
            )
        if "labels" in self.wants and self.plan["unlabelled"] is not None:
            raise RacError(
                f"labels are needed, but {self.plan['unlabelled']} and perhaps others in {self.folder} belong to no "
                "class; choose classes, and prepare the crops again"
            )
        if "features" in self.wants and self.plan.get("features") is None:
            raise RacError(
                f"features are needed, but {self.folder} holds none; prepare them with rac cache --representation"
            )
        if "latents" not in self.wants:
            return
        if self.plan["teacher"] is None:
            raise RacError(f"latents are needed, but {self.folder} holds none; prepare them with rac cache --teacher")
        if self.layout.moments and self._latents is None:
            raise RacError(
                f"{self.folder} holds raw moments, of which only their coder can make latents; give it as the teacher"
            )
        if not self.layout.moments and self._latents is not None and self._latents.posterior == "sample":
            raise RacError(
                f"{self.folder} holds only the means of the posterior, which cannot be sampled; prepare it again with "
                "rac cache --moments"
            )

    def _pixels(self, number: int) -> NDArray[np.uint8]:
        if self._source is None:
            return self._row("images", number).numpy()
        return _cut(self._source, number, self.layout).pixels

    def _row(self, want: Want, number: int) -> Tensor:
        shard, row = divmod(number, self.layout.shard_size)
        return self._rows[want][shard].read(row, 1)[0]

    def _reopen(self) -> Crops:
        source = fresh_stream(from_json(DataConfig, self.plan["data"]), self.plan["rng_seed"])
        if _collection(source)["pictures"] != self.plan["pictures"]:
            paths = ", ".join(self.plan["data"]["paths"]) or "scikit-image"
            raise RacError(
                f"{self.folder} holds latents without pixels, and the pictures in {paths} have changed since; prepare "
                "it again"
            )
        return source


def _is_streamed(config: DataConfig) -> bool:
    return len(config.paths) == 1 and has_scheme(config.paths[0], "hf-stream")


def _check_use(
    stream: CachedStream, config: DataConfig, latents: Latents | None, features: Features | None = None
) -> None:
    """Raises `RacError` unless the crops are those that `config`, `latents` and `features` ask for."""
    folder, plan = stream.folder, stream.plan
    prepared = from_json(DataConfig, plan["data"], str(folder / PLAN))
    for setting in fields(DataConfig):
        name, asked, found = setting.name, getattr(config, setting.name), getattr(prepared, setting.name)
        free = name in ("paths", "cached_crops", "keep_mb") or (name == "held_out" and asked <= found)
        if not free and asked != found and (asked != setting.default or name == "size"):
            raise RacError(f"{folder} was prepared with {name} {found}, not {asked}; give {found}")
    if latents is not None and plan["teacher"] is not None:
        ours, theirs = latents.identity(), plan["teacher"]
        if (ours["weights"], ours["spec"]) != (theirs["weights"], theirs["spec"]):
            raise RacError(
                f"{folder} holds latents of the teacher {theirs['name']} (weights {theirs['weights']}), not of "
                f"{ours['name']} (weights {ours['weights']}); give --teacher {theirs['name']}, or prepare others with "
                f"rac cache --teacher {ours['name']}"
            )
    if features is not None and plan.get("features") is not None:
        given, kept = features.describer.identity(), plan["features"]
        # One representation may have several names.
        if changed := differences({**given, "name": kept["name"]}, kept):
            raise RacError(
                f"{folder} holds features of {kept['name']} that are others than those of {given['name']}: "
                f"{'; '.join(changed)}; give the settings that it has, or prepare others with rac cache"
            )


# ------------------------------------------------------------------------------------------------------------- making


def plan_of(
    config: DataConfig,
    rng_seed: int,
    latents: Latents | None = None,
    layout: Layout | None = None,
    features: Features | None = None,
) -> dict[str, Any]:
    """Returns the origin of `config.cached_crops` crops as JSON, as far as it is known without the pictures.

    - `config`: where pictures are, and how crops are drawn.
    - `rng_seed`: chooses the crops.
    - `latents`: the coder whose latents to prepare; None: no latents.
    - `layout`: contents and size of the files; None: the defaults.
    - `features`: the features to prepare; None: no features.

    Raises `RacError` for several sizes, for one that does not fit the coder, and where there is nothing to prepare.
    """
    layout = layout or Layout()
    if config.further_sizes:
        raise RacError(f"a folder of prepared crops has one size, not {config.sizes}; leave out further_sizes")
    if latents is not None and config.size % latents.coder.spec.factor:
        raise RacError(f"size {config.size} must be a multiple of the teacher's factor {latents.coder.spec.factor}")
    if latents is None and (layout.moments or (not layout.pixels and features is None)):
        raise RacError("without pixels, or with moments, a teacher is needed; give --teacher")
    schemes = [has_scheme(path, "hf", "hf-stream") for path in config.paths]
    paths = [
        path if named else home_expanded(path).resolve() for path, named in zip(config.paths, schemes, strict=True)
    ]
    return {
        **_HEADER,
        "data": to_json(replace(config, paths=tuple(paths), keep_mb=0)),
        "rng_seed": rng_seed,
        "teacher": None if latents is None else latents.identity(),
        "layout": asdict(layout),
        "count": config.cached_crops,
        # Left out where there are none, as in folders made before there could be any.
        **({} if features is None else {"features": features.describer.identity()}),
    }


def prepare(
    folder: Path,
    asked: dict[str, Any],
    stream: Crops,
    latents: Latents | None = None,
    features: Features | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    workers: int = 1,
) -> list[Path]:
    """Makes the shards that `folder` lacks, and returns those still to be made by other parts.

    Each shard appears whole or not at all, so a process that is killed loses the shard in hand.

    - `folder`: where the shards are kept.
    - `asked`: the origin of the crops, as `plan_of` gives it.
    - `stream`: the crops.
    - `latents`: the coder whose latents to prepare; None: no latents.
    - `features`: the features to prepare; None: no features.
    - `part`: (k, n) makes every n-th shard, from the k-th on.
    - `workers`: threads that read ahead.

    Raises `RacError` where the folder holds crops made otherwise, or something else, or a damaged shard.
    """
    plan = {**asked, **_collection(stream)}
    _enter(folder, plan)
    if not _exists(folder / _HELD_OUT, plan):
        _write(folder / _HELD_OUT, {"pixels": [torch.from_numpy(stream.held_out_pixels)]}, plan)
    shards = _shards(folder, plan)
    mine = [number for number in range(part[0], len(shards), part[1]) if not _exists(shards[number], plan)]
    _write_shards(folder, plan, mine, stream, latents, features, workers)
    return [path for path in shards if not path.exists()]


def _write_shards(
    folder: Path,
    plan: dict[str, Any],
    numbers: Sequence[int],
    stream: Crops,
    latents: Latents | None,
    features: Features | None,
    workers: int,
) -> None:
    count, layout, paths = plan["count"], Layout(**plan["layout"]), _shards(folder, plan)
    starts = [
        first
        for number in numbers
        for first in range(number * layout.shard_size, min((number + 1) * layout.shard_size, count), _ENCODED_AT_ONCE)
    ]

    def cut(first: int) -> list[Crop]:
        return [_cut(stream, draw, layout) for draw in range(first, min(first + _ENCODED_AT_ONCE, count))]

    parts: dict[str, list[Tensor]] = {}
    done, total = 0, sum(min(count - first, _ENCODED_AT_ONCE) for first in starts)
    with counting(f"preparing {total:,} crops") as progress, closing(ahead(cut, starts, workers)) as supply:
        for first, crops in zip(starts, supply, strict=True):
            pixels = np.stack([crop.pixels for crop in crops])
            if layout.pixels:
                parts.setdefault("pixels", []).append(torch.from_numpy(pixels))
            if latents is not None:
                name = "moments" if layout.moments else "latents"
                parts.setdefault(name, []).append(latents.prepared(pixels, layout))
            if features is not None:
                parts.setdefault("features", []).append(features.prepared(pixels))
            if plan["classes"]:
                labels = [stream.label(crop.class_name) for crop in crops]
                parts.setdefault("labels", []).append(torch.tensor(labels, dtype=torch.int64))
            done, end = done + len(crops), first + len(crops)
            progress(done, total)
            if end % layout.shard_size == 0 or end == count:
                _write(paths[first // layout.shard_size], parts, plan)
                parts = {}


def _cut(stream: Crops, number: int, layout: Layout) -> Crop:
    if not layout.centre_crops:
        return stream.crop(number)
    assert isinstance(stream, ImageStream)
    return stream.centre(number)


def _write(path: Path, parts: dict[str, list[Tensor]], plan: dict[str, Any]) -> None:
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > _ABANDONED:
            left.unlink(missing_ok=True)
    tensors = {name: torch.cat(part).contiguous() for name, part in parts.items()}
    write_bytes(path, safetensors.torch.save(tensors, {"made_from": json.dumps(plan)}))


def _enter(folder: Path, plan: dict[str, Any]) -> None:
    """Makes the folder, or checks that it was begun from the same plan."""
    if (folder / PLAN).exists():
        _check(folder, plan)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RacError(f"{folder} is damaged or holds no prepared crops; delete it to prepare them again")
    else:
        make_folder(folder)
        write_bytes(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())


def _collection(found: Crops | Pictures) -> dict[str, Any]:
    """Returns the fingerprint and the classes of the pictures that crops are cut from, as JSON."""
    if isinstance(found, ImageStream):
        found = found.pictures
    if isinstance(found, Crops):  # read in its own order, so most of it is not known
        return {"pictures": {"count": None, "hash": None}, "classes": list(found.classes), "unlabelled": None}
    fingerprint, unlabelled = found.fingerprint(), None
    if found.classes:
        unlabelled = next((picture.description for picture in found if picture.class_name is None), None)
    pictures = {"count": fingerprint.count, "hash": fingerprint.hash}
    return {"pictures": pictures, "classes": list(found.classes), "unlabelled": unlabelled}


# ------------------------------------------------------------------------------------------------------------ reading


def _prepared(paths: Sequence[Path]) -> Path | None:
    """Returns the folder of prepared crops that `paths` is; None if it is none."""
    found = [path for path in map(home_expanded, paths) if (path / PLAN).is_file()]
    if found and len(paths) > 1:
        raise RacError(f"{found[0]} holds prepared crops, which cannot be combined with other paths; leave those out")
    return found[0] if found else None


def _is_whole(folder: Path, asked: dict[str, Any]) -> bool:
    """Returns whether every shard is there. Raises `RacError` if a shard was made otherwise."""
    if not (folder / PLAN).exists():
        return False
    _check(folder, asked)
    return all(path.exists() for path in (folder / _HELD_OUT, *_shards(folder, asked)))


def _check(folder: Path, asked: dict[str, Any]) -> None:
    found, asked = _read_plan(folder), {"features": None, **asked}
    if changed := differences(asked, {name: found.get(name) for name in asked}):
        raise RacError(
            f"{folder} was prepared with other settings: {'; '.join(changed)}; delete it to prepare it again"
        )


def _read_plan(folder: Path) -> dict[str, Any]:
    try:
        plan = read_json(folder / PLAN)
        if plan["format"] == _HEADER["format"] and plan["version"] < _HEADER["version"]:
            raise RacError(f"{folder} was prepared by an earlier version of rac; delete it to prepare it again")
        known = {name: plan[name] for name in _HEADER} == _HEADER
    except (TypeError, KeyError):
        known = False
    if known and {"data", "rng_seed", "teacher", "layout", "count", "pictures", "classes", "unlabelled"} <= plan.keys():
        return plan
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
    """First byte of the tensor in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, path: Path, plan: dict[str, Any], name: str) -> _Rows:
        """Returns tensor `name` of a file that is whole and made from `plan`. Raises `RacError` for another file."""
        header, length = _header(path, plan)
        try:
            found = header[name]
            return cls(path, length + found["data_offsets"][0], tuple(found["shape"]), _DTYPES[found["dtype"]])
        except KeyError:
            raise RacError(f"{path} lacks {name}; delete it to prepare it again") from None

    def read(self, first: int, count: int) -> Tensor:
        """Reads rows `first` to `first + count - 1`; safe in any thread."""
        row = math.prod(self.shape[1:])
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + first * row * self.dtype.itemsize)
            data = bytearray(count * row * self.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise RacError(f"{self.path} was shortened while it was read; prepare it again")
        return torch.frombuffer(data, dtype=self.dtype).view(count, *self.shape[1:])

    def all(self) -> Tensor:
        """Reads all rows."""
        return self.read(0, self.shape[0])


def _header(path: Path, plan: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns the header of a shard that is whole and made from `plan`, and its length. Raises `RacError`."""
    if not path.exists():
        raise RacError(f"{path} is missing: not all crops are prepared; run the same rac cache command again")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= path.stat().st_size else {}
        found = json.loads(header["__metadata__"]["made_from"])
        ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
        if 8 + length + max(ends) != path.stat().st_size:
            raise ValueError("cut short")
    except (OSError, KeyError, TypeError, ValueError):
        raise RacError(f"{path} is damaged or holds no prepared crops; delete it to prepare them again") from None
    if changed := differences(plan, found):
        raise RacError(f"{path} belongs to other crops: {'; '.join(changed)}; delete it to prepare it again")
    return header, 8 + length
