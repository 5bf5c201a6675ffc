"""RAC's training objective, term by term (RAC, section 3.4, and terms of our own that are not in the paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..draws import Draws
from ..errors import RacError
from ..flow import Euler, Field, MeanEuler, TimeGrid, Trajectory, integrate, straight
from ..flow.mean import Derivative, mean_velocity_target
from ..flow.memory import precision_of, recomputed, retraced
from ..flow.solvers import Step
from ..flow.times import TimeDistribution, times_of
from ..states import PAD, RGB, StateSpec, contract, expand, image_of, image_state
from .image_terms import DISCRIMINATOR, NO_IMAGE_LOSSES, ImageLosses, check_weights, image_terms

DECODING = ("reconstruction", "coarse", "pattern", "detail", "pad", "path_decode", "perceptual", "adversarial")
"""Names of the terms computed on the flow from the teacher's latent to the image."""

ENCODING = ("path_encode", "state", "latent", "pixel", "round_trip", "round_trip_state")
"""Names of the terms that begin by encoding the image."""

SHARP = ("perceptual", "detail")
"""Names of the terms that reward sharpness."""

Memory = Literal["store", "recompute", "reverse"]

INSTANTANEOUS = 0.75
"""Share of images whose mean-velocity interval is empty (MeanFlow, arXiv 2505.13447, table 1a)."""


@dataclass(frozen=True)
class RACWeights:
    """Weights of the terms of `rac_terms`; only the flows that some term of nonzero weight needs are unrolled."""

    reconstruction: float = 0.0
    """Weight of the MSE of the decoded state's image against the image."""
    pad: float = 0.0
    """Weight of the MSE of the decoded state's other channels against their constant."""
    path_decode: float = 0.0
    """Weight of the MSE of the interior states of decoding against the straight path (RAC, equation 9)."""
    path_encode: float = 0.0
    """Weight of the MSE of the interior states of encoding against the straight path (RAC, equation 9)."""
    latent: float = 0.0
    """Weight of the MSE of the contracted encoding against the teacher's latent."""
    state: float = 0.0
    """Weight of the MSE of the encoding against the seed state."""
    pixel: float = 0.0
    """Weight of the MSE of the teacher's decode of the encoded latent against the image."""
    round_trip: float = 0.0
    """Weight of the MSE of image -> latent -> image against the image (RAC, equation 10)."""
    round_trip_state: float = 0.0
    """Weight of the MSE of the round trip without contraction to a latent in between."""
    mean_velocity: float = 0.0
    """Weight of the MSE of the mean velocity against the MeanFlow identity (`rac.flow.mean`); the field must accept
    intervals."""
    velocity: float = 0.0
    """Weight of the MSE of the velocity at a random time against the straight path's (arXiv 2209.03003, equation 1).
    Nothing is unrolled. Not in RAC's paper.
    """
    latent_velocity: float = 0.0
    """Weight of the MSE of the velocity where the state carries the latent alone, in the latent's own units. Not in
    RAC's paper.
    """
    perceptual: float = 0.0
    """Weight of LPIPS (VGG16, its weight file in RAC_WEIGHTS_DIR) of the image that `reconstruction` compares. Not in
    RAC's paper."""
    coarse: float = 0.0
    """Weight of the MSE of the decoded image against the image, both averaged over blocks of f x f pixels. It counters
    tints and wrong brightness, to which the other terms hardly react, because most of their value comes from fine
    detail. Not in RAC's paper."""
    pattern: float = 0.0
    """Weight of the block pattern, which shows as a grid in even regions: the mean square of the decoded image's error
    at each of the f^2 places in a block of f x f pixels, averaged over all blocks of an image, without its mean. Not in
    RAC's paper."""
    detail: float = 0.0
    """Weight of the MSE of the amount of fine detail in each block of f x f pixels. The amount is the root mean square
    of the difference between the image and its 3 x 3 mean. The other distances, perceptual ones too, favour images
    smoother than their originals. Not in RAC's paper."""
    adversarial: float = 0.0
    """Weight of the adversarial term of the image that `reconstruction` compares. It is relative to all other terms: at
    1, its gradient at the field's last layer has the same norm as theirs. Not in RAC's paper."""

    def __post_init__(self) -> None:
        check_weights(vars(self))

    def chosen(self) -> dict[str, float]:
        """Returns the terms whose weight is not 0, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}


PAPER = RACWeights(
    reconstruction=1.0,
    pad=0.1,
    path_decode=0.1,
    path_encode=0.1,
    latent=1.0,
    state=0.5,
    pixel=1.0,
    round_trip=1.0,
    round_trip_state=1.0,
)
"""Weights of the terms that the paper lists."""

NANO = replace(PAPER, pad=0.0)
"""Weights of the terms in the authors' nano script; it compares whole states, pad channels included."""


