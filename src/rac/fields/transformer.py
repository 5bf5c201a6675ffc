"""Parts of transformers over the patches of a state: embeddings, positions, and blocks that a condition modulates.

A state B C H W becomes tokens B N D, one for each patch, row by row. Each block scales and shifts its tokens by what it
makes of a condition (adaptive layer norm, DiT, arXiv 2212.09748, section 3.2): one vector for a whole state, B D, or
one for each token, B N D.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RacError

TIME_FREQUENCIES = 128
"""Number of cosines, and of sines, that embed a time."""

FOURIER_FREQUENCIES = 256
"""Number of random frequencies of a `FourierEmbedding`."""

EPSILON = 1e-6
"""Number that norms add to the variance."""

Style = Literal["layer", "rms"]
"""Blocks of DiT and SiT (layer norm, GELU), or of LightningDiT and DDT (RMS norm, SwiGLU, rotated positions)."""


# ------------------------------------------------------------------------------------------------------- embeddings


def waves(time: Tensor, count: int = TIME_FREQUENCIES) -> Tensor:
    """Returns cos(w t) and then sin(w t) of times B, as B 2 `count`, w = 10000^(-i / count) for i = 0, 1, ...

    Computed in float32 at least: half precision does not tell the fast waves apart.
    """
    exact = time.to(torch.promote_types(time.dtype, torch.float32))
    angles = exact[:, None] * torch.exp(
        -math.log(1e4) / count * torch.arange(count, device=time.device, dtype=exact.dtype)
    )
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Sequential):
    """Embedding of times in [0, 1], or of signed intervals, B -> B width."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        """Returns the embedding, in the type of the weights."""
        return super().forward(waves(time).to(next(self.parameters()).dtype))


class FourierEmbedding(nn.Sequential):
    """Embedding of times in [0, 1], or of signed intervals, B -> B width, by random frequencies that are never trained.

    sin(2 pi w t) and then cos(2 pi w t), w ~ N(0, 1), before a two-layer network (RAE, arXiv 2510.11690).
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(2 * FOURIER_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("frequencies", torch.randn(FOURIER_FREQUENCIES))

    def forward(self, time: Tensor) -> Tensor:
        """Returns the embedding, in the type of the weights. The waves are computed in float32 at least."""
        exact = torch.promote_types(time.dtype, torch.float32)
        angles = 2 * math.pi * time.to(exact)[:, None] * self.frequencies.to(exact)
        return super().forward(torch.cat([angles.sin(), angles.cos()], dim=1).to(next(self.parameters()).dtype))


class LabelEmbedding(nn.Embedding):
    """Embedding of labels, B -> B width; label number `classes` stands for none, as when a label is dropped."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes + 1, width)

    @property
    def null(self) -> int:
        """The label that stands for none."""
        return self.num_embeddings - 1

    def forward(self, labels: Tensor | None, count: int = 1) -> Tensor:
        """Returns the embedding of `labels`; None stands for `count` times no label."""
        if labels is None:
            labels = torch.full((count,), self.null, device=self.weight.device)
        return super().forward(labels)


def positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Returns the fixed table of the positions of height x width tokens, N `channels`, in the type of `like`.

    The first half of the channels tells the column, the second the row; each half has sines and then cosines of the
    whole-numbered place, of frequencies 10000^(-k / (channels / 4)). Raises `RacError` unless `channels` is a multiple
    of 4.
    """
    if channels % 4:
        raise RacError(f"width {channels} of a transformer must be a multiple of 4, for the table of positions")
    count = channels // 4
    frequencies = torch.exp(-math.log(1e4) / count * torch.arange(count, device=like.device))

    def told(length: int) -> Tensor:
        angles = torch.arange(length, device=like.device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    columns = told(width)[None].expand(height, -1, -1)
    rows = told(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).to(like.dtype)


class Patches(nn.Conv2d):
    """Embedding of patches: a state B C H W -> tokens B N width, for `patch` x `patch` patches."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__(channels, width, patch, stride=patch)

    def forward(self, state: Tensor) -> Tensor:
        """Returns the tokens, row by row."""
        return super().forward(state).flatten(2).transpose(1, 2)


def check_factor(patch: int, factor: int | None) -> None:
    """Raises `RacError` for a factor, if one is asked for, that patches of this side do not undo."""
    if factor not in (None, patch):
        raise RacError(f"patches of {patch} undo a factor of {patch}, not {factor}; give patch {factor}")


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Returns the state B C H W of tokens B N p p C; `height` and `width` count patches."""
    channels = tokens.shape[-1] // patch**2
    blocks = tokens.view(len(tokens), height, width, patch, patch, channels)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), channels, height * patch, width * patch)


# ----------------------------------------------------------------------------------------------------------- blocks


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns tokens B N D times (1 + `scale`) plus `shift`, both B 1 D or B N D."""
    return x * (1 + scale) + shift


class Modulation(nn.Sequential):
    """Modulations of a block, made of its condition, B D or B N D: `count` tensors B 1 width or B N width."""

    def __init__(self, condition: int, width: int, count: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(condition, count * width))
        self.count = count

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Returns the modulations, in their order."""
        made = super().forward(condition)
        return (made if made.ndim == 3 else made[:, None]).chunk(self.count, dim=-1)


