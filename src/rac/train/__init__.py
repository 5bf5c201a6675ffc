"""Training: one loop for every task, exact on resume.

To read it in order: `task` says what is trained, in parts; `step` is one iteration over all parts; `loop` goes through
the iterations and writes the results, with `checkpoint` and `log`; `processes` divides a training among several
processes, and `adversary` has the networks that look at decoded images.
"""

from .config import TrainConfig
from .log import read_log
from .loop import Fitted, check_run, fit
from .task import Part, PartTerms, Task

__all__ = ["Fitted", "Part", "PartTerms", "Task", "TrainConfig", "check_run", "fit", "read_log"]
