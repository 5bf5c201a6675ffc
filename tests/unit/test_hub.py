"""Directories: written whole, read strictly, the same bits."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import rac
from rac.coders.klvae import KLVAEConfig
from rac.errors import RacError, WeightsError
from rac.fields import LdmFieldConfig, TinyFieldConfig
from rac.latents import Statistics


@pytest.fixture
def saved(make_rac, tmp_path):
    coder = make_rac(
        lively=0.1, contraction="projector", teacher="a/teacher", statistics=Statistics.scaled(0.5, mean=(0.1,) * 4)
    )
    rac.save(coder, tmp_path / "coder")
    return coder, tmp_path / "coder"


@pytest.mark.parametrize(
    "changes",
    [{}, {"contraction": "projector"}, {"field": LdmFieldConfig(widths=(8, 8, 8), groups=4), "spread": "shuffle"}],
    ids=["tiny", "projector", "ldm"],
)
def test_save_and_load_give_the_same_bits(make_rac, images, tmp_path, changes):
    coder = make_rac(lively=0.1, **changes).eval().requires_grad_(False)  # attention rounds otherwise with gradients
    rac.save(coder, tmp_path / "deep" / "coder")
    again = rac.load(tmp_path / "deep" / "coder")
    assert again.config == coder.config
    for (name, one), (other, two) in zip(coder.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(one, two)
    image = images(1, 8, 8)
    assert torch.equal(again.encode(image), coder.encode(image))
    assert torch.equal(again.reconstruct(image), coder.reconstruct(image))


def test_loaded_coders_are_ready_and_frozen(saved):
    again = rac.load(str(saved[1]))
    assert again.teacher == "a/teacher"
    assert again.spec == saved[0].spec
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_directories_hold_plain_files_that_others_may_read(saved):
    _, directory = saved
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    for file in directory.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o400
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_half_precision_on_disk_is_float32_in_memory(saved, tmp_path):
    coder, directory = saved
    coder.save(tmp_path / "half", torch.float16)
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.7 * (
        directory / "model.safetensors"
    ).stat().st_size
    again = rac.load(tmp_path / "half")
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, coder.state_dict()[name].half().float())


def test_saving_replaces_and_leaves_other_files(saved, make_rac):
    _, directory = saved
    (directory / "CARD.md").write_text("a card")
    other = make_rac(lively=0.2)
    rac.save(other, directory)
    assert sorted(os.listdir(directory)) == ["CARD.md", "config.json", "model.safetensors"]
    assert torch.equal(next(iter(rac.load(directory).parameters())), next(iter(other.parameters())))


def test_a_failed_save_leaves_the_old_coder_whole(saved, make_rac, monkeypatch):
    coder, directory = saved

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match="disk is full"):
        rac.save(make_rac(lively=0.3), directory)
    monkeypatch.undo()
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    assert torch.equal(next(iter(rac.load(directory).parameters())), next(iter(coder.parameters())))


def test_saving_where_one_cannot(make_rac, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RacError, match="there is a file where a folder is needed"):
        rac.save(make_rac(), tmp_path / "file")
    with pytest.raises(RacError, match="not str"):
        rac.save("coder", tmp_path / "x")


# ------------------------------------------------------------------------------------- what cannot be loaded


def edit(directory, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_cut_in_half(saved):
    file = saved[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(WeightsError, match=r"model.safetensors \(\d+ bytes\) is not a whole safetensors file"):
        rac.load(saved[1])


def test_no_weights_and_no_config(saved):
    (saved[1] / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds no weights"):
        rac.load(saved[1])
    (saved[1] / "config.json").unlink()
    with pytest.raises(WeightsError):
        rac.load(saved[1])


def test_weights_of_another_shape_and_another_configuration(saved):
    file = saved[1] / "model.safetensors"
    # Copies: some versions map the file, which is about to be written over.
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    name = "field.network.layers.0.weight"
    save_file({**tensors, name: tensors[name][:, :5].contiguous()}, file)
    with pytest.raises(WeightsError, match=rf"{name} has shape .* the configuration asks for"):
        rac.load(saved[1])
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(WeightsError, match=rf"lacks tensor {name} \(1 missing"):
        rac.load(saved[1])
    save_file({**tensors, "more": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match="unknown tensor more"):
        rac.load(saved[1])


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: edit(path, version=99),
        lambda path: edit(path, config=None),
        lambda path: edit(path, config={}),
        lambda path: edit(path, config={"spec": {"factor": 4, "channels": 4}, "field": {"kind": "wavelet"}}),
        lambda path: (path / "config.json").write_text("{"),
        lambda path: (path / "config.json").write_text("[]"),
    ],
    ids=["version", "null", "empty", "kind", "cut", "list"],
)
def test_a_broken_config_is_one_line(saved, break_it):
    break_it(saved[1])
    with pytest.raises(RacError, match=r"config\.json") as caught:
        rac.load(saved[1])
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused_with_the_near_ones(monkeypatch, tmp_path):
    for name in ("rac-64", "klvae-64"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr("rac.hub.SHIPPED", tmp_path)
    assert rac.available() == ["klvae-64", "rac-64"]
    with pytest.raises(WeightsError, match="did you mean rac-64"):
        rac.load("rac-46")
    with pytest.raises(WeightsError, match="shipped coders are klvae-64, rac-64"):
        rac.load("zzzzzz")


def test_shipped_names_load(monkeypatch, saved):
    monkeypatch.setattr("rac.hub.SHIPPED", saved[1].parent)
    assert rac.available() == ["coder"]
    assert rac.load("coder").config == saved[0].config


def test_a_file_that_is_no_coder(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"no coder")
    with pytest.raises(WeightsError, match=r"photo\.png"):
        rac.load(tmp_path / "photo.png")


def test_the_hub_is_not_asked_offline():
    """HF_HUB_OFFLINE is set for all tests: the error must be ours, and quick."""
    with pytest.raises(WeightsError, match="nobody/nothing"):
        rac.load("nobody/nothing")


@pytest.mark.parametrize("name", rac.available())
def test_everything_shipped_loads_without_its_teacher(name):
    coder = rac.load(name)
    assert coder.spec.channels > 0
    assert not coder.training


def test_the_folder_of_a_run_is_its_coder(make_rac, tmp_path):
    coder = make_rac(lively=0.1)
    rac.save(coder, tmp_path / "run" / "coder")
    (tmp_path / "run" / "recipe.json").write_text("{}")
    loaded = rac.load(tmp_path / "run")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in coder.state_dict().items())


# ------------------------------------------------------------------------------------- layouts of files


@pytest.mark.parametrize(
    "options",
    [{"variant": "fp16"}, {"max_shard_size": "20KB"}, {"variant": "fp16", "max_shard_size": "10KB"}],
    ids=["variant", "shards", "both"],
)
@pytest.mark.parametrize("kind", ["rac", "klvae"])
def test_what_diffusers_wrote_is_read_in_any_layout(make_rac, images, tmp_path, kind, options):
    from rac.integrations.diffusers import AutoencoderRAC

    if kind == "rac":
        coder = make_rac(lively=0.1, statistics=Statistics.of(0.3, 0.5), field=LARGER)
        AutoencoderRAC.from_rac(coder).save_pretrained(tmp_path, **options)
    else:
        coder = KLVAEConfig(widths=(8, 16, 16), latent_channels=4).build()
        coder.network.save_pretrained(tmp_path, **options)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    again, image = rac.load(tmp_path), images(1, 16, 16)
    assert torch.equal(again.encode(image), coder.eval().encode(image))
    assert again.spec == coder.spec


LARGER = TinyFieldConfig(widths=(16, 16, 16), blocks=(1, 1, 1))


def test_several_variants_are_named(tmp_path):
    network = KLVAEConfig(widths=(8, 8)).build().network
    for variant in ("fp16", "bf16"):
        network.save_pretrained(tmp_path, variant=variant)
    with pytest.raises(WeightsError, match=r"several variants.*bf16.*fp16"):
        rac.load(tmp_path)
    network.save_pretrained(tmp_path)
    assert rac.load(tmp_path).spec.factor == 2


def test_a_pipeline_that_was_saved_with_a_rac_is_its_coder(make_rac, images, tmp_path):
    from rac.integrations.diffusers import AutoencoderRAC

    coder, image = make_rac(lively=0.1).eval(), images(1, 16, 16)
    AutoencoderRAC.from_rac(coder).save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert torch.equal(rac.load(tmp_path).encode(image), coder.encode(image))


# ------------------------------------------------------------------------------------- versions and defaults


def test_the_first_version_and_the_second_give_the_same_bits(images, tmp_path):
    """Some of what ships has the first version's numbers in its config.json."""
    for name in ("rac-64", "rac-taef2"):
        coder = rac.load(name)
        assert json.loads((rac.hub.SHIPPED / name / "config.json").read_text())["version"] == 1
        rac.save(coder, tmp_path / name)
        again = rac.load(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["version"] == 2
        assert again.spec == coder.spec
        assert again.statistics.hash() == coder.statistics.hash() == coder.spec.statistics
        latent = coder.encode(images(1, 32, 32))
        assert torch.equal(again.encode(images(1, 32, 32)), latent)
        assert torch.equal(again.statistics.denormalise(latent), coder.statistics.denormalise(latent))
        assert torch.equal(again.decode(latent), coder.decode(latent))


def test_statistics_that_are_not_those_of_the_spec_are_refused(saved):
    file = saved[1] / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "statistics.scale": tensors["statistics.scale"] * 2}, file)
    with pytest.raises(WeightsError, match=r"the statistics have hash \w+, the spec names"):
        rac.load(saved[1])


