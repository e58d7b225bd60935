"""Evaluation: several answers to each held-out problem, graded, kept as JSON lines, and what they come to.

    evaluation = evaluate(engine, dataset, ["math"], k=4, temperature=0.6, output="math_500.jsonl")
    evaluation.metrics["avg@4"], evaluation.metrics["pass@2"], evaluation.metrics["maj@4"]

The first line of the file says what was evaluated and how; each other line is a problem. Problems are answered in
chunks that depend on ``batch_size`` and ``k`` alone, each with a seed of its own: an evaluation that was killed goes on
after the last whole chunk, and ends with the bytes of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, BinaryIO

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sppo._utils import lock_file
from sppo.config import SPPOConfig
from sppo.data import text_of
from sppo.reporting.meter import Gather, Meter
from sppo.rewards import BUILTIN, Reward, resolve, score
from sppo.rewards.builtin import final_answer
from sppo.rewards.samples import score_samples
from sppo.rollout import RolloutEngine, Sample, rollout_seed

FORMAT = 1
"""Of the JSON lines; another number is another layout."""

_EVALUATION = 2**32 - 1  # where a seed has the number of a training rollout, as in the trainer's own evaluate()
_COMPARING = {BUILTIN["numeric"], BUILTIN["math"]}  # graders that see the same answer in two texts
_LONGEST_VOTE = 1000  # characters: what is longer is degenerate repetition, and no answer to these graders either
_FAILURES_SHOWN = 3

logger = logging.getLogger(__name__)

Result = dict[str, Any]
"""A problem's line: ``index``, ``prompt``, ``answer``, and of its k completions ``completions`` (text), ``rewards``
(None where none could be had), ``tokens`` (their numbers), ``truncated``; ``majority_right``: whether the answer that
most of them give is right."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` gives: the lines of its file and the metrics of :func:`summarize`."""

    header: dict[str, Any]
    results: list[Result]
    metrics: dict[str, float]


