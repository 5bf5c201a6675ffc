"""The GPU gives what the CPU gives: coding, training, bf16, checkpoints across devices. And what memory it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import untrained_dgae
from torch import Tensor, nn
from training_toy import AdversarialTask, ToyStream, ToyTask

import rac
from rac import hub
from rac.coders.klvae import KLVAEConfig
from rac.coders.rac import RAC, RACConfig
from rac.draws import Draws
from rac.fields import FieldConfig, LdmFieldConfig, LocalFieldConfig, TinyFieldConfig, UNetConfig, UNetFieldConfig
from rac.images import from_pixels
from rac.latents import LatentSpec
from rac.objectives.rac import Coding, RACObjective, RACWeights, rac_terms
from rac.runtime import autocast, generator, place, reproducible
from rac.train import TrainConfig, fit, log, read_log

PLAIN = TrainConfig(iterations=10, batch=8, lr=1e-3, clip=0.0, log_every=1, gallery_every=100, tensorboard=False)
SPEC = LatentSpec(factor=8, channels=4)


@pytest.fixture(autouse=True)
def _float32_in_full(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TF32, torch's default for convolutions, keeps ten bits; here both devices are to round alike. No curves."""
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield


def image(side: int = 64, batch: int = 2) -> Tensor:
    pixels = torch.randint(0, 256, (batch, side // 8, side // 8, 3), generator=torch.Generator().manual_seed(1))
    coarse = from_pixels(pixels.to(torch.uint8).numpy())
    return F.interpolate(coarse, size=side, mode="bicubic").clamp(-1, 1)


def random_rac(field: FieldConfig) -> RAC:
    """With a last layer that is not zero, so that the flow goes somewhere."""
    torch.manual_seed(0)
    coder = RAC(RACConfig(SPEC, field, state_channels=4, spread="shuffle"))
    with torch.no_grad():
        for parameter in coder.field.parameters():
            if parameter.ndim == 4 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return coder.eval().requires_grad_(False)


FIELDS = {
    "tiny": TinyFieldConfig(widths=(32, 24, 16), blocks=(1, 1, 1), patch=2),
    "local": LocalFieldConfig(widths=(32, 24, 16), blocks=(1, 1, 1), down=(8, 16), down_blocks=(0, 1), carrier=False),
    "ldm": LdmFieldConfig(widths=(16, 16, 32, 32), layers_per_block=1, groups=8),
    "unet": UNetFieldConfig(network=UNetConfig(width=16, multiples=(1, 1, 2), blocks=1, norm_groups=8)),
}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_rac_codes_alike(kind: str, channels_last: bool, cuda: torch.device) -> None:
    coder, images = random_rac(FIELDS[kind]), image()
    with reproducible():
        latent, decoded = coder.encode(images, steps=3), coder.decode(coder.encode(images, steps=3), steps=3)
        assert float((decoded - images).abs().max()) > 1e-3, "the flow goes nowhere, so nothing would be compared"
        place(coder, cuda, channels_last)
        theirs = coder.encode(images.to(cuda), steps=3)
        again = coder.decode(latent.to(cuda), steps=3)
    assert theirs.device.type == again.device.type == "cuda"
    torch.testing.assert_close(theirs.cpu(), latent, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.cpu(), decoded, rtol=1e-3, atol=1e-4)


def test_a_kl_vae_codes_alike(cuda: torch.device) -> None:
    torch.manual_seed(0)
    coder = KLVAEConfig(widths=(16, 16, 32, 32), latent_channels=4).build().eval().requires_grad_(False)
    images = image()
    with reproducible():
        latent = coder.encode(images)
        decoded = coder.decode(latent)
        place(coder, cuda, channels_last=True)
        torch.testing.assert_close(coder.encode(images.to(cuda)).cpu(), latent, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(coder.decode(latent.to(cuda)).cpu(), decoded, rtol=1e-3, atol=1e-4)


def test_a_dgae_codes_alike_from_the_same_noise(cuda: torch.device) -> None:
    coder, images = untrained_dgae(0.05).eval().requires_grad_(False), image()
    with reproducible():
        latent = coder.encode(images)
        noise = coder.noise_of(latent, ("a", "b"), 3)
        decoded = coder.decode(latent, noise=noise)
        place(coder, cuda, channels_last=True)
        theirs = coder.encode(images.to(cuda))
        drawn = coder.noise_of(theirs, ("a", "b"), 3)
        assert drawn is not None
        assert torch.equal(drawn.cpu(), noise)
        again = coder.decode(latent.to(cuda), noise=noise)
        coder.fit_statistics([images.to(cuda)])
        assert float(coder.encode(images.to(cuda)).std()) == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(theirs.cpu(), latent, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.cpu(), decoded, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["rac-64", "klvae-f8d4"])
def test_a_shipped_coder_decodes_alike(name: str, cuda: torch.device) -> None:
    coder, images = hub.load(name), image()
    with reproducible():
        latent = coder.encode(images)
        decoded = coder.decode(latent)
        place(coder, cuda)
        torch.testing.assert_close(coder.decode(latent.to(cuda)).cpu(), decoded, rtol=1e-3, atol=1e-3)


def test_bf16_decodes_nearly_alike(cuda: torch.device) -> None:
    """bfloat16 keeps 8 bits: a hundredth of the range off here and there is expected, another picture is not."""
    coder, images = hub.load("rac-64"), image()
    with torch.no_grad():
        decoded = coder.decode(coder.encode(images))
        latent = coder.encode(images).to(cuda)
        place(coder, cuda, channels_last=True)
        with autocast(cuda, True):
            ours = coder.decode(latent).float().cpu()
    error = F.mse_loss(ours, decoded).sqrt()
    assert 0 < float(error) < 0.02


def deep() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))
    return nn.Sequential(*layers)


class Plainly(ToyTask):
    """No random numbers: each device has a generator of its own, whose numbers differ."""

    def losses(self, batch, draws, iteration):
        clean = self.module(batch.images)
        return {"clean": F.mse_loss(clean, batch.images), "faint": clean.square().mean(), "unused": clean.mean()}


def losses(run: Path) -> list[float]:
    return [record["train"]["loss"] for record in read_log(run / "log.jsonl") if "train" in record]


def test_ten_iterations_equal_the_cpu_s(tmp_path: Path, cuda: torch.device) -> None:
    ours = fit(Plainly(deep()), ToyStream(), replace(PLAIN, device="cpu"), tmp_path / "cpu").module
    theirs = fit(Plainly(deep()), ToyStream(), replace(PLAIN, device="cuda"), tmp_path / "cuda").module
    assert next(theirs.parameters()).is_cuda
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "cuda")), torch.tensor(losses(tmp_path / "cpu")), rtol=1e-3, atol=1e-5
    )
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            other.cpu(), one, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("task", [ToyTask, AdversarialTask])
def test_bf16_channels_last_trains(tmp_path: Path, task: type[ToyTask], cuda: torch.device) -> None:
    settings = replace(PLAIN, iterations=150, lr=1e-2, bf16=True, channels_last=True, device="cuda", workers=4)
    fit(task(deep()), ToyStream(), settings, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert all(map(math.isfinite, found))
    assert sum(found[-10:]) < 0.7 * sum(found[:10])


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("task", [ToyTask, AdversarialTask])
def test_a_checkpoint_goes_on_on_the_other_device(
    tmp_path: Path, task: type[ToyTask], first: str, second: str, cuda: torch.device
) -> None:
    begun = fit(task(deep()), ToyStream(), replace(PLAIN, device=first), tmp_path / "run", stop_at=5)
    kept = {name: value.cpu().clone() for name, value in begun.module.state_dict().items()}
    idle = replace(PLAIN, device=second, iterations=5)
    same = fit(task(deep()), ToyStream(), idle, tmp_path / "run", resume=True)
    for name, value in same.module.state_dict().items():
        assert torch.equal(value.cpu(), kept[name]), name
    done = fit(task(deep()), ToyStream(), replace(PLAIN, device=second), tmp_path / "run", resume=True)
    assert done.iteration == 10
    assert next(done.module.parameters()).device.type == second


def test_a_cuda_coder_is_saved_and_loads_on_the_cpu(tmp_path: Path, cuda: torch.device) -> None:
    coder = random_rac(FIELDS["local"])
    weights = {name: value.clone() for name, value in coder.state_dict().items()}
    rac.save(place(coder, cuda, channels_last=True), tmp_path / "coder")
    loaded = rac.load(tmp_path / "coder")
    for name, value in loaded.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, weights[name]), name


