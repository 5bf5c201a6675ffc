"""AutoencoderRAC where diffusers' users are: in pipelines, in half precision, saved and loaded."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

import rac
from rac.coders.adapter import statistics_of
from rac.coders.klvae import KLVAEConfig
from rac.coders.tiling import tiled
from rac.errors import RacError
from rac.fields import LdmFieldConfig, LocalFieldConfig
from rac.integrations.diffusers import AutoencoderRAC
from rac.latents import Statistics

diffusers.utils.logging.disable_progress_bar()

PLAIN = Statistics.of(0.3, 0.5)
PER_CHANNEL = Statistics.scaled(0.4, 0.3, mean=(0.1, -0.2, 0.3, 0.0), std=(1.5, 0.5, 1.0, 2.0))
LOCAL = LocalFieldConfig(widths=(8, 8), blocks=(1, 1), down=(8,), down_blocks=(1,), patch=2, embedding=8)
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed: no text encoder")


@pytest.fixture(scope="module")
def coder(make_rac):
    return make_rac(lively=0.05, statistics=PLAIN).eval().requires_grad_(False)


@pytest.fixture
def vae(coder) -> AutoencoderRAC:
    return AutoencoderRAC.from_rac(coder)


def raw_latents(batch: int = 2, height: int = 4, width: int = 6) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------- the class


def test_raw_latents_of_the_teacher_come_and_go(coder, vae, images) -> None:
    z, x = raw_latents(), images(2, 16, 24)
    assert torch.equal(vae.decode(z).sample, coder.decode(PLAIN.normalise(z)))
    encoded = vae.encode(x)
    assert torch.equal(encoded.latents, PLAIN.denormalise(coder.encode(x)))
    for same in (encoded.latent_dist.mode(), encoded.latent_dist.mean, encoded.latent_dist.sample()):
        assert torch.equal(same, encoded.latents)
    assert not encoded.latent_dist.std.any()
    assert torch.equal(vae.encode(x, return_dict=False)[0].mode(), encoded.latents)
    assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z).sample)
    assert torch.equal(vae(x).sample, vae.decode(encoded.latents).sample)


def test_steps_by_attribute_argument_and_config(coder, vae, images, tmp_path) -> None:
    z, x = raw_latents(), images(1, 16, 16)
    expected = coder.decode(PLAIN.normalise(z), steps=2)
    assert not torch.equal(vae.decode(z).sample, expected)
    assert torch.equal(vae.decode(z, num_inference_steps=2).sample, expected)
    assert torch.equal(vae.encode(x, num_inference_steps=2).latents, PLAIN.denormalise(coder.encode(x, steps=2)))
    vae.num_inference_steps = 2
    assert torch.equal(vae.decode(z).sample, expected)
    vae.save_pretrained(tmp_path)
    assert AutoencoderRAC.from_pretrained(tmp_path).num_inference_steps == 2
    assert rac.load(tmp_path).config.steps == 2
    assert AutoencoderRAC.from_pretrained(tmp_path, num_inference_steps=3).num_inference_steps == 3
    for wrong in (0, 1.5):
        with pytest.raises(RacError, match="at least 1"):
            vae.num_inference_steps = wrong
        with pytest.raises(RacError, match="at least 1"):
            vae.decode(z, num_inference_steps=wrong)


@pytest.mark.parametrize("statistics", [Statistics.identity(), PLAIN, PER_CHANNEL])
def test_the_config_says_what_the_teachers_would(statistics, make_rac) -> None:
    config = AutoencoderRAC.from_rac(make_rac(statistics=statistics)).config
    assert statistics_of(config).hash() == statistics.hash()
    assert (config.latent_channels, 2 ** (len(config.block_out_channels) - 1)) == (4, 4)


def test_a_pipeline_with_statistics_gives_what_the_rac_expects(make_rac) -> None:
    """SDXL's line before the decoder, and its inverse in img2img, from latents that a generator learned."""
    coder = make_rac(lively=0.05, statistics=PER_CHANNEL).eval()
    vae, latent = AutoencoderRAC.from_rac(coder), raw_latents()
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    z = latent * std / vae.config.scaling_factor + mean
    torch.testing.assert_close(vae.decode(z).sample, coder.decode(latent), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"field": LOCAL, "spread": "beside"}, {"contraction": "projector"}], ids=str)
