"""Loading coders by name or directory, and saving them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from .coders.adapter import DeepCompressionCoder, TinyCoder
from .coders.klvae import KLVAE
from .coders.protocol import Coder
from .coders.rac import DROP_IN, FORMAT, RAC
from .coders.taesd import TAESD
from .errors import RacError, WeightsError, check_path
from .runtime import plain_defaults
from .storage import CONFIG, DIFFUSERS, WEIGHTS, read_settings

SHIPPED = Path(__file__).parent / "weights"

PRODUCTS = ("coder",)
"""Names of the folder inside a training run's folder that holds the trained product."""

LOADERS: dict[str, Callable[[Path], Coder]] = {
    FORMAT: RAC.load,
    DROP_IN: RAC.load_drop_in,
    "AutoencoderKL": KLVAE.load,
    "AutoencoderTiny": TinyCoder.load,
    "AutoencoderDC": DeepCompressionCoder.load,
    "TAESD": TAESD.load,
}
"""The function that reads a coder's directory, by the `format` or `_class_name` in its config.json."""


def available() -> list[str]:
    """Returns the names of the coders that ship with the package, as `load` takes them."""
    return sorted(config.parent.name for config in SHIPPED.glob(f"*/{CONFIG}"))


def load(name_or_dir: str | Path) -> Coder:
    """Loads a coder, ready to use: float32, on the CPU, in evaluation mode, parameters frozen.

    `name_or_dir` is one of:

    - a name in `available()`;
    - a directory written by `save`, or by diffusers (AutoencoderKL, AutoencoderTiny, AutoencoderDC, AutoencoderRAC;
      with whole or sharded weights, or a variant of them);
    - the directory of a diffusers pipeline, whose `vae` is loaded;
    - the folder of a training run;
    - a TAESD-family .pth file, or a directory with one such pair;
    - a name on the Hugging Face hub (HF_HUB_OFFLINE is respected).

    Raises `WeightsError` for an unknown name (naming similar ones), a directory without weights, and weights that do
    not fit.
    """
    if not isinstance(name_or_dir, (str, os.PathLike)):
        raise WeightsError(
            f"expected the name or the directory of a coder, such as 'rac-64', not {name_or_dir!r:.80}; {_shipped()}"
        )
    name, path = str(name_or_dir), Path(name_or_dir).expanduser()
    if name in available() and not path.exists():
        path = SHIPPED / name
    elif not path.exists() and _on_hub(name):
        path = download(name)
    if not path.exists():
        near = difflib.get_close_matches(name, available(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else _shipped()
        raise WeightsError(
            f"there is no coder {name!r}: it is not a directory, a hub name (organisation/name) or a shipped coder; "
            f"{hint}"
        )
    path = product(path)
    if (path / "model_index.json").is_file() and (path / "vae").is_dir():
        path = path / "vae"
    with plain_defaults():
        return _loader(path)(path).eval().requires_grad_(False)


def _shipped() -> str:
    return f"the shipped coders are {', '.join(available()) or 'none'}"


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
    data = read_settings(path)
    kind = data.get("format", data.get("_class_name"))
    if not isinstance(kind, str) or kind not in LOADERS:
        raise WeightsError(
            f"cannot tell the coder from {path / CONFIG}: its format or _class_name is {kind!r}, expected one of "
            f"{', '.join(LOADERS)}"
        )
    return LOADERS[kind]


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/"))


def download(name: str) -> Path:
    """Returns the local folder of a coder on the Hugging Face hub, downloading it unless the hub's cache has it.

    Raises `WeightsError` if it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    ends = (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")
    files = [CONFIG, WEIGHTS, *(DIFFUSERS + end for end in ends)]
    patterns = ["model_index.json", *files, *(f"vae/{file}" for file in files)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the network fails in many ways, all with the same mend
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(
            f"{name} is not a directory, and cannot be downloaded from the hub ({reason}); check the name and the "
            "connection"
        ) from error
