"""RAC's training objective, term by term (RAC, section 3.4; the terms marked "ours" are not in the paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, cast, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from ..draws import Draws
from ..errors import RacError
from ..flow import Euler, Field, TimeGrid, Trajectory, integrate, straight
from ..flow.mean import Derivative, mean_velocity_target
from ..flow.memory import recomputed, retraced
from ..flow.solvers import Step
from ..flow.times import TimeDistribution, times_of
from ..states import PAD, RGB, StateSpec, contract, expand, image_of, image_state
from .image_terms import DISCRIMINATOR, NO_IMAGE_LOSSES, ImageLosses, check_weights, image_terms

DECODING = ("reconstruction", "coarse", "pattern", "detail", "pad", "path_decode", "perceptual", "adversarial")
"""The terms on the flow from the teacher's latent."""

ENCODING = ("path_encode", "state", "latent", "pixel", "round_trip", "round_trip_state")
"""The terms that begin by encoding the image."""

Memory = Literal["store", "recompute", "reverse"]

INSTANTANEOUS = 0.75
"""Share of images whose mean-velocity interval is empty (MeanFlow, arXiv 2505.13447, table 1a)."""


@dataclass(frozen=True)
class RACWeights:
    """Weight of each term; only the flows that some term of nonzero weight needs are unrolled."""

    reconstruction: float = 0.0
    """MSE of the decoded state's image against the image."""
    pad: float = 0.0
    """MSE of the decoded state's other channels against their constant."""
    path_decode: float = 0.0
    """MSE of the interior states against the straight line, decoding (RAC, equation 9)."""
    path_encode: float = 0.0
    """The same, encoding."""
    latent: float = 0.0
    """MSE of the contracted encoding against the teacher's latent."""
    state: float = 0.0
    """MSE of the encoding against the seed state."""
    pixel: float = 0.0
    """MSE of the teacher's decode of the encoded latent against the image."""
    round_trip: float = 0.0
    """MSE of image -> latent -> image against the image (RAC, equation 10)."""
    round_trip_state: float = 0.0
    """The same without contracting to a latent in between."""
    mean_velocity: float = 0.0
    """MSE of the mean velocity against its identity (flow/mean.py). Needs a field built with `interval`."""
    velocity: float = 0.0
    """Ours: MSE of the velocity at a random time on the straight line against its slope (arXiv 2209.03003,
    equation 1). No unrolling."""
    latent_velocity: float = 0.0
    """Ours: the same, where the state carries the latent alone, so in the latent's own units."""
    perceptual: float = 0.0
    """Ours: LPIPS (VGG16, its weights in RAC_WEIGHTS_DIR) of the decoded image, that of `reconstruction`."""
    coarse: float = 0.0
    """Ours: MSE of the decoded image against the image, both averaged over blocks of f x f pixels: tints and wrong
    brightness, which the other terms hardly see, for most of their value comes from fine detail."""
    pattern: float = 0.0
    """Ours: mean square of the decoded image's error, averaged over all blocks of f x f pixels of one image, at each of
    the f^2 places in a block, without its mean: the grid of blocks that shows in even regions."""
    detail: float = 0.0
    """Ours: MSE of the amount of fine detail in each block of f x f pixels: the root mean square of what a 3 x 3 mean
    takes away. Distances, perceptual ones too, like decoded images smoother than their originals."""
    adversarial: float = 0.0
    """Ours: a discriminator's judgement of the same image, in units of all other terms: at 1 its gradient at the
    field's last layer is as long as theirs."""

    def __post_init__(self) -> None:
        check_weights(vars(self))

    def chosen(self) -> dict[str, float]:
        """The terms whose weight is not 0, in the order above."""
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
"""The paper's term list."""

NANO = replace(PAPER, pad=0.0)
"""The term list of the authors' nano script; it compares whole states, pad channels included."""