@dataclass(frozen=True)
class RACObjective:
    """Objective of a RAC: weights of its terms, and how flows are unrolled."""

    weights: RACWeights = PAPER
    steps: tuple[int, int] = (4, 4)
    """Smallest and largest number of steps of the unrolled flows; each iteration draws one evenly."""
    last_steps: tuple[int, int] = (0, 0)
    """Number of last steps through which gradients flow, for decoding and for encoding; 0: all. The steps before them
    are computed without gradients, at a third of the cost."""
    sharpen: float = 0.0
    """Exponent of a factor steps^`sharpen`, by which the terms that reward sharpness (`perceptual`, `detail`) are
    multiplied. With it one step stays faithful to the image, and more steps make it sharper."""
    random_grid: bool = True
    """Draw random time nodes between 0 and 1 (RAC, section 3.2) instead of equal steps."""
    step_noise: float = 0.05
    """Gaussian noise added to the state before each step, in units of that state's own standard deviation."""
    latent_noise: float = 0.0
    """Largest standard deviation of Gaussian noise on the latents that are decoded, so that the decoder tolerates
    imperfect latents (RAE, arXiv 2510.11690). Each image draws its own between 0 and this; the targets of encoding have
    no noise."""
    compare: Literal["image", "state"] = "image"
    """Channels that `reconstruction` and the round trips compare: the three of the image, or all C of the state."""
    times: TimeDistribution = "uniform"
    """Distribution of the times on the path at which `velocity` and `mean_velocity` are evaluated."""
    derivative: Derivative = "jvp"
    """Derivative of the mean velocity: exact, or by central difference, for fields without forward-mode derivatives
    (`ldm`).
    """
    memory: Memory = "recompute"
    """What an unrolled flow stores for the backward pass. "store": all activations. "recompute": the states, from which
    activations are computed again step by step. "reverse": the end states only, from which the others are computed
    backwards; it unrolls by `ReversibleHeun`, takes one more evaluation per flow, and does not allow step noise."""

    def __post_init__(self) -> None:
        low, high = self.steps
        if not 1 <= low <= high:
            raise RacError(f"steps {self.steps} must be (fewest, most) with 1 <= fewest <= most")
        if min(self.last_steps) < 0:
            raise RacError(f"last_steps {self.last_steps} must be at least 0; 0 means all")
        if any(self.last_steps) and self.memory == "reverse":
            raise RacError(
                'memory "reverse" needs gradients through all steps; set last_steps 0 0, or memory "recompute"'
            )
        if self.memory not in get_args(Memory):
            raise RacError(f"memory {self.memory!r} is unknown; expected {', '.join(get_args(Memory))}")
        if self.memory == "reverse" and self.step_noise:
            raise RacError(
                f'memory "reverse" does not work with step_noise {self.step_noise}; set step_noise 0, or '
                'memory "recompute"'
            )
        if not self.weights.chosen():
            raise RacError(
                "every weight of the objective is 0, so nothing would be trained; give one, such as velocity 1"
            )


