"""The suite sparse: on made-up states, and what it would say of a broken bound."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import sparse
from benchmarks.__main__ import main
from benchmarks.harness import hidden_states
from sppo_kernels import linear_logprobs


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    assert main(["sparse", "--quick", "--out", str(folder)]) == 0
    assert (folder / "sparse.svg").exists()
    return json.loads((folder / "sparse.json").read_text())


@pytest.mark.slow
def test_each_part_has_its_rows_and_its_table(report):
    assert report["failures"] == []
    tables = sparse.tables(report["rows"])
    assert tuple(tables) == sparse.PARTS
    for lines, columns in tables.values():
        assert lines
        assert all(value(line) is not None for line in lines for name, value in columns.items() if name == "prompts")


def test_coverage_is_what_the_operation_keeps(report):
    """Counted by sorting, in float64; the operation selects in one read, in float32."""
    hidden, weight, labels = hidden_states.random_states(256)
    for row in sparse.rows_of("coverage", report["rows"]):
        if row["tolerance"] < 1e-4:  # next to what float32 sums are off by
            continue
        settings = {"backward": "sparse", "mass_tolerance": row["tolerance"], "max_entries": row["capacity"]}
        certificate = linear_logprobs(
            hidden.requires_grad_(), weight, labels, return_certificate=True, **settings
        ).certificate
        assert float(certificate.sparse_share) == pytest.approx(row["covered"], abs=0.01)
        if row["covered"]:
            assert float(certificate.mean_entries) == pytest.approx(row["mean_entries"], rel=0.02)


def test_timed_providers_have_their_numbers_of_passes(report):
    rows = {(row["logits"], row["provider"]): row for row in sparse.rows_of("times", report["rows"])}
    assert rows["states", "cache"]["passes"] == pytest.approx(3, abs=0.01)
    assert rows["states", "sparse"]["passes"] < rows["noise", "sparse"]["passes"]
    assert rows["noise", "sparse"]["passes"] == pytest.approx(4, abs=0.01)
    assert all(row["both_ms"] > 0 for row in rows.values() if "note" not in row)


def test_providers_take_turns(monkeypatch):
    called = []
    ours = sparse._implementation

    def noting(provider):
        function = ours(provider)
        return lambda **given: called.append(provider) or function(**given)

    monkeypatch.setattr(sparse, "_implementation", noting)
    rows = list(sparse.times(*hidden_states.random_states(64), rounds=3, peers=False))
    assert called[-12:] == [*sparse.MODES] * 3
    assert [row["provider"] for row in rows] == [*sparse.MODES]
    assert all(row["both_ms"] >= max(row["forward_ms"], row["backward_ms"]) for row in rows)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("bound", {"largest": 1.2}, "the error is up to 1.2 of its bound"),
        ("bound", {"mean": 0.001}, "0.001 in the mean"),
        ("errors", {"d weight": 0.01}, "error of d weight in float32 0.01, over 0.001"),
        ("errors", {"d hidden": float("nan")}, "error of d hidden in float32 nan"),
    ],
)
def test_a_broken_promise_is_a_failure(report, part, change, says):
    rows = [dict(row) for row in report["rows"]]
    spoilt = next(
        row for row in sparse.rows_of(part, rows) if part == "bound" or row["provider"] == "sparse, tolerance 0.0001"
    )
    spoilt |= change
    (failure,) = sparse.failures_of(rows)
    assert says in failure


def test_sampled_states_are_kept(tmp_path, monkeypatch):
    """The model is asked once; what lies in the folder is read the next time."""
    made = hidden_states.random_states(8)
    asked = []
    monkeypatch.setattr(hidden_states, "_sample", lambda *given: asked.append(given) or made)
    for _ in range(2):
        read = hidden_states.sampled_states(tmp_path, "some/prompts.parquet", 0.6, 4, 2)
        assert all(torch.equal(x, y) for x, y in zip(read, made, strict=True))
    assert asked == [("some/prompts.parquet", 0.6, 4, 2, hidden_states.NOT_TRUNCATED)]
    hidden_states.sampled_states(tmp_path, "some/prompts.parquet", 0.6, 4, 2, hidden_states.Truncation(20, 0.95))
    assert len(asked) == 2  # another sampler has other states
    assert len(list(tmp_path.iterdir())) == 2
