from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import rac
from rac.coders.adapter import WEIGHTS, Adapter, DeepCompressionCoder, TinyCoder
from rac.coders.klvae import KLVAE, KLVAEConfig
from rac.coders.taesd import TAESD, TAESDConfig
from rac.errors import RacError, WeightsError
from rac.latents import LatentSpec, Statistics


def tiny() -> TinyCoder:
    widths = (8, 8, 8)
    config = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    return TinyCoder.from_config({**config, **blocks, "latent_channels": 5, "scaling_factor": 2.0})


def deep_compression() -> DeepCompressionCoder:
    shared = {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.5}
    encoder = {"encoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1)}
    decoder = {"decoder_block_out_channels": (8, 8), "decoder_layers_per_block": (1, 1)}
    blocks = {"encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    norms = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
    return DeepCompressionCoder.from_config({**shared, **encoder, **decoder, **blocks, **scales, **norms})


def kl() -> KLVAE:
    coder = KLVAEConfig(widths=(8, 8, 8), latent_channels=3).build()
    return KLVAE.from_config({**coder.config, "scaling_factor": 0.25, "shift_factor": 0.5})


def taesd() -> TAESD:
    return TAESD(TAESDConfig(latent_channels=4, pooled=True, width=8))


KINDS: dict[Callable[[], Adapter], LatentSpec] = {
    tiny: LatentSpec(4, 5, statistics=Statistics.of(0.0, 2.0).hash()),
    deep_compression: LatentSpec(2, 4, statistics=Statistics.of(0.0, 0.5).hash()),
    kl: LatentSpec(4, 3, statistics=Statistics.of(0.5, 0.25).hash()),
    taesd: LatentSpec(8, 4, statistics=Statistics.of(0.0, 1 / 0.85).hash()),
}
every_kind = pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    kl().save(tmp_path / "coder")
    return tmp_path / "coder"


def photo(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@every_kind
def test_spec_and_shapes(build: Callable[[], Adapter]) -> None:
    coder, spec = build(), KINDS[build]
    assert coder.spec == spec
    latent = coder.encode(photo(2, 3, 32, 16))
    assert latent.shape == (2, spec.channels, 32 // spec.factor, 16 // spec.factor)
    assert coder.decode(latent).shape == (2, 3, 32, 16)


@every_kind
def test_any_size_comes_back_cropped(build: Callable[[], Adapter]) -> None:
    coder = build().eval()
    image = photo(1, 3, 21, 30)
    assert coder.reconstruct(image).shape == image.shape
    assert coder.encode(image).shape[-2:] == (-(-21 // coder.spec.factor), -(-30 // coder.spec.factor))


@every_kind
def test_saves_and_loads_bit_for_bit(build: Callable[[], Adapter], tmp_path: Path) -> None:
    coder = build().eval()
    coder.save(tmp_path)
    loaded = rac.load(tmp_path)
    assert type(loaded) is type(coder)
    assert loaded.spec == coder.spec
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    image = photo(1, 3, 32, 32)
    assert torch.equal(loaded.encode(image), coder.encode(image))
    assert torch.equal(loaded.reconstruct(image), coder.reconstruct(image))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS]


@every_kind
def test_gradient_reaches_the_input_of_a_frozen_coder(build: Callable[[], Adapter]) -> None:
    coder = build().eval().requires_grad_(False)
    image = photo(1, 3, 16, 16).requires_grad_()
    coder.decode(coder.encode(image)).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("pixel_range", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
def test_black_and_white_come_back_and_the_network_sees_its_own_range(pixel_range: tuple[float, float]) -> None:
    class Identity(TAESD):
        def __init__(self) -> None:
            super().__init__(TAESDConfig(latent_channels=3, width=1))
            self.set_statistics(Statistics.of(0.3, 2.0), LatentSpec(1, 3))
            self.pixel_range = pixel_range

        def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
            self.seen = (pixels.min().item(), pixels.max().item())
            return pixels

        def _decode_pixels(self, raw_latent: torch.Tensor) -> torch.Tensor:
            return raw_latent

    coder = Identity()
    squares = torch.stack([torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 1.0)])
    torch.testing.assert_close(coder.reconstruct(squares), squares)
    assert coder.seen == pixel_range


def test_a_diffusers_coder_gives_its_network_the_image_as_it_is() -> None:
    coder, image = kl().eval(), photo(1, 3, 16, 16)
    raw_latent = coder.network.encode(image).latent_dist.mean
    torch.testing.assert_close(coder.encode(image), (raw_latent - 0.5) * 0.25)
    torch.testing.assert_close(coder.decode((raw_latent - 0.5) * 0.25), coder.network.decode(raw_latent).sample)


def test_per_channel_statistics_as_the_pipelines_use_them() -> None:
    mean, std = torch.tensor([-0.5, 0.0, 2.0]), torch.tensor([0.5, 1.0, 4.0])
    statistics = {
        "scaling_factor": 0.5,
        "shift_factor": None,
        "latents_mean": mean.tolist(),
        "latents_std": std.tolist(),
    }
    coder, image = KLVAE.from_config({**kl().config, **statistics}).eval(), photo(1, 3, 16, 16)
    raw_latent = coder.network.encode(image).latent_dist.mean
    expected = (raw_latent - mean.view(1, 3, 1, 1)) * 0.5 / std.view(1, 3, 1, 1)
    torch.testing.assert_close(coder.encode(image), expected)
    torch.testing.assert_close(coder.decode(expected), coder.network.decode(raw_latent).sample)


def test_a_scaling_factor_of_zero_is_not_a_missing_one() -> None:
    with pytest.raises(RacError, match="scale 0 would make every latent zero"):
        KLVAE.from_config({**kl().config, "scaling_factor": 0.0})


def test_reads_what_diffusers_wrote_and_a_pipelines_directory(tmp_path: Path) -> None:
    coder = kl().eval()
    coder.network.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    image = photo(1, 3, 16, 16)
    assert torch.equal(rac.load(tmp_path).encode(image), coder.encode(image))
    assert torch.equal(rac.load(tmp_path / "vae").encode(image), coder.encode(image))


def test_reads_attention_under_its_old_names(tmp_path: Path) -> None:
    coder = KLVAEConfig(widths=(8, 8), middle_attention=True).build().eval()
    coder.save(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(tmp_path / WEIGHTS)
    for new, old in names.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    image = photo(1, 3, 16, 16)
    assert torch.equal(rac.load(tmp_path).encode(image), coder.encode(image))


def write_pair(coder: TAESD, folder: Path, name: str) -> None:
    for half in ("encoder", "decoder"):
        tensors = {key: tensor.half() for key, tensor in getattr(coder.network, half).state_dict().items()}
        torch.save(tensors, folder / f"{name}_{half}.pth")


@pytest.mark.parametrize("config", [TAESDConfig(4, False, 8), TAESDConfig(16, False, 8), TAESDConfig(32, True, 8)])
def test_tells_the_member_of_the_taesd_family(config: TAESDConfig, tmp_path: Path) -> None:
    coder = TAESD(config)
    write_pair(coder, tmp_path, "tae")
    for source in (tmp_path, tmp_path / "tae_encoder.pth", tmp_path / "tae_decoder.pth"):
        loaded = rac.load(source)
        assert loaded.config == coder.config
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    write_pair(coder, tmp_path, "taf")
    with pytest.raises(WeightsError, match=r"several.*tae_encoder\.pth, taf_encoder\.pth"):
        rac.load(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_weights(coder: Path) -> None:
    (coder / WEIGHTS).unlink()


def leave_a_pickle(coder: Path) -> None:
    (coder / WEIGHTS).rename(coder / "diffusion_pytorch_model.bin")


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(coder: Path) -> None:
        config = json.loads((coder / "config.json").read_text())
        (coder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove_weights, "no weights; expected"),
        (leave_a_pickle, r"pickled weights \(diffusion_pytorch_model.bin\).*save_pretrained"),
        (lambda coder: cut(coder / WEIGHTS), "not a whole safetensors file"),
        (lambda coder: cut(coder / "config.json"), "not readable JSON"),
        (lambda coder: (coder / "config.json").write_text("[]"), "expected a JSON object"),
        (edit_config(_class_name="VQModel"), "'VQModel', expected one of rac, AutoencoderRAC, AutoencoderKL"),
        (edit_config(_class_name=["AutoencoderKL"]), "expected one of rac, AutoencoderRAC, AutoencoderKL"),
        (edit_config(latent_channels=4), r"shape \(8, 3, 3, 3\), the configuration asks for \(8, 4, 3, 3\)"),
        (edit_config(layers_per_block=2), "lacks tensor"),
        (edit_config(block_out_channels="wide"), "cannot build AutoencoderKL"),
        (edit_config(scaling_factor="large"), "scaling_factor: expected a number"),
        (edit_config(scaling_factor=float("nan")), "must be finite, not nan"),
        (lambda coder: shutil.rmtree(coder) or coder.mkdir(), "holds no coder; expected config.json"),
    ],
)
def test_broken_directories_are_refused_in_one_line(harm: Callable[[Path], None], message: str, saved: Path) -> None:
    harm(saved)
    with pytest.raises(WeightsError, match=message) as error:
        rac.load(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_pth_files_are_refused_in_one_line(tmp_path: Path) -> None:
    write_pair(taesd(), tmp_path, "tae")
    encoder, decoder = tmp_path / "tae_encoder.pth", tmp_path / "tae_decoder.pth"
    whole = encoder.read_bytes()

    def refused(source: Path, message: str) -> None:
        with pytest.raises(WeightsError, match=message) as error:
            rac.load(source)
        assert "\n" not in str(error.value)

    cut(encoder)
    refused(tmp_path, "cut short")
    encoder.write_bytes(b"text")
    refused(tmp_path, "cut short")
    torch.save({"0.weight": torch.zeros(1)}, encoder)
    refused(tmp_path, "is not a TAESD encoder: it lacks tensor '14.weight'")
    torch.save([1, 2], encoder)
    refused(tmp_path, "no state dict")
    torch.save({"model": print}, encoder)
    refused(tmp_path, "not a state dict of plain tensors")
    encoder.write_bytes(whole)
    write_pair(TAESD(TAESDConfig(latent_channels=5, pooled=True, width=8)), tmp_path, "other")
    (tmp_path / "other_decoder.pth").rename(decoder)
    refused(encoder, r"tae_decoder.pth: 1.weight has shape \(8, 5, 3, 3\)")
    decoder.unlink()
    refused(encoder, "tae_decoder.pth does not exist")
    encoder.rename(tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", "is not a coder")


@pytest.mark.parametrize("name", ["nowhere/to-be-found", "a/b/c", "no such name"])
def test_offline_and_unknown_names_are_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=f"{name}.*(check the name|or a shipped coder)") as error:
        rac.load(name)
    assert "\n" not in str(error.value)


def test_a_hub_name_is_loaded_from_the_snapshot(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(saved))
    assert isinstance(rac.load("org/name"), KLVAE)


def test_wrong_tensors_are_refused() -> None:
    coder = kl()
    with pytest.raises(RacError, match="3 H W"):
        coder.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(RacError, match="has 4 channels, but this coder's latents have 3"):
        coder.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(RacError, match="too small"):
        coder.encode(torch.zeros(1, 3, 1, 1))


def test_saving_where_a_file_stands_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(RacError, match="cannot write"):
        kl().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "here"


def test_diffusers_opens_what_is_saved(saved: Path) -> None:
    network = diffusers.AutoencoderKL.from_pretrained(saved)
    assert network.config.scaling_factor == 0.25
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.state_dict().values(), rac.load(saved).network.state_dict().values(), strict=True)
    )