def test_half_precision(dtype, changes, make_rac, images, tmp_path) -> None:
    whole = AutoencoderRAC.from_rac(make_rac(lively=0.05, statistics=PLAIN, **changes))
    whole.save_pretrained(tmp_path)
    vae = AutoencoderRAC.from_pretrained(tmp_path, torch_dtype=dtype)
    assert vae.dtype == dtype
    z, x = raw_latents(), images(2, 16, 24)
    decoded, encoded = vae.decode(z.to(dtype)).sample, vae.encode(x.to(dtype)).latents
    assert decoded.dtype == encoded.dtype == dtype
    torch.testing.assert_close(decoded.float(), whole.decode(z).sample, atol=0.03, rtol=0.03)
    torch.testing.assert_close(encoded.float(), whole.encode(x).latents, atol=0.03, rtol=0.03)
    # The states are float32: an untrained field, whose flow is the identity, loses nothing on the way.
    still = AutoencoderRAC.from_rac(make_rac(statistics=PLAIN)).to(dtype)
    assert torch.equal(still.decode(z).sample, still.float().decode(z).sample)


def test_tiles_and_slices(coder, vae, images, monkeypatch) -> None:
    z, x = raw_latents(3, 10, 12), images(3, 40, 48)
    whole, code, sizes = vae.decode(z).sample, vae.encode(x).latents, []
    vae.coder.field.register_forward_hook(lambda field, given, made: sizes.append(tuple(given[0].shape)))
    vae.enable_tiling(8)
    vae.enable_slicing()
    torch.testing.assert_close(vae.decode(z).sample, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vae.encode(x).latents, code, atol=1e-6, rtol=1e-5)
    assert {size[0] for size in sizes} == {1}
    vae.disable_slicing()
    sizes.clear()
    vae.decode(z)
    assert {size[0] for size in sizes} == {3}
    assert min(size[-1] for size in sizes) < 48
    vae.disable_tiling()
    sizes.clear()
    assert torch.equal(vae.decode(z).sample, whole)
    assert sizes == [(3, 4, 40, 48)] * 4
    assert len(vae.state_dict()) == len(coder.state_dict())


def test_tiles_in_half_precision(vae) -> None:
    z = raw_latents(1, 10, 12).bfloat16()
    vae.to(torch.bfloat16)
    whole = vae.decode(z).sample
    vae.enable_tiling(8)
    torch.testing.assert_close(vae.decode(z).sample, whole, atol=0.03, rtol=0.03)


def test_other_coders_are_refused(make_rac) -> None:
    with pytest.raises(RacError, match="expected a RAC"):
        AutoencoderRAC.from_rac(KLVAEConfig(widths=(8, 8), norm_groups=4).build())
    inner = tiled(make_rac(lively=0.05), 8)
    assert torch.equal(
        AutoencoderRAC.from_rac(inner).decode(raw_latents()).sample, make_rac(0.05).decode(raw_latents())
    )


# --------------------------------------------------------------------------------------------------- files


def test_saved_and_loaded_gives_the_same_bits(coder, vae, tmp_path) -> None:
    z = raw_latents()
    vae.save_pretrained(tmp_path)
    names = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    again = AutoencoderRAC.from_pretrained(tmp_path)
    assert not again.training
    assert torch.equal(again.decode(z).sample, vae.decode(z).sample)
    assert torch.equal(rac.load(tmp_path).decode(PLAIN.normalise(z)), vae.decode(z).sample)
    assert "4 channels at 1/4" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    vae.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_weights_of_another_kind_are_told(vae, tmp_path) -> None:
    vae.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(rac.WeightsError, match=r"holds no weights; expected diffusion_pytorch_model\.safetensors"):
        rac.load(tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_the_hub_gets_a_card_once(there, vae, monkeypatch) -> None:
    import huggingface_hub

    sent = {}

    class Hub:
        def __init__(self, token: str | None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **options: object) -> object:
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})()

        def file_exists(self, repo_id: str, name: str) -> bool:
            assert (repo_id, name) == ("me/mine", "README.md")
            return there

        def upload_folder(self, **options: object) -> str:
            sent.update(options, files=sorted(file.name for file in Path(str(options["folder_path"])).iterdir()))
            return "url"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert vae.push_to_hub("mine", token="t", private=True) == "url"
    assert (sent["repo_id"], sent["token"]) == ("me/mine", "t")
    assert sent["ignore_patterns"] == (["README.md"] if there else None)
    assert {"README.md", "config.json"} < set(sent["files"])


