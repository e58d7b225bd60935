"""Cases, and the rows that are measured of them: seconds and peak memory of a step by phase, way by way, in turns."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.step.models import MODELS, entropy_of, make_policy
from benchmarks.step.prepared import Prepared, lengths_of
from benchmarks.step.trainers import OURS, Probe, Step, Way, make_trainer, settings_of

MOST_GENERATIONS = max(way.generations for way in OURS)
TOLERANCES = {"cpu": 1e-3, "cuda": 5e-2}  # of gradients. TRL adds 1e-4 to a group's deviation, we 1e-6; bf16 on a GPU
MEASURED, OUT_OF_MEMORY, NO_TIME, DIFFERS = "measured", "out of memory", "no time left", "gradients differ"


class Case(NamedTuple):
    """What steps are of.

    Attributes:
        model: one of ``MODELS``.
        lengths: of responses, "equal" or "mixed".
        mean: about how many tokens a response has, or at most where they are generated.
        equal: what all ways have as many of in a step, "responses" or "prompts".
        live: whether the trainers generate.
        responses: of the way that has most of them, where they are not equal.
        updates: into how many optimizer steps a rollout is divided, which count as one step.
    """

    model: str
    lengths: str
    mean: int
    equal: str = "responses"
    live: bool = False
    responses: int = 32
    updates: int = 1

    def prepared(self, way: Way) -> Prepared:
        """Prompts and responses for a step; of fewer responses the first of the same ones."""
        count = self.responses if self.equal == "responses" else self.responses // MOST_GENERATIONS * way.generations
        lengths = lengths_of(self.lengths, self.responses, self.mean)[:count]
        model = MODELS[self.model]
        return Prepared(model.size["vocab_size"], count // way.generations, model.prompt, lengths)

    def new_row(self, way: Way) -> Row:
        """Before anything is measured."""
        prepared = self.prepared(way)
        return {
            "model": self.model,
            "lengths": "live" if self.live else self.lengths,
            "equal": self.equal,
            "updates": self.updates,
            "way": way.name,
            "trainer": way.trainer,
            "algorithm": way.algorithm,
            "prompts": len(prepared.dataset),
            "responses": len(prepared.responses),
            "longest": max(map(len, prepared.responses)),
            "outcome": NO_TIME,
        }


class Limits(NamedTuple):
    """How often ways take turns, how many steps a turn has, and when no more is begun (of ``time.monotonic``)."""

    rounds: int
    steps: int
    end: float = float("inf")


def measure(case: Case, ways: Sequence[Way], limits: Limits) -> Iterator[list[Row]]:
    """The rows of a case, as far as they are, after each turn of a way."""
    rows = {way: case.new_row(way) for way in ways}
    steps: dict[Way, list[Step]] = {way: [] for way in ways}
    for theirs, row in rows.items():
        if theirs.trainer == "TRL":
            ours = Way("ours", theirs.algorithm)
            _try(row, limits.end, lambda row=row, pair=(ours, theirs): _check_gradients(case, *pair, row))
            if row["outcome"] == DIFFERS:
                rows[ours]["outcome"] = DIFFERS
            yield list(rows.values())
    for _ in range(limits.rounds):
        for way, row in rows.items():
            if row["outcome"] in (MEASURED, NO_TIME):
                _try(row, limits.end, lambda way=way, row=row: _take_turn(case, way, limits.steps, steps[way], row))
                yield list(rows.values())


def _try(row: Row, end: float, call: Callable[[], None]) -> None:
    """Call, unless there is no time left; where it fails, the row says so and the rest go on."""
    if time.monotonic() > end:
        return
    try:
        call()
    except torch.OutOfMemoryError:
        row["outcome"] = OUT_OF_MEMORY
    except Exception as error:
        traceback.print_exc()
        row["outcome"] = f"failed: {type(error).__name__}: {error}"
    if torch.cuda.is_available():
        gc.collect()  # trainers and their models are in cycles
        torch.cuda.empty_cache()


def _take_turn(case: Case, way: Way, count: int, steps: list[Step], row: Row) -> None:
    """Some steps after one that warms up."""
    policy = make_policy(MODELS[case.model].size, results.this_device())
    row["entropy"] = entropy_of(policy)
    probe = Probe(peaks=torch.cuda.is_available())
    _train(case, way, policy, probe, steps=count + 1)
    steps += whole_steps(probe.steps, case.updates)[1:]
    row |= summary(steps, row["responses"])


def _train(case: Case, way: Way, policy: Any, probe: Probe, steps: int, **changes: Any) -> None:
    prepared = case.prepared(way)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(way, prepared, folder, case.updates, max_steps=steps * case.updates, **changes)
        make_trainer(way, policy, prepared, settings, probe, live=case.live).train()


def whole_steps(parts: Sequence[Step], count: int) -> list[Step]:
    """Each so many optimizer steps as one, beginning with the one that the rollout is counted to."""
    whole = []
    for start in range(0, len(parts), count):
        part = parts[start : start + count]
        seconds, peaks = ([each[field] for each in part] for field in (0, 1))
        whole.append(Step(_joined(seconds, sum), _joined(peaks, max), part[0].response_length))
    return whole


def _joined(by_phase: Sequence[dict[str, Any]], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    names = dict.fromkeys(name for each in by_phase for name in each)
    return {name: join([each[name] for each in by_phase if name in each]) for name in names}


def summary(steps: Sequence[Step], responses: int) -> Row:
    """The step of median length with its phases, how far lengths are spread, and the highest peak of each phase."""
    totals = [sum(step.seconds.values()) for step in steps]
    median = steps[totals.index(statistics.median_low(totals))]
    low, _, high = statistics.quantiles(totals, n=4, method="inclusive") if len(totals) > 1 else totals * 3
    seconds = sum(median.seconds.values())
    tokens = round(median.response_length * responses)
    return {
        "outcome": MEASURED,
        "tokens": tokens,
        "seconds": median.seconds,
        "step_s": seconds,
        "iqr_s": high - low,
        "steps_s": [round(total, 4) for total in totals],
        "tokens_per_s": tokens / seconds,
        "peak_bytes": _joined([step.peak_bytes for step in steps], max),
    }


def _check_gradients(case: Case, ours: Way, theirs: Way, row: Row) -> None:
    """Note how far the gradients of the two are from each other, and whether that is too far."""
    one_update = case._replace(live=False, updates=1)  # TRL divides a rollout otherwise
    moves = [_moved(one_update, way) for way in (ours, theirs)]
    row["gradient_error"] = (_norm([a - b for a, b in zip(*moves, strict=True)]) / _norm(moves[1])).item()
    if not row["gradient_error"] <= TOLERANCES[results.this_device().type]:
        row["outcome"] = DIFFERS


def _moved(case: Case, way: Way) -> list[Tensor]:
    """What one update by SGD moved the weights by: the gradient."""
    policy = make_policy(MODELS[case.model].size, results.this_device())
    before = [p.detach().clone() for p in policy.parameters()]
    _train(case, way, policy, Probe(), steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=1e9)
    return [p.detach() - b for p, b in zip(policy.parameters(), before, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()
