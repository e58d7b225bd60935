"""Evaluation on held-out problems: sampling answers, grading them, and metrics such as avg@k, pass@k and maj@k.

    evaluation = evaluate(engine, dataset, ["math"], k=4, temperature=0.6, output="math_500.jsonl")
    evaluation.metrics["avg@4"], evaluation.metrics["pass@2"], evaluation.metrics["maj@4"]

The output file is JSON Lines: a header that describes the evaluation, then one line per problem. Problems are answered
in chunks that depend only on ``batch_size`` and ``k``, each with its own seed. An interrupted evaluation therefore
resumes after the last complete chunk and produces the same bytes as an uninterrupted one.

The trainer's evaluation during training is also here: :func:`answer_held_out` and :func:`held_out_metrics`.
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
from sppo.reporting.text import aligned
from sppo.rewards import BUILTIN, Reward, resolve, score
from sppo.rewards.builtin import short_answer
from sppo.rewards.samples import grade, score_samples
from sppo.rollout import RolloutEngine, Sample, rollout_seed
from sppo.rollout.episodes import Episodes

FORMAT = 1
"""Version of the layout of the output file."""

_EVALUATION_SEED = 2**32 - 1  # takes the place of a training rollout's number in a seed
_EQUIVALENCE_GRADERS = {BUILTIN["numeric"], BUILTIN["math"]}  # can tell that two texts are the same answer

logger = logging.getLogger(__name__)

Result = dict[str, Any]
"""A problem's line in the output file.

``index``, ``prompt`` and ``answer`` describe the problem. ``completions`` (text), ``rewards`` (None if a reward
failed), ``tokens`` (lengths) and ``truncated`` have one value per completion. ``majority_right`` is true if the most
frequent final answer is correct.
"""


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`: the lines of its file and the metrics of :func:`summarize`."""

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
    episodes: Episodes | None = None,
) -> Evaluation:
    """Answer each problem ``k`` times and grade the answers.

    Args:
        engine: samples the completions; it should be deterministic for the same weights, prompts and seed.
        dataset: column ``prompt`` (text or chat messages); rewards receive the other columns.
        rewards: rewards, as taken by :func:`sppo.rewards.resolve`. An answer is correct if their weighted sum is at
            least 1.
        k: completions per problem.
        temperature: sampling temperature; 0 is greedy and requires ``k=1``.
        seed: seed of the sampling.
        batch_size: completions per batch. It affects the completions, because a chunk shares a seed.
        reward_weights: one per reward; default 1.
        timeout: time limit of a reward per chunk, in seconds.
        output: JSONL file, written after each chunk. Problems that it already holds are not answered again. None: write
            no file.
        overwrite: discard the content of ``output``.
        identity: everything else that affects the completions (weights, maximum length), for the file's header.
        progress: show a progress bar with the fraction of correct answers so far.
        episodes: samples the completions in place of ``engine``, for example with an environment.

    Raises:
        ValueError: ``k`` or ``batch_size`` is below 1, ``k`` is above 1 with greedy decoding, ``output`` holds
            something else (the message names the differences), or another process is writing to it.
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
    with nullcontext() if output is None else _open_locked(Path(output)) as file:
        results = [] if file is None else _resume(file, header, chunk, overwrite=overwrite)
        with tqdm(total=len(dataset), initial=len(results), unit="problem", disable=not progress) as bar:
            for start in range(len(results), len(dataset), chunk):
                rows = [dataset[i] for i in range(start, min(start + chunk, len(dataset))) for _ in range(k)]
                sampling: dict[str, Any] = {
                    "seed": rollout_seed(seed, _EVALUATION_SEED, start // chunk),
                    "temperature": temperature,
                    "batch_size": batch_size,
                }
                if episodes is None:
                    samples = engine.generate([row["prompt"] for row in rows], **sampling)
                else:
                    samples = episodes.play(rows, **sampling)
                grade(samples, rows, graders, weights=reward_weights, timeout=timeout, max_failures_shown=3)
                new_results = [
                    _result(start + i // k, samples[i : i + k], rows[i].get("answer"), graders, timeout)
                    for i in range(0, len(rows), k)
                ]
                if file is not None:
                    file.write(b"".join(map(_encode_line, new_results)))
                    file.flush()
                results += new_results
                bar.set_postfix_str(f"avg@{k} {summarize(results).get(f'avg@{k}', math.nan):.3f}", refresh=False)
                bar.update(len(new_results))
    return Evaluation(header, results, summarize(results))


def check_sampling(k: int, temperature: float) -> None:
    """Check the number of completions per problem.

    Raises:
        ValueError: ``k`` is below 1, or above 1 with greedy decoding.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1 completion per problem, got {k}")
    if k > 1 and temperature == 0:
        raise ValueError(
            f"k={k} with temperature 0: greedy decoding gives the same completion {k} times; set a higher temperature "
            "(such as 0.6)"
        )


