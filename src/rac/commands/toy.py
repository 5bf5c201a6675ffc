"""`rac toy`: RAC in the plane, trained while you wait, and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..experiments.toy import ToyConfig, measure, moons, seed_state, to_latent, train
from ..experiments.toy_report import draw_errors, draw_flow, draw_paths, exact_table, film, table
from ..files import make_output, write_bytes
from ..images import write_picture
from ..progress import counting
from ..runtime import generator
from .shared import note, say, show

SHOWN = 160
"""Number of points that are drawn with their paths."""


@dataclass(frozen=True)
class Command:
    """Train a RAC on points of the plane in seconds, and draw its flow in both directions.

    A point of two moons stands for an image, and the lattice cell that it lies in for the latent. Writes flow.png (the
    field and the states over time), paths.png (decoding and encoding at 1, 2, 4 and 8 steps), errors.png (how exactly
    encoding inverts decoding) and film.gif.
    """

    out: Path = Path("toy")
    """Folder for the pictures; created if it does not exist."""
    rng_seed: int = 0
    """Equal seeds give equal fields, metrics and pictures."""
    cell: float = ToyConfig.cell
    """Side of a lattice cell: the larger it is, the coarser are the latents. The moons are about 3 wide and 1.7
    high."""
    seed_noise: float = ToyConfig.seed_noise
    """Standard deviation of the noise in seed states, in cells, from 0 to 0.25; at 0 every cell decodes to one
    point."""
    iterations: int = ToyConfig.iterations
    """Number of training iterations, each on 512 points."""

    def run(self) -> int:
        """Train, draw, print; the exit code. Raises `RacError`."""
        config = ToyConfig(self.cell, self.seed_noise, self.iterations)
        make_output(self.out)
        with counting("training") as progress:
            field, loss = train(config, self.rng_seed, progress)
        note(f"trained {self.iterations} iterations, loss {loss:.4f}; drawing")
        rng = generator(self.rng_seed, "toy", "judge")
        point = moons(1_000, rng)
        metrics = measure(field, config, point, rng)
        shown = point[:SHOWN]
        seed = seed_state(to_latent(shown, config.cell), config, rng)
        write_picture(draw_flow(field, config, shown, seed), self.out / "flow.png")
        write_picture(draw_paths(field, config, shown, seed), self.out / "paths.png")
        write_picture(draw_errors(metrics), self.out / "errors.png")
        write_bytes(self.out / "film.gif", film(field, config, shown, seed))
        write_bytes(self.out / "figures.csv", exact_table(metrics).to_csv().encode())
        show(table(metrics), "Distances in the plane, root mean squares over 1,000 points")
        centre = float((point - config.cell * to_latent(point, config.cell)).square().sum(1).mean().sqrt())
        say("")
        say(f"A latent names only a cell, whose centre is {centre:.3f} away from the point.")
        say(f"Pictures, film.gif and figures.csv are in {self.out}")
        return 0


# ------------------------------------------------------------------------------------------ pictures
