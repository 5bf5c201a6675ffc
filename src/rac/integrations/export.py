"""Export of a coder's two halves as single files for other runtimes: ONNX, or PyTorch's own exported programs.

The number of steps is fixed in the file, each step unrolled; batch, height and width stay free, an image's sides as
multiples of the factor. Files hold their own `Description`, the same JSON in either format.
"""

from __future__ import annotations

import contextlib
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

LEAST = (2, 3)
"""Fewest blocks on a side for which an exported program promises to work: the second for networks with strides beyond
the factor, which make a single place of two blocks."""
LARGEST = 1 << 13
"""Most blocks on a side for which an exported program promises to work."""
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
    noise: int | None
    """Channels of the standard normal noise, B channels h*f w*f, that a decoder takes after the latent; None: it takes
    none.
    """
    statistics: str
    """Hash of shift and scale, `rac.latents.Statistics.hash`."""
    coder: str
    weights: str
    """Hash of the coder's weights."""
    image_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the image, B 3 H W; a decoder's output is not clamped."""
    sides: str = "multiples of factor"


class Half(nn.Module):
    """One way of a coder as a module of tensors, with sides that are multiples of f; nothing is checked."""

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
    """A coder's decoder: latent B c h w, and noise if the coder takes any -> image B 3 h*f w*f, not clamped."""

    def forward(self, latent: Tensor, noise: Tensor | None = None) -> Tensor:
        """Decodes a latent B c h w, from noise B C h*f w*f if the coder takes any, to an image B 3 h*f w*f."""
        if self.latents == "raw":
            latent = self.coder.statistics.normalise(latent)
        return self.coder._decode(latent, self.walk, noise, "end").image


# --------------------------------------------------------------------------------------------------- writing


def part_of(coder: Coder, part: Part, steps: int | None = None, latents: Latents = "normalised") -> nn.Module:
    """Returns the half of a coder to export: a module of an image, or of a latent and the noise of coders that take it.

    - `coder`: the coder.
    - `part`: which half.
    - `steps`: the number of steps; None: the coder's own.
    - `latents`: "raw" or "normalised" latents.

    Raises `RacError` for steps below 1, and for steps of a coder that takes one pass.
    """
    if latents not in get_args(Latents) or part not in get_args(Part):
        raise RacError(f"part {part!r} and latents {latents!r} must be encode or decode, and raw or normalised")
    walk = coder.walk(part, steps)
    if walk is None and steps is not None:
        raise RacError(f"a {type(coder).__name__} {part}s in one pass; leave out steps, or export a RAC")
    return (Encoding if part == "encode" else Decoding)(coder, walk, latents).eval()


def describe(module: nn.Module, coder_name: str = "") -> Description:
    """Returns the description of a module made by `part_of`."""
    assert isinstance(module, Half)
    coder, per_position = module.coder, module.coder.statistics.shift.ndim == 3
    part: Part = "encode" if isinstance(module, Encoding) else "decode"
    noise = coder.noise_shape(torch.empty(1, coder.spec.channels, 1, 1)) if part == "decode" else None
    return Description(
        part=part,
        steps=None if module.walk is None else module.walk.steps,
        latents=module.latents,
        factor=coder.spec.factor,
        channels=coder.spec.channels,
        shift=None if per_position else coder.statistics.shift.tolist(),
        scale=None if per_position else coder.statistics.scale.tolist(),
        noise=None if noise is None else noise[1],
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
            program = _exported(module, description)
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


def _exported(module: nn.Module, description: Description) -> torch.export.ExportedProgram:
    """Returns the program of a module, with free sides from as few blocks on as it allows."""
    for least in LEAST[:-1]:
        with contextlib.suppress(torch._dynamo.exc.UserError):
            return torch.export.export(module, _example(description), dynamic_shapes=_free(description, least))
    return torch.export.export(module, _example(description), dynamic_shapes=_free(description, LEAST[-1]))


def _to_onnx(program: torch.export.ExportedProgram, description: Description) -> Any:
    *into, out = names(description)
    result = torch.onnx.export(program, dynamo=True, verbose=False, input_names=into, output_names=[out])
    assert result is not None
    return result


def names(description: Description) -> tuple[str, ...]:
    """Returns the names of the file's inputs, then that of its output."""
    if description.part == "encode":
        return ("image", "latent")
    return ("latent", "image") if description.noise is None else ("latent", "noise", "image")


def _example(description: Description) -> tuple[Tensor, ...]:
    # Sides of 4 and 6 blocks: not 1, which exporters take for a constant, and not alike.
    factor = description.factor
    if description.part == "encode":
        return (torch.zeros(2, 3, 4 * factor, 6 * factor),)
    latent = torch.zeros(2, description.channels, 4, 6)
    if description.noise is None:
        return (latent,)
    return latent, torch.zeros(2, description.noise, 4 * factor, 6 * factor)


def _free(description: Description, least: int) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch", max=LARGEST_BATCH)
    down, across = (torch.export.Dim(name, min=least, max=LARGEST) for name in ("down", "across"))
    pixels = {0: batch, 2: description.factor * down, 3: description.factor * across}
    if description.part == "encode":
        return (pixels,)
    blocks = {0: batch, 2: down, 3: across}
    return (blocks,) if description.noise is None else (blocks, pixels)


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


def load(path: str | Path) -> Callable[..., Tensor]:
    """Loads an exported file as a function of its inputs, on the CPU: by ONNX Runtime, or by PyTorch."""
    path = Path(path)
    if path.suffix == SUFFIX["torch-export"]:
        return torch.export.load(path).module()
    need("onnxruntime")
    session = _session(path)
    given = [one.name for one in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        arrays = {name: x.contiguous().numpy() for name, x in zip(given, tensors, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return run


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
def check(module: nn.Module, path: str | Path, inputs: Sequence[tuple[Tensor, ...]], runs: int = 3) -> Check:
    """Runs the file and the module on the same inputs, in turns, and returns their differences and times.

    - `module`: the module that was exported.
    - `path`: the file.
    - `inputs`: the inputs of each run.
    - `runs`: number of runs on each input.
    """
    written = load(path)
    largest, theirs, ours = [], [], []
    for x in inputs:
        largest.append(float((written(*x) - module(*x)).abs().max()))  # this warms both up
        turns = [(_seconds(written, x), _seconds(module, x)) for _ in range(runs)]
        theirs.append(median(turn[0] for turn in turns))
        ours.append(median(turn[1] for turn in turns))
    return Check(tuple(largest), tuple(theirs), tuple(ours))


def _seconds(function: Callable[..., Tensor], x: tuple[Tensor, ...]) -> float:
    start = time.perf_counter()
    function(*x)
    return time.perf_counter() - start
