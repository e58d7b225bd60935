"""What the documentation claims of speed on a GPU, held against the measured rows."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks import results
from benchmarks.plans import BARE, BASE, MILLION, SHARP, Item, item_of
from benchmarks.results import Row


def judge(rows: Iterable[Row]) -> list[Row]:
    """Those of the claims that the rows decide: what was measured, and whether it holds."""
    timed = {(item_of(row), row["way"]): row for row in rows if "both_ms" in row}
    bare = timed.get((Item("linear_logprobs", BASE), BARE))
    judged = []
    for (item, way), row in timed.items():
        name = item.operation
        if item == Item("linear_logprobs", BASE) and bare and way in ("ours, cache", "ours, recompute"):
            least = bare["both_ms"] + (bare["forward_ms"] if way == "ours, recompute" else 0.0)
            ratio = row["both_ms"] / least
            judged.append(_claim(f"{name}, {way}: at most 1.15 times its bare products", ratio, ratio <= 1.15))
        if item == Item("linear_logprobs", SHARP) and way == "ours, sparse":
            others = [row["both_ms"] for (at, other), row in timed.items() if at == item and _is_of_others(other)]
            if others:
                ratio = row["both_ms"] / min(others)
                judged.append(
                    _claim(f"{name}, a few tokens with all the mass: at most half of any other", ratio, ratio <= 0.5)
                )
        eager = timed.get((item, "eager PyTorch"))
        if name.startswith("policy_loss") and item.point.tokens == MILLION and way == "ours" and eager:
            ratio = eager["both_ms"] / row["both_ms"]
            judged.append(_claim(f"{name}, {MILLION} tokens: at least 10 times as fast as eager", ratio, ratio >= 10))
        if item == Item("selective_logprobs", BASE) and way == "ours":
            for what, share in (("forward", row["forward_of_copy"]), ("forward and backward", row["of_ceiling"])):
                judged.append(_claim(f"{name}, {what}: at least 0.85 of the copy bandwidth", share, share >= 0.85))
    return judged


def _is_of_others(way: str) -> bool:
    return way != BARE and not way.startswith("ours")


def _claim(claim: str, measured: float, held: bool) -> Row:
    return {"claim": claim, "measured": measured, "held": held}


COLUMNS: results.Columns = {
    "claim": lambda row: f"{row['claim']} ({row['part']})" if "part" in row else row["claim"],
    "measured": lambda row: row["measured"],
    "": lambda row: "held" if row["held"] else "NOT HELD",
}
