"""Export of a coder's two halves as single files for other runtimes: ONNX, or PyTorch's own exported programs.

The number of steps is fixed in the file, each step unrolled; batch, height and width stay free, an image's sides as
multiples of the factor. Files hold their own `Description`, the same JSON in either format.
"""

from __future__ import annotations

import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..coders.protocol import Coder
from ..errors import RacError, install_extra
from ..files import explained, write_bytes
from ..flow import Walk
from ..storage import weights_hash

Format = Literal["onnx", "torch-export"]
Part = Literal["encode", "decode"]
Latents = Literal["raw", "normalised"]

SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
KEY = "rac"
"""Name of a file's description: in ONNX's metadata, or as an exported program's extra file `rac.json`."""

LARGEST = 1 << 13
"""Most blocks on a side for which an exported program promises to work, from 2 on."""
LARGEST_BATCH = 63
"""Most images at once for which an exported program promises to work: diffusers' upsampling branches at 64.

An ONNX file promises nothing and takes more.
"""
LARGEST_MESSAGE = 1_900_000_000
"""Most bytes of weights that fit into one ONNX file (a protobuf message); more go to a file beside it."""


@dataclass(frozen=True)
class Description:
    """Description of an exported file: all one must know to use it."""

    part: Part
    steps: int | None
    """Number of steps, unrolled in the file; None for a coder that takes one pass."""
    latents: Latents
    """Kind of latents. `raw`: as the teacher's own network makes them. `normalised`: (raw - shift) * scale."""
    factor: int
    channels: int
    shift: float | list[float] | None
    """Shift of the latents: one number, or one per channel; None where there is one for each position."""
    scale: float | list[float] | None
    """Scale of the latents: one number, or one per channel; None where there is one for each position."""
    statistics: str
    """Hash of shift and scale, `rac.latents.Statistics.hash`."""
    coder: str
    weights: str
    """Hash of the coder's weights."""
    image_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the image, B 3 H W; a decoder's output is not clamped."""
    sides: str = "multiples of factor"


class Half(nn.Module):
    """One way of a coder as a module of one tensor, with sides that are multiples of f; nothing is checked."""

    def __init__(self, coder: Coder, walk: Walk | None, latents: Latents) -> None:
        super().__init__()
        self.coder, self.walk, self.latents = coder, walk, latents


class Encoding(Half):
    """A coder's encoder: image B 3 H W -> latent B c H/f W/f."""

    def forward(self, image: Tensor) -> Tensor:
        """Encodes an image B 3 H W to a latent B c H/f W/f."""
        coder = self.coder
        if self.walk is None and self.latents == "raw":
            return coder._moments(image)[:, : coder.spec.channels]
        latent = coder._encode(image, self.walk, "end").latent
        return latent if self.latents == "normalised" else coder.statistics.denormalise(latent)


class Decoding(Half):
    """A coder's decoder: latent B c h w -> image B 3 h*f w*f, not clamped."""

    def forward(self, latent: Tensor) -> Tensor:
        """Decodes a latent B c h w to an image B 3 h*f w*f, not clamped."""
        if self.latents == "raw":
            latent = self.coder.statistics.normalise(latent)
        return self.coder._decode(latent, self.walk, None, "end").image


# --------------------------------------------------------------------------------------------------- writing


def part_of(coder: Coder, part: Part, steps: int | None = None, latents: Latents = "normalised") -> nn.Module:
    """Returns the half of a coder to export: a module of one tensor, image or latent.

    - `coder`: the coder.
    - `part`: which half.
    - `steps`: the number of steps; None: the coder's own.
    - `latents`: "raw" or "normalised" latents.

    Raises `RacError` for steps below 1, for steps of a coder that takes one pass, and for decoding from noise, which
    would be of one size.
    """
    if latents not in get_args(Latents) or part not in get_args(Part):
        raise RacError(f"part {part!r} and latents {latents!r} must be encode or decode, and raw or normalised")
    walk = coder.walk(part, steps)
    if walk is None and steps is not None:
        raise RacError(f"a {type(coder).__name__} {part}s in one pass; leave out steps, or export a RAC")
    spec = coder.spec
    if part == "decode" and coder.noise_shape(torch.empty(1, spec.channels, 1, 1)) is not None:
        raise RacError(
            "this coder decodes from noise, which is drawn anew for each size and cannot be written to a file of free "
            "sizes; export its encode part alone"
        )
    return (Encoding if part == "encode" else Decoding)(coder, walk, latents).eval()


def describe(module: nn.Module, coder_name: str = "") -> Description:
    """Returns the description of a module made by `part_of`."""
    assert isinstance(module, Half)
    coder, per_position = module.coder, module.coder.statistics.shift.ndim == 3
    return Description(
        part="encode" if isinstance(module, Encoding) else "decode",
        steps=None if module.walk is None else module.walk.steps,
        latents=module.latents,
        factor=coder.spec.factor,
        channels=coder.spec.channels,
        shift=None if per_position else coder.statistics.shift.tolist(),
        scale=None if per_position else coder.statistics.scale.tolist(),
        statistics=coder.statistics.hash(),
        coder=coder_name or type(coder).__name__,
        weights=weights_hash(coder.state_dict()),
    )


