"""Claims of speed on a GPU, judged by measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.harness import results
from benchmarks.harness.cases import BASE, GEMM_ONLY, MILLION, OURS, SHARP, BenchmarkCase, is_ours, provider_name
from benchmarks.harness.results import Row


class Claim(NamedTuple):
    """A ratio and its target.

    Attributes:
        text: the claim, with a place for ``{target}``.
        target: the bound that the ratio has to meet.
        expected: the least and the most that a review of the compiled code expects.
        at_least: whether the target is a lower bound.
    """

    text: str
    target: float
    expected: tuple[float, float]
    at_least: bool = True

    def row(self, measured: float) -> Row:
        """Return the row of the judged claim."""
        held = measured >= self.target if self.at_least else measured <= self.target
        claim = self.text.format(target=f"{self.target:g}")
        return {"claim": claim, "target": self.target, "measured": measured, "held": held}


# Targets are slightly below what "Before the first GPU run" in docs/dev/performance-log.md expects of the kernels. They
# have to be raised with the kernels. No GPU has measured any of them yet.
CLAIMS = {
    "cache": Claim("linear_logprobs, cache: at most {target} times its matmuls", 1.25, (1.17, 1.17), False),
    "recompute": Claim("linear_logprobs, recompute: at most {target} times its matmuls", 1.25, (1.16, 1.16), False),
    "sparse": Claim(
        "linear_logprobs, sparse, a few tokens with all the mass: at most {target} times as long as the fastest other",
        1.0,
        (31 / 48, 36 / 46),  # over torch.compile
        False,
    ),
    "selective forward": Claim(
        "selective_logprobs, forward: at least {target} of the copy bandwidth", 0.5, (0.55, 0.7)
    ),
    "selective both": Claim(
        "selective_logprobs, forward and backward: at least {target} of the copy bandwidth", 0.6, (0.7, 0.7)
    ),
    "policy_loss, token": Claim(
        f"policy_loss, token, {MILLION} tokens: at least {{target}} times as fast as eager", 5.0, (6.0, 7.0)
    ),
    "policy_loss, sequence_mean": Claim(
        f"policy_loss, sequence_mean, {MILLION} tokens: at least {{target}} times as fast as eager", 3.0, (4.0, 4.0)
    ),
}


def judge(rows: Iterable[Row]) -> list[Row]:
    """Return a row for each claim that the rows decide: target, measured ratio, and whether it holds."""
    timed = {(BenchmarkCase.of_row(row), row["provider"]): row for row in rows if "both_ms" in row}
    return [CLAIMS[name].row(ratio) for name, ratio in _ratios(timed)]


def _ratios(timed: dict[tuple[BenchmarkCase, str], Row]) -> Iterator[tuple[str, float]]:
    """Yield the ratio of each claim that the rows decide, in the order of the rows."""
    base, sharp = BenchmarkCase("linear_logprobs", BASE), BenchmarkCase("linear_logprobs", SHARP)
    gemm = timed.get((base, GEMM_ONLY))
    for (case, provider), row in timed.items():
        if case == base and gemm and provider == provider_name("cache"):
            yield "cache", row["both_ms"] / gemm["both_ms"]
        if case == base and gemm and provider == provider_name("recompute"):
            yield "recompute", row["both_ms"] / (gemm["both_ms"] + gemm["forward_ms"])
        if case == sharp and provider == provider_name("sparse"):
            peers = [other["both_ms"] for (at, name), other in timed.items() if at == sharp and _is_peer(name)]
            if peers:
                yield "sparse", row["both_ms"] / min(peers)
        eager = timed.get((case, "eager PyTorch"))
        if case.operation.startswith("policy_loss") and case.size.tokens == MILLION and provider == OURS and eager:
            yield case.operation, eager["both_ms"] / row["both_ms"]
        # A part that was stopped leaves rows without a share of the copy bandwidth.
        if case == BenchmarkCase("selective_logprobs", BASE) and provider == OURS and "of_ceiling" in row:
            yield "selective forward", row["forward_of_copy"]
            yield "selective both", row["of_ceiling"]


def _is_peer(provider: str) -> bool:
    return provider != GEMM_ONLY and not is_ours(provider)


COLUMNS: results.Columns = {
    "claim": lambda row: f"{row['claim']} ({row['part']})" if "part" in row else row["claim"],
    "target": lambda row: row.get("target"),
    "measured": lambda row: row["measured"],
    "held": lambda row: "held" if row["held"] else "NOT HELD",
}
