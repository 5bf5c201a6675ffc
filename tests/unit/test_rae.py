"""RAE: sizes, statistics, the decoder by its formula, and public decoders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rac
from rac.coders.rac import RAC, RACConfig
from rac.coders.rae import RAE, RAEConfig, ViTDecoder, ViTDecoderConfig, vit_decoder
from rac.coders.rae_public import from_public
from rac.errors import RacError, WeightsError
from rac.evaluate.cost import count
from rac.fields import LocalFieldConfig
from rac.fields.transformer import positions
from rac.latents import Moments, Statistics
from rac.recipes import RECIPES
from rac.representations import Representation
from rac.states import StateSpec, contract, expand

pytest.importorskip("efficientnet_lite_pytorch", reason="the metrics extra is not installed")

SMALL = ViTDecoderConfig(2, 16, 2, 24)
NET = "efficientnet-lite0"


@pytest.fixture(scope="module")
def coder(images) -> RAE:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    made = RAEConfig(NET, SMALL).build()
    with torch.no_grad():
        for parameter in made.decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.fit_statistics([images(6, 64, 64, 3)])
    return made.eval().requires_grad_(False)


# Parameters, and 10^9 MACs at 256 pixels with and without the products of attention, as published.
SIZES = [
    ("B", 16, 86_237_952, 23.3, 22.1),
    ("L", 16, 303_887_104, 81.3, 78.0),
    ("XL", 16, 415_056_640, 110.8, 106.6),
    ("XL", 32, 415_056_640, 492.8, 425.0),
]


@pytest.mark.parametrize(("size", "side", "parameters", "gmacs", "without"), SIZES)
def test_sizes_are_the_published_ones(size, side, parameters, gmacs, without):
    with torch.device("meta"):
        decoder = ViTDecoder(vit_decoder(size), 768)
    cost = count(decoder, (1, 768, side, side))
    assert cost.parameters == parameters
    assert cost.gmacs == pytest.approx(gmacs, abs=0.06)
    # Published counts leave out the token without pixels, one in 257.
    assert cost.gmacs_without_attention == pytest.approx(without, rel=0.005)


def recomputed(w: dict[str, Tensor], z: Tensor, heads: int) -> Tensor:
    """The normalised pixels of raw latents by the paper's formulas, in float64, query, key and value apart."""
    w = {name: one.double() for name, one in w.items()}
    batch, _, height, width = z.shape
    channels = w["norm.weight"].shape[0]

    def apply(name: str, v: Tensor) -> Tensor:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normed(name: str, v: Tensor) -> Tensor:
        v = v - v.mean(-1, keepdim=True)
        return v / (v.square().mean(-1, keepdim=True) + 1e-12).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    rate = 10000 ** (-torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    place = torch.arange(height * width)
    told = [(place % width)[:, None] * rate, torch.div(place, width, rounding_mode="floor")[:, None] * rate]
    table = torch.cat([wave for one in told for wave in (one.sin(), one.cos())], dim=1)
    x = apply("embed", z.double().flatten(2).mT) + table
    x = torch.cat([w["class_token"].expand(batch, 1, -1), x], dim=1)
    for block in sorted({name.split(".")[1] for name in w if name.startswith("blocks.")}):
        inner = normed(f"blocks.{block}.before_attention", x)
        q, k, v = (
            apply(f"blocks.{block}.attention.qkv", inner)
            .reshape(batch, -1, 3, heads, channels // heads)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = torch.softmax(q @ k.mT / math.sqrt(channels // heads), dim=-1) @ v
        x = x + apply(f"blocks.{block}.attention.out", mixed.transpose(1, 2).flatten(2))
        a = apply(f"blocks.{block}.mlp.0", normed(f"blocks.{block}.before_mlp", x))
        x = x + apply(f"blocks.{block}.mlp.2", a * 0.5 * (1 + torch.erf(a / math.sqrt(2))))
    out = apply("out", normed("norm", x))[:, 1:].reshape(batch, height, width, 16, 16, 3)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, 16 * height, 16 * width)


@pytest.mark.parametrize("grid", [(2, 2), (3, 5)])
def test_the_decoder_is_that_of_the_formula_on_any_grid(coder, grid):
    z = torch.randn(2, 112, *grid)
    expected = recomputed(coder.decoder.state_dict(), z, 2)
    torch.testing.assert_close(coder.decoder(z).double(), expected, rtol=1e-4, atol=1e-4)
    # Pixels are in the scale of the representation's input.
    image = 2 * (expected * (128 / 255) + 127 / 255) - 1
    latent = coder.statistics.normalise(z)
    torch.testing.assert_close(coder.decode(latent).double(), image, rtol=1e-4, atol=1e-4)


def test_latents_are_normalised_tokens_of_the_representation(coder, images):
    image = images(3, 64, 64, 7)
    raw = coder.encoder(image)
    assert torch.equal(coder.moments(image), raw)
    torch.testing.assert_close(coder.encode(image), (raw - coder.statistics.shift) * coder.statistics.scale)


def test_statistics_are_those_of_all_images_in_any_order_and_batches(coder, images):
    image = images(9, 32, 48, 5)
    raw = torch.cat([coder.encoder(one) for one in image.split(1)]).double()
    mean, scale = raw.mean(dim=0), (raw.var(dim=0, unbiased=False) + 1e-5).rsqrt()
    for order, cut in ((range(9), 9), (range(9), 2), (range(8, -1, -1), 4)):
        made = RAE(coder.config, encoder=coder.encoder)
        made.fit_statistics(image[list(order)].split(cut))
        assert made.statistics.shift.shape == (112, 2, 3)
        torch.testing.assert_close(made.statistics.shift.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.statistics.scale.double(), scale, rtol=1e-3, atol=0)
        latent = made.encode(image)
        assert latent.mean(dim=0).abs().max() < 1e-3
        assert made.spec.statistics == made.statistics.hash()


def test_moments_are_exact_far_from_zero():
    values = 1e6 + torch.rand(100, 2, 1, 1, dtype=torch.float64)
    moments = Moments()
    for piece in values.split(7):
        moments.add(piece)
    torch.testing.assert_close(moments.variance, values.var(dim=0, unbiased=False), rtol=1e-9, atol=0)
    with pytest.raises(RacError, match="images of one size"):
        moments.add(torch.zeros(1, 2, 2, 2))


def test_statistics_of_other_grids_are_interpolated(coder, images):
    image = images(2, 96, 32, 2)
    shift, scale = (
        nn.functional.interpolate(one[None], (6, 2), mode="bilinear", align_corners=False)[0]
        for one in (coder.statistics.shift, coder.statistics.scale)
    )
    torch.testing.assert_close(coder.encode(image), (coder.encoder(image) - shift) * scale)
    torch.testing.assert_close(coder.statistics.denormalise(coder.encode(image)), coder.encoder(image))


def test_the_representation_stays_frozen_and_in_evaluation_mode(images):
    made = RAEConfig(NET, SMALL).build().train()
    assert made.decoder.training
    assert not any(part.training for part in made.encoder.modules())
    assert not any(one.requires_grad for one in made.encoder.parameters())
    image = images(2, 32, 32)
    before = {name: one.clone() for name, one in made.encoder.state_dict().items()}
    first = made.encode(image)
    assert torch.equal(first, made.encode(image))
    assert all(torch.equal(one, before[name]) for name, one in made.encoder.state_dict().items())


def test_files_hold_the_decoder_alone(coder, tmp_path: Path):
    rac.save(coder, tmp_path)
    from safetensors.torch import load_file

    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"decoder", "statistics"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"]["representation"] == NET
    config["config"]["representation"] = "dinov9"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="no representation 'dinov9'"):
        rac.load(tmp_path)


def test_another_decoder_in_the_same_coder(coder, images, tmp_path: Path):
    other = ViTDecoder(SMALL, 112)
    twin = coder.with_decoder(other)
    assert coder.decoder is not other
    latent = coder.encode(images(1, 32, 32))
    assert torch.equal(twin.encode(images(1, 32, 32)), latent)
    assert not torch.equal(twin.decode(latent), coder.decode(latent))
    rac.save(twin, tmp_path)
    assert torch.equal(rac.load(tmp_path).decode(latent), twin.decode(latent))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"depth": 0}, "depth 0"), ({"width": 18}, "width 18"), ({"width": 16, "heads": 3}, "heads, 3")],
)
def test_decoders_that_cannot_be_built_are_refused(changes, words):
    with pytest.raises(RacError, match=words):
        ViTDecoderConfig(**changes)
    with pytest.raises(RacError, match="no decoder of size 'H'; sizes are XS, S, B, L, XL"):
        vit_decoder("H")


