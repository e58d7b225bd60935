"""Evaluation: its estimators against counting, its votes, and files that end the same however often it was stopped."""

import json
import math
from itertools import combinations
from statistics import fmean

import datasets
import pytest
import torch
from tiny_models import char_tokenizer, tiny_model

from sppo.evaluation import evaluate, model_identity, pass_at, summarize, table
from sppo.rollout import HFRollout, Sample

PROBLEMS = datasets.Dataset.from_list([{"prompt": f"{i}+{i}=", "answer": "abcde"[i]} for i in range(5)])


def letter(prompts, completions, answer):
    return [float(a in c) for a, c in zip(answer, completions, strict=True)]


class Script:
    """An engine that says what it is told, one text a completion."""

    def __init__(self, *texts):
        self.texts = list(texts)

    def generate(self, prompts, *, seed, temperature, batch_size):
        said = [self.texts.pop(0) for _ in prompts]
        return [Sample(p, text, [2], [3] * len(text), truncated=False) for p, text in zip(prompts, said, strict=True)]


class Counting:
    """An engine that counts another's completions."""

    def __init__(self, engine):
        self.engine, self.completions = engine, 0

    def generate(self, prompts, **settings):
        self.completions += len(prompts)
        return self.engine.generate(prompts, **settings)


def tiny_engine(model=None):
    return Counting(HFRollout(model or tiny_model(), char_tokenizer(), max_completion_length=6))


def run(output=None, engine=None, dataset=PROBLEMS, reward=letter, **settings):
    settings = {"k": 2, "temperature": 1.0, "batch_size": 4, "progress": False} | settings
    return evaluate(engine or tiny_engine(), dataset, [reward], output=output, **settings)


def answers(texts, reward, answer="1/2", **settings):
    """The result of one problem with these completions."""
    dataset = datasets.Dataset.from_list([{"prompt": "p", "answer": answer}])
    return run(engine=Script(*texts), dataset=dataset, reward=reward, k=len(texts), **settings).results[0]


# Metrics


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 1), (6, 5), (6, 6)])
def test_pass_at_is_the_share_of_subsets_with_a_right_one(n, right):
    for j in range(1, n + 1):
        share = fmean(any(i < right for i in chosen) for chosen in combinations(range(n), j))
        assert pass_at(j, n, right) == pytest.approx(share, abs=1e-15)


def test_pass_at_of_many_completions_does_not_overflow():
    exact = 1 - math.comb(9990, 1000) / math.comb(10000, 1000)
    assert pass_at(1000, 10000, 10) == pytest.approx(exact, rel=1e-12)


