"""Cost of networks: parameters and multiply-accumulates (MACs), batch 1.

MACs are half of torch's floating point operations; the papers print them as "GFLOPs". Convolutions, linear layers and
the two products of attention count; normalisation, activations and additions do not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..coders.protocol import Coder
from ..flow.grid import steps_in_words
from ..generators.protocol import LatentGenerator
from ..latents import LatentSpec

SD_WIDTHS = (128, 256, 512, 512)
"""Widths of the SD-VAE's encoder and decoder, at strides 1, 2, 4, 8."""

SCALED_WIDTHS = {0.1: (40, 81, 162, 162), 0.2: (57, 114, 229, 229), 0.3: (70, 140, 281, 281)}
"""Widths of SD-VAE decoders with the given fraction of its parameters, all in one proportion, rounded.

They share no divisor that group normalisation could use, so they are for counting; `fields.LdmFieldConfig.scaled`
rounds to widths that train.
"""


class MacCounter:
    """Counts the MACs of everything run inside: `with MacCounter() as counter: ...`, then `counter.macs`.

    On a CPU, torch's own counter misses fused attention; this one knows it.
    """

    def __init__(self) -> None:
        fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops}
        self._counter = FlopCounterMode(display=False, custom_mapping=fused)

    def __enter__(self) -> MacCounter:
        self._counter.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._counter.__exit__(*raised)

    @property
    def macs(self) -> int:
        """MACs counted so far, the products of attention included."""
        return sum(self._flops().values()) // 2

    @property
    def attention_macs(self) -> int:
        """The part of `macs` that is query times key and weights times value."""
        return sum(flops for name, flops in self._flops().items() if "attention" in name or "bmm" in name) // 2

    def _flops(self) -> dict[str, int]:
        # Where nothing that counts was run, there is no total either.
        counts = self._counter.get_flop_counts().get("Global", {})
        return {str(operation): flops for operation, flops in counts.items()}


