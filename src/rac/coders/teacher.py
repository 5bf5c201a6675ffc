"""Teachers: autoencoders trained elsewhere, loaded by name or directory and frozen.

diffusers' AutoencoderKL, AutoencoderTiny and AutoencoderDC, TAESD-family .pth files, and what `Adapter.save` wrote.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ..config import read_json
from ..errors import RacError, WeightsError
from ..storage import CONFIG, fit_tensors, read_tensors
from ..storage import WEIGHTS as RAC_WEIGHTS
from .adapter import WEIGHTS, Adapter, DiffusersCoder
from .klvae import KLVAE
from .taesd import TAESD


class TinyCoder(DiffusersCoder):
    """A coder around diffusers' AutoencoderTiny, the TAESD family in diffusers' clothes ([-1, 1] outside)."""

    network_class = "AutoencoderTiny"

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latents


class DeepCompressionCoder(DiffusersCoder):
    """A coder around diffusers' AutoencoderDC (Chen et al. 2025): factors of 32 to 128, no posterior."""

    network_class = "AutoencoderDC"

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latent


KINDS: dict[str, type[Adapter]] = {
    "AutoencoderKL": KLVAE,
    "AutoencoderTiny": TinyCoder,
    "AutoencoderDC": DeepCompressionCoder,
    "TAESD": TAESD,
}
"""Coder for each `_class_name` a config.json may hold."""


def load_teacher(name_or_dir: str | Path) -> Adapter:
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