# --------------------------------------------------------------------------------------------------- pipelines


def dit_pipeline(vae) -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        norm_elementwise_affine=False,
    ).eval()
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())


def sampled(pipeline, *args: object, **options: object) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(*args, generator=generator, num_inference_steps=2, output_type="np", **options).images


def as_pixels(image: Tensor) -> np.ndarray:
    return (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_dit_pipeline(coder, vae, tmp_path, monkeypatch) -> None:
    pipeline, seen = dit_pipeline(vae), []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **options: seen.append(z) or decode(z, **options))
    made = sampled(pipeline, [1, 2])
    assert made.shape == (2, 16, 16, 3)
    (z,) = seen
    np.testing.assert_allclose(made, as_pixels(coder.decode(PLAIN.normalise(z))), atol=1e-6)
    monkeypatch.undo()

    pipeline.save_pretrained(tmp_path)
    by_name = DiTPipeline.from_pretrained(tmp_path)  # the module is imported here, so the name is enough
    assert isinstance(by_name.vae, AutoencoderRAC)
    handed_over = DiTPipeline.from_pretrained(tmp_path, vae=AutoencoderRAC.from_pretrained(tmp_path / "vae"))
    for again in (by_name, handed_over):
        assert np.array_equal(sampled(again, [1, 2]), made)


@pytest.mark.slow
@pytest.mark.parametrize("imported", [True, False])
def test_a_saved_pipeline_wants_the_module_imported(imported, vae, tmp_path) -> None:
    dit_pipeline(vae).save_pretrained(tmp_path)
    first = "import rac.integrations.diffusers\n" if imported else ""
    script = f"{first}from diffusers import DiTPipeline\nprint(DiTPipeline.from_pretrained({str(tmp_path)!r}).vae.spec)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if imported:
        assert ran.returncode == 0, ran.stderr
        assert str(vae.spec) in ran.stdout
    else:
        assert "rac.integrations.diffusers" in ran.stderr


@pytest.fixture(scope="module")
def text_parts(tmp_path_factory):
    """A text encoder and a tokenizer of a few words, a U-Net of a few channels."""
    import json

    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    return {
        "text_encoder": CLIPTextModel(config).eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": DDIMScheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@needs_transformers
def test_stable_diffusion_pipeline(coder, vae, text_parts, tmp_path) -> None:
    pipeline = diffusers.StableDiffusionPipeline(vae=vae, **text_parts)
    assert pipeline.vae_scale_factor == 4
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 16, "width": 24}
    latents = pipeline("a b", output_type="latent", generator=torch.Generator().manual_seed(0), **options).images
    assert latents.shape == (1, 4, 4, 6)
    made = sampled(pipeline, "a b", height=16, width=24)
    expected = as_pixels(coder.decode(PLAIN.normalise(latents / PLAIN.scale)))
    np.testing.assert_allclose(made, expected, atol=1e-6)
    pipeline.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again.vae, AutoencoderRAC)
    assert np.array_equal(sampled(again, "a b", height=16, width=24), made)
    again.vae.enable_tiling(8)
    np.testing.assert_allclose(sampled(again, "a b", height=16, width=24), made, atol=1e-5)


