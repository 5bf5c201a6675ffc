"""Results made ahead by threads, in order, so that training does not wait for images."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from ..errors import RacError

T = TypeVar("T")


def ahead(
    work: Callable[[int], T], items: Iterable[int], workers: int, patience: float = 600.0
) -> Generator[T, None, None]:
    """Yields the result of `work` for each item, in order, made ahead by threads.

    A few results wait at a time. Threads, not processes: decoding and resampling run outside Python's lock.

    - `work`: the function.
    - `items`: its arguments.
    - `workers`: number of threads; 0: none.
    - `patience`: seconds to wait for a result.

    Raises whatever `work` raises, and `RacError` if a thread ends or none of them delivers for `patience` seconds.
    """
    if workers == 0:
        yield from map(work, items)
        return
    jobs: SimpleQueue[tuple[int, Future[T]] | None] = SimpleQueue()

    def serve() -> None:
        while (job := jobs.get()) is not None:
            item, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(item))
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # such as SystemExit, which would end the run as if all were well
                future.set_exception(RacError(f"a thread that reads images ended with {error!r}"))

    # Not a thread pool: leaving it, and leaving Python, would wait for a thread that hangs.
    threads = [Thread(target=serve, name=f"rac-data-{k}", daemon=True) for k in range(workers)]
    waiting: deque[Future[T]] = deque()
    try:
        for thread in threads:
            thread.start()
        for item in items:
            waiting.append(Future())
            jobs.put((item, waiting[-1]))
            if len(waiting) > workers + 1:
                yield _awaited(waiting.popleft(), patience)
        while waiting:
            yield _awaited(waiting.popleft(), patience)
    finally:
        for future in waiting:
            future.cancel()
        until = time.monotonic() + _GOODBYE
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))


_GOODBYE = 2.0
"""Seconds that reading threads have to finish their current work."""


def _awaited(future: Future[T], patience: float) -> T:
    if not wait([future], timeout=patience).done:
        raise RacError(
            f"no images came for {patience:.0f} seconds; the disk or the network does not answer, or reading is too "
            "slow; raise patience_minutes"
        )
    return future.result()
