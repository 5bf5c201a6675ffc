"""Loading coders and generators by name or directory, and saving them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from .coders import dgae
from .coders.adapter import DeepCompressionCoder, TinyCoder
from .coders.klvae import KLVAE
from .coders.protocol import Coder
from .coders.rac import DROP_IN, FORMAT, RAC
from .coders.rae import FORMAT as RAE_FORMAT
from .coders.rae import RAE
from .coders.rae_public import DIFFUSERS_CLASS, load_diffusers
from .coders.taesd import TAESD
from .errors import RacError, WeightsError, check_path
from .generators.flow import DROP_IN as FLOW_DROP_IN
from .generators.flow import FORMAT as FLOW_GENERATOR
from .generators.flow import OWN_CODER, FlowGenerator
from .generators.protocol import LatentGenerator
from .runtime import plain_defaults
from .storage import CONFIG, DIFFUSERS, WEIGHTS, read_settings

SHIPPED = Path(__file__).parent / "weights"

PRODUCTS = ("coder", "generator")
"""Names of the folder inside a training run's folder that holds the trained product."""

LOADERS: dict[str, Callable[[Path], Coder]] = {
    FORMAT: RAC.load,
    DROP_IN: RAC.load_drop_in,
    "AutoencoderKL": KLVAE.load,
    "AutoencoderTiny": TinyCoder.load,
    "AutoencoderDC": DeepCompressionCoder.load,
    "TAESD": TAESD.load,
    dgae.FORMAT: dgae.DGAE.load,
    dgae.DROP_IN: dgae.DGAE.load_drop_in,
    RAE_FORMAT: RAE.load,
    DIFFUSERS_CLASS: load_diffusers,
}
"""The function that reads a coder's directory, by the `format` or `_class_name` in its config.json."""

GENERATORS: dict[str, Callable[[Path], LatentGenerator]] = {
    FLOW_GENERATOR: FlowGenerator.load,
    FLOW_DROP_IN: FlowGenerator.load_drop_in,
}
"""The function that reads a generator's directory, by the `format` or `_class_name` in its config.json."""


def available() -> list[str]:
    """Returns the names of the coders that ship with the package, as `load` takes them."""
    return sorted(folder.name for folder in _shipped() if _kind(folder) not in GENERATORS)


def available_generators() -> list[str]:
    """Returns the names of the generators that ship with the package, as `load_generator` takes them."""
    return sorted(folder.name for folder in _shipped() if _kind(folder) in GENERATORS)


def _shipped() -> list[Path]:
    return [config.parent for config in SHIPPED.glob(f"*/{CONFIG}")]


def load(name_or_dir: str | Path) -> Coder:
    """Loads a coder, ready to use: float32, on the CPU, in evaluation mode, parameters frozen.

    `name_or_dir` is one of:

    - a name in `available()`;
    - a directory written by `save`, or by diffusers (AutoencoderKL, AutoencoderTiny, AutoencoderDC, AutoencoderRAC,
      AutoencoderDGAE, AutoencoderRAE; with whole or sharded weights, or a variant of them);
    - the directory of a diffusers pipeline, whose `vae` is loaded;
    - the folder of a training run;
    - the directory of a generator that was trained together with its coder (REPA-E), whose coder is loaded;
    - a TAESD-family .pth file, or a directory with one such pair;
    - a name on the Hugging Face hub (HF_HUB_OFFLINE is respected).

    Raises `WeightsError` for an unknown name (naming similar ones), a directory without weights, and weights that do
    not fit.
    """
    path = _part(_found(name_or_dir, "coder", available()), "vae")
    if _kind(path) in GENERATORS and (path / OWN_CODER).is_dir():
        path = path / OWN_CODER
    with plain_defaults():
        return _loader(path)(path).eval().requires_grad_(False)


def load_generator(name_or_dir: str | Path) -> LatentGenerator:
    """Loads a generator of latents, ready to use: float32, on the CPU, in evaluation mode, parameters frozen.

    `name_or_dir` is a name in `available_generators()`, a directory that a generator's `save` wrote, the folder of a
    training run, the directory of a `FlowGeneratorPipeline`, or a name on the Hugging Face hub. Raises `WeightsError`
    for an unknown name (naming similar ones), a directory that holds no generator, and weights that are missing or do
    not fit.
    """
    path = _part(_found(name_or_dir, "generator", available_generators()), "transformer")
    kind = _kind(path)
    if kind not in GENERATORS:
        raise WeightsError(
            f"{path} holds no generator of latents; give the folder of a training run of one, or what its save wrote"
        )
    with plain_defaults():
        return GENERATORS[kind](path)


