"""Training: one loop for every task, exact on resume."""

from .config import TrainConfig
from .log import read_log
from .loop import Fitted, fit
from .task import Task

__all__ = ["Fitted", "Task", "TrainConfig", "fit", "read_log"]
