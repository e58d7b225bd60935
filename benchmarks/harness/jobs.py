"""Independent jobs in processes of one thread each, as many at a time as there are workers."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

Job = TypeVar("Job")


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes end with this one, and with the context, whatever they are doing."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
    try:
        yield pool
    finally:
        for worker in multiprocessing.active_children():
            worker.terminate()  # idle at the end; after an interruption their jobs are not needed
        pool.shutdown(cancel_futures=True)


def finished(
    pool: ProcessPoolExecutor, function: Callable[..., Any], jobs: Sequence[Job], *args: Any
) -> Iterator[tuple[Job, Any]]:
    """Yield each job with ``function(job, *args)``, or with the exception that it raised, as they finish."""
    pending = {pool.submit(function, job, *args): job for job in jobs}
    for future in as_completed(pending):
        error = future.exception()
        yield pending[future], error if error is not None else future.result()


def _start() -> None:
    """Use one thread, and end when the command is killed, which would otherwise leave its jobs on the cores."""
    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
