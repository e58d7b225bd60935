"""Diagrams of the docs: the backward modes of linear_logprobs, and the data flow of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.harness.palette import BLUE, GREY, INK, ORANGE, PAPER, TEAL
from benchmarks.harness.results import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Box(NamedTuple):
    """A step: its label, its colour, and its width; a matrix product with the LM head has the width 1."""

    label: str
    colour: str
    width: float


PRODUCT = Box("hidden Wᵀ", BLUE, 1)
D_HIDDEN, D_WEIGHT = Box("d hidden", BLUE, 1), Box("d W", BLUE, 1)
ROWS = Box("rows", ORANGE, 0.32)

MODES: dict[str, tuple[list[Box], str, list[Box]]] = {
    '"recompute"': ([PRODUCT, ROWS], "log-sum-exp", [PRODUCT, ROWS, D_HIDDEN, D_WEIGHT]),
    '"cache"': ([PRODUCT, ROWS], "probabilities", [D_HIDDEN, D_WEIGHT]),
    '"sparse"': ([PRODUCT, ROWS], "largest entries", [Box("gather", TEAL, 0.5)]),
    "support=": ([Box("K rows of W", TEAL, 0.7)], "K probabilities", [Box("gather", TEAL, 0.5)]),
    "linear_policy_loss": (
        [PRODUCT, ROWS, Box("loss", ORANGE, 0.32), D_HIDDEN, D_WEIGHT],
        "gradients",
        [Box("scale", ORANGE, 0.45)],
    ),
}
"""Steps of the forward, what is kept until the backward, and steps of the backward."""

STAGES = {
    "prompts": "text or chat,\nany dataset",
    "rollout engine": "hf, continuous,\nvllm, your own",
    "rewards": "functions, math,\ncode in a sandbox",
    "critic values": "prompt, probe,\ntoken, none",
    "advantages": "sppo, grpo,\nppo, rloo, …",
    "micro-batches": "packed,\nno padding",
    "loss": "fused\noperations",
}
"""Stages of the trainer, and what each can be."""


def _box(axes: Axes, left: float, bottom: float, box: Box, *, height: float = 0.62) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), box.width, height, boxstyle="round,pad=0,rounding_size=0.06", color=box.colour, linewidth=0
        )
    )
    axes.text(left + box.width / 2, bottom + height / 2, box.label, color=PAPER, ha="center", va="center", fontsize=8)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 0.8})


def modes(path: Path) -> None:
    """Draw the steps of each backward mode, matrix products as wide as they are long."""

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for row, (name, (forward, kept, backward)) in enumerate(MODES.items()):
            bottom = -row
            axes.text(-0.15, bottom + 0.31, name, ha="right", va="center", fontsize=9, family="monospace")
            x = 0.0
            for box in forward:
                _box(axes, x, bottom, box)
                x += box.width + 0.05
            _arrow(axes, (x, bottom + 0.31), (x + 1.3, bottom + 0.31))
            axes.text(x + 0.62, bottom + 0.38, kept, ha="center", va="bottom", fontsize=7.5)
            x += 1.35
            for box in backward:
                _box(axes, x, bottom, box)
                x += box.width + 0.05
        axes.text(-0.15, 1.0, "forward, then backward:", ha="right", va="center", fontsize=9)
        for x, (label, colour) in zip(
            (0.0, 2.3, 4.5),
            (("product with the LM head, 2NHV", BLUE), ("pass over rows of logits", ORANGE), ("rows of W only", TEAL)),
            strict=True,
        ):
            axes.plot(x + 0.05, 1.0, "s", color=colour, markersize=7)
            axes.text(x + 0.17, 1.0, label, va="center", fontsize=8)
        axes.set(xlim=(-1.9, 6.6), ylim=(-len(MODES) + 0.9, 1.25))
        axes.axis("off")

    save_figure(path, (8.6, 3.3), fill)


def data_flow(path: Path) -> None:
    """Draw the stages of the trainer."""

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (stage, choices) in enumerate(STAGES.items()):
            colour = ORANGE if stage == "loss" else BLUE
            _box(axes, place * 1.3, 0, Box(stage.replace(" ", "\n"), colour, 1.05))
            axes.text(place * 1.3 + 0.52, -0.12, choices, ha="center", va="top", fontsize=7.5)
            if place:
                _arrow(axes, (place * 1.3 - 0.25, 0.31), (place * 1.3, 0.31))
        end = (len(STAGES) - 2) * 1.3 + 1.05
        axes.plot([0, 0, end, end], [0.78, 0.88, 0.88, 0.78], color=GREY, linewidth=0.8)
        label = "one iterable, read by transformers' Trainer like a data loader"
        axes.text(end / 2, 0.93, label, ha="center", fontsize=8)
        axes.set(xlim=(-0.1, (len(STAGES) - 1) * 1.3 + 1.15), ylim=(-0.62, 1.12))
        axes.axis("off")

    save_figure(path, (9.2, 1.9), fill)
