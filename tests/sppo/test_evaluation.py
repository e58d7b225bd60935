"""Tests of evaluation: estimators, majority votes, and output files that are the same after interruptions."""

import json
import math
from itertools import combinations
from statistics import fmean
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny_models import char_tokenizer, tiny_model

from sppo.evaluation import answer_held_out, evaluate, model_identity, pass_at, summarize, table
from sppo.rollout import HFRollout, Sample

PROBLEMS = datasets.Dataset.from_list([{"prompt": f"{i}+{i}=", "answer": "abcde"[i]} for i in range(5)])


def letter(prompts, completions, answer):
    return [float(a in c) for a, c in zip(answer, completions, strict=True)]


class ScriptedEngine:
    """An engine that returns given texts, one per completion."""

    def __init__(self, *texts):
        self.texts = list(texts)

    def generate(self, prompts, *, seed, temperature, batch_size):
        texts = [self.texts.pop(0) for _ in prompts]
        return [Sample(p, text, [2], [3] * len(text), truncated=False) for p, text in zip(prompts, texts, strict=True)]


class CountingEngine:
    """An engine that counts the completions of another engine."""

    def __init__(self, engine):
        self.engine, self.completions = engine, 0

    def generate(self, prompts, **settings):
        self.completions += len(prompts)
        return self.engine.generate(prompts, **settings)


def tiny_engine(model=None):
    return CountingEngine(HFRollout(model or tiny_model(), char_tokenizer(), max_completion_length=6))


def run(output=None, engine=None, dataset=PROBLEMS, reward=letter, **settings):
    settings = {"k": 2, "temperature": 1.0, "batch_size": 4, "progress": False} | settings
    return evaluate(engine or tiny_engine(), dataset, [reward], output=output, **settings)


def result_of(texts, reward, answer="1/2", **settings):
    """Return the result of one problem with these completions."""
    dataset = datasets.Dataset.from_list([{"prompt": "p", "answer": answer}])
    return run(engine=ScriptedEngine(*texts), dataset=dataset, reward=reward, k=len(texts), **settings).results[0]


# Metrics


@pytest.mark.parametrize(("n", "num_correct"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 1), (6, 5), (6, 6)])
def test_pass_at_is_the_fraction_of_subsets_with_a_correct_one(n, num_correct):
    for j in range(1, n + 1):
        fraction = fmean(any(i < num_correct for i in chosen) for chosen in combinations(range(n), j))
        assert pass_at(j, n, num_correct) == pytest.approx(fraction, abs=1e-15)


def test_pass_at_does_not_overflow():
    exact = 1 - math.comb(9990, 1000) / math.comb(10000, 1000)
    assert pass_at(1000, 10000, 10) == pytest.approx(exact, rel=1e-12)


def test_metrics_match_hand_computed_values():
    def problem(rewards, majority_right):
        n = len(rewards)
        lengths = {"tokens": [4] * n, "truncated": [True] + [False] * (n - 1)}
        return {"rewards": rewards, "majority_right": majority_right} | lengths

    results = [
        problem([1.0, 0.5, 0.0], False),
        problem([1.0, 1.0, 1.0], True),
        problem([0.0, 0.0, 0.0], False),
        problem([1.0, None, 1.0], True),  # excluded
    ]
    fractions = [1 / 3, 1.0, 0.0]
    variance = sum((fraction - 4 / 9) ** 2 for fraction in fractions) / 2
    assert summarize(results) == pytest.approx(
        {
            "problems": 3,
            "ungraded": 1,
            "avg@3": 4 / 9,
            "standard_error": math.sqrt(variance / 3),
            "pass@1": 4 / 9,
            "pass@2": (2 / 3 + 1) / 3,
            "pass@3": 2 / 3,
            "maj@3": 1 / 3,
            "reward": 4.5 / 9,
            "tokens": 4,
            "truncated": 1 / 3,
        }
    )
    assert summarize(results[3:]) == {"problems": 0, "ungraded": 1}
    assert "standard_error" not in summarize(results[:1])


def test_the_table_is_aligned():
    metrics = {"a": {"problems": 3, "avg@1": 0.5, "standard_error": 0.25, "truncated": 0, "tokens": 12}}
    lines = table(metrics | {"longer": {"problems": 0, "ungraded": 1}}, k=1).splitlines()
    assert lines == [
        "dataset  problems  avg@1  standard_error  truncated  tokens",
        "a               3  0.500           0.250      0.000      12",
        "longer          0      -               -          -       -",
    ]


