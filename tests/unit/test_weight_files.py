"""Published weight files: found, converted, refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rac.errors import WeightsError
from rac.representations.inception import INCEPTION, InceptionV3, layers, pytorch_fid_names
from rac.representations.lpips import FILES, LPIPS
from rac.representations.weight_files import convert, find_weights, weights_folder

PLACES = {"alex": (0, 3, 6, 8, 10), "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}


def publish_lpips(folder, backbone, network=None):
    """Random weights, as torchvision and the lpips package lay theirs out."""
    network = network or LPIPS(backbone)
    features = {
        f"features.{place}.{part}": getattr(network.get_submodule(f"conv{index}"), part).detach()
        for index, place in enumerate(PLACES[backbone])
        for part in ("weight", "bias")
    }
    linear = {f"lin{i}.model.1.weight": network.get_submodule(f"lin{i}").weight.detach() for i in range(5)}
    classifier = {"classifier.1.weight": torch.zeros(3, 3)}
    names = [published.names[0] for published in FILES[backbone].published]
    torch.save({**features, **classifier}, folder / names[0])
    torch.save(linear, folder / names[1])
    return network


@pytest.mark.parametrize("backbone", ["alex", "vgg16"])
def test_published_lpips_becomes_the_same_distance(tmp_path, backbone, monkeypatch):
    network = publish_lpips(tmp_path, backbone)
    path = convert(FILES[backbone], tmp_path, tmp_path / "out")
    assert path is not None
    monkeypatch.setenv("RAC_WEIGHTS_DIR", str(tmp_path / "out"))
    one, other = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    assert torch.equal(LPIPS.load(backbone)(one, other), network(one, other))


def publish_inception(folder):
    tensors = {}
    rng = torch.Generator().manual_seed(0)
    for name, layer in zip(pytorch_fid_names(), layers(full=True), strict=True):
        shape = (layer.outputs, layer.inputs, layer.height, layer.width)
        tensors[f"{name}.conv.weight"] = torch.randn(shape, generator=rng) / layer.inputs**0.5
        for part in ("weight", "bias", "running_mean"):
            tensors[f"{name}.bn.{part}"] = torch.rand(layer.outputs, generator=rng)
        tensors[f"{name}.bn.running_var"] = 1 + torch.rand(layer.outputs, generator=rng)
    tensors |= {"fc.weight": torch.randn(1008, 2048, generator=rng), "fc.bias": torch.zeros(1008)}
    torch.save(tensors, folder / INCEPTION.published[0].names[0])


def test_published_inception_converts_and_loads(tmp_path):
    publish_inception(tmp_path)
    path = convert(INCEPTION, tmp_path, tmp_path / "out")
    assert path is not None
    assert InceptionV3.load(path, full=True).full
    assert load_file(path)["logits.weight"].shape == (1008, 2048)


def test_nothing_is_written_while_a_part_is_missing(tmp_path):
    publish_lpips(tmp_path, "alex")
    (tmp_path / "alex.pth").unlink()
    assert convert(FILES["alex"], tmp_path, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_and_one_of_other_tensors_are_refused(tmp_path):
    publish_lpips(tmp_path, "alex")
    whole = (tmp_path / "alex.pth").read_bytes()
    (tmp_path / "alex.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"alex\.pth is not a state dict"):
        convert(FILES["alex"], tmp_path, tmp_path)
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "alex.pth")
    with pytest.raises(WeightsError, match=r"alex\.pth lack.*lin1"):
        convert(FILES["alex"], tmp_path, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_code_in_a_published_file_is_not_run(tmp_path):
    publish_lpips(tmp_path, "alex")

    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"lin0.model.1.weight": Runs()}, tmp_path / "alex.pth")
    with pytest.raises(WeightsError, match="not a state dict"):
        convert(FILES["alex"], tmp_path, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_error_says_where_it_looked_and_what_helps(tmp_path, monkeypatch):
    monkeypatch.setenv("RAC_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(
        WeightsError, match=rf"perceptual term.*lpips_vgg16_v0\.1\.safetensors.*{tmp_path}.*rac weights"
    ):
        find_weights(None, FILES["vgg16"])


def test_the_folder_without_a_variable_and_without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("RAC_WEIGHTS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights_folder() == tmp_path / "rac" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where no home is known
    assert weights_folder() is None
    with pytest.raises(WeightsError, match="no home folder"):
        find_weights(None, FILES["alex"])