def test_metrics_of_a_few_problems_by_hand():
    def problem(rewards, majority_right):
        n = len(rewards)
        lengths = {"tokens": [4] * n, "truncated": [True] + [False] * (n - 1)}
        return {"rewards": rewards, "majority_right": majority_right} | lengths

    results = [
        problem([1.0, 0.5, 0.0], False),
        problem([1.0, 1.0, 1.0], True),
        problem([0.0, 0.0, 0.0], False),
        problem([1.0, None, 1.0], True),  # left out
    ]
    shares = [1 / 3, 1.0, 0.0]
    spread = sum((share - 4 / 9) ** 2 for share in shares) / 2
    assert summarize(results) == pytest.approx(
        {
            "problems": 3,
            "ungraded": 1,
            "avg@3": 4 / 9,
            "standard_error": math.sqrt(spread / 3),
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


def test_a_table_is_aligned():
    metrics = {"a": {"problems": 3, "avg@1": 0.5, "standard_error": 0.25, "truncated": 0, "tokens": 12}}
    lines = table(metrics | {"longer": {"problems": 0, "ungraded": 1}}, k=1).splitlines()
    assert lines == [
        "dataset  problems  avg@1  standard_error  truncated  tokens",
        "a               3  0.500           0.250      0.000      12",
        "longer          0      -               -          -       -",
    ]


# Majority vote


@pytest.mark.parametrize(
    ("texts", "reward", "right"),
    [
        (["Answer: 3", "Answer: 1/2", "Answer: 1/2"], "exact", True),
        (["Answer: 3", "Answer: 1/2", "Answer: 3"], "exact", False),
        (["Answer: 1/2", "Answer: 3"], "exact", True),  # of equals the earliest
        (["Answer: 3", "Answer: 1/2"], "exact", False),
        (["Answer: 3", "Answer: 3", "Answer: 1/2", "so it is 1/2", "so 1/2 it is"], "exact", False),
        # Graders know that these are one answer, right or wrong
        (["Answer: 3", "Answer: 3", "Answer: 1/2", "Answer: 0.5", r"\boxed{\frac12}"], "math", True),
        (["Answer: 1/2", "Answer: 1/2", r"\boxed{\frac34}", "Answer: 0.75", "Answer: 3/4"], "math", False),
        (["Answer: 3", "Answer: 3", "Answer: 1/2", "it is 1/2", "it is 0.5"], "numeric", True),
        (["Answer: 3", "Answer: 3.001", "Answer: 1/2"], "numeric?tolerance=0.01", False),
        (["Answer: 3", "Answer: 3.001", "Answer: 1/2", "so 0.5"], "numeric", True),
        # No vote: a thought without an end, a box without one, endless repetition
        (["<think> 3", "<think> 3", "Answer: 1/2"], "math", True),
        ([r"\boxed{3", r"\boxed{3", "Answer: 1/2"], "math", True),
        (["1 " * 800, "1 " * 800, "Answer: 1/2"], "math", True),
        # An answer that cannot be read is an answer
        (["Answer: }{", "Answer: }{", "Answer: 1/2"], "math", False),
    ],
)
def test_majority(texts, reward, right):
    result = answers(texts, reward)
    assert any(result["rewards"])
    assert not all(result["rewards"])
    assert result["majority_right"] is right


def test_all_right_needs_no_vote_and_none_right_wins_none():
    assert answers(["x a", "y a"], letter, answer="a")["majority_right"] is True
    assert answers(["b", "b"], letter, answer="a")["majority_right"] is False


# Files


def test_lines_hold_what_was_said_and_graded(tmp_path):
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


def test_the_same_seed_gives_the_same_bytes_and_another_others(tmp_path):
    for name in "ab":
        torch.manual_seed(ord(name))
        run(tmp_path / name)
    run(tmp_path / "c", seed=1)
    texts = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert texts[0] == texts[1]
    assert texts[0].partition(b"\n")[2] != texts[2].partition(b"\n")[2]


def test_answers_to_a_problem_and_chunks_differ():
    same = datasets.Dataset.from_list([PROBLEMS[0]] * 4)
    said = [tuple(result["completions"]) for result in run(dataset=same, k=4).results]
    assert len(set(said)) == 4
    assert all(len(set(texts)) > 1 for texts in said)


def test_stopped_anywhere_it_ends_with_the_same_bytes(tmp_path):
    path = tmp_path / "results.jsonl"
    metrics = run(path).metrics
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0: 10, 30: 10, ends[0]: 10, ends[1]: 10, ends[2] - 1: 10, ends[2]: 6, ends[4] - 7: 6, ends[4] + 9: 2}
    for cut, completions in {**cuts, len(whole): 0}.items():
        path.write_bytes(whole[:cut])
        engine = tiny_engine()
        assert run(path, engine).metrics == metrics
        assert path.read_bytes() == whole
        assert engine.completions == completions, cut


def test_each_chunk_is_on_its_way_to_the_disk_when_it_is_graded(tmp_path):
    path = tmp_path / "results.jsonl"
    seen = []

    class Looking(Counting):
        def generate(self, prompts, **settings):
            seen.append(path.read_bytes())
            return super().generate(prompts, **settings)

    run(path, Looking(tiny_engine()))
    lines = path.read_bytes().splitlines(keepends=True)
    assert seen == [b"".join(lines[:finished]) for finished in (1, 3, 5)]


def test_another_evaluation_is_refused_by_what_differs_unless_overwritten(tmp_path):
    path = tmp_path / "results.jsonl"
    run(path)
    whole = path.read_bytes()
    others = {
        "k: 2 there, 3 here": {"k": 3},
        "temperature: 1.0 there, 0.5 here": {"temperature": 0.5},
        "seed: 0 there, 1 here": {"seed": 1},
        "batch_size: 4 there, 6 here": {"batch_size": 6},
        r"rewards: \[\['letter', {}\]\] there, \[\['sppo.rewards.builtin:exact', {}\]\] here": {"reward": "exact"},
        r"dataset_digest: .* dataset_size: 5 there, 4 here": {"dataset": PROBLEMS.select(range(4))},
        "weights: None there, 'x' here": {"identity": {"weights": "x"}},
    }
    for says, settings in others.items():
        with pytest.raises(ValueError, match=rf"another evaluation \({says}.*--overwrite"):
            run(path, **settings)
        assert path.read_bytes() == whole
    run(path, seed=1, overwrite=True)
    assert json.loads(path.read_text().partition("\n")[0])["seed"] == 1


@pytest.mark.parametrize("damage", [b"important notes\n", b"{}\n", b"no line end"])
def test_a_file_of_something_else_is_left_alone(tmp_path, damage):
    path = tmp_path / "results.jsonl"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="is no evaluation, or damaged"):
        run(path)
    assert path.read_bytes() == damage


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    run(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (lines[:2] + lines[3:], [*lines, lines[-1]], [*lines[:2], b"{\n", *lines[2:]]):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(ValueError, match="damaged"):
            run(path)


def test_one_process_at_a_time_writes_a_file(tmp_path):
    path = tmp_path / "results.jsonl"

    class Twice(Counting):
        def generate(self, prompts, **settings):
            with pytest.raises(ValueError, match="is being written by another process"):
                run(path)
            return super().generate(prompts, **settings)

    assert run(path, Twice(tiny_engine())).metrics == run(path).metrics


def test_models_are_known_by_their_weights_and_template():
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


# Mistakes


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": 0}, "k=2 with temperature 0: greedy decoding gives 2 times the same"),
        ({"k": 0}, "k must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_a_mistake_is_named(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "results.jsonl", **settings)
    assert not list(tmp_path.iterdir())


def test_a_problem_without_a_reward_is_left_out_and_said(caplog):
    def picky(prompts, completions, answer):
        return [None if a == "c" else 1.0 for a in answer]

    evaluation = run(reward=picky)
    assert evaluation.results[2]["rewards"] == [None, None]
    assert evaluation.metrics["ungraded"] == 1
    assert evaluation.metrics["problems"] == 4
    assert evaluation.metrics["avg@2"] == 1.0
    assert "'picky' returned None; prompt: '2+2='" in caplog.text