def peak_of_decoding(coder: RAC, steps: int, cuda: torch.device) -> int:
    latent = torch.zeros(4, 4, 32, 32, device=cuda)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        coder.decode(latent, steps=steps)
    return torch.cuda.max_memory_allocated() - before


def test_decoding_takes_no_more_memory_for_more_steps(cuda: torch.device) -> None:
    coder = place(random_rac(FIELDS["local"]), cuda)
    peak_of_decoding(coder, 1, cuda)  # what libraries allocate once
    one, sixteen = peak_of_decoding(coder, 1, cuda), peak_of_decoding(coder, 16, cuda)
    assert sixteen < 1.5 * one


@pytest.mark.parametrize("recompute", [False, True])
def test_training_memory_with_and_without_recomputing(recompute: bool, cuda: torch.device) -> None:
    """Stored activations grow with the steps; recomputed ones by a state a step."""
    coder = place(random_rac(FIELDS["local"]).requires_grad_(True), cuda)
    images = image(128, 8).to(cuda)
    latent = torch.zeros(8, 4, 16, 16, device=cuda)

    def peak(steps: int) -> int:
        objective = RACObjective(
            RACWeights(reconstruction=1.0), steps=(steps, steps), memory="recompute" if recompute else "store"
        )
        draws = Draws(generator(0, "shared"), generator(0, "own", device=cuda), 8, 0, 8)
        coding = Coding(coder.field, coder.states, coder.contract, None)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        terms = rac_terms(coding, images, latent, objective, draws)
        sum(terms.values()).backward()
        coder.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    peak(1)
    ratio = peak(8) / peak(1)
    assert ratio < 3 if recompute else ratio > 4
