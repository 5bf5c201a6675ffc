"""A generator and its decoder as a pipeline of diffusers: the images of `rac generate`, saved, loaded, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import rac
from rac.cli import main
from rac.coders.klvae import KLVAEConfig
from rac.errors import RacError, WeightsError
from rac.fields import SiTFieldConfig
from rac.generators.flow import FlowGenerator, FlowGeneratorConfig
from rac.generators.sampling import Sampling, sample_seeds
from rac.integrations.diffusers import AutoencoderRAC
from rac.integrations.generation import FlowGeneratorModel, FlowGeneratorPipeline
from rac.latents import Statistics

diffusers.utils.logging.disable_progress_bar()

STATISTICS = Statistics.of(0.3, 0.5)
FIELD = SiTFieldConfig(depth=2, width=16, heads=2, patch=2, classes=3)


def made(config: FlowGeneratorConfig) -> FlowGenerator:
    torch.manual_seed(0)
    generator = FlowGenerator(config)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return generator.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_rac) -> Path:
    """A coder, and a generator of its latents."""
    folder = tmp_path_factory.mktemp("generation")
    coder = make_rac(lively=0.05, statistics=STATISTICS)
    rac.save(coder, folder / "coder")
    sampling = Sampling(steps=3, guidance=1.5)
    config = FlowGeneratorConfig(coder.spec, 4, FIELD, ("cat", "dog", "fish"), str(folder / "coder"), sampling)
    made(config).save(folder / "generator")
    return folder


@pytest.fixture
def pipeline(folder) -> FlowGeneratorPipeline:
    return FlowGeneratorPipeline.from_rac(folder / "generator")


def seeded(*numbers: int, rng_seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in sample_seeds(rng_seed, numbers)]


@pytest.mark.parametrize(
    ("called", "options"),
    [
        ({}, ()),
        ({"num_inference_steps": 2, "guidance_scale": 1.0}, ("--steps", 2, "--guidance", 1)),
        ({"decode_steps": 1, "guidance_scale": 2.5}, ("--decode-steps", 1, "--guidance", 2.5)),
        ({"sampling": Sampling(steps=4, method="sde")}, ("--steps", 4, "--method", "sde", "--guidance", 1)),
    ],
)
def test_images_are_those_of_rac_generate(pipeline, folder, tmp_path, called, options) -> None:
    told = ["generate", folder / "generator", "--count", 4, "--rng-seed", 7, "--out", tmp_path / "out", *options]
    assert main([str(one) for one in told]) == 0
    images = pipeline(["cat", 1, "fish", 0], generator=seeded(0, 1, 2, 3, rng_seed=7), **called).images
    for number, (name, image) in enumerate(zip(["cat", "dog", "fish", "cat"], images, strict=True)):
        expected = np.asarray(Image.open(tmp_path / "out" / "images" / name / f"{number:06d}.png")).astype(int)
        assert abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_the_kinds_of_output_agree(pipeline) -> None:
    def call(kind: str, **options):
        return pipeline("dog", generator=seeded(5), output_type=kind, **options)

    latent, pixels, array = (call(kind).images for kind in ("latent", "pt", "np"))
    (picture,) = call("pil").images
    assert (latent.shape, pixels.shape, array.shape, picture.size) == (
        (1, 4, 4, 4),
        (1, 3, 16, 16),
        (1, 16, 16, 3),
        (16, 16),
    )
    raw_latent = STATISTICS.denormalise(latent)
    torch.testing.assert_close(pixels, (pipeline.vae.decode(raw_latent).sample / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, pixels.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(picture), (255 * array[0]).round().astype(np.uint8))
    assert torch.equal(call("pt", return_dict=False)[0], pixels)
    assert torch.equal(call("latent").images, pipeline.transformer.sample(sample_seeds(0, [5]), [1]).latent)


def test_one_generator_or_the_global_one(pipeline) -> None:
    def images(**options) -> torch.Tensor:
        return pipeline([0, 0], output_type="pt", **options).images

    one = images(generator=torch.Generator().manual_seed(1))
    assert torch.equal(images(generator=torch.Generator().manual_seed(1)), one)
    assert not torch.equal(one[0], one[1])
    torch.manual_seed(3)
    first, second = images(), images()
    torch.manual_seed(3)
    assert torch.equal(images(), first)
    assert not torch.equal(first, second)


def test_saved_and_loaded_gives_the_same_bits(pipeline, tmp_path) -> None:
    expected = pipeline([1, 2], generator=seeded(0, 1), output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "FlowGeneratorPipeline"
    assert index["transformer"] == ["rac.integrations.generation", "FlowGeneratorModel"]
    again = FlowGeneratorPipeline.from_pretrained(tmp_path)
    assert isinstance(again.vae, AutoencoderRAC)
    assert (again.classes, again.transformer.sampling) == (pipeline.classes, pipeline.transformer.sampling)
    assert torch.equal(again([1, 2], generator=seeded(0, 1), output_type="pt").images, expected)
    # Its folder is the generator and the coder for everything else here, too.
    generator, coder = rac.load_generator(tmp_path), rac.load(tmp_path)
    latent = generator.sample(sample_seeds(0, [0, 1]), [1, 2]).latent
    torch.testing.assert_close((coder.decode(latent) / 2 + 0.5).clamp(0, 1), expected, atol=1e-5, rtol=1e-4)
    assert rac.load_generator(tmp_path / "transformer").classes == pipeline.classes


@pytest.mark.slow
def test_a_fresh_process_loads_it(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    script = (
        "import torch\nfrom rac.integrations.generation import FlowGeneratorPipeline\n"
        f"pipeline = FlowGeneratorPipeline.from_pretrained({str(tmp_path)!r})\n"
        "made = pipeline('fish', generator=torch.Generator().manual_seed(4), output_type='pt').images\n"
        "print(float(made.double().sum()))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = pipeline("fish", generator=torch.Generator().manual_seed(4), output_type="pt").images.double().sum()
    assert float(ran.stdout) == pytest.approx(float(expected), abs=1e-3)


def test_an_autoencoder_of_diffusers_decodes(folder, tmp_path) -> None:
    torch.manual_seed(0)
    teacher = KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build()
    teacher.network.register_to_config(scaling_factor=0.5, shift_factor=0.3)
    teacher.set_statistics(STATISTICS.copy())
    rac.save(teacher, tmp_path / "teacher")
    pipeline = FlowGeneratorPipeline.from_rac(folder / "generator", tmp_path / "teacher")
    assert isinstance(pipeline.vae, AutoencoderKL)
    images = pipeline([0], generator=seeded(0), output_type="pt").images
    latent = rac.load_generator(folder / "generator").sample(sample_seeds(0, [0]), [0]).latent
    expected = (rac.load(tmp_path / "teacher").decode(latent) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-4)
    pipeline.save_pretrained(tmp_path / "saved")
    again = FlowGeneratorPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again([0], generator=seeded(0), output_type="pt").images, images)
    with pytest.raises(RacError, match="decodes at once and has no steps"):
        pipeline([0], decode_steps=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipeline, tmp_path, dtype) -> None:
    whole = pipeline([0, 1], generator=seeded(0, 1), output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    half = FlowGeneratorPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert half.transformer.dtype == half.vae.dtype == dtype
    latent = half([0, 1], generator=seeded(0, 1), output_type="latent").images
    assert latent.dtype == torch.float32
    made = half([0, 1], generator=seeded(0, 1), output_type="pt").images
    torch.testing.assert_close(made, whole, atol=0.05, rtol=0.05)


def test_the_model_is_the_velocity(folder) -> None:
    model, generator = FlowGeneratorModel.from_rac(folder / "generator"), rac.load_generator(folder / "generator")
    state, time, labels = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])
    assert torch.equal(model(state, time, labels), generator.network(state, time, condition=labels))
    assert torch.equal(model(state, time), generator.network(state, time))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_without_classes(folder) -> None:
    config = rac.load_generator(folder / "generator").config
    bare = made(replace(config, field=replace(FIELD, classes=0), classes=(), sampling=Sampling(steps=2)))
    pipeline = FlowGeneratorPipeline.from_rac(bare)
    assert len(pipeline(batch_size=3).images) == 3
    with pytest.raises(RacError, match="knows no classes"):
        pipeline([0])


@pytest.mark.parametrize(
    ("called", "words"),
    [
        ({"class_labels": "zebra"}, "no class 'zebra'; classes are cat, dog, fish"),
        ({"class_labels": [3]}, "label 3 is none of 0 to 2"),
        ({"class_labels": []}, "0 images cannot be generated"),
        ({"class_labels": [0], "num_inference_steps": 0}, "steps 0 must be a whole number"),
        ({"class_labels": [0], "guidance_scale": float("nan")}, "guidance nan"),
        ({"class_labels": [0], "decode_steps": 0}, "steps 0 must be a whole number"),
        ({"class_labels": [0], "output_type": "jpeg"}, "output_type 'jpeg' is not known; choose pil, np, pt, latent"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators do not fit 2 images"),
        ({}, "guidance without labels"),
        ({"batch_size": 0}, "0 images cannot be generated"),
    ],
)
def test_what_cannot_be_generated_is_refused(pipeline, called, words) -> None:
    with pytest.raises(RacError, match=words):
        pipeline(**called)


def test_decoders_that_do_not_fit_are_refused(folder, make_rac, pipeline, tmp_path) -> None:
    with pytest.raises(RacError, match=r"latents are not those of the vae: .*statistics"):
        FlowGeneratorPipeline.from_rac(folder / "generator", make_rac())
    with pytest.raises(RacError, match=r"latents are not those of the vae: .*statistics"):
        FlowGeneratorPipeline(pipeline.transformer, AutoencoderKL(latent_channels=4))
    alone = made(replace(rac.load_generator(folder / "generator").config, coder=None))
    with pytest.raises(RacError, match="names no coder of its latents"):
        FlowGeneratorPipeline.from_rac(alone)
    pipeline.vae = AutoencoderRAC.from_rac(make_rac())
    with pytest.raises(RacError, match="latents are not those of the vae"):
        pipeline([0])


def test_damaged_folders_are_refused(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    config["rac"]["field"]["depht"] = 3
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="unknown keys, depht"):
        rac.load_generator(tmp_path)
    with pytest.raises(RacError, match="unknown keys, depht"):
        FlowGeneratorPipeline.from_pretrained(tmp_path)
