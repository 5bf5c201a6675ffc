"""Training: one loop for every task, exact on resume.

To read it in order: `task` says what is trained, in parts; `step` is one iteration over all parts; `loop` goes through
the iterations and keeps what comes of them, with `checkpoint` and `log`; `processes` has what several processes share,
and `adversary` the networks that look at decoded images.
"""

from .config import TrainConfig
from .log import read_log
from .loop import Fitted, check_run, fit
from .task import Part, PartTerms, Task

__all__ = ["Fitted", "Part", "PartTerms", "Task", "TrainConfig", "check_run", "fit", "read_log"]