@dataclass(frozen=True)
class RACObjective:
    """Which terms, and how the unrolled ones are unrolled."""

    weights: RACWeights = PAPER
    steps: tuple[int, int] = (4, 4)
    """Steps of the unrolled flows: drawn evenly from the first to the last number, anew for each iteration."""
    random_grid: bool = True
    """Random time nodes between 0 and 1 (RAC, section 3.2), or equal steps."""
    step_noise: float = 0.05
    """Gaussian noise added to the state before each step, in units of that state's own standard deviation."""
    latent_noise: float = 0.0
    """Gaussian noise added to the latents that are decoded (those that encoding aims at stay clean), its deviation
    drawn for each image between 0 and this: practice for latents that lie off the teacher's (RAE, arXiv 2510.11690)."""
    compare: Literal["image", "state"] = "image"
    """What `reconstruction` and the round trips compare: the three channels of the image, or all C of the state."""
    times: TimeDistribution = "uniform"
    """Where on the line the `velocity` and `mean_velocity` terms look."""
    derivative: Derivative = "jvp"
    """Of the mean velocity: exact, or by central difference, for fields without forward-mode derivatives (`ldm`)."""
    memory: Memory = "recompute"
    """What waits for the backward pass: all activations ("store"); the states, from which they are computed again step
    by step ("recompute"); or the end states alone, from which the others are retraced ("reverse"). The last unrolls by
    `ReversibleHeun`, one evaluation more per flow, and knows no step noise: it could not be taken off again."""

    def __post_init__(self) -> None:
        low, high = self.steps
        if not 1 <= low <= high:
            raise RacError(f"steps {self.steps} must be (fewest, most) with 1 <= fewest <= most")
        if self.memory not in get_args(Memory):
            raise RacError(f"memory {self.memory!r} is unknown; expected {', '.join(get_args(Memory))}")
        if self.memory == "reverse" and self.step_noise:
            raise RacError(
                f'memory "reverse" cannot take step_noise {self.step_noise} off the states again; set step_noise 0, or '
                'memory "recompute"'
            )
        if not self.weights.chosen():
            raise RacError(
                "every weight of the objective is 0, so nothing would be trained; give one, such as velocity 1"
            )


class Coding(NamedTuple):
    """What the objective needs of a coder and its teacher, as functions."""

    field: Field
    states: StateSpec
    contract: Callable[[Tensor], Tensor]
    """Seed state -> latent: the spread's inverse, or a learned projector."""
    teacher_decode: Callable[[Tensor], Tensor] | None
    """Latent -> image by the frozen teacher; None where the `pixel` term is not used."""
    losses: ImageLosses = NO_IMAGE_LOSSES
    """Networks that look at the decoded image; without a discriminator there is no `adversarial` term (yet)."""
    seed_noise: float = 0.0
    """Deviation of the noise in the sites of the seed state that the latent leaves free."""


class Rollout(NamedTuple):
    """How the flows of one iteration are unrolled."""

    objective: RACObjective
    steps: int
    draws: Draws


def rac_terms(
    coding: Coding, image: Tensor, latent: Tensor, objective: RACObjective, draws: Draws
) -> dict[str, Tensor]:
    """The terms of nonzero weight, unweighted, by name; and `discriminator`, where one is given (`image_terms`).

    `image` is B 3 H W in [-1, 1] with sides that are multiples of f, `latent` B c h w the teacher's.
    Raises `RacError` if the `pixel` term is wanted without a teacher, or `perceptual` without its network.
    """
    weights, channels = objective.weights, coding.states.state_channels
    target = image_state(image, channels)

    def spread(latent: Tensor) -> Tensor:
        fill = PAD + coding.seed_noise * draws.normal(target) if coding.seed_noise else None
        return expand(latent, coding.states, fill)

    decoded_latent = latent
    if objective.latent_noise:
        deviation = objective.latent_noise * draws.uniform(latent).view(-1, 1, 1, 1)
        decoded_latent = latent + deviation * draws.normal(latent)
    seed_state = spread(decoded_latent)
    rollout = Rollout(objective, draws.integer(*objective.steps), draws)
    terms: dict[str, Tensor] = {}

    if any(getattr(weights, name) for name in DECODING):
        decoding = _unroll(coding, seed_state, rollout, path=weights.path_decode)
        terms["reconstruction"] = _image_error(decoding.end, target, objective)
        if weights.coarse or weights.pattern or weights.detail:
            terms |= block_terms(image_of(decoding.end), image, coding.states.factor)
        if weights.path_decode:
            terms["path_decode"] = path_error(decoding, seed_state, target)
        if weights.pad:  # a state of three channels has none
            pad = F.mse_loss(decoding.end[:, RGB:], target[:, RGB:]) if channels > RGB else image.new_zeros(())
            terms["pad"] = pad
        if weights.perceptual and coding.losses.perceptual is None:
            raise RacError("the perceptual term needs LPIPS; give it in Coding's losses, or weight 0")
        if weights.perceptual or weights.adversarial:
            terms |= image_terms(coding.losses, image_of(decoding.end), image)

    if any(getattr(weights, name) for name in ENCODING):
        encoding = _unroll(coding, target, rollout, backwards=True, path=weights.path_encode)
        aim = expand(latent, coding.states)
        if weights.path_encode:
            terms["path_encode"] = path_error(encoding, aim, target)
        terms["state"] = F.mse_loss(encoding.end, aim)
        encoded = coding.contract(encoding.end)
        terms["latent"] = F.mse_loss(encoded, latent)
        if weights.pixel:
            terms["pixel"] = F.mse_loss(_teacher_decode(coding, objective)(encoded), image)
        if weights.round_trip:
            returned = _unroll(coding, spread(encoded), rollout)
            terms["round_trip"] = _image_error(returned.end, target, objective)
        if weights.round_trip_state:
            returned = _unroll(coding, encoding.end, rollout)
            terms["round_trip_state"] = _image_error(returned.end, target, objective)

    if weights.velocity or weights.latent_velocity:
        time = times_of(draws.uniform(image), objective.times)
        point = straight(seed_state, target, time)
        velocity = coding.field(point.state, time)
        terms["velocity"] = F.mse_loss(velocity, point.velocity)
        if weights.latent_velocity:
            terms["latent_velocity"] = F.mse_loss(
                contract(velocity, coding.states), contract(point.velocity, coding.states)
            )
    if weights.mean_velocity:
        time, end = (times_of(draws.uniform(image), objective.times) for _ in range(2))
        end = end.where(draws.uniform(image) >= INSTANTANEOUS, time)
        terms["mean_velocity"] = mean_velocity_error(coding.field, seed_state, target, time, end, objective.derivative)
    return {name: terms[name] for name in (*weights.chosen(), DISCRIMINATOR) if name in terms}