# Majority vote


@pytest.mark.parametrize(
    ("texts", "reward", "is_correct"),
    [
        (["Answer: 3", "Answer: 1/2", "Answer: 1/2"], "exact", True),
        (["Answer: 3", "Answer: 1/2", "Answer: 3"], "exact", False),
        (["Answer: 1/2", "Answer: 3"], "exact", True),  # in a tie the earliest counts
        (["Answer: 3", "Answer: 1/2"], "exact", False),
        (["Answer: 3", "Answer: 3", "Answer: 1/2", "so it is 1/2", "so 1/2 it is"], "exact", False),
        # These graders see that different texts are the same answer, correct or not.
        (["Answer: 3", "Answer: 3", "Answer: 1/2", "Answer: 0.5", r"\boxed{\frac12}"], "math", True),
        (["Answer: 1/2", "Answer: 1/2", r"\boxed{\frac34}", "Answer: 0.75", "Answer: 3/4"], "math", False),
        (["Answer: 3", "Answer: 3", "Answer: 1/2", "it is 1/2", "it is 0.5"], "numeric", True),
        (["Answer: 3", "Answer: 3.001", "Answer: 1/2"], "numeric?tolerance=0.01", False),
        (["Answer: 3", "Answer: 3.001", "Answer: 1/2", "so 0.5"], "numeric", True),
        # No vote: thinking that is not closed, a box that is not closed, endless repetition
        (["<think> 3", "<think> 3", "Answer: 1/2"], "math", True),
        ([r"\boxed{3", r"\boxed{3", "Answer: 1/2"], "math", True),
        (["1 " * 800, "1 " * 800, "Answer: 1/2"], "math", True),
        # An answer that cannot be parsed has a vote.
        (["Answer: }{", "Answer: }{", "Answer: 1/2"], "math", False),
    ],
)
def test_the_majority_vote_counts_equivalent_answers(texts, reward, is_correct):
    result = result_of(texts, reward)
    assert any(result["rewards"])
    assert not all(result["rewards"])
    assert result["majority_right"] is is_correct


def test_the_vote_is_decided_if_all_or_no_answers_are_correct():
    assert result_of(["x a", "y a"], letter, answer="a")["majority_right"] is True
    assert result_of(["b", "b"], letter, answer="a")["majority_right"] is False


# Files


def test_lines_hold_completions_and_rewards(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    evaluation = run(path, identity={"model": "tiny"})
    header, *lines = map(json.loads, path.read_text().splitlines())
    assert header == evaluation.header
    assert header["model"] == "tiny"
    assert lines == evaluation.results
    assert [line["index"] for line in lines] == list(range(5))
    for line, row in zip(lines, PROBLEMS, strict=True):
        assert (line["prompt"], line["answer"]) == (row["prompt"], row["answer"])
        assert line["rewards"] == [float(row["answer"] in text) for text in line["completions"]]
        assert all(1 <= tokens <= 6 for tokens in line["tokens"])
    assert evaluation.metrics == summarize(lines)
    assert 0 < evaluation.metrics["avg@2"] < 1


def test_the_bytes_depend_only_on_the_seed(tmp_path):
    for name in "ab":
        torch.manual_seed(ord(name))
        run(tmp_path / name)
    run(tmp_path / "c", seed=1)
    texts = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert texts[0] == texts[1]
    assert texts[0].partition(b"\n")[2] != texts[2].partition(b"\n")[2]


def test_completions_differ_within_problems_and_chunks():
    same = datasets.Dataset.from_list([PROBLEMS[0]] * 4)
    completions = [tuple(result["completions"]) for result in run(dataset=same, k=4).results]
    assert len(set(completions)) == 4
    assert all(len(set(texts)) > 1 for texts in completions)


def test_an_interrupted_evaluation_ends_with_the_same_bytes(tmp_path):
    path = tmp_path / "results.jsonl"
    metrics = run(path).metrics
    complete = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(complete) if byte == ord("\n")]
    cuts = {0: 10, 30: 10, ends[0]: 10, ends[1]: 10, ends[2] - 1: 10, ends[2]: 6, ends[4] - 7: 6, ends[4] + 9: 2}
    for cut, completions in {**cuts, len(complete): 0}.items():
        path.write_bytes(complete[:cut])
        engine = tiny_engine()
        assert run(path, engine).metrics == metrics
        assert path.read_bytes() == complete
        assert engine.completions == completions, cut


