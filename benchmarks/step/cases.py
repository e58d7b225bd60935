"""Cases of a training step, and their rows: seconds and peak memory by phase, measured in turns."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.step.models import MODELS, entropy_of
from benchmarks.step.prepared import Prepared, lengths_of
from benchmarks.step.trainers import SPPO, Probe, Step, TrainerVariant, make_trainer, settings_of

MOST_GENERATIONS = max(variant.generations for variant in SPPO)
# Of gradients. TRL adds 1e-4 to the standard deviation of a group, this library 1e-6.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
MEASURED, OUT_OF_MEMORY, NO_TIME, DIFFERS = "measured", "out of memory", "no time left", "gradients differ"


class Case(NamedTuple):
    """Model, responses and updates of a step.

    Attributes:
        model: one of ``MODELS``.
        lengths: of responses, "equal" or "mixed".
        mean: mean tokens per response; the maximum if trainers generate.
        equal: what is equal in the steps of all variants, "responses" or "prompts".
        live: whether the trainers generate.
        responses: per step, of the variant with the most.
        updates: optimizer steps per rollout, which count as one step.
    """

    model: str
    lengths: str
    mean: int
    equal: str = "responses"
    live: bool = False
    responses: int = 32
    updates: int = 1

    @property
    def precision(self) -> str:
        """Precision of the matrix products; weights and AdamW's moments are float32."""
        return "bfloat16" if torch.cuda.is_available() or MODELS[self.model].bf16 else "float32"

    def prepared(self, variant: TrainerVariant) -> Prepared:
        """Make prompts and responses for a step; fewer responses are the first of the same ones."""
        count = (
            self.responses if self.equal == "responses" else self.responses // MOST_GENERATIONS * variant.generations
        )
        lengths = lengths_of(self.lengths, self.responses, self.mean)[:count]
        model = MODELS[self.model]
        return Prepared(model.vocabulary(), count // variant.generations, model.prompt, lengths)

    def new_row(self, variant: TrainerVariant) -> Row:
        """Return the row of a variant before it is measured."""
        prepared = self.prepared(variant)
        return {
            "model": self.model,
            "lengths": "live" if self.live else self.lengths,
            "equal": self.equal,
            "updates": self.updates,
            "precision": self.precision,
            "variant": variant.name,
            "trainer": variant.trainer,
            "algorithm": variant.algorithm,
            "prompts": len(prepared.dataset),
            "responses": len(prepared.responses),
            "longest": max(map(len, prepared.responses)),
            "outcome": NO_TIME,
        }


class Limits(NamedTuple):
    """Turns of each variant, steps per turn, and the time (of ``time.monotonic``) after which no turn begins."""

    rounds: int
    steps: int
    end: float = float("inf")


def measure(case: Case, variants: Sequence[TrainerVariant], limits: Limits) -> Iterator[list[Row]]:
    """Yield the rows of a case after each turn of a variant."""
    rows = {variant: case.new_row(variant) for variant in variants}
    steps: dict[TrainerVariant, list[Step]] = {variant: [] for variant in variants}
    for theirs, row in rows.items():
        if theirs.trainer == "TRL":
            ours = TrainerVariant("sppo", theirs.algorithm)
            _try(row, limits.end, partial(_check_gradients, case, ours, theirs, row))
            if row["outcome"] == DIFFERS:
                rows[ours]["outcome"] = DIFFERS
            yield list(rows.values())
    for _ in range(limits.rounds):
        for variant, row in rows.items():
            if row["outcome"] in (MEASURED, NO_TIME):
                _try(row, limits.end, partial(_take_turn, case, variant, limits.steps, steps[variant], row))
                yield list(rows.values())


def _try(row: Row, end: float, call: Callable[[], None]) -> None:
    """Call ``call`` unless no time is left; if it raises, record that in the row."""
    if time.monotonic() > end:
        return
    try:
        call()
    except torch.OutOfMemoryError:
        row["outcome"] = OUT_OF_MEMORY
    except Exception as error:
        traceback.print_exc()
        row["outcome"] = f"failed: {type(error).__name__}: {error}"
    gc.collect()  # trainers and their models are in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _take_turn(case: Case, variant: TrainerVariant, count: int, steps: list[Step], row: Row) -> None:
    """Run some steps after one that warms up, and record them."""
    probe = Probe(peaks=True)
    policy = MODELS[case.model].policy(results.this_device())
    row["entropy"] = entropy_of(policy)
    _train(case, variant, policy, probe, steps=count + 1)
    steps += whole_steps(probe.steps, case.updates)[1:]
    row |= summary(steps, row["responses"])


def _train(case: Case, variant: TrainerVariant, policy: Any, probe: Probe, steps: int, **changes: Any) -> None:
    prepared = case.prepared(variant)
    critic = MODELS[case.model].critic(policy, variant.small_critic) if variant.critic else None
    changes |= {"max_steps": steps * case.updates, "bf16": case.precision == "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(variant, prepared, folder, case.updates, **changes)
        make_trainer(variant, policy, prepared, settings, probe, critic=critic, live=case.live).train()


def whole_steps(parts: Sequence[Step], count: int) -> list[Step]:
    """Join each ``count`` optimizer steps into one, beginning with the step that includes the rollout."""
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
    """Return the step of median length with its phases, the spread of lengths, and the highest peak of each phase."""
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


def _check_gradients(case: Case, ours: TrainerVariant, theirs: TrainerVariant, row: Row) -> None:
    """Record the relative difference of the gradients of two variants, and whether it is too large."""
    one_update = case._replace(live=False, updates=1)  # TRL divides a rollout differently
    moves = [_moved(one_update, variant) for variant in (ours, theirs)]
    row["gradient_error"] = (_norm([a - b for a, b in zip(*moves, strict=True)]) / _norm(moves[1])).item()
    if not row["gradient_error"] <= TOLERANCES[case.precision]:
        row["outcome"] = DIFFERS


def _moved(case: Case, variant: TrainerVariant) -> list[Tensor]:
    """Return the change of the weights by one update of SGD: the gradient."""
    policy = MODELS[case.model].policy(results.this_device())
    before = [p.detach().clone() for p in policy.parameters()]
    _train(case, variant, policy, Probe(), steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=1e9)
    return [p.detach() - b for p, b in zip(policy.parameters(), before, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()
