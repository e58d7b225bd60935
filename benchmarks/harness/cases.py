"""Which operations are measured where: the plans of the suite kernels."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

from benchmarks.harness.operations import OPERATIONS, Point
from benchmarks.harness.results import Row

HEADS = {"0.5B": (896, 151_936), "1.5B": (1536, 151_936), "7B": (3584, 152_064), "8B": (4096, 151_936)}  # Qwen
BASE = Point(8192, *HEADS["8B"])
MILLION = 1 << 20
SHARP = BASE._replace(logits="sharp")
BARE = "bare products"  # a reference, not an implementation: see the suite kernels


class Item(NamedTuple):
    """An operation at a point."""

    operation: str
    point: Point


def describe(item: Item) -> str:
    """In a few words; what is as usual is left out."""
    point = item.point
    size = f"{point.tokens} tokens" + (f", H {point.hidden}, V {point.vocab}" if point.vocab else "")
    changed = [f"{name} {getattr(point, name)}" for name in ("ignored", "clipped") if getattr(point, name)]
    return ", ".join([f"{item.operation}: {size}", *changed, *([point.logits] if point.logits != "peaked" else [])])


def head_of(item: Item) -> Row:
    """The columns that say what a row is of."""
    return {"operation": item.operation, **item.point._asdict()}


def item_of(row: Row) -> Item:
    """What a row is of."""
    return Item(row["operation"], Point(*(row[name] for name in Point._fields)))


def _linear(*points: Point) -> list[Item]:
    return [Item("linear_logprobs", point) for point in points]


POLICY = ("policy_loss, token", "policy_loss, sequence_mean")
REST = ("prompt_value_loss", "gae", "whiten", "group_advantages")


def _small(names: Iterable[str], *tokens: int) -> list[Item]:
    """Operations that have nothing to do with a vocabulary."""
    return [Item(name, Point(n, HEADS["1.5B"][0], 0)) for n, name in product(tokens, names)]


def _swept(base: Point) -> list[Point]:
    """One thing at a time: noise for distributions, tokens without loss, tokens without gradient."""
    changes: list[dict[str, Any]] = [
        {"logits": "uniform"}, {"ignored": 0.5}, {"ignored": 0.9}, {"clipped": 0.3}, {"clipped": 0.9},
    ]  # fmt: skip
    return [base._replace(**change) for change in changes]


_TINY = Point(512, 64, 1024)
_CPU = Point(512, 576, 49_152)  # SmolLM2-135M's head

PLANS: dict[str, list[Item]] = {
    # What the claims are about, and the heads of small models, where row passes weigh most.
    "headline": [
        *_linear(BASE, SHARP, Point(16_384, *HEADS["1.5B"]), Point(4096, *HEADS["0.5B"])),
        Item("selective_logprobs", BASE),
        *_small(POLICY, MILLION),
        Item("linear_logprobs, mean NLL", BASE),
    ],
    "compiled": [*_linear(BASE, SHARP), Item("selective_logprobs", BASE)],
    "shapes": _linear(
        BASE._replace(tokens=4096),
        *(Point(8192, *HEADS[name]) for name in ("0.5B", "1.5B", "7B")),
        BASE._replace(tokens=32_768),
    ),
    "others": [
        *(Item("linear_logprobs + policy_loss", point) for point in (BASE, SHARP)),
        *_small(REST, MILLION),
    ],
    "sweep": [
        *_linear(*(BASE._replace(tokens=n) for n in (1024, 2048, 16_384, 65_536)), *_swept(BASE)),
        *(Item("selective_logprobs", point) for point in (BASE._replace(tokens=1024), *_swept(BASE))),
        *_small((*POLICY, *REST), 8192, 65_536),
    ],
    "quick": [
        *_linear(_TINY, _TINY._replace(ignored=0.5, clipped=0.5), _TINY._replace(logits="sharp")),
        *(Item(name, _TINY) for name in ("linear_logprobs, mean NLL", "linear_logprobs + policy_loss")),
        Item("selective_logprobs", _TINY),
        *_small((*POLICY, *REST), 4096),
    ],
    "dry": [
        *(Item(name, Point(8, 16, 97, ignored=0.25, clipped=0.25)) for name in OPERATIONS if "logprobs" in name),
        *_small((*POLICY, *REST), 64),
    ],
    "cpu": [
        *_linear(
            _CPU, *(_CPU._replace(**change) for change in ({"ignored": 0.9}, {"clipped": 0.9}, {"logits": "sharp"}))
        ),
        *(Item(name, _CPU) for name in ("linear_logprobs, mean NLL", "linear_logprobs + policy_loss")),
        Item("selective_logprobs", _CPU),
        *_small((*POLICY, *REST), 65_536),
    ],
}
PLANS["full"] = [*PLANS["headline"], *PLANS["shapes"], *PLANS["others"], *PLANS["sweep"]]