def block_terms(decoded: Tensor, image: Tensor, factor: int) -> dict[str, Tensor]:
    """`coarse`, `pattern` and `detail`, as `RACWeights` has them, of images B 3 H W; f is `factor`."""
    blocks = F.pixel_unshuffle(decoded - image, factor).unflatten(1, (image.shape[1], factor**2))
    places = blocks.mean(dim=(-2, -1))
    return {
        "coarse": blocks.mean(dim=2).square().mean(),
        "pattern": (places - places.mean(dim=2, keepdim=True)).square().mean(),
        "detail": F.mse_loss(fine_detail(decoded, factor), fine_detail(image, factor)),
    }


def fine_detail(image: Tensor, factor: int) -> Tensor:
    """Root mean square of what a 3 x 3 mean takes from B 3 H W, in each block of `factor`: B 1 H/factor W/factor."""
    detail = image - F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    # Not less than a thousandth of the range, for the root's slope at 0 is infinite.
    return (F.avg_pool2d(detail.square().mean(dim=1, keepdim=True), factor) + 1e-6).sqrt()


def path_error(trajectory: Trajectory, seed_state: Tensor, target: Tensor) -> Tensor:
    """Mean over the interior nodes of the MSE against the straight line (RAC, equation 9); 0 without interior nodes."""
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
    """MSE of u(s_t, t, r - t) against its identity (flow/mean.py); t = `time`, r = `end`, both B, in any order."""
    wanted = mean_velocity_target(field, seed_state, target, time, end, how)
    return F.mse_loss(field(straight(seed_state, target, time).state, time, end - time), wanted)


@dataclass(frozen=True)
class TrainingStep:
    """Euler's step as training takes it, a solver: noise on the state first, and nothing stored but the state."""

    step_noise: float
    memory: Memory
    draws: Draws

    order = 1
    reversible = False

    def step(self, field: Field, state: Tensor, t0: float, t1: float, carry: Any = None) -> Step:
        """See `rac.flow.Solver`."""
        rng_seed = self.draws.rng_seed() if self.step_noise else None

        def advance(state: Tensor) -> Tensor:
            if rng_seed is not None:
                deviation = state.flatten(1).std(dim=1).view(-1, 1, 1, 1)
                state = state + self.step_noise * deviation * self.draws.normal(state, rng_seed)
            return Euler().step(field, state, t0, t1).state

        return Step(advance(state) if self.memory == "store" else recomputed(advance)(state))


def _unroll(coding: Coding, state: Tensor, rollout: Rollout, backwards: bool = False, path: float = 0.0) -> Trajectory:
    """One flow as training unrolls it, on a grid of its own. Its states are kept if their path has a weight."""
    objective, draws = rollout.objective, rollout.draws
    grid = TimeGrid.random(rollout.steps, draws.shared) if objective.random_grid else TimeGrid.uniform(rollout.steps)
    grid = grid.reversed() if backwards else grid
    keep: Literal["end", "nodes"] = "nodes" if path else "end"
    if objective.memory == "reverse":
        return retraced(cast(nn.Module, coding.field), state, grid, keep=keep)
    return integrate(coding.field, state, grid, TrainingStep(objective.step_noise, objective.memory, draws), keep=keep)


def _teacher_decode(coding: Coding, objective: RACObjective) -> Callable[[Tensor], Tensor]:
    if coding.teacher_decode is None:
        raise RacError("the pixel term needs the teacher's decoder; give a teacher, or weight 0")
    return coding.teacher_decode if objective.memory == "store" else recomputed(coding.teacher_decode)


def _image_error(state: Tensor, target: Tensor, objective: RACObjective) -> Tensor:
    if objective.compare == "state":
        return F.mse_loss(state, target)
    return F.mse_loss(state[:, :RGB], target[:, :RGB])