class RMSNorm(nn.Module):
    """Division by the root mean square over the channels, computed in float32, with a weight for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens B N D to the same shape."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype) * self.weight


def norm(width: int, style: Style) -> nn.Module:
    """Returns the norm of tokens of a style: layer norm without weights, or `RMSNorm`."""
    return nn.LayerNorm(width, EPSILON, elementwise_affine=False) if style == "layer" else RMSNorm(width)


class SwiGLU(nn.Module):
    """Two-layer network with a gate: W3 (SiLU(W1 x) * W2 x). Shazeer, arXiv 2002.05202, equation 6."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens B N D to the same shape."""
        gate, value = self.gate(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class GeluMLP(nn.Sequential):
    """Two-layer network with GELU in its tanh form."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))


def rotation(height: int, width: int, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines, each N `channels`, that rotate queries and keys by their places.

    The first half of a head's channels turns with the row, the second with the column, adjacent channels in pairs, by
    frequencies 10000^(-k / (channels / 4)) of whole-numbered places (RoFormer, arXiv 2104.09864, on two axes).
    """
    count = channels // 4
    frequencies = torch.exp(-math.log(1e4) / count * torch.arange(count, device=like.device)).repeat_interleave(2)
    rows = torch.arange(height, device=like.device)[:, None, None] * frequencies
    columns = torch.arange(width, device=like.device)[:, None] * frequencies
    angles = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1).flatten(0, 1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Returns queries or keys B heads N d, adjacent channels rotated by the result of `rotation`."""
    cosines, sines = turn
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cosines + torch.stack([-odd, even], dim=-1).flatten(-2) * sines


class Attention(nn.Module):
    """Self-attention of all tokens, in `heads` heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Maps tokens B N D to the same shape; `turn`, from `rotation`, rotates queries and keys."""
        batch, count, width = x.shape
        query, key, value = self.qkv(x).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        if turn is not None:
            query, key = rotated(query, turn).to(value.dtype), rotated(key, turn).to(value.dtype)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, count, width))


class Block(nn.Module):
    """Block of a transformer: attention and a two-layer network, each modulated and gated by the condition.

    Args:
        width: channels of the tokens; `heads` must divide it.
        heads: heads of the attention.
        style: `layer` or `rms`.
        condition: channels of the condition; None: `width`.
    """

    def __init__(self, width: int, heads: int, style: Style = "layer", condition: int | None = None) -> None:
        super().__init__()
        self.modulation = Modulation(condition or width, width, 6)
        self.before_attention, self.before_mlp = norm(width, style), norm(width, style)
        self.attention = Attention(width, heads)
        self.mlp = GeluMLP(width, 4 * width) if style == "layer" else SwiGLU(width, 8 * width // 3)

    def forward(self, x: Tensor, condition: Tensor, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Maps tokens B N D to the same shape, under a condition B D or B N D."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition)
        x = x + gate * self.attention(modulate(self.before_attention(x), shift, scale), turn)
        return x + mlp_gate * self.mlp(modulate(self.before_mlp(x), mlp_shift, mlp_scale))


class PlainBlock(nn.Module):
    """Block of a vision transformer, without a condition: layer norm with weights, and GELU in its exact form.

    Args:
        width: channels of the tokens; `heads` must divide it.
        heads: heads of the attention.
        hidden: channels between the two layers of the network.
        epsilon: number that norms add to the variance.
        gelu: form of GELU, `none` (exact) or `tanh`.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, epsilon: float, gelu: Literal["none", "tanh"] = "none"
    ) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(gelu), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens B N D to the same shape."""
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class Head(nn.Module):
    """Last layer: tokens B N D to the numbers of their patches, B N `out`, modulated by the condition."""

    def __init__(self, width: int, out: int, style: Style = "layer", condition: int | None = None) -> None:
        super().__init__()
        self.modulation = Modulation(condition or width, width, 2)
        self.norm = norm(width, style)
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Returns B N `out`, under a condition B D or B N D."""
        shift, scale = self.modulation(condition)
        return self.out(modulate(self.norm(x), shift, scale))


# --------------------------------------------------------------------------------------------------- initialisation


@torch.no_grad()
def initialise(network: nn.Module, linears: Literal["xavier", "torch"] = "xavier") -> None:
    """Gives a network of these parts the weights that its kind begins with, so that its output is zero.

    Patches: Xavier's uniform on the flattened weights, without bias; time and label embeddings: N(0, 0.02^2);
    modulations and the last layer: zero, so that every block begins as the identity. All other linear layers: Xavier's
    uniform without bias as in DiT and SiT, or torch's own as in DDT and RAE.
    """
    for module in network.modules():
        if isinstance(module, Patches) or (linears == "xavier" and isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in network.modules():
        for part in module.children():
            if isinstance(module, (TimeEmbedding, FourierEmbedding)) and isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
            elif isinstance(module, (Modulation, Head)) and isinstance(part, nn.Linear):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
