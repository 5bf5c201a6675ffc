"""Terms of flow matching and of alignment: published values, drawn times, dropped labels."""

from __future__ import annotations

import math

import pytest
import torch

from rac.draws import Draws
from rac.errors import RacError
from rac.objectives.alignment import alignment, on_grid
from rac.objectives.flow import FlowObjective, flow_sample, velocity_error


def draws(count: int, rng_seed: int = 0) -> Draws:
    return Draws.whole(torch.Generator().manual_seed(rng_seed), count)


def times(objective: FlowObjective, count: int = 20_000) -> torch.Tensor:
    return flow_sample(torch.zeros(count, 1, 1, 1), None, 0, objective, draws(count)).time


def test_the_point_lies_on_the_path_and_the_velocity_leads_along_it():
    latents = torch.randn(6, 4, 3, 3)
    sample = flow_sample(latents, None, 0, FlowObjective(), draws(6))
    left = (1 - sample.time).view(-1, 1, 1, 1)
    torch.testing.assert_close(sample.state + left * sample.velocity, latents)
    noise = sample.state - sample.time.view(-1, 1, 1, 1) * sample.velocity
    torch.testing.assert_close(noise, latents - sample.velocity)
    assert noise.std() == pytest.approx(1, abs=0.15)


def test_the_error_is_the_mean_of_squares():
    sample = flow_sample(torch.randn(3, 4, 2, 2), None, 0, FlowObjective(), draws(3))
    assert velocity_error(sample.velocity, sample) == 0
    assert velocity_error(sample.velocity + 2, sample).item() == pytest.approx(4)
    # A field that says nothing is wrong by the variance of data and noise.
    many = flow_sample(0.5 * torch.randn(4000, 4, 2, 2), None, 0, FlowObjective(), draws(4000))
    assert velocity_error(torch.zeros(()), many).item() == pytest.approx(1.25, abs=0.02)


def test_times_follow_their_distribution():
    uniform = times(FlowObjective())
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.var() == pytest.approx(1 / 12, abs=0.002)
    for mean, std in ((0.0, 1.0), (0.4, 1.0), (-1.0, 0.5)):
        found = torch.logit(times(FlowObjective("logit_normal", mean, std)).double())
        assert found.mean() == pytest.approx(mean, abs=0.03)
        assert found.std() == pytest.approx(std, abs=0.03)


def test_a_shift_translates_the_logit_of_times():
    alpha = math.sqrt(768 * 256 / 4096)
    found = torch.logit(times(FlowObjective("logit_normal", shift=alpha)).double())
    assert found.mean() == pytest.approx(-1.9356, abs=0.03)
    # A share of about 3.4 % of uniform draws comes to lie below 0.005.
    assert (times(FlowObjective(shift=alpha)) < 0.005).float().mean() == pytest.approx(0.034, abs=0.005)


def test_labels_are_dropped_at_random_and_nothing_else_changes():
    latents, labels = torch.zeros(8000, 1, 1, 1), torch.arange(8000) % 7
    sample = flow_sample(latents, labels, 7, FlowObjective(label_dropout=0.1), draws(8000))
    dropped = sample.labels == 7
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.015)
    assert torch.equal(sample.labels[~dropped], labels[~dropped])
    without = flow_sample(latents, None, 7, FlowObjective(), draws(8000))
    assert without.labels is None
    assert torch.equal(without.state, sample.state)
    assert torch.equal(flow_sample(latents, labels, 7, FlowObjective(label_dropout=0), draws(8000)).labels, labels)
    assert (flow_sample(latents, labels, 7, FlowObjective(label_dropout=1), draws(8000)).labels == 7).all()


def test_samples_do_not_depend_on_how_the_batch_is_cut():
    latents, labels, objective = torch.randn(6, 2, 3, 3), torch.arange(6), FlowObjective(label_dropout=0.5)
    whole = flow_sample(latents, labels, 9, objective, draws(6))
    generator = torch.Generator().manual_seed(0)
    part = flow_sample(latents[2:5], labels[2:5], 9, objective, Draws(generator, generator, 6, 2, 3))
    assert all(torch.equal(one, other[2:5]) for one, other in zip(part, whole, strict=True))


@pytest.mark.parametrize(
    "changes",
    [{"time_std": 0.0}, {"time_mean": math.nan}, {"shift": 0.0}, {"shift": math.inf}, {"label_dropout": 1.5}],
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(RacError, match=next(iter(changes))):
        FlowObjective(**changes)


def test_published_alignment():
    found = alignment(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
    assert found.item() == pytest.approx(-0.70711, abs=5e-6)


def test_alignment_is_a_mean_over_tokens_without_gradient_to_the_target():
    projected = torch.randn(2, 5, 3, requires_grad=True)
    target = torch.randn(2, 5, 3, requires_grad=True)
    found = alignment(projected, target)
    each = [
        -torch.dot(p, t) / p.norm() / t.norm()
        for p, t in zip(projected.flatten(0, 1), target.flatten(0, 1), strict=True)
    ]
    assert found.item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-6)
    found.backward()
    assert projected.grad is not None
    assert target.grad is None
    assert alignment(3 * target, target).item() == pytest.approx(-1)


def test_features_come_to_the_grid_of_the_tokens():
    features = torch.randn(2, 3, 4, 6)
    own = on_grid(features, 4, 6)
    assert torch.equal(own[:, 7], features[:, :, 1, 1])
    even = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 4, 8)
    assert on_grid(even, 2, 4)[0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5] * 2