def evaluate(
    engine: RolloutEngine,
    dataset: datasets.Dataset,
    rewards: Sequence[Any],
    *,
    k: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    reward_weights: Sequence[float] | None = None,
    timeout: float = 60.0,
    output: str | Path | None = None,
    overwrite: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Answer each problem ``k`` times and grade the answers.

    Args:
        engine: samples the completions; with the same weights, prompts and seed it should give the same.
        dataset: column ``prompt`` (text or chat messages); the others go to the rewards.
        rewards: what :func:`sppo.rewards.resolve` takes. An answer is right if their weighted sum is at least 1.
        k: completions a problem.
        temperature: of sampling; 0 is greedy, for ``k=1`` alone.
        seed: of the sampling.
        batch_size: completions to work on at once; part of what decides them, for a chunk shares a seed.
        reward_weights: one a reward; default 1.
        timeout: seconds that grading a chunk may take a reward.
        output: JSONL file, written as problems are graded. Where it has finished problems of this evaluation, they are
            not answered again. None: keep nothing.
        overwrite: start over whatever ``output`` holds.
        identity: what else decides the completions (the weights, the longest completion), for the file's first line.
        progress: show a line with problems done, share of right answers so far and time left.

    Raises:
        ValueError: ``k`` or ``batch_size`` below 1, ``k`` greedy completions, or ``output`` holds something else: the
            message names what differs; or another process writes it now.
    """
    check_sampling(k, temperature)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    graders = [resolve(reward) for reward in rewards]
    chunk = max(1, batch_size // k)
    header = {
        "format": FORMAT,
        **(identity or {}),
        "dataset_digest": _digest(dataset),
        "dataset_size": len(dataset),
        "rewards": [[g.target if isinstance(g.target, str) else g.name, g.options] for g in graders],
        "reward_weights": reward_weights,
        "k": k,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
    }
    with nullcontext() if output is None else _sole_writer(Path(output)) as lines:
        results = [] if lines is None else _resume(lines, header, chunk, overwrite)
        with tqdm(total=len(dataset), initial=len(results), unit="problem", disable=not progress) as bar:
            for start in range(len(results), len(dataset), chunk):
                rows = [dataset[i] for i in range(start, min(start + chunk, len(dataset))) for _ in range(k)]
                samples = engine.generate(
                    [row["prompt"] for row in rows],
                    seed=rollout_seed(seed, _EVALUATION, start // chunk),
                    temperature=temperature,
                    batch_size=batch_size,
                )
                _grade(samples, rows, graders, reward_weights, timeout)
                made = [
                    _result(start + i // k, samples[i : i + k], rows[i].get("answer"), graders, timeout)
                    for i in range(0, len(rows), k)
                ]
                if lines is not None:
                    lines.write(b"".join(map(_line, made)))
                    lines.flush()
                results += made
                bar.set_postfix_str(f"avg@{k} {summarize(results).get(f'avg@{k}', math.nan):.3f}", refresh=False)
                bar.update(len(made))
    return Evaluation(header, results, summarize(results))


def check_sampling(k: int, temperature: float) -> None:
    """ValueError where ``k`` completions cannot be had, or would all be the same."""
    if k < 1:
        raise ValueError(f"k must be at least 1 completion a problem, got {k}")
    if k > 1 and temperature == 0:
        raise ValueError(f"k={k} with temperature 0: greedy decoding gives {k} times the same; raise temperature (0.6)")


def summarize(results: Sequence[Result]) -> dict[str, float]:
    """The metrics of problems with k completions each. One without a reward for all k is left out and counted.

    Returns:
        - ``problems``, ``ungraded``: how many the other metrics are of, and how many were left out.
        - ``avg@k``: mean share of right answers.
        - ``standard_error``: of ``avg@k`` over problems, from two on (Miller 2024, arXiv 2411.00640).
        - ``pass@j`` for j = 1, 2, 4, ... and k: see :func:`pass_at`.
        - ``maj@k``: share of problems that a majority vote solves (Wang et al. 2022, arXiv 2203.11171).
        - ``reward``, ``tokens``, ``truncated``: means over completions.
    """
    graded = [result for result in results if None not in result["rewards"]]
    metrics: dict[str, float] = {"problems": len(graded), "ungraded": len(results) - len(graded)}
    if not graded:
        return metrics
    k = len(graded[0]["rewards"])
    right = [sum(map(_is_right, result["rewards"])) for result in graded]
    metrics[f"avg@{k}"] = fmean(right) / k
    if len(graded) > 1:
        metrics["standard_error"] = stdev(right) / k / math.sqrt(len(graded))
    for j in sorted({2**i for i in range(k.bit_length())} | {k}):
        metrics[f"pass@{j}"] = fmean(pass_at(j, k, c) for c in right)
    metrics[f"maj@{k}"] = fmean(result["majority_right"] for result in graded)
    for name, column in (("reward", "rewards"), ("tokens", "tokens"), ("truncated", "truncated")):
        metrics[name] = fmean(value for result in graded for value in result[column])
    return metrics


def pass_at(j: int, n: int, right: int) -> float:
    """Probability that one of ``j`` of the ``n`` completions, drawn without replacement, is among the right ones.

    1 - C(n - right, j) / C(n, j), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), as their product.
    """
    if n - right < j:
        return 1.0
    return 1.0 - math.prod(1.0 - j / i for i in range(n - right + 1, n + 1))


def table(metrics: Mapping[str, Mapping[str, float]], k: int) -> str:
    """Metrics of evaluations with the same k by dataset, as aligned text."""
    shares = [f"avg@{k}", "standard_error", *([f"pass@{k}", f"maj@{k}"] if k > 1 else []), "truncated"]
    rows = [["dataset", "problems", *shares, "tokens"]]
    for name, found in metrics.items():
        cells = [f"{found[share]:.3f}" if share in found else "-" for share in shares]
        rows.append([name, f"{found['problems']:.0f}", *cells, f"{found['tokens']:.0f}" if "tokens" in found else "-"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def model_identity(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of all weights and of the chat template, for ``identity``: names do not tell what a folder holds now."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {"weights_digest": weights.hexdigest()[:16], "template_digest": _digest([tokenizer.chat_template])}


def _grade(
    samples: Sequence[Sample],
    rows: Sequence[Mapping[str, Any]],
    graders: Sequence[Reward],
    reward_weights: Sequence[float] | None,
    timeout: float,
) -> None:
    """Set each sample's reward, and say which could not be had."""
    scores = score(
        graders,
        [sample.prompt for sample in samples],
        [sample.completion for sample in samples],
        {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
        weights=reward_weights,
        timeout=timeout,
    )
    for sample, reward in zip(samples, scores.rewards, strict=True):
        sample.reward = reward
    for failure in scores.failures[:_FAILURES_SHOWN]:
        logger.warning(failure)
    if len(scores.failures) > _FAILURES_SHOWN:
        logger.warning("and %d more such failures of %d samples", len(scores.failures) - _FAILURES_SHOWN, len(samples))


def _result(index: int, samples: Sequence[Sample], answer: Any, graders: Sequence[Reward], timeout: float) -> Result:
    return {
        "index": index,
        "prompt": samples[0].prompt,
        "answer": answer,
        "completions": [text_of(sample.completion) for sample in samples],
        "rewards": [sample.reward for sample in samples],
        "tokens": [len(sample.response_ids) for sample in samples],
        "truncated": [sample.truncated for sample in samples],
        "majority_right": _majority_is_right(samples, graders, timeout),
    }


def _majority_is_right(samples: Sequence[Sample], graders: Sequence[Reward], timeout: float) -> bool:
    """Whether the final answer that most of a problem's completions give is right; of equals the earliest counts.

    Two answers are the same if their text is, or if a built-in grader accepts the later where the earlier is the right
    one. A completion without a final answer has no vote.
    """
    right = [_is_right(sample.reward) for sample in samples]
    if all(right) or not any(right):  # no vote changes that
        return all(right)
    by_text: dict[str, list[Sample]] = {}
    for sample in samples:
        answer = final_answer(sample.prompt, sample.completion)
        if answer and len(answer) <= _LONGEST_VOTE:
            by_text.setdefault(answer, []).append(sample)
    grader = next((grader for grader in graders if grader.target in _COMPARING), None)
    votes: dict[str, list[Sample]] = {}
    for answer, voters in by_text.items():
        same = None if grader is None else _first_equal(list(votes), voters[0], grader, timeout)
        votes.setdefault(same or answer, []).extend(voters)
    winner = max(votes.values(), key=len, default=None)
    return winner is not None and _is_right(winner[0].reward)


def _first_equal(answers: Sequence[str], sample: Sample, grader: Reward, timeout: float) -> str | None:
    """The first answer that the grader, taking it for the right one, accepts the sample for."""
    n = len(answers)
    scores = score([grader], [sample.prompt] * n, [sample.completion] * n, {"answer": answers}, timeout=timeout)
    return next((answer for answer, reward in zip(answers, scores.rewards, strict=True) if _is_right(reward)), None)


def _is_right(reward: float | None) -> bool:
    return reward is not None and reward >= 1


@contextmanager
def _sole_writer(path: Path) -> Iterator[BinaryIO]:
    """The file, to read and to append to, for one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        lock_file(file, f"output {str(path)!r} is being written by another process; wait for it, or name another one")
        yield file


def _resume(file: BinaryIO, header: Mapping[str, Any], chunk: int, overwrite: bool) -> list[Result]:
    """The finished problems in the file, which is left to end with them; a new one gets its first line."""
    first = _line(header)
    file.seek(0)
    content = b"" if overwrite else file.read()
    if first.startswith(content):  # nothing, or as far as the first line
        file.truncate(0)
        file.write(first)
        file.flush()
        return []
    *lines, _ = content.split(b"\n")  # what follows the last line end was cut off
    try:
        saved, *results = map(json.loads, lines)
        whole = "format" in saved and [result["index"] for result in results] == list(range(len(results)))
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise ValueError(f"output {file.name!r} is no evaluation, or damaged; name another one, or use --overwrite")
    here = json.loads(first)
    differing = [
        f"{name}: {saved.get(name)!r} there, {here.get(name)!r} here"
        for name in {**here, **saved}
        if saved.get(name) != here.get(name)
    ]
    if differing:
        raise ValueError(
            f"output {file.name!r} holds another evaluation ({'; '.join(differing)}); "
            "evaluate as it was begun, name another one, or use --overwrite"
        )
    finished = len(results) if len(results) == header["dataset_size"] else len(results) // chunk * chunk
    file.truncate(sum(len(line) + 1 for line in lines[: 1 + finished]))
    return results[:finished]


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"


def _digest(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def answer_held_out(engine: RolloutEngine, rows: Sequence[dict[str, Any]], args: SPPOConfig) -> list[Sample]:
    """Answer this process's held-out prompts in the course of training, each time with the same seed."""
    if not rows:
        return []
    return engine.generate(
        [row["prompt"] for row in rows],
        seed=rollout_seed(args.seed, _EVALUATION, args.process_index),
        temperature=args.eval_temperature,
        batch_size=args.per_device_eval_batch_size,
    )


def held_out_metrics(
    samples: list[Sample],
    rows: Sequence[dict[str, Any]],
    reward_funcs: Sequence[Reward],
    args: SPPOConfig,
    gather: Gather,
) -> dict[str, float]:
    """Score this process's answers to held-out prompts, and return the metrics over all processes.

    Args:
        samples: this process's answers; their rewards are set.
        rows: their rows of the dataset.
        reward_funcs: resolved rewards.
        args: settings of the run; one call of a reward gets as many samples as a rollout has, for ``reward_timeout``.
        gather: concatenates lists over processes.

    Returns:
        ``success_rate``, ``reward``, ``response_length``, ``truncated``, ``rewards/<name>``, and ``problems``, the
        number of answers that could be scored.
    """
    meter = Meter()
    for start in range(0, len(rows), args.rollout_size):
        part = slice(start, start + args.rollout_size)
        means = score_samples(samples[part], rows[part], reward_funcs, args, as_probability=False)
        meter.mean(dict(means), weight=len(rows[part]))
    for sample in samples:
        meter.mean({"response_length": len(sample.response_ids), "truncated": sample.truncated})
        if sample.reward is not None:
            meter.mean({"success_rate": sample.reward >= 1, "reward": sample.reward})
    problems = len(gather([1 for sample in samples if sample.reward is not None]))
    read = meter.read(gather)
    names = ("response_length", "truncated", "success_rate", "reward")
    by_reward = {name: value for name, value in read.items() if name.startswith("rewards/")}
    return {name: read.get(name, 0.0) for name in names} | by_reward | {"problems": problems}