def test_each_chunk_is_written_when_it_is_graded(tmp_path):
    path = tmp_path / "results.jsonl"
    seen = []

    class Looking(CountingEngine):
        def generate(self, prompts, **settings):
            seen.append(path.read_bytes())
            return super().generate(prompts, **settings)

    run(path, Looking(tiny_engine()))
    lines = path.read_bytes().splitlines(keepends=True)
    assert seen == [b"".join(lines[:finished]) for finished in (1, 3, 5)]


def test_the_file_of_another_evaluation_raises(tmp_path):
    path = tmp_path / "results.jsonl"
    run(path)
    complete = path.read_bytes()
    others = {
        "k: 2 there, 3 here": {"k": 3},
        "temperature: 1.0 there, 0.5 here": {"temperature": 0.5},
        "seed: 0 there, 1 here": {"seed": 1},
        "batch_size: 4 there, 6 here": {"batch_size": 6},
        r"rewards: \[\['letter', {}\]\] there, \[\['sppo.rewards.builtin:exact', {}\]\] here": {"reward": "exact"},
        r"dataset_digest: .* dataset_size: 5 there, 4 here": {"dataset": PROBLEMS.select(range(4))},
        "weights: None there, 'x' here": {"identity": {"weights": "x"}},
    }
    for difference, settings in others.items():
        with pytest.raises(ValueError, match=rf"another evaluation \({difference}.*--overwrite"):
            run(path, **settings)
        assert path.read_bytes() == complete
    run(path, seed=1, overwrite=True)
    assert json.loads(path.read_text().partition("\n")[0])["seed"] == 1


@pytest.mark.parametrize("damage", [b"important notes\n", b"{}\n", b"no line end"])
def test_a_file_of_something_else_is_not_changed(tmp_path, damage):
    path = tmp_path / "results.jsonl"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="is not an evaluation, or is damaged"):
        run(path)
    assert path.read_bytes() == damage


def test_a_damaged_file_raises(tmp_path):
    path = tmp_path / "results.jsonl"
    run(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (lines[:2] + lines[3:], [*lines, lines[-1]], [*lines[:2], b"{\n", *lines[2:]]):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(ValueError, match="damaged"):
            run(path)


def test_only_one_process_writes_a_file(tmp_path):
    path = tmp_path / "results.jsonl"

    class Twice(CountingEngine):
        def generate(self, prompts, **settings):
            with pytest.raises(ValueError, match="is being written by another process"):
                run(path)
            return super().generate(prompts, **settings)

    assert run(path, Twice(tiny_engine())).metrics == run(path).metrics


def test_models_are_identified_by_weights_and_template():
    tokenizer = char_tokenizer()
    identity = model_identity(tiny_model(), tokenizer)
    assert model_identity(tiny_model(), tokenizer) == identity
    changed = tiny_model().to(torch.bfloat16)
    assert model_identity(changed, tokenizer)["weights_digest"] != identity["weights_digest"]
    changed = tiny_model()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    assert model_identity(changed, tokenizer)["weights_digest"] != identity["weights_digest"]
    tokenizer.chat_template = "{{ messages }}"
    assert model_identity(tiny_model(), tokenizer)["template_digest"] != identity["template_digest"]


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "k=2 with temperature 0: greedy decoding gives the same completion 2 times"),
        ({"k": 0}, "k must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_invalid_settings_raise(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "results.jsonl", **settings)
    assert not list(tmp_path.iterdir())


def test_problems_without_a_reward_are_excluded_and_logged(caplog):
    def picky(prompts, completions, answer):
        return [None if a == "c" else 1.0 for a in answer]

    evaluation = run(reward=picky)
    assert evaluation.results[2]["rewards"] == [None, None]
    assert evaluation.metrics["ungraded"] == 1
    assert evaluation.metrics["problems"] == 4
    assert evaluation.metrics["avg@2"] == 1.0
    assert "'picky' returned None; prompt: '2+2='" in caplog.text


def test_a_process_without_prompts_takes_part_where_the_engine_needs_it():
    """A server's weights are sent when all processes are there."""
    skipped = []
    engines = [SimpleNamespace(skip=lambda: skipped.append(1)), SimpleNamespace()]
    assert [answer_held_out(SimpleNamespace(engine=engine), [], None) for engine in engines] == [[], []]
    assert skipped == [1]