def _fused_attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Returns the FLOPs of softmax(q k') v from the shapes B heads L d, as torch counts them on other devices."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


@dataclass(frozen=True)
class Cost:
    """Parameters of a network, and MACs of one evaluation."""

    parameters: int
    macs: int
    """MACs of one evaluation, the products of attention included."""
    attention_macs: int = 0

    @property
    def gmacs(self) -> float:
        """MACs of one evaluation in units of 10^9."""
        return self.macs / 1e9

    @property
    def gmacs_without_attention(self) -> float:
        """MACs of convolutions and linear layers alone, in units of 10^9."""
        return (self.macs - self.attention_macs) / 1e9


def count(module: nn.Module, *shapes: Sequence[int]) -> Cost:
    """Returns the cost of `module` called with float tensors of the given shapes.

    Nothing is computed; `module` stays as it is. A field is called as `count(field, (1, C, H, W), (1,))`.
    """
    abstract = copy.deepcopy(module).to("meta").eval()
    inputs = [torch.empty(tuple(shape), device="meta") for shape in shapes]
    with MacCounter() as counter, torch.no_grad():
        abstract(*inputs)
    return Cost(parameters(module), counter.macs, counter.attention_macs)


def parameters(module: nn.Module) -> int:
    """Returns the number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------- the networks one compares with


@dataclass(frozen=True)
class CostRow:
    """One line of a table of costs."""

    name: str
    parameters: int
    cost: Cost | None = None
    """Cost of the network; None for a whole whose halves have rows of their own."""
    note: str = ""


def reference_rows(side: int = 256) -> list[CostRow]:
    """Counts well-known autoencoders, RAC's scaled decoders and the nano field, for `side` x `side` images, batch 1.

    The networks are diffusers' classes, built without weights; nothing is downloaded.
    """
    from diffusers import AutoencoderTiny

    from ..fields import TinyFieldConfig

    nano = TinyFieldConfig(position=True, taesd_range=True)
    f16d32 = _kl((128, 128, 256, 256, 512), 32, attend=True)
    return [
        *halves("SD-VAE f8d4", _kl(SD_WIDTHS, 4), LatentSpec(8, 4), side),
        *(_scaled(fraction, widths, side) for fraction, widths in SCALED_WIDTHS.items()),
        field_row("RAC nano field", nano.build(4, nano.factor), 4, side, "4 state channels; per evaluation"),
        *halves("IN-VAE, VA-VAE f16d32", f16d32, LatentSpec(16, 32), side),
        *halves("FLUX, SD3 VAE f8d16", _kl(SD_WIDTHS, 16, quant=False), LatentSpec(8, 16), side),
        *halves("TAESD f8d4", _on_meta(AutoencoderTiny), LatentSpec(8, 4), side),
    ]


def halves(name: str, network: Any, spec: LatentSpec, side: int = 256) -> list[CostRow]:
    """Returns rows for the encoder, the decoder and the whole of an autoencoder.

    - `name`: the name in the rows.
    - `network`: a module with an `encoder` and a `decoder`.
    - `spec`: the shape of its latents.
    - `side`: side of the images.
    """
    encoder = count(network.encoder, (1, 3, side, side))
    decoder = count(network.decoder, (1, spec.channels, side // spec.factor, side // spec.factor))
    total = parameters(network)
    saved = f"without its encoder {100 * encoder.parameters / total:.2f} % fewer"
    return [
        CostRow(f"{name} encoder", encoder.parameters, encoder),
        CostRow(f"{name} decoder", decoder.parameters, decoder),
        CostRow(f"{name} whole", total, note=saved),
    ]


def coder_rows(name: str, coder: Coder, side: int = 256) -> list[CostRow]:
    """Returns a row for each network of a coder, for images of `side` x `side` or of the only size it takes.

    Several networks are followed by a row for the whole. The note of a flow's network states the cost of all steps.
    """
    side = side if coder.spec.side is None else coder.spec.side * coder.spec.factor
    networks = coder.networks()
    rows = []
    for title, network in networks.items():
        shapes = network.shapes(side, side)
        cost, walk = count(network.module, *shapes), coder.walk("decode")
        note = ""
        if walk is not None and network.way != "encode":
            steps = steps_in_words(walk.steps)
            note = f"{shapes[0][1]} channels in; {cost.gmacs * walk.steps:.2f} GMACs at {steps}"
        rows.append(CostRow(f"{name} {title}", cost.parameters, cost, note))
    if len(rows) == 1:
        return rows
    total = parameters(coder)
    encoding = sum(parameters(network.module) for network in networks.values() if network.way == "encode")
    return [*rows, CostRow(f"{name} whole", total, note=f"without its encoder {100 * encoding / total:.2f} % fewer")]


def generator_row(name: str, generator: LatentGenerator, side: int | None = None) -> CostRow:
    """Returns a row for one evaluation of a generator's network, with the cost of a sample in its note.

    - `name`: the name in the row.
    - `generator`: the generator.
    - `side`: side of the images in pixels; their latents are padded to whole patches. None: as it was trained on.
    """
    spec, step = generator.kind.spec, generator.multiple
    latent = generator.kind.side if side is None else -(-side // (spec.factor * step)) * step
    cost = count(generator.network, (1, spec.channels, latent, latent), (1,))
    note = f"latents {spec.channels} x {latent} x {latent}; per evaluation; {generator.sampling.in_words()}"
    return CostRow(f"{name} field", cost.parameters, cost, note)


def field_row(name: str, field: nn.Module, state_channels: int, side: int = 256, note: str = "") -> CostRow:
    """Returns a row for one evaluation of a field.

    - `name`: the name in the row.
    - `field`: the field.
    - `state_channels`: channels of its states.
    - `side`: side of its states.
    - `note`: a remark in the row.
    """
    cost = count(field, (1, state_channels, side, side), (1,))
    return CostRow(name, cost.parameters, cost, note)


def flow_row(name: str, field: nn.Module, state_channels: int, steps: int, side: int = 256) -> CostRow:
    """Returns a row for one evaluation of a field, with the cost of a whole flow in its note.

    - `name`: the name in the row.
    - `field`: the field.
    - `state_channels`: channels of its states.
    - `steps`: number of steps of the flow.
    - `side`: side of its states.
    """
    row = field_row(name, field, state_channels, side)
    assert row.cost is not None
    note = f"{state_channels} state channels; {row.cost.gmacs * steps:.2f} GMACs at {steps_in_words(steps)}"
    return CostRow(name, row.parameters, row.cost, note)


def _scaled(fraction: float, widths: tuple[int, ...], side: int) -> CostRow:
    from diffusers.models.autoencoders.vae import Decoder

    decoder = _on_meta(
        Decoder,
        in_channels=4,
        out_channels=3,
        up_block_types=_blocks("UpDecoderBlock2D", widths),
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=1,
    )
    cost = count(decoder, (1, 4, side // 8, side // 8))
    note = f"widths {' '.join(str(width) for width in widths)}"
    return CostRow(f"SD-VAE decoder at {fraction:.2f}", cost.parameters, cost, note)


def _kl(widths: tuple[int, ...], latent_channels: int, attend: bool = False, quant: bool = True) -> Any:
    """Builds an AutoencoderKL of the SD-VAE family; `attend` adds attention to blocks at the latent's resolution."""
    from diffusers import AutoencoderKL

    down, up = _blocks("DownEncoderBlock2D", widths), _blocks("UpDecoderBlock2D", widths)
    if attend:
        down, up = (*down[:-1], "AttnDownEncoderBlock2D"), ("AttnUpDecoderBlock2D", *up[1:])
    return _on_meta(
        AutoencoderKL,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=latent_channels,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )


def _on_meta(kind: Callable[..., Any], **settings: Any) -> Any:
    """Builds a network without weights."""
    with torch.device("meta"):
        return kind(**settings)


def _blocks(kind: str, widths: tuple[int, ...]) -> tuple[str, ...]:
    return (kind,) * len(widths)
