"""Comparisons of variants of a recipe: what is trained, and how runs are summed up over the seeds."""

from __future__ import annotations

import argparse
import json

import pytest

pytest.importorskip("triton")

from benchmarks.harness import recipe_comparison
from benchmarks.harness.recipe_comparison import Comparison, by_variant


def make_run(variant, seed, after, evaluations=((100, 0.5), (200, 0.8)), before=0.4):
    return {
        "variant": variant,
        "seed": seed,
        "problems": 500,
        "accuracy_before": before,
        "accuracy_after": after,
        "evaluations": [list(each) for each in evaluations],
    }


def test_an_interrupted_comparison_resumes(tmp_path, monkeypatch):
    trained = []

    def train(recipe, settings, seed, folder, **_):
        trained.append((settings["name"], seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return make_run(settings["name"], seed, 0.8) | {"seconds": 1.0}

    monkeypatch.setattr(recipe_comparison, "train", train)
    comparison = Comparison("names", {"a": {"name": "a"}, "b": {"name": "b"}}, {}, stop_at_threshold=True)
    parser = argparse.ArgumentParser()
    recipe_comparison.add_arguments(parser)
    args = parser.parse_args(["--seeds", "3", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        comparison.run(args)
    assert comparison.run(args) == 0
    assert trained == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert len(json.loads((tmp_path / "names.json").read_text())["rows"]) == 6


def test_tokens_to_the_threshold():
    rows = [make_run("a", 0, 0.8), make_run("a", 1, 0.9, [(100, 0.9)]), make_run("b", 0, 0.6, [(100, 0.6)])]
    lines = by_variant(rows, 0.75)
    assert [(line["variant"], line["reached"], line["tokens"]) for line in lines] == [("a", 2, 150), ("b", 0, None)]
    assert lines[0]["tokens_error"] == pytest.approx(50)
