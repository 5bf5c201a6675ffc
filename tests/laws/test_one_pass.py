"""An evaluation walks each flow once, whatever it measures."""

from __future__ import annotations

import pytest
import torch

from rac.coders.klvae import KLVAEConfig
from rac.evaluate import ImageSet, Preprocessing, Protocol, evaluate, measure

STEPS = 4


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return KLVAEConfig(widths=(4, 4, 4), latent_channels=4).build().eval()


@pytest.mark.parametrize("latents", ["own", "teacher"])
@pytest.mark.parametrize(
    ("metrics", "walks"),
    [
        (("psnr",), {"own": 2, "teacher": 1}),
        (("psnr", "explained-variance"), {"own": 2, "teacher": 2}),
        (("psnr", "explained-variance", "state-round-trip"), {"own": 3, "teacher": 3}),
    ],
)
def test_fields_are_asked_once_for_each_step(make_rac, images, teacher, latents, metrics, walks) -> None:
    coder, calls, encodings = make_rac(lively=0.05).eval(), [], []
    coder.field.register_forward_hook(lambda *_: calls.append(1))
    teacher_hook = teacher.network.encoder.register_forward_hook(lambda *_: encodings.append(1))
    protocol = Protocol("counted", Preprocessing(), metrics=metrics, steps=STEPS, latents=latents)
    evaluate(coder, ImageSet.of(images(3, 24, 24), "waves"), protocol, teacher=teacher)
    teacher_hook.remove()
    assert len(calls) == STEPS * walks[latents]
    assert len(encodings) == (latents == "teacher" or "explained-variance" in metrics)


def test_a_posterior_is_computed_once_for_sample_and_mean(images, make_rac, teacher) -> None:
    encodings = []
    hook = teacher.network.encoder.register_forward_hook(lambda *_: encodings.append(1))
    metrics = ("psnr", "explained-variance")
    protocol = Protocol("sampled", Preprocessing(), metrics=metrics, latents="teacher", posterior="sample")
    coder, waves = make_rac(lively=0.05).eval(), ImageSet.of(images(3, 24, 24), "waves")
    sampled = measure(coder, waves, protocol, teacher=teacher)
    hook.remove()
    assert len(encodings) == 1
    mean = measure(coder, waves, Protocol("mean", Preprocessing(), metrics=metrics, latents="teacher"), teacher=teacher)
    assert sampled.metrics["psnr"] != mean.metrics["psnr"]
    # Agreement is that with the posterior's mean, whatever is decoded.
    assert sampled.metrics["explained variance"] == pytest.approx(mean.metrics["explained variance"], abs=1e-6)


def test_a_measurement_hashes_no_weights(make_rac, images, monkeypatch) -> None:
    monkeypatch.setattr("rac.evaluate.reconstruction.weights_hash", lambda _: pytest.fail("hashed"))
    found = measure(make_rac().eval(), ImageSet.of(images(2, 24, 24), "two"), Protocol("p", Preprocessing()))
    assert set(found.metrics) == {"psnr", "ssim"}