@needs_transformers
def test_image_to_image_starts_from_the_encoder(coder, vae, text_parts, images, monkeypatch) -> None:
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(vae=vae, **text_parts)
    noised = []
    add_noise = pipeline.scheduler.add_noise
    monkeypatch.setattr(pipeline.scheduler, "add_noise", lambda x, *rest: noised.append(x) or add_noise(x, *rest))
    image = images(1, 16, 24)
    made = sampled(pipeline, "a b", image=image / 2 + 0.5, strength=0.5)
    assert made.shape == (1, 16, 24, 3)
    expected = PLAIN.denormalise(coder.encode(image)) * PLAIN.scale
    torch.testing.assert_close(noised[0], expected, atol=1e-5, rtol=1e-5)


def test_shipped_coder_takes_its_teachers_place(images) -> None:
    vae, teacher = AutoencoderRAC.from_rac("rac-64"), rac.load("klvae-f8d4")
    assert statistics_of(vae.config).hash() == teacher.statistics.hash()
    for name in ("scaling_factor", "shift_factor"):
        assert vae.config[name] == pytest.approx(teacher.network.config[name], rel=1e-6), name
    for name in ("latents_mean", "latents_std", "latent_channels"):
        assert vae.config[name] == teacher.network.config[name], name
    assert len(vae.config.block_out_channels) == len(teacher.network.config.block_out_channels)
    image = images(1, 64, 64)
    z = teacher.network.encode(image).latent_dist.mode()
    expected = rac.load("rac-64").decode(teacher.encode(image))
    torch.testing.assert_close(vae.decode(z).sample, expected, atol=1e-5, rtol=1e-5)


def test_ldm_field_builds_on_nothing(make_rac, tmp_path) -> None:
    """from_pretrained builds the network without memory first, which a field must bear."""
    coder = make_rac(
        lively=0.05, statistics=PLAIN, field=LdmFieldConfig(widths=(8, 8, 8), layers_per_block=1, groups=4)
    )
    AutoencoderRAC.from_rac(coder).save_pretrained(tmp_path)
    z = raw_latents()
    assert torch.equal(
        AutoencoderRAC.from_pretrained(tmp_path).decode(z).sample, coder.eval().decode(PLAIN.normalise(z))
    )


# ------------------------------------------------------------------------------------------- what users of a VAE try


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_as_one_graph(vae, images, dtype) -> None:
    torch._dynamo.reset()
    vae, z, image = copy.deepcopy(vae).to(dtype), raw_latents().to(dtype), images(1, 16, 16).to(dtype)
    for function, given in ((lambda x: vae.decode(x).sample, z), (lambda x: vae.encode(x).latents, image)):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert torch.equal(compiled(given), function(given))


def test_the_switches_of_other_autoencoders(vae) -> None:
    vae = copy.deepcopy(vae)
    assert (vae.use_tiling, vae.use_slicing) == (False, False)
    vae.enable_tiling(True)
    vae.enable_slicing()
    assert (vae.use_tiling, vae.use_slicing) == (True, True)
    for off in ({"use_tiling": False}, {"tile": False}):
        vae.enable_tiling(16)
        vae.enable_tiling(**off)
        assert not vae.use_tiling
    with pytest.raises(RacError, match="tile 3"):
        vae.enable_tiling(3)
    assert not vae.use_tiling


@pytest.mark.slow
def test_a_device_map_places_it(vae, tmp_path) -> None:
    vae.save_pretrained(tmp_path)
    placed = AutoencoderRAC.from_pretrained(tmp_path, device_map="auto").requires_grad_(False)
    assert torch.equal(placed.decode(raw_latents().to(placed.device)).sample.cpu(), vae.decode(raw_latents()).sample)


def test_half_precision_says_nothing_of_no_modules(vae, caplog, capfd) -> None:
    half = copy.deepcopy(vae).to(torch.float16)
    assert half.dtype == torch.float16
    assert half.coder.statistics.hash() == vae.coder.statistics.hash()
    assert "float32" not in caplog.text + capfd.readouterr().err


def test_integers_are_no_images_and_no_latents(vae) -> None:
    with pytest.raises(RacError, match="from_pixels"):
        vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(RacError, match="floating-point"):
        vae.decode(torch.zeros(1, 4, 2, 2, dtype=torch.uint8))