def summarize(results: Sequence[Result]) -> dict[str, float]:
    """Compute the metrics of problems with k completions each, excluding problems without all k rewards.

    Returns:
        - ``problems``, ``ungraded``: the numbers of problems included and excluded.
        - ``avg@k``: mean fraction of correct answers.
        - ``standard_error``: of ``avg@k`` over problems, for at least two (Miller 2024, arXiv 2411.00640).
        - ``pass@j`` for j = 1, 2, 4, ... and k: see :func:`pass_at`.
        - ``maj@k``: fraction of problems that a majority vote solves (Wang et al. 2022, arXiv 2203.11171).
        - ``reward``, ``tokens``, ``truncated``: means over completions.
    """
    graded = [result for result in results if None not in result["rewards"]]
    metrics: dict[str, float] = {"problems": len(graded), "ungraded": len(results) - len(graded)}
    if not graded:
        return metrics
    k = len(graded[0]["rewards"])
    num_correct = [sum(map(_is_correct, result["rewards"])) for result in graded]
    metrics[f"avg@{k}"] = fmean(num_correct) / k
    if len(graded) > 1:
        metrics["standard_error"] = stdev(num_correct) / k / math.sqrt(len(graded))
    for j in sorted({2**i for i in range(k.bit_length())} | {k}):
        metrics[f"pass@{j}"] = fmean(pass_at(j, k, c) for c in num_correct)
    metrics[f"maj@{k}"] = fmean(result["majority_right"] for result in graded)
    for name, column in (("reward", "rewards"), ("tokens", "tokens"), ("truncated", "truncated")):
        metrics[name] = fmean(value for result in graded for value in result[column])
    return metrics


def pass_at(j: int, n: int, num_correct: int) -> float:
    """Probability that ``j`` of ``n`` completions, drawn without replacement, include a correct one.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), ``1 - C(n - num_correct, j) / C(n, j)``, computed as
    a product as in their paper.
    """
    if n - num_correct < j:
        return 1.0
    return 1.0 - math.prod(1.0 - j / i for i in range(n - num_correct + 1, n + 1))


def table(metrics: Mapping[str, Mapping[str, float]], k: int) -> str:
    """Format metrics by dataset, of evaluations with the same k, as an aligned text table."""
    columns = [f"avg@{k}", "standard_error", *([f"pass@{k}", f"maj@{k}"] if k > 1 else []), "truncated"]
    rows = [["dataset", "problems", *columns, "tokens"]]
    for name, values in metrics.items():
        cells = [f"{values[column]:.3f}" if column in values else "-" for column in columns]
        tokens = f"{values['tokens']:.0f}" if "tokens" in values else "-"
        rows.append([name, f"{values['problems']:.0f}", *cells, tokens])
    return aligned(rows)


