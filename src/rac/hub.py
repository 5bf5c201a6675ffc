"""Names and directories -> coders, and back."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from torch import Tensor

from .coders.adapter import WEIGHTS, Adapter, DeepCompressionCoder, TinyCoder
from .coders.klvae import KLVAE
from .coders.protocol import Coder
from .coders.rac import DROP_IN, FORMAT, RAC
from .coders.taesd import TAESD
from .config import read_json
from .errors import RacError, WeightsError
from .storage import CONFIG, fit_tensors, read_tensors
from .storage import WEIGHTS as RAC_WEIGHTS

SHIPPED = Path(__file__).parent / "weights"

KINDS: dict[str, type[Adapter]] = {
    "AutoencoderKL": KLVAE,
    "AutoencoderTiny": TinyCoder,
    "AutoencoderDC": DeepCompressionCoder,
    "TAESD": TAESD,
}
"""Coder for each `_class_name` a config.json may hold."""


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
    name, path = str(name_or_dir), Path(name_or_dir).expanduser()
    if name in available() and not path.exists():
        path = SHIPPED / name
    elif not path.exists() and _on_hub(name):
        path = download(name)
    if (path / "recipe.json").is_file() and (path / "coder").is_dir():
        path = path / "coder"
    if path.is_dir() and _says(path, "format") == FORMAT:
        return RAC.load(path)
    if path.is_dir() and _says(path, "_class_name") == DROP_IN:
        return RAC.load_drop_in(path)
    if path.exists():
        return load_adapter(path)
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


def _says(directory: Path, key: str) -> object:
    config = directory / CONFIG
    data = read_json(config) if config.is_file() else None
    return data.get(key) if isinstance(data, dict) else None


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/"))


def load_adapter(name_or_dir: str | Path) -> Adapter:
    """Load a coder in float32, in evaluation mode and frozen (`requires_grad_(False)`).

    `name_or_dir` is a directory with config.json and safetensors, a pipeline's directory (its `vae` is taken), a
    TAESD-family .pth file or a directory with one such pair, or a hub name "org/name" (HF_HUB_OFFLINE is respected).
    Raises `WeightsError` for anything else.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_file():
        coder: Adapter = _from_pth(path)
    else:
        coder = _from_directory(path if path.is_dir() else download(str(name_or_dir)))
    return coder.eval().requires_grad_(False)


def _from_directory(directory: Path) -> Adapter:
    if (directory / "model_index.json").is_file() and (directory / "vae").is_dir():
        directory = directory / "vae"
    source = directory / CONFIG
    if not source.is_file():
        return _from_pth_directory(directory)
    weights = _weights_file(directory)
    try:
        config = read_json(source)
        coder = _kind(config).from_config(config)
    except RacError as error:
        raise WeightsError(f"cannot tell the coder from {source}: {error}") from error
    tensors, _ = read_tensors(weights)
    fit_tensors(coder.network, _modern_names(tensors), str(weights))
    return coder


def _kind(config: object) -> type[Adapter]:
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in KINDS:
        raise WeightsError(f"its _class_name is {name!r}, expected one of {', '.join(KINDS)}")
    return KINDS[name]


def _weights_file(directory: Path) -> Path:
    if (directory / WEIGHTS).is_file():
        return directory / WEIGHTS
    pickles = sorted(file.name for file in directory.glob("*.bin"))
    if pickles:
        raise WeightsError(
            f"{directory} holds only pickled weights ({pickles[0]}), which can run code when read; "
            "convert them with diffusers: save_pretrained(directory, safe_serialization=True)"
        )
    raise WeightsError(f"{directory} has a config.json but no weights; expected {WEIGHTS} beside it")


def _modern_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention tensors under today's names; files from before diffusers 0.15, such as sd-vae-ft-mse, have others."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    return {pattern.sub(lambda match: names[match[0]], name): tensor for name, tensor in tensors.items()}


def _from_pth_directory(directory: Path) -> TAESD:
    encoders = sorted(directory.glob("*_encoder.pth"))
    if not encoders:
        raise WeightsError(
            f"{directory} holds no coder; expected {CONFIG} and {WEIGHTS}, or NAME_encoder.pth and NAME_decoder.pth"
        )
    if len(encoders) > 1:
        names = ", ".join(file.name for file in encoders)
        raise WeightsError(f"{directory} holds several TAESD pairs; give the path of one file: {names}")
    return _from_pth(encoders[0])


def _from_pth(path: Path) -> TAESD:
    name = re.fullmatch(r"(.*)_(?:encoder|decoder)\.pth", path.name)
    if name is None:
        raise WeightsError(
            f"{path} is no teacher; expected a directory, or a file NAME_encoder.pth or NAME_decoder.pth"
        )
    return TAESD.from_files(path.with_name(f"{name[1]}_encoder.pth"), path.with_name(f"{name[1]}_decoder.pth"))


def download(name: str) -> Path:
    """Fetch a hub repository's coder, or find it in the hub's cache. Raises `WeightsError`."""
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", CONFIG, WEIGHTS, RAC_WEIGHTS, f"vae/{CONFIG}", f"vae/{WEIGHTS}"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the network fails in many ways, all with the same mend
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(
            f"{name} is no directory here, and the hub did not give it ({reason}); check the name and the connection"
        ) from error
