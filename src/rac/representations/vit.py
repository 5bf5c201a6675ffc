"""Vision transformers as representations: DINOv2, SigLIP 2 and MAE, by the package transformers.

Oquab et al. (arXiv 2304.07193) and, with registers, Darcet et al. (arXiv 2309.16588); Tschannen et al. (arXiv
2502.14786); He et al. (arXiv 2111.06377). They are read from a directory as transformers saves it, or by their name on
the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError, install_extra
from .representation import IMAGENET, Representation


@dataclass(frozen=True)
class Family:
    """How the models of one architecture are used."""

    model: str
    """Class of transformers."""
    norm: str
    """Name of the final layer norm."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    """Mean and deviation of pixels in [0, 1]."""
    has_class: bool = True
    """Whether a class token comes before those of the patches."""
    interpolated: bool = True
    """Whether the model has to be asked to interpolate its positions; otherwise it always does."""
    masked: bool = False
    """Whether the model drops tokens at random, unless told otherwise."""


_SIGLIP = Family("SiglipVisionModel", "post_layernorm", ((0.5,) * 3, (0.5,) * 3), has_class=False)

FAMILIES: dict[str, Family] = {
    "dinov2": Family("Dinov2Model", "layernorm", interpolated=False),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "layernorm", interpolated=False),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit_mae": Family("ViTMAEModel", "layernorm", masked=True),
}
"""The architectures by the `model_type` in their config.json."""

PUBLISHED: dict[str, str] = {
    "dinov2-s": "facebook/dinov2-with-registers-small",
    "dinov2-b": "facebook/dinov2-with-registers-base",
    "dinov2-l": "facebook/dinov2-with-registers-large",
    "siglip2-b": "google/siglip2-base-patch16-256",
    "mae-b": "facebook/vit-mae-base",
}
"""Names on the Hugging Face hub of the models that have a short name here."""


class VisionTransformer(Representation):
    """The patch tokens of a vision transformer after its final layer norm, without class and register tokens.

    - `model`: a model of transformers.
    - `kind`: its `model_type`, one of `FAMILIES`.
    - `affine`: keep scale and shift of the final layer norm, as REPA does. Without them, as in RAE, every token has
      mean 0 and variance 1 over its channels.
    """

    def __init__(self, model: Any, kind: str, *, affine: bool = True) -> None:
        family, config = FAMILIES[kind], model.config
        super().__init__(config.hidden_size, config.patch_size, family.statistics)
        self.family = family
        self.model = model
        registers: int = config.num_register_tokens if kind == "dinov2_with_registers" else 0
        self.dropped = family.has_class + registers
        if family.masked:
            config.mask_ratio = 0.0
        if not affine:
            norm = next(part for name, part in model.named_modules() if name.rpartition(".")[2] == family.norm)
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, name_or_dir: str | Path, *, affine: bool = True) -> VisionTransformer:
        """Loads a model from a directory, or by its name on the hub: float32, on the CPU, frozen.

        - `name_or_dir`: a directory that transformers' `save_pretrained` wrote, a name on the hub (HF_HUB_OFFLINE is
          respected), or a short name of `PUBLISHED`.
        - `affine`: keep scale and shift of the final layer norm.

        Raises `WeightsError` if transformers is not installed, if there is no such model or it lacks weights, and for
        an architecture that is not one of `FAMILIES`.
        """
        source = PUBLISHED.get(str(name_or_dir), str(Path(name_or_dir).expanduser()))
        try:
            import transformers
        except ImportError:
            raise WeightsError(
                f"{name_or_dir} needs transformers, which is not installed; {install_extra('representations')}"
            ) from None
        with _quiet(transformers):
            kind = _kind(transformers, source)
            model, found = _called(getattr(transformers, FAMILIES[kind].model), source, output_loading_info=True)
        if missing := sorted(map(str, found["missing_keys"])):
            raise WeightsError(
                f"{source} lacks {len(missing)} tensors of a {kind}, such as {missing[0]}; save or download it again"
            )
        return cls(model.float(), kind, affine=affine)

    def _tokens(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        further: dict[str, Any] = {"interpolate_pos_encoding": True} if self.family.interpolated else {}
        if self.family.masked:
            # Tokens are sorted by this noise even when none is masked; float32 tells all of them apart.
            order = torch.arange(rows * columns, dtype=torch.float32, device=pixels.device)
            further["noise"] = order.expand(len(pixels), -1)
        hidden: Tensor = self.model(pixels, **further).last_hidden_state
        return hidden[:, self.dropped :].transpose(1, 2).unflatten(2, (rows, columns))


def _kind(transformers: Any, source: str) -> str:
    kind = _called(transformers.AutoConfig, source).model_type
    if kind not in FAMILIES:
        raise WeightsError(
            f"{source} is a {kind}, which is not known as a representation; expected one of {', '.join(FAMILIES)}"
        )
    return kind


def _called(loader: Any, source: str, **further: Any) -> Any:
    """Returns `loader.from_pretrained(source)`, whose many errors become one."""
    try:
        return loader.from_pretrained(source, **further)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(
            f"{source} cannot be read as a model of transformers ({reason}); give a directory that its save_pretrained "
            "wrote, or a name on the hub and a connection"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silences what transformers says of the weights that are not needed, such as those of a text encoder."""
    before = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.logging.enable_progress_bar()
