"""Names and directories -> coders, and back."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from .coders.protocol import Coder
from .coders.rac import HEADER, RAC, is_drop_in
from .config import read_json
from .errors import RacError, WeightsError
from .storage import CONFIG

SHIPPED = Path(__file__).parent / "weights"


def available() -> list[str]:
    """Names of the coders that ship with the package, for `load`."""
    return sorted(config.parent.name for config in SHIPPED.glob(f"*/{CONFIG}"))


def load(name_or_dir: str | Path) -> Coder:
    """A coder, ready to use: float32, on the CPU, in evaluation mode, parameters frozen.

    `name_or_dir` is one of `available()`, a directory written by `save` or by diffusers (AutoencoderKL,
    AutoencoderTiny, AutoencoderDC, AutoencoderRAC), the folder of a training run, a TAESD-family .pth file, or a name
    on the Hugging Face hub. Raises `WeightsError` for an unknown name (naming the near ones), a directory without
    weights, and weights that do not fit.
    """
    from .coders.teacher import download, load_teacher

    name, path = str(name_or_dir), Path(name_or_dir).expanduser()
    if name in available() and not path.exists():
        path = SHIPPED / name
    elif not path.exists() and _on_hub(name):
        path = download(name)
    if (path / "recipe.json").is_file() and (path / "coder").is_dir():
        path = path / "coder"
    if path.is_dir() and (_is_rac(path) or is_drop_in(path)):
        return RAC.load(path)
    if path.exists():
        return load_teacher(path)
    near = difflib.get_close_matches(name, available(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped are {', '.join(available()) or 'none'}"
    raise WeightsError(
        f"no coder {name!r}: neither a directory, nor a hub name (organisation/name), nor shipped; {hint}"
    )


def save(coder: Coder, directory: str | Path) -> None:
    """Write `coder` to `directory` (config.json and safetensors), whole or not at all; `load` gives back the same bits.

    Raises `WeightsError` where the system refuses.
    """
    if not isinstance(coder, Coder):
        raise RacError(f"expected a coder, such as rac.load gives, not {type(coder).__name__}")
    coder.save(directory)


def _is_rac(directory: Path) -> bool:
    config = directory / CONFIG
    if not config.is_file():
        return False
    data = read_json(config)
    return isinstance(data, dict) and data.get("format") == HEADER["format"]


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/"))