def is_generator(name_or_dir: str | Path) -> bool:
    """Returns whether a name or a directory is that of a generator, which `load_generator` loads, not of a coder.

    Raises `WeightsError` if there is neither of this name.
    """
    return _kind(_found(name_or_dir, "model", sorted([*available(), *available_generators()]))) in GENERATORS


def _found(name_or_dir: str | Path, what: str, shipped: list[str]) -> Path:
    """Returns the folder, or the file, of a coder or a generator, downloaded if the hub has it.

    Raises `WeightsError` if it is not found.
    """
    if not isinstance(name_or_dir, (str, os.PathLike)):
        raise WeightsError(
            f"expected the name or the directory of a {what}, not {name_or_dir!r:.80}; {_listed(what, shipped)}"
        )
    name, path = str(name_or_dir), Path(name_or_dir).expanduser()
    if not path.exists() and any(name == folder.name for folder in _shipped()):
        path = SHIPPED / name
    elif not path.exists() and _on_hub(name):
        path = download(name)
    if not path.exists():
        near = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else _listed(what, shipped)
        raise WeightsError(
            f"there is no {what} {name!r}: it is not a directory, a hub name (organisation/name) or a shipped {what}; "
            f"{hint}"
        )
    return product(path)


def _part(path: Path, name: str) -> Path:
    """Returns the folder of a part of a diffusers pipeline; `path` itself, if it is no pipeline that has this part."""
    return path / name if (path / "model_index.json").is_file() and (path / name).is_dir() else path


def _listed(what: str, shipped: list[str]) -> str:
    return f"the shipped {what}s are {', '.join(shipped) or 'none'}"


def product(path: Path) -> Path:
    """Returns the folder of the trained product if `path` is a training run's folder, else `path` itself."""
    if (path / "recipe.json").is_file():
        return next((path / name for name in PRODUCTS if (path / name).is_dir()), path)
    return path


def save(coder: Coder, directory: str | Path) -> None:
    """Writes `coder` to `directory` (config.json and safetensors), completely or not at all.

    `load` reads it back bit for bit. Raises `WeightsError` if the files cannot be written.
    """
    if not isinstance(coder, Coder):
        raise RacError(f"expected a coder, such as rac.load gives, not {type(coder).__name__}")
    check_path(directory, WeightsError)
    coder.save(directory)


def _loader(path: Path) -> Callable[[Path], Coder]:
    if not (path / CONFIG).is_file():
        return TAESD.load_pth
    kind = _kind(path)
    if kind in GENERATORS:
        raise WeightsError(
            f"{path} holds a generator of latents, not a coder; rac.load_generator and rac generate use it"
        )
    if kind not in LOADERS:
        raise WeightsError(
            f"cannot tell the coder from {path / CONFIG}: its format or _class_name is {kind!r}, expected one of "
            f"{', '.join(LOADERS)}"
        )
    return LOADERS[kind]


def _kind(path: Path) -> str:
    """Returns the `format`, or else the `_class_name`, in the config.json of a folder; "" where there is none.

    Raises `WeightsError` for a file that is not JSON.
    """
    if not (path / CONFIG).is_file():
        return ""
    data = read_settings(path)
    kind = data.get("format", data.get("_class_name"))
    return kind if isinstance(kind, str) else ""


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/"))


def download(name: str) -> Path:
    """Returns the local folder of a coder on the Hugging Face hub, downloading it unless the hub's cache has it.

    Raises `WeightsError` if it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    ends = (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")
    files = [CONFIG, WEIGHTS, *(DIFFUSERS + end for end in ends)]
    parts = ("vae", "transformer", OWN_CODER)
    patterns = ["model_index.json", *files, *(f"{part}/{file}" for part in parts for file in files)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the network fails in many ways, all with the same mend
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(
            f"{name} is not a directory, and cannot be downloaded from the hub ({reason}); check the name and the "
            "connection"
        ) from error