class Coding(NamedTuple):
    """Functions of a coder and its teacher that the objective needs."""

    field: Field
    states: StateSpec
    contract: Callable[[Tensor], Tensor]
    """Function from seed state to latent: the spread's inverse, or a learned projector."""
    teacher_decode: Callable[[Tensor], Tensor] | None
    """Function from latent to image, by the frozen teacher; None where the `pixel` term is not used."""
    losses: ImageLosses = NO_IMAGE_LOSSES
    """Networks of the image terms; without a discriminator there is no `adversarial` term (yet)."""
    seed_noise: float = 0.0
    """Standard deviation of the noise in the sites of the seed state that the latent leaves free."""
    solver: Euler | MeanEuler = Euler()
    """Rule by which flows are unrolled: `MeanEuler` if the field accepts the interval, otherwise `Euler`."""


class Rollout(NamedTuple):
    """Settings by which the flows of one iteration are unrolled."""

    objective: RACObjective
    steps: int
    draws: Draws


def rac_terms(
    coding: Coding, image: Tensor, latent: Tensor, objective: RACObjective, draws: Draws
) -> dict[str, Tensor]:
    """Returns the terms of nonzero weight by name, unweighted, and `discriminator` if one is given (`image_terms`).

    - `coding`: the coder and its teacher, as functions.
    - `image`: B 3 H W in [-1, 1], with sides that are multiples of f.
    - `latent`: the teacher's latents, B c h w.
    - `objective`: which terms, and how flows are unrolled.
    - `draws`: the random numbers of this batch.

    Raises `RacError` if the `pixel` term is wanted without a teacher, or `perceptual` without its network.
    """
    weights = objective.weights
    target = image_state(image, coding.states.state_channels)
    decoded_latent = latent
    if objective.latent_noise:
        deviation = objective.latent_noise * draws.uniform(latent).view(-1, 1, 1, 1)
        decoded_latent = latent + deviation * draws.normal(latent)
    seed_state = _spread(coding, decoded_latent, target, draws)
    rollout = Rollout(objective, draws.integer(*objective.steps), draws)
    ends = _Ends(image, latent, seed_state, target)
    terms: dict[str, Tensor] = {}
    if any(getattr(weights, name) for name in DECODING):
        terms |= _decoding_terms(coding, ends, rollout)
    if any(getattr(weights, name) for name in ENCODING):
        terms |= _encoding_terms(coding, ends, rollout)
    if weights.velocity or weights.latent_velocity or weights.mean_velocity:
        terms |= _velocity_terms(coding, ends, rollout)
    return {name: terms[name] for name in (*weights.chosen(), DISCRIMINATOR) if name in terms}


class _Ends(NamedTuple):
    """The latent and the states at both ends of the flow."""

    image: Tensor
    latent: Tensor
    """The teacher's latent, without noise."""
    seed_state: Tensor
    """The seed state of the latent with its noise."""
    target: Tensor
    """The image state."""


def _spread(coding: Coding, latent: Tensor, like: Tensor, draws: Draws) -> Tensor:
    """Returns the seed state of a latent; free sites hold the coding's noise, drawn for states such as `like`."""
    fill = PAD + coding.seed_noise * draws.normal(like) if coding.seed_noise else None
    return expand(latent, coding.states, fill)


def _decoding_terms(coding: Coding, ends: _Ends, rollout: Rollout) -> dict[str, Tensor]:
    objective, weights = rollout.objective, rollout.objective.weights
    image, target = ends.image, ends.target
    decoding = _unroll(coding, ends.seed_state, rollout, path=weights.path_decode)
    terms = {"reconstruction": _image_error(decoding.end, target, objective)}
    if weights.coarse or weights.pattern or weights.detail:
        terms |= block_terms(image_of(decoding.end), image, coding.states.factor)
    if weights.path_decode:
        terms["path_decode"] = path_error(decoding, ends.seed_state, target)
    if weights.pad:  # a state of three channels has none
        free = target.shape[1] > RGB
        terms["pad"] = F.mse_loss(decoding.end[:, RGB:], target[:, RGB:]) if free else image.new_zeros(())
    if weights.perceptual and coding.losses.perceptual is None:
        raise RacError("the perceptual term needs LPIPS; give it in Coding's losses, or weight 0")
    if weights.perceptual or weights.adversarial:
        terms |= image_terms(coding.losses, image_of(decoding.end), image)
    sharper = rollout.steps**objective.sharpen
    return {name: sharper * term if name in SHARP else term for name, term in terms.items()}