def test_unknown_keys_of_a_config_are_named(saved):
    edit(saved[1], colour="red")
    with pytest.raises(WeightsError, match="unknown keys, colour"):
        rac.load(saved[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scaling_facto": 3.0}, "unknown keys, scaling_facto"),
        ({"scaling_factor": "x"}, "scaling_factor: expected a number, not 'x'"),
        ({"latents_mean": 3}, "latents_mean"),
        ({"latents_std": [1.0]}, "statistics of 1 channels"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
@pytest.mark.parametrize("kind", ["rac", "klvae"])
def test_a_diffusers_config_is_read_strictly(make_rac, tmp_path, kind, changes, words):
    from rac.coders.native import DROP_IN_KEYS
    from rac.integrations.diffusers import AutoencoderRAC

    if kind == "rac":
        AutoencoderRAC.from_rac(make_rac()).save_pretrained(tmp_path)
        saved_keys = json.loads((tmp_path / "config.json").read_text())
        assert {key for key in saved_keys if not key.startswith("_")} == {"rac", *DROP_IN_KEYS}
    else:
        rac.save(KLVAEConfig(widths=(8, 16), latent_channels=4).build(), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(WeightsError, match=words) as caught:
        rac.load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_steps_of_a_drop_in_are_a_number(make_rac, tmp_path):
    from rac.integrations.diffusers import AutoencoderRAC

    AutoencoderRAC.from_rac(make_rac()).save_pretrained(tmp_path)
    edit(tmp_path, num_inference_steps="four")
    with pytest.raises(RacError, match="steps 'four' must be a whole number"):
        AutoencoderRAC.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["rac-64", "klvae-f8d4"])
def test_torchs_defaults_change_nothing(name, images):
    expected, image = rac.load(name), images(1, 16, 16)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = rac.load(name)
        assert torch.get_default_dtype() == torch.float64
        assert torch.empty(1).is_meta
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert {(tensor.dtype, tensor.device.type) for tensor in found.state_dict().values()} == {(torch.float32, "cpu")}
    assert torch.equal(found.encode(image), expected.encode(image))