def model_identity(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Compute digests of all weights and of the chat template, for ``identity``; a folder's content can change."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {"weights_digest": weights.hexdigest()[:16], "template_digest": _digest([tokenizer.chat_template])}


def _result(index: int, samples: Sequence[Sample], answer: Any, graders: Sequence[Reward], timeout: float) -> Result:
    return {
        "index": index,
        "prompt": samples[0].prompt,
        "answer": answer,
        "completions": [text_of(sample.completion) for sample in samples],
        "rewards": [sample.reward for sample in samples],
        "tokens": [len(sample.response_ids) for sample in samples],
        "truncated": [sample.truncated for sample in samples],
        "majority_right": _majority_is_correct(samples, graders, timeout),
    }


def _majority_is_correct(samples: Sequence[Sample], graders: Sequence[Reward], timeout: float) -> bool:
    """Return whether the most frequent final answer is correct; in a tie the earliest counts.

    Two answers are the same if their texts are equal, or if a built-in grader accepts the later one with the earlier
    one as ground truth. A completion without a final answer has no vote.
    """
    is_correct = [_is_correct(sample.reward) for sample in samples]
    if all(is_correct) or not any(is_correct):  # the vote cannot matter
        return all(is_correct)
    by_text: dict[str, list[Sample]] = {}
    for sample in samples:
        if answer := short_answer(sample.prompt, sample.completion):
            by_text.setdefault(answer, []).append(sample)
    grader = next((grader for grader in graders if grader.target in _EQUIVALENCE_GRADERS), None)
    votes: dict[str, list[Sample]] = {}
    for answer, voters in by_text.items():
        same = None if grader is None else _first_equivalent(list(votes), voters[0], grader, timeout)
        votes.setdefault(same or answer, []).extend(voters)
    winner = max(votes.values(), key=len, default=None)
    return winner is not None and _is_correct(winner[0].reward)


def _first_equivalent(answers: Sequence[str], sample: Sample, grader: Reward, timeout: float) -> str | None:
    """Return the first answer that, as ground truth, makes the grader accept the sample; None if there is none."""
    n = len(answers)
    scores = score([grader], [sample.prompt] * n, [sample.completion] * n, {"answer": answers}, timeout=timeout)
    return next((answer for answer, reward in zip(answers, scores.rewards, strict=True) if _is_correct(reward)), None)


def _is_correct(reward: float | None) -> bool:
    return reward is not None and reward >= 1


@contextmanager
def _open_locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading and appending, locked for this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        lock_file(file, f"output {str(path)!r} is being written by another process; wait for it, or choose another one")
        yield file


def _resume(file: BinaryIO, header: Mapping[str, Any], chunk: int, *, overwrite: bool) -> list[Result]:
    """Return the finished problems in the file and truncate it after them; write the header of a new file.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    first_line = _encode_line(header)
    file.seek(0)
    content = b"" if overwrite else file.read()
    if first_line.startswith(content):  # empty, or cut off within the header
        file.truncate(0)
        file.write(first_line)
        file.flush()
        return []
    *lines, _ = content.split(b"\n")  # what follows the last line break was cut off
    try:
        saved, *results = map(json.loads, lines)
        is_valid = "format" in saved and [result["index"] for result in results] == list(range(len(results)))
    except (ValueError, TypeError, KeyError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"output {file.name!r} is not an evaluation, or is damaged; choose another file, or use --overwrite"
        )
    current = json.loads(first_line)
    differences = [
        f"{name}: {saved.get(name)!r} there, {current.get(name)!r} here"
        for name in {**current, **saved}
        if saved.get(name) != current.get(name)
    ]
    if differences:
        raise ValueError(
            f"output {file.name!r} holds another evaluation ({'; '.join(differences)}); "
            "use the same settings, choose another file, or use --overwrite"
        )
    finished = len(results) if len(results) == header["dataset_size"] else len(results) // chunk * chunk
    file.truncate(sum(len(line) + 1 for line in lines[: 1 + finished]))
    return results[:finished]


def _encode_line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"


def _digest(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def answer_held_out(episodes: Episodes, rows: Sequence[dict[str, Any]], args: SPPOConfig) -> list[Sample]:
    """Answer this process's held-out prompts during training, with the same seed each time."""
    if not rows:
        if skip := getattr(episodes.engine, "skip", None):  # a part of what other processes do is for all
            skip()
        return []
    return episodes.play(
        rows,
        seed=rollout_seed(args.seed, _EVALUATION_SEED, args.process_index),
        temperature=args.eval_temperature,
        batch_size=args.per_device_eval_batch_size,
    )


def held_out_metrics(
    samples: list[Sample],
    rows: Sequence[dict[str, Any]],
    reward_funcs: Sequence[Reward],
    args: SPPOConfig,
    gather: Gather,
    *,
    trainer_state: Any = None,
) -> dict[str, float]:
    """Score this process's answers to held-out prompts, and return the metrics over all processes.

    Args:
        samples: this process's answers; their rewards are set in place.
        rows: their rows of the dataset.
        reward_funcs: resolved rewards.
        args: settings of the run. ``reward_timeout`` limits each call of a reward, on as many samples as a rollout has.
        gather: concatenates lists over processes.
        trainer_state: the trainer's state, for rewards that take it.

    Returns:
        ``success_rate``, ``reward``, ``response_length``, ``truncated``, ``rewards/<name>``, ``custom/<name>`` of what
        rewards log, and ``problems``, the number of answers that could be scored.
    """
    meter = Meter()
    for start in range(0, len(rows), args.rollout_size):
        part = slice(start, start + args.rollout_size)
        means = score_samples(
            samples[part], rows[part], reward_funcs, args, as_probability=False, trainer_state=trainer_state
        )
        meter.mean(dict(means), weight=len(rows[part]))
    for sample in samples:
        meter.mean({"response_length": len(sample.response_ids), "truncated": sample.truncated})
        if sample.reward is not None:
            meter.mean({"success_rate": sample.reward >= 1, "reward": sample.reward})
    problems = len(gather([1 for sample in samples if sample.reward is not None]))
    read = meter.read(gather)
    names = ("response_length", "truncated", "success_rate", "reward")
    by_reward = {name: value for name, value in read.items() if name.startswith(("rewards/", "custom/"))}
    return {name: read.get(name, 0.0) for name in names} | by_reward | {"problems": problems}
