"""Station 4: seed state <-> image state, along a velocity field.

t = 0 is the seed state, t = 1 the image state. Direction is a property of the grid: integrating along
`grid.reversed()` encodes.
"""

from .grid import TimeGrid
from .guidance import Conditioned, Guided
from .integrate import Field, Trajectory, integrate
from .invert import FixedPoint
from .path import PathSample, straight
from .solvers import RK4, Euler, Heun, MeanEuler, Midpoint, ReversibleHeun, Solver
from .stochastic import EulerMaruyama, sde_grid
from .walk import Walk

__all__ = [
    "RK4",
    "Conditioned",
    "Euler",
    "EulerMaruyama",
    "Field",
    "FixedPoint",
    "Guided",
    "Heun",
    "MeanEuler",
    "Midpoint",
    "PathSample",
    "ReversibleHeun",
    "Solver",
    "TimeGrid",
    "Trajectory",
    "Walk",
    "integrate",
    "sde_grid",
    "straight",
]