# ------------------------------------------------------------------------------------------------ public decoders


def public(width: int = 16, channels: int = 112, diffusers: bool = False, rng_seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names that public code gives them, two blocks."""
    rng = torch.Generator().manual_seed(rng_seed)
    made: dict[str, Tensor] = {}

    def layer(name: str, out: int, into: int) -> None:
        made[f"{name}.weight"] = torch.randn(out, into, generator=rng) / math.sqrt(into)
        made[f"{name}.bias"] = 0.2 * torch.randn(out, generator=rng)

    def norm(name: str) -> None:
        made[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=rng)
        made[f"{name}.bias"] = 0.2 * torch.randn(width, generator=rng)

    made["trainable_cls_token"] = torch.randn(1, 1, width, generator=rng)
    layer("decoder_embed", width, channels)
    names = ("to_q", "to_k", "to_v", "to_out.0") if diffusers else ("query", "key", "value", "dense")
    for block in (f"decoder_layers.{number}" for number in range(2)):
        norm(f"{block}.layernorm_before")
        norm(f"{block}.layernorm_after")
        inner = "attention" if diffusers else "attention.attention"
        for name in names[:3]:
            layer(f"{block}.{inner}.{name}", width, width)
        layer(f"{block}.attention.{names[3]}" if diffusers else f"{block}.attention.output.dense", width, width)
        layer(f"{block}.intermediate.dense", 24, width)
        layer(f"{block}.output.dense", width, 24)
    norm("decoder_norm")
    layer("decoder_pred", 768, width)
    if not diffusers:
        table = torch.cat([torch.zeros(1, width), positions(4, 4, width, torch.zeros(()))])
        made["decoder_pos_embed"] = table[None]
    return made


def by_hand(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as `recomputed` wants them, found by their place in the network rather than by their names."""
    order = list(tensors)
    found = {"class_token": tensors["trainable_cls_token"]}
    for part in ("weight", "bias"):
        found[f"embed.{part}"] = tensors[f"decoder_embed.{part}"]
        found[f"norm.{part}"] = tensors[f"decoder_norm.{part}"]
        found[f"out.{part}"] = tensors[f"decoder_pred.{part}"]
        for number in range(2):
            mine = [n for n in order if n.startswith(f"decoder_layers.{number}.") and n.endswith(part)]
            norms, attention, mlp = mine[:2], mine[2:6], mine[6:8]
            block = f"blocks.{number}"
            found[f"{block}.before_attention.{part}"], found[f"{block}.before_mlp.{part}"] = (tensors[n] for n in norms)
            found[f"{block}.attention.qkv.{part}"] = torch.cat([tensors[n] for n in attention[:3]])
            found[f"{block}.attention.out.{part}"] = tensors[attention[3]]
            found[f"{block}.mlp.0.{part}"], found[f"{block}.mlp.2.{part}"] = (tensors[n] for n in mlp)
    return found


def test_decoders_of_the_papers_code_are_converted(tmp_path: Path):
    tensors = public()
    rng = torch.Generator().manual_seed(1)
    mean, var = torch.randn(1, 112, 4, 4, generator=rng), torch.rand(1, 112, 4, 4, generator=rng)
    torch.save(tensors, tmp_path / "model.pt")
    torch.save({"mean": mean[0], "var": var[0]}, tmp_path / "stat.pt")
    made = from_public(tmp_path / "model.pt", NET, tmp_path / "stat.pt", heads=2)
    latent = torch.randn(2, 112, 4, 4, generator=rng)
    raw = latent * torch.sqrt(var + 1e-5) + mean
    expected = 2 * (recomputed(by_hand(tensors), raw, 2) * (128 / 255) + 127 / 255) - 1
    torch.testing.assert_close(made.decode(latent).double(), expected, rtol=1e-4, atol=1e-4)
    rac.save(made, tmp_path / "saved")
    assert torch.equal(rac.load(tmp_path / "saved").decode(latent), made.decode(latent))


def dinov2(folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the representations extra is not installed")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, patch_size=14, image_size=518, num_register_tokens=4
    )
    torch.manual_seed(0)
    model = transformers.Dinov2WithRegistersModel(config)
    nn.init.normal_(model.layernorm.weight, 1.0, 0.3)
    model.save_pretrained(folder)


def autoencoder(encoder: Path, **statistics: object) -> nn.Module:
    """diffusers' own RAE, with random weights and the encoder in the folder."""
    diffusers = pytest.importorskip("diffusers")
    if "AutoencoderRAE" not in dir(diffusers):
        pytest.skip("this diffusers has no AutoencoderRAE")
    network = diffusers.AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=2, encoder_input_size=56, decoder_hidden_size=16,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=24, **statistics,
    )  # fmt: skip
    transformers = pytest.importorskip("transformers", reason="the representations extra is not installed")
    weights = transformers.Dinov2WithRegistersModel.from_pretrained(encoder).state_dict()
    network.encoder.load_state_dict({name: one for name, one in weights.items() if not name.startswith("layernorm.")})
    tensors = public(channels=64, diffusers=True)
    network.decoder.load_state_dict(tensors)
    # Its own table is right on a grid of 16 alone.
    table = torch.cat([torch.zeros(1, 16), positions(4, 4, 16, torch.zeros(()))])
    network.decoder.decoder_pos_embed.copy_(table[None])
    return network.eval()


