"""Runs of plans in processes of one thread each; each row is yielded when its run is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from tqdm.auto import tqdm

from benchmarks.harness.jobs import finished, worker_pool
from benchmarks.harness.learning.plan import Plan, Run
from benchmarks.harness.results import Row

AnyPlan = TypeVar("AnyPlan", bound=Plan[Any, Any])


def remaining_rows(
    plans: Sequence[AnyPlan],
    train: Callable[..., Row],
    args: Callable[[AnyPlan], Sequence[Any]],
    *,
    workers: int,
    failures: list[str],
) -> Iterator[tuple[AnyPlan, Row]]:
    """Yield the rows of all runs that are not done, as they finish.

    Args:
        plans: plans, one after the other. Add each row to ``done`` of its plan: it chooses the rates of later runs.
        train: a function of a module, called as ``train(run, *args(plan))`` in another process.
        args: further arguments of ``train`` for the runs of a plan.
        workers: runs at a time.
        failures: list to which runs that raise are added. Rates cannot be chosen without all tuning runs, so nothing
            follows the first runs that failed.
    """
    with worker_pool(workers) as pool:
        for plan in plans:
            for runs in (plan.tuning, plan.counting):
                for row in finished_rows(pool, train, plan.left(runs()), args(plan), failures):
                    yield plan, row
                if failures:
                    return


def finished_rows(
    pool: ProcessPoolExecutor, train: Callable[..., Row], runs: Sequence[Run], args: Sequence[Any], failures: list[str]
) -> Iterator[Row]:
    """Yield rows as runs finish; a run that raises is a failure, and the others continue."""
    for run, row in tqdm(finished(pool, train, runs, *args), total=len(runs), unit="run", disable=not runs):
        if isinstance(row, BaseException):
            failures.append(f"{run.task.name}, {run.variant}, seed {run.seed}: {type(row).__name__}: {row}")
            continue
        tqdm.write(
            f"{run.task.name}, {run.variant}, rate {run.learning_rate:.0e}, seed {run.seed}: "
            f"{row['reward'][0]:.2f} -> {row['reward'][-1]:.2f} in {row['seconds'][-1]:.0f} s"
        )
        yield row
