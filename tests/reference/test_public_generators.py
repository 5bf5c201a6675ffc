"""Public checkpoints of SiT, REPA and LightningDiT: random weights in their layouts, computed once more by formula."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rac
from rac.coders.rac import RAC
from rac.errors import WeightsError
from rac.fields import DDTFieldConfig
from rac.fields.transformer import positions
from rac.generators.convert import from_public, read_public, to_public, turned
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.latents import LatentSpec

WIDTH, HEADS, DEPTH, CHANNELS, SIDE, CLASSES = 24, 2, 2, 4, 8, 5
Weights = dict[str, Tensor]


def weights(style: str, patch: int = 2, sigma: bool = False, projector: bool = False) -> Weights:
    """Random weights under the names that public code gives them."""
    rng = torch.Generator().manual_seed(0)
    made: Weights = {}

    def layer(name: str, out: int, *into: int) -> None:
        made[f"{name}.weight"] = torch.randn(out, *into, generator=rng) / math.sqrt(math.prod(into))
        made[f"{name}.bias"] = 0.2 * torch.randn(out, generator=rng)

    made["pos_embed"] = positions(SIDE // patch, SIDE // patch, WIDTH, torch.zeros(()))[None]
    layer("x_embedder.proj", WIDTH, CHANNELS, patch, patch)
    layer("t_embedder.mlp.0", WIDTH, 256)
    layer("t_embedder.mlp.2", WIDTH, WIDTH)
    made["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, WIDTH, generator=rng)
    for block in (f"blocks.{number}" for number in range(DEPTH)):
        layer(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        layer(f"{block}.attn.proj", WIDTH, WIDTH)
        layer(f"{block}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
        if style == "lightning":
            made[f"{block}.norm1.weight"] = 1 + 0.3 * torch.randn(WIDTH, generator=rng)
            made[f"{block}.norm2.weight"] = 1 + 0.3 * torch.randn(WIDTH, generator=rng)
            layer(f"{block}.mlp.w12", 2 * 64, WIDTH)
            layer(f"{block}.mlp.w3", WIDTH, 64)
        else:
            layer(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
            layer(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    if style == "lightning":
        made["final_layer.norm_final.weight"] = 1 + 0.3 * torch.randn(WIDTH, generator=rng)
        made["feat_rope.freqs_cos"] = torch.zeros((SIDE // patch) ** 2, WIDTH // HEADS)
    layer("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    layer("final_layer.linear", patch**2 * CHANNELS * (2 if sigma else 1), WIDTH)
    if projector:
        layer("projectors.0.0", 16, WIDTH)
    return made


def recomputed(w: Weights, x: Tensor, t: Tensor, y: Tensor, patch: int = 2) -> Tensor:
    """The velocity by the published formulas, in the direction of time of the checkpoint, in float64."""
    w = {name: one.double() for name, one in w.items()}
    gated = "final_layer.norm_final.weight" in w
    batch, grid = len(x), SIDE // patch

    def apply(name: str, v: Tensor) -> Tensor:
        return v @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def normed(v: Tensor, name: str) -> Tensor:
        if gated:
            return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
        v = v - v.mean(-1, keepdim=True)
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(v: Tensor) -> Tensor:
        return v / (1 + torch.exp(-v))

    def rotate(v: Tensor) -> Tensor:
        """Channel pairs as complex numbers, turned by row (first half) and column (second half)."""
        half = v.shape[-1] // 2
        place = torch.arange(grid**2, dtype=torch.float64)
        rate = 10000 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        angles = torch.cat([(place // grid)[:, None] * rate, (place % grid)[:, None] * rate], dim=1)
        pairs = torch.view_as_complex(v.reshape(*v.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    tokens = apply("x_embedder.proj", F.unfold(x.double(), patch, stride=patch).transpose(1, 2)) + w["pos_embed"]
    rate = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = t.double()[:, None] * rate
    told = apply("t_embedder.mlp.2", silu(apply("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    given = silu(told + w["y_embedder.embedding_table.weight"][y])
    for number in range(DEPTH):
        block = f"blocks.{number}"
        chunks = apply(f"{block}.adaLN_modulation.1", given)[:, None].chunk(6, dim=-1)
        inner = normed(tokens, f"{block}.norm1") * (1 + chunks[1]) + chunks[0]
        q, k, v = apply(f"{block}.attn.qkv", inner).reshape(batch, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        if gated:
            q, k = rotate(q), rotate(k)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS), dim=-1) @ v
        tokens = tokens + chunks[2] * apply(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        inner = normed(tokens, f"{block}.norm2") * (1 + chunks[4]) + chunks[3]
        if gated:
            gate, value = apply(f"{block}.mlp.w12", inner).chunk(2, dim=-1)
            made = apply(f"{block}.mlp.w3", silu(gate) * value)
        else:
            a = apply(f"{block}.mlp.fc1", inner)
            gelu = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
            made = apply(f"{block}.mlp.fc2", gelu)
        tokens = tokens + chunks[5] * made
    shift, scale = apply("final_layer.adaLN_modulation.1", given)[:, None].chunk(2, dim=-1)
    out = apply("final_layer.linear", normed(tokens, "final_layer.norm_final") * (1 + scale) + shift)
    out = out.reshape(batch, grid, grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, -1, SIDE, SIDE)[:, :CHANNELS]


@pytest.fixture(scope="module")
def coder(make_rac) -> RAC:  # type: ignore[no-untyped-def]
    return make_rac()


def asked() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, CHANNELS, SIDE, SIDE, generator=rng),
        torch.rand(3, generator=rng),
        torch.tensor([0, 3, CLASSES]),
    )


def velocity(generator: FlowGenerator, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return generator.field(x, t, condition=y)


@pytest.mark.parametrize(
    ("style", "patch", "sigma"), [("sit", 2, False), ("sit", 2, True), ("sit", 1, False), ("lightning", 1, False)]
)
def test_sit_and_lightning_dit_keep_their_time(coder, style, patch, sigma):
    public = weights(style, patch, sigma)
    generator = from_public(public, coder, "a-coder", heads=HEADS)
    x, t, y = asked()
    expected = recomputed(public, x, t, y, patch)
    assert expected.std() > 0.3
    torch.testing.assert_close(velocity(generator, x, t, y).double(), expected, rtol=1e-4, atol=1e-4)
    assert generator.kind.side == SIDE
    assert generator.classes == ("0", "1", "2", "3", "4")
    assert generator.kind.spec == coder.spec


def test_repa_is_turned_to_the_time_of_this_library(coder):
    public = weights("sit", projector=True)
    generator = from_public(public, coder, heads=HEADS)
    x, t, y = asked()
    torch.testing.assert_close(
        velocity(generator, x, t, y).double(), -recomputed(public, x, 1 - t, y), rtol=1e-4, atol=1e-4
    )
    # Without its projectors nobody can tell.
    bare = {name: one for name, one in public.items() if not name.startswith("projectors")}
    same = from_public(bare, coder, heads=HEADS, noise_time=True)
    assert torch.equal(velocity(same, x, t, y), velocity(generator, x, t, y))
    assert not torch.allclose(velocity(from_public(bare, coder, heads=HEADS), x, t, y), velocity(generator, x, t, y))


def test_turning_twice_changes_nothing():
    made = {"time.0.weight": torch.randn(6, 256), "head.out.weight": torch.randn(4, 6), "head.out.bias": torch.ones(4)}
    again = turned(turned(made))
    assert all(torch.allclose(again[name], one, atol=1e-5) for name, one in made.items())


@pytest.mark.parametrize("style", ["sit", "lightning"])
@pytest.mark.parametrize("noise_time", [False, True])
def test_what_goes_out_is_what_public_code_computes(coder, style, noise_time):
    generator = from_public(weights(style), coder, heads=HEADS)
    public = to_public(generator, noise_time=noise_time, learn_sigma=style == "sit")
    x, t, y = asked()
    found = -recomputed(public, x, 1 - t, y) if noise_time else recomputed(public, x, t, y)
    torch.testing.assert_close(velocity(generator, x, t, y).double(), found, rtol=1e-4, atol=1e-4)
    names = {name for name in weights(style) if not name.startswith("feat_rope")}
    assert public.keys() == names
    rows = public["final_layer.linear.weight"].shape[0]
    assert rows == 4 * CHANNELS * (2 if style == "sit" else 1)
    back = from_public(public, coder, heads=HEADS, noise_time=noise_time)
    torch.testing.assert_close(velocity(back, x, t, y), velocity(generator, x, t, y), rtol=1e-4, atol=1e-5)


def test_checkpoints_of_training_scripts_are_read(coder, tmp_path: Path):
    public = weights("sit")
    other = {name: one + 1 for name, one in public.items()}
    checkpoint = {"model": {f"module.{name}": one for name, one in other.items()}, "ema": public}
    torch.save({**checkpoint, "opt": {"state": {}}, "args": argparse.Namespace(model="SiT-B/2")}, tmp_path / "it.pt")
    torch.save(public, tmp_path / "bare.pt")
    for name in ("it.pt", "bare.pt"):
        assert all(torch.equal(one, public[key]) for key, one in read_public(tmp_path / name).items())
    assert torch.equal(read_public(tmp_path / "it.pt", "model")["pos_embed"], other["pos_embed"])
    generator = from_public(read_public(tmp_path / "it.pt"), coder, heads=HEADS, classes=list("abcde"))
    generator.save(tmp_path / "saved")
    loaded = rac.load_generator(tmp_path / "saved")
    assert loaded.label("c") == 2
    assert torch.equal(loaded.sample([1], [2]).latent, generator.sample([1], [2]).latent)


class Harmful:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (print, ("run",))


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"ema": Harmful()}, tmp_path / "code.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    torch.save({"ema": {"a": 1}}, tmp_path / "numbers.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, words in [
        ("code.pt", "more than tensors and settings"),
        ("cut.pt", "cut short"),
        ("numbers.pt", "no state dict"),
        ("list.pt", "no state dict"),
        ("none.pt", "does not exist"),
        ("none.safetensors", "does not exist"),
    ]:
        with pytest.raises(WeightsError, match=words):
            read_public(tmp_path / name)
    assert "run" not in capsys.readouterr().out


def test_networks_of_other_kinds_are_refused(coder, make_rac):
    public = weights("sit")
    without = {name: one for name, one in public.items() if name != "blocks.1.attn.qkv.bias"}
    cases = [
        ({}, {}, "lacks x_embedder"),
        ({**public, "blocks.0.attn.q_norm.weight": torch.ones(12)}, {}, "normalises queries"),
        (public, {"heads": None}, "width 24 is none of the published ones"),
        (without, {}, "lacks tensor blocks.1.attention.qkv.bias"),
        ({**public, "extra": torch.ones(1)}, {}, "unknown tensor extra"),
        ({**public, "pos_embed": public["pos_embed"] + 1}, {}, "other positions"),
        ({name: one for name, one in public.items() if name != "pos_embed"}, {}, "lacks pos_embed"),
        (public, {"classes": ("a", "b")}, "2 names do not fit a field of 5 classes"),
        (public, {"heads": 5}, "multiple of 4 and of its heads"),
    ]
    for tensors, given, words in cases:
        with pytest.raises(WeightsError, match=words):
            from_public(tensors, coder, **{"heads": HEADS, **given})
    with pytest.raises(WeightsError, match="4 channels, the coder's have 3"):
        from_public(public, make_rac(spec=LatentSpec(4, 3)), heads=HEADS)


def test_a_wide_head_is_refused_by_code_that_has_none(coder):
    config = FlowGeneratorConfig(coder.spec, 4, DDTFieldConfig().tiny())
    with pytest.raises(WeightsError, match="a ddt, which code of SiT"):
        to_public(FlowGenerator(config))