@pytest.mark.slow
@torch.no_grad()
def test_what_diffusers_saved_codes_as_diffusers_does(tmp_path: Path, images):
    dinov2(tmp_path / "dino")
    rng = torch.Generator().manual_seed(1)
    mean, std = torch.randn(64, 4, 4, generator=rng), 0.5 + torch.rand(64, 4, 4, generator=rng)
    network = autoencoder(tmp_path / "dino", latents_mean=mean, latents_std=std, scaling_factor=0.5)
    network.save_pretrained(tmp_path / "rae")
    from rac.coders.rae_public import load_diffusers

    made = load_diffusers(tmp_path / "rae", str(tmp_path / "dino"))
    image = images(2, 64, 64)
    latent = network.encode((image + 1) / 2).latent
    torch.testing.assert_close(made.encode(image), latent, rtol=1e-4, atol=1e-4)
    pixels = network.decode(latent).sample
    torch.testing.assert_close(made.decode(latent), 2 * pixels - 1, rtol=1e-4, atol=1e-4)
    # Every token of the representation has mean 0 and variance 1 over its channels.
    tokens = made.moments(image)
    torch.testing.assert_close(tokens.mean(dim=1), torch.zeros(2, 4, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.var(dim=1, unbiased=False), torch.ones(2, 4, 4), rtol=1e-3, atol=0)
    # By its name alone it would need the published encoder.
    with pytest.raises(WeightsError, match="encoder dinov2 of 64 channels is none of the published"):
        rac.load(tmp_path / "rae")
    network.encoder.encoder.layer[1].mlp.fc1.weight.add_(0.5)
    network.save_pretrained(tmp_path / "rae")
    with pytest.raises(WeightsError, match="another encoder than"):
        load_diffusers(tmp_path / "rae", str(tmp_path / "dino"))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def test_files_that_are_no_decoders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, tensors = tmp_path / "model.pt", public()

    def refused(words: str, changed: object, **options: object) -> None:
        torch.save(changed, path)
        with pytest.raises(WeightsError, match=words):
            from_public(path, NET, **{"heads": 2, **options})  # type: ignore[arg-type]

    refused("not a state dict", {"decoder": Evil()})
    assert "run" not in capsys.readouterr().out
    refused("lacks what is called embed.weight", {"weight": torch.zeros(1)})
    refused("none of the published ones; give its heads", tensors, heads=None)
    refused("decodes tokens of 64 channels, those of efficientnet-lite0 have 112", public(channels=64))
    refused("other positions", {**tensors, "decoder_pos_embed": torch.zeros(1, 17, 16)})
    refused("lacks tensor blocks.1.mlp.0.bias", {k: v for k, v in tensors.items() if "1.intermediate.dense.b" not in k})
    refused("unknown tensor extra", {**tensors, "extra": torch.zeros(1)})
    torch.save({"mean": torch.zeros(1)}, tmp_path / "stat.pt")
    refused("no mean and var", tensors, statistics=tmp_path / "stat.pt")


def test_it_is_a_coder_of_a_representation(coder):
    assert isinstance(coder.encoder, Representation)
    assert (coder.spec.factor, coder.spec.channels) == (16, 112)
    assert isinstance(coder.statistics, Statistics)


# ------------------------------------------------------------------------------------------------ as a RAC's teacher


@pytest.mark.parametrize(
    ("channels", "state_channels", "spread", "free"),
    [
        (768, 3, "shuffle", 0),
        (1024, 4, "shuffle", 0),
        (384, 3, "shuffle", 384),
        (112, 3, "shuffle", 656),
        (768, 6, "beside", 768),
        (112, 4, "beside", 912),
    ],
)
def test_tokens_fit_into_few_channels_of_a_state(channels, state_channels, spread, free):
    spec = StateSpec(16, channels, state_channels, spread)
    slots = spec.slots()
    assert len(set(slots)) == channels
    assert state_channels * 256 - len(slots) == free
    latent = torch.randn(2, channels, 3, 2)
    state = expand(latent, spec)
    assert state.shape == (2, state_channels, 48, 32)
    assert torch.equal(contract(state, spec), latent)
    # The seed is spread over all of its channels alike, and weighs as much as an image.
    if not free:
        assert state.std().item() == pytest.approx(1, abs=0.05)


def test_a_step_of_the_rac_of_its_latents_costs_what_the_decoder_does():
    field = RECIPES["rac-rae-128"][1].field.build(4, 16)
    decoder = ViTDecoder(RECIPES["rae-128"][1].decoder, 112)
    one, other = count(field, (1, 4, 128, 128), (1,)), count(decoder, (1, 112, 8, 8))
    assert one.gmacs == pytest.approx(other.gmacs, rel=0.05)


@pytest.mark.parametrize("spread", ["shuffle", "beside"])
def test_a_rac_walks_between_images_and_its_latents(coder, images, spread):
    widths = {"widths": (8,) * 4, "blocks": (1,) * 4, "down": (8,) * 3, "down_blocks": (0,) * 3}
    field = LocalFieldConfig(**widths, carrier=spread == "beside", embedding=8)
    torch.manual_seed(0)
    walker = RAC(RACConfig(coder.spec, field, 4, spread, teacher="rae"), coder.statistics).eval()
    image = images(2, 64, 96, 8)
    latent = coder.encode(image)
    assert walker.spec == coder.spec
    assert walker.decode(latent).shape == image.shape
    assert walker.encode(image).shape == latent.shape
    # The state of the decoding flow holds the teacher's latent exactly.
    torch.testing.assert_close(walker.contract(walker.seed_state(latent)), latent)
