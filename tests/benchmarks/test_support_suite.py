"""The suite support: on made-up states, and what it would say of a wrong gradient or a claim that does not hold."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

from benchmarks import support
from benchmarks.__main__ import main
from benchmarks.harness import library_seams
from benchmarks.harness.hidden_states import HiddenStates, Truncation, random_states
from benchmarks.harness.operations import OPERATIONS, eager
from benchmarks.harness.problem import ProblemSize
from benchmarks.support import MASKED, OURS, Sampler, Supports

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("support")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "FIRST_K", (64, 2048))
        patch.setattr(torch, "compile", lambda function, **_: function)
        assert main(["support", "--quick", "--out", str(folder)]) == 0
    assert (folder / "support.svg").exists()
    return json.loads((folder / "support.json").read_text())


def states_of(logits):
    """Make states whose logits are given."""
    logits = torch.tensor(logits)
    return HiddenStates(logits, torch.eye(logits.shape[1]), logits.argmax(-1))


@pytest.mark.slow
def test_each_part_has_its_rows(report):
    assert report["failures"] == []
    for part in support.PARTS:
        lines = support.rows_of(part, report["rows"])
        assert lines
        for value in support.COLUMNS[part].values():
            assert any(value(line) is not None for line in lines) or part == "times"
    timed = {(row["sampler"], row["tokens"], row["provider"]): row for row in support.rows_of("times", report["rows"])}
    assert all(row["both_ms"] > 0 for row in timed.values())
    assert {provider for _, _, provider in timed} == {OURS, MASKED, support.COMPILED, *support.WHOLE}
    top_k = {row["entries"] for (sampler, _, _), row in timed.items() if sampler == "top_k=20, T=1"}
    assert top_k == {20}


@pytest.mark.slow
def test_peak_of_supports_is_a_part_of_the_masked_softmax(report):
    rows = [row for row in support.rows_of("times", report["rows"]) if row["sampler"] == str(support.TIMED[1])]
    ours = {row["tokens"]: row["peak_bytes"] for row in rows if row["provider"] == OURS}
    masked = {row["tokens"]: row["peak_bytes"] for row in rows if row["provider"] == MASKED}
    for tokens, peak in masked.items():
        assert peak >= 3 * 4 * tokens * 3000
        assert ours[tokens] < peak / 5


def test_kept_tokens_are_those_of_the_sampler():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    logits = p.log() * 0.5  # at T = 0.5 the probabilities are p
    of = lambda **truncation: support.kept(logits, Sampler(0.5, Truncation(**truncation)))[0].tolist()
    assert of(top_k=3) == [True, True, True, False]
    assert of(top_p=0.75) == [True, True, False, False]
    assert of(top_p=0.52) == [True, True, False, False]
    assert of(top_k=3, top_p=0.52) == [True, False, False, False]  # 0.5 / 0.95 of what top-k left
    assert of(min_p=0.2) == [True, True, True, False]


def test_label_outside_is_added_and_counted():
    states = states_of([[3.0, 2.0, 1.0, 0.0]] * 2)._replace(labels=torch.tensor([0, 3]))
    found = support.supports(states, Sampler(1.0, Truncation(2)))
    assert found.token_ids.tolist() == [0, 1, 0, 1, 3]
    assert found.offsets.tolist() == [0, 2, 5]
    assert found.added == 1


def test_statistics_of_sizes():
    sizes = torch.tensor([1, 1, 2, 96])
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    row = support.size_row(Supports(torch.zeros(100), offsets, 0), vocab=6400)
    assert (row["mean"], row["p50"], row["max"], row["single"]) == (25, 1.5, 96, 0.5)
    assert row["large"] == 0
    assert support.size_row(Supports(torch.zeros(100), offsets, 0), vocab=96 * 63)["large"] == 0.25


@pytest.mark.parametrize("masked", [True, False])
def test_exact_results_are_those_of_autograd(masked):
    states = random_states(300)  # of more than a block
    problem = support.problem_of(states, support.supports(states, Sampler(0.7, Truncation(5))), 300)
    found = support.exact(problem, 0.7, masked)
    call = lambda **given: (
        eager.masked_logprobs(**given, temperature=0.7)
        if masked
        else eager.selective_logprobs(given["hidden"] @ given["weight"].t() / 0.7, given["labels"])
    )
    want = problem.cast(torch.float64).results(call)
    for name, value in found.items():
        torch.testing.assert_close(value, want[name], rtol=1e-9, atol=1e-12)


def test_providers_take_turns_and_a_wrong_one_gets_no_time(monkeypatch):
    called = []
    ours, wrong = support.of_support, eager.masked_logprobs

    def note(name, function, spoil=1.0):
        def call(**given):
            called.append(name)
            return {key: spoil * value for key, value in function(**given).items()}

        return call

    states = random_states(32)
    problem = support.problem_of(states, support.supports(states, Sampler(1.0, Truncation(5))), 32)
    made = {OURS: note("a", ours), MASKED: note("b", wrong), "cache": note("c", wrong, spoil=1.01)}
    monkeypatch.setattr(
        support,
        "providers",
        lambda temperature, complete: {
            name: lambda call=call, **given: call(**given, temperature=temperature) for name, call in made.items()
        },
    )
    rows = {row["provider"]: row for row in support.times(problem, 1.0, rounds=3, complete=True)}
    assert called[-6:] == ["a", "b"] * 3
    assert "both_ms" not in rows["cache"]
    assert rows[MASKED]["speedup"] == 1
    at = {"part": "times", "sampler": "s", "tokens": 32}
    (failure,) = support.failures_of([at | row for row in rows.values()])
    assert failure.startswith("s, 32 tokens: cache is off by")


@pytest.mark.parametrize(("kind", "dense"), [("narrow", False), ("wide", True)])
def test_supports_are_forced_to_a_kind(kind, dense, monkeypatch):
    states = random_states(16)
    problem = support.problem_of(states, support.supports(states, Sampler(1.0, Truncation(5))), 16)
    called = []
    read = library_seams.SupportHead._read_wide
    monkeypatch.setattr(
        library_seams.SupportHead, "_read_wide", lambda self, *given: called.append(1) or read(self, *given)
    )
    want = support.exact(problem, 1.0, masked=True)
    with library_seams.all_supports_are(kind):
        found = problem.results(lambda **given: support.of_support(**given, temperature=1.0))
    assert bool(called) == dense
    for name in want:
        torch.testing.assert_close(found[name].double(), want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({}, [True, True, True]),
        ({"speedup": 19.0}, [False, True, True]),
        ({"both_ms": 11.0}, [True, False, True]),
        ({"peak_share": 0.06}, [True, True, False]),
    ],
)
def test_claims_are_judged_by_the_rows(change, held):
    at = {"part": "times", "sampler": str(support.TIMED[0]), "tokens": 1024}
    ours = {**at, "provider": OURS, "speedup": 21.0, "both_ms": 9.0, "peak_share": 0.04} | change
    rows = [ours, {**at, "provider": "sparse", "both_ms": 50.0}]
    judged = support.judge(rows)
    assert [row["held"] for row in judged] == held
    assert judged[0]["claim"] == f"{support.TIMED[0]}, 1,024 tokens: at least 20 times as fast as the masked softmax"


@pytest.mark.parametrize("size", [ProblemSize(9, 16, 97, ignored=0.3), ProblemSize(5, 8, 20), ProblemSize(3, 8, 2)])
def test_supports_of_the_measured_operation_are_sets_with_their_label(size):
    given = OPERATIONS["linear_logprobs, support"].inputs(size, CPU, torch.float32).tensors
    for i, label in enumerate(given["labels"].tolist()):
        ids = given["token_ids"][given["offsets"][i] : given["offsets"][i + 1]].tolist()
        assert len(set(ids)) == len(ids) == min(20, size.vocab)
        assert 0 <= min(ids) <= max(ids) < size.vocab
        assert label in ids or label < 0


@pytest.mark.slow
def test_parts_that_are_not_measured_again_are_kept(tmp_path):
    other = {"part": "wide", "tokens": 1, "k": 2, "share": 0.5}
    other |= {f"{kind}_{key}": 1.0 for kind in ("narrow", "wide") for key in ("ms", "iqr_ms")}
    (tmp_path / "support.json").write_text(json.dumps({"rows": [other, {"part": "sizes", "mean": -1}]}))
    assert main(["support", "--quick", "--only", "sizes", "--out", str(tmp_path)]) == 0
    sizes, kept = json.loads((tmp_path / "support.json").read_text())["rows"]
    assert sizes["part"] == "sizes"
    assert sizes["mean"] > 0
    assert kept == other