def _encoding_terms(coding: Coding, ends: _Ends, rollout: Rollout) -> dict[str, Tensor]:
    objective, weights = rollout.objective, rollout.objective.weights
    encoding = _unroll(coding, ends.target, rollout, backwards=True, path=weights.path_encode)
    aim = expand(ends.latent, coding.states)
    encoded = coding.contract(encoding.end)
    terms = {"state": F.mse_loss(encoding.end, aim), "latent": F.mse_loss(encoded, ends.latent)}
    if weights.path_encode:
        terms["path_encode"] = path_error(encoding, aim, ends.target)
    if weights.pixel:
        terms["pixel"] = F.mse_loss(_teacher_decode(coding, objective)(encoded), ends.image)
    if weights.round_trip:
        returned = _unroll(coding, _spread(coding, encoded, ends.target, rollout.draws), rollout)
        terms["round_trip"] = _image_error(returned.end, ends.target, objective)
    if weights.round_trip_state:
        returned = _unroll(coding, encoding.end, rollout)
        terms["round_trip_state"] = _image_error(returned.end, ends.target, objective)
    return terms


def _velocity_terms(coding: Coding, ends: _Ends, rollout: Rollout) -> dict[str, Tensor]:
    objective, draws = rollout.objective, rollout.draws
    weights, image = objective.weights, ends.image
    terms = {}
    if weights.velocity or weights.latent_velocity:
        time = times_of(draws.uniform(image), objective.times)
        point = straight(ends.seed_state, ends.target, time)
        velocity = coding.field(point.state, time)
        terms["velocity"] = F.mse_loss(velocity, point.velocity)
        if weights.latent_velocity:
            found, wanted = (contract(state, coding.states) for state in (velocity, point.velocity))
            terms["latent_velocity"] = F.mse_loss(found, wanted)
    if weights.mean_velocity:
        time, end = (times_of(draws.uniform(image), objective.times) for _ in range(2))
        end = end.where(draws.uniform(image) >= INSTANTANEOUS, time)
        terms["mean_velocity"] = mean_velocity_error(
            coding.field, ends.seed_state, ends.target, time, end, objective.derivative
        )
    return terms


def block_terms(decoded: Tensor, image: Tensor, factor: int) -> dict[str, Tensor]:
    """Returns the terms `coarse`, `pattern` and `detail` of `RACWeights`, for images B 3 H W; f is `factor`."""
    blocks = F.pixel_unshuffle(decoded - image, factor).unflatten(1, (image.shape[1], factor**2))
    places = blocks.mean(dim=(-2, -1))
    return {
        "coarse": blocks.mean(dim=2).square().mean(),
        "pattern": (places - places.mean(dim=2, keepdim=True)).square().mean(),
        "detail": F.mse_loss(fine_detail(decoded, factor), fine_detail(image, factor)),
    }


def fine_detail(image: Tensor, factor: int) -> Tensor:
    """Returns the root mean square of what a 3 x 3 mean takes from B 3 H W, in each block: B 1 H/factor W/factor."""
    detail = image - F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    # Not less than a thousandth of the range, for the root's slope at 0 is infinite.
    return (F.avg_pool2d(detail.square().mean(dim=1, keepdim=True), factor) + 1e-6).sqrt()


