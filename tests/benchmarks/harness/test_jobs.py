"""Independent jobs in processes."""

import os
import time

import torch

from benchmarks.harness.jobs import finished, worker_pool


def half(number, factor):
    return factor * (10 // number) / 2, torch.get_num_threads(), os.getpid()


def test_jobs_run_in_other_processes_with_one_thread_and_report_what_they_raise():
    with worker_pool(1) as pool:
        found = dict(finished(pool, half, [5, 0], 3.0))
    assert found[5][:2] == (3.0, 1)
    assert found[5][2] != os.getpid()
    assert isinstance(found[0], ZeroDivisionError)


def wait(seconds):
    time.sleep(seconds)


def test_leaving_the_context_ends_jobs_that_run():
    start = time.monotonic()
    with worker_pool(1) as pool:
        pool.submit(half, 1, 1.0).result()  # the process has started
        running = pool.submit(wait, 60)
    assert time.monotonic() - start < 50
    assert running.cancelled() or running.exception() is not None