def export(module: nn.Module, path: str | Path, format: Format = "onnx", coder_name: str = "") -> Description:
    """Writes a module made by `part_of` to `path`, completely or not at all, and returns its description.

    - `module`: the module.
    - `path`: the file to write.
    - `format`: the format of the file.
    - `coder_name`: the name of the coder in the description.

    Raises `RacError` where the extra is missing, the network cannot be exported, or the system refuses.
    """
    path, description = Path(path), describe(module, coder_name)
    if format == "onnx":
        need("onnx", "onnxscript")
    said = json.dumps(asdict(description))
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, (_example(description),), dynamic_shapes=(_free(description),))
            onnx_program = _to_onnx(program, description) if format == "onnx" else None
        except Exception as error:  # the exporters fail in many ways on what they do not know
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise RacError(f"torch cannot export this network ({reason}); try the other --format") from error
    written = io.BytesIO()  # torch itself ends the process where a disk is full
    if onnx_program is None:
        torch.export.save(program, written, extra_files={f"{KEY}.json": said})
    else:
        onnx_program.model.metadata_props[KEY] = said
        if _bytes(module) > LARGEST_MESSAGE:
            with explained(path):
                onnx_program.save(path, external_data=True)  # two files, the names of which must stay
            return description
        onnx_program.save(written, external_data=False)
    write_bytes(path, written.getvalue())
    return description


def _to_onnx(program: torch.export.ExportedProgram, description: Description) -> Any:
    into, out = names(description)
    result = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[into], output_names=[out])
    assert result is not None
    return result


def names(description: Description) -> tuple[str, str]:
    """Returns the names of the file's input and output."""
    return ("image", "latent") if description.part == "encode" else ("latent", "image")


def _example(description: Description) -> Tensor:
    # Sides of 4 and 6 blocks: not 1, which exporters take for a constant, and not alike.
    factor = description.factor
    if description.part == "encode":
        return torch.zeros(2, 3, 4 * factor, 6 * factor)
    return torch.zeros(2, description.channels, 4, 6)


def _free(description: Description) -> dict[int, Any]:
    batch = torch.export.Dim("batch", max=LARGEST_BATCH)
    down, across = (torch.export.Dim(name, min=2, max=LARGEST) for name in ("down", "across"))
    blocks = description.factor if description.part == "encode" else 1
    return {0: batch, 2: blocks * down, 3: blocks * across}


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def need(*modules: str) -> None:
    """Raises `RacError`, saying how to install them, unless the extra's modules are there."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise RacError(f"this needs {' and '.join(missing)}; {install_extra('export')}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters' messages on their work and on what is not installed; errors still come through."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


# --------------------------------------------------------------------------------------------------- reading


def read_description(path: str | Path) -> dict[str, Any]:
    """Reads the description in an exported file, as plain JSON. Raises `RacError` for another file."""
    path = Path(path)
    if path.suffix == SUFFIX["torch-export"]:
        extra = {f"{KEY}.json": ""}
        torch.export.load(path, extra_files=extra)
        said = extra[f"{KEY}.json"]
    else:
        need("onnxruntime")
        said = _session(path).get_modelmeta().custom_metadata_map.get(KEY, "")
    if not said:
        raise RacError(f"{path} was not written by rac export; it has no description under {KEY!r}")
    return json.loads(said)


def load(path: str | Path) -> Callable[[Tensor], Tensor]:
    """Loads an exported file as a function of one tensor, on the CPU: by ONNX Runtime, or by PyTorch."""
    path = Path(path)
    if path.suffix == SUFFIX["torch-export"]:
        return torch.export.load(path).module()
    need("onnxruntime")
    session = _session(path)
    (given,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.contiguous().numpy()})[0])


def _session(path: Path) -> Any:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Check:
    """Comparison of an exported file and the module it was made from."""

    largest: tuple[float, ...]
    """Largest absolute difference, for each input."""
    theirs: tuple[float, ...]
    """Seconds that the file takes, for each input: the median of some runs, taken in turns with the module's."""
    ours: tuple[float, ...]
    """Seconds that the module takes, for each input: the median of the same number of runs."""


@torch.no_grad()
def check(module: nn.Module, path: str | Path, inputs: Sequence[Tensor], runs: int = 3) -> Check:
    """Runs the file and the module on the same inputs, in turns, and returns their differences and times.

    - `module`: the module that was exported.
    - `path`: the file.
    - `inputs`: tensors to run on.
    - `runs`: number of runs on each input.
    """
    written = load(path)
    largest, theirs, ours = [], [], []
    for x in inputs:
        largest.append(float((written(x) - module(x)).abs().max()))  # this warms both up
        turns = [(_seconds(written, x), _seconds(module, x)) for _ in range(runs)]
        theirs.append(median(turn[0] for turn in turns))
        ours.append(median(turn[1] for turn in turns))
    return Check(tuple(largest), tuple(theirs), tuple(ours))


def _seconds(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    function(x)
    return time.perf_counter() - start