def path_error(trajectory: Trajectory, seed_state: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over the interior nodes of the MSE against the straight path (RAC, equation 9).

    It is 0 without interior nodes.
    """
    interior = list(zip(trajectory.states, trajectory.times, strict=True))[1:-1]
    if not interior:
        return seed_state.new_zeros(())
    # The points of the line are cheap to make again, and would be one more state for each step to store.
    error = recomputed(lambda state, time: F.mse_loss(state, straight(seed_state, target, time).state))
    errors = [error(state, seed_state.new_tensor(t)) for state, t in interior]
    return sum(errors[1:], errors[0]) / len(errors)


def mean_velocity_error(
    field: Field, seed_state: Tensor, target: Tensor, time: Tensor, end: Tensor, how: Derivative = "jvp"
) -> Tensor:
    """Returns the MSE of u(s_t, t, r - t) against its identity (flow/mean.py).

    - `field`: the mean-velocity field.
    - `seed_state`, `target`: the ends of the path, B C H W.
    - `time`, `end`: t and r, both B, in any order.
    - `how`: how the derivative is taken, as for `total_derivative`.
    """
    wanted = mean_velocity_target(field, seed_state, target, time, end, how)
    return F.mse_loss(field(straight(seed_state, target, time).state, time, end - time), wanted)


@dataclass(frozen=True)
class TrainingStep:
    """A rule of integration for training: adds noise to the state first, and stores nothing but the state."""

    step_noise: float
    memory: Memory
    draws: Draws
    solver: Euler | MeanEuler = Euler()  # noqa: RUF009 - frozen and without state
    """The rule itself."""
    without_gradient: int = 0
    """Number of first steps of an integration that are walked without gradients; `carry` counts them."""

    order = 1
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """Carries `state` from t0 to t1, with noise added before."""
        rng_seed = self.draws.rng_seed() if self.step_noise else None

        def advance(state: Tensor) -> Tensor:
            if rng_seed is not None:
                deviation = state.flatten(1).std(dim=1).view(-1, 1, 1, 1)
                state = state + self.step_noise * deviation * self.draws.normal(state, rng_seed)
            return self.solver.step(field, state, t0, t1).state

        done: int = carry or 0
        if done < self.without_gradient:
            # Narrowed weights that are made here have no gradient, and must not serve the steps that follow.
            with torch.no_grad(), precision_of(state)():
                return Step(advance(state), done + 1)
        return Step(advance(state) if self.memory == "store" else recomputed(advance)(state), done + 1)


def _unroll(coding: Coding, state: Tensor, rollout: Rollout, backwards: bool = False, path: float = 0.0) -> Trajectory:
    """Unrolls one flow on a grid of its own. Its states are kept if their path has a weight."""
    objective, draws = rollout.objective, rollout.draws
    grid = TimeGrid.random(rollout.steps, draws.shared) if objective.random_grid else TimeGrid.uniform(rollout.steps)
    grid = grid.reversed() if backwards else grid
    keep: Literal["end", "nodes"] = "nodes" if path else "end"
    if objective.memory == "reverse":
        return retraced(cast(nn.Module, coding.field), state, grid, keep=keep)
    last = objective.last_steps[backwards] or rollout.steps
    first = max(0, rollout.steps - last)
    rule = TrainingStep(objective.step_noise, objective.memory, draws, coding.solver, first)
    return integrate(coding.field, state, grid, rule, keep=keep)


def _teacher_decode(coding: Coding, objective: RACObjective) -> Callable[[Tensor], Tensor]:
    if coding.teacher_decode is None:
        raise RacError("the pixel term needs the teacher's decoder; give a teacher, or weight 0")
    return coding.teacher_decode if objective.memory == "store" else recomputed(coding.teacher_decode)


def _image_error(state: Tensor, target: Tensor, objective: RACObjective) -> Tensor:
    if objective.compare == "state":
        return F.mse_loss(state, target)
    return F.mse_loss(state[:, :RGB], target[:, :RGB])
