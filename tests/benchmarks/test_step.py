"""The suite step: short runs of it, what it counts, and what it would say of worse ones."""

import json
import time

import pytest
import torch

from benchmarks import step
from benchmarks.__main__ import main
from benchmarks.step import cases
from benchmarks.step.cases import DIFFERS, MEASURED, NO_TIME, OUT_OF_MEMORY, Case, Limits
from benchmarks.step.models import ENTROPY, MODELS, entropy_of, make_critic, make_policy
from benchmarks.step.prepared import odd_end
from benchmarks.step.trainers import SPPO, TRL, Probe, Step, TrainerVariant

QUICK = Case("tiny", "mixed", 8, responses=16)
ONCE = Limits(rounds=1, steps=1)
CPU = torch.device("cpu")


def last(case, variants, limits=ONCE):
    """The rows at the end of a case, by the names of their variants."""
    *_, rows = cases.measure(case, variants, limits)
    return {row["variant"]: row for row in rows}


@pytest.mark.slow
def test_every_algorithm_and_trl(tmp_path):
    pytest.importorskip("trl")
    assert main(["step", "--quick", "--updates", "2", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "step-2-updates.json").read_text())
    rows = {row["variant"]: row for row in report["rows"]}
    assert list(rows) == [variant.name for variant in SPPO + TRL]
    for row in rows.values():
        assert row["outcome"] == MEASURED
        assert sum(row["seconds"].values()) == pytest.approx(row["step_s"])
        assert min(row["seconds"].values()) > 0
        assert {"rollout", "reward", "log-probabilities", "update"} <= row["seconds"].keys()
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_s"])
        assert row["peak_bytes"] == {}  # a CPU
        assert row["entropy"] == pytest.approx(ENTROPY, rel=0.01)
    assert len({row["tokens"] for row in rows.values()}) == 1
    assert all(rows[variant.name]["gradient_error"] <= 1e-3 for variant in TRL)
    for line in step.compared_with_trl(report["rows"]):
        assert line["speedup"] == line["step_s"] / rows[line["algorithm"]]["step_s"]
    assert len(step.compared_with_trl(report["rows"])) == len(TRL)
    assert (tmp_path / "step-2-updates.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--mean", "0"], "--mean must be at least 2, got 0"),
        (["--quick", "--model", "qwen2.5-0.5b"], "--quick uses the tiny model, got --model qwen2.5-0.5b"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, says):
    with pytest.raises(SystemExit, match=says):
        main(["step", *options, "--out", str(tmp_path)])


@pytest.mark.slow
def test_live():
    pytest.importorskip("trl")
    rows = last(
        QUICK._replace(lengths="equal", live=True, equal="prompts"),
        [TrainerVariant("sppo", "remax"), TrainerVariant("sppo", "grpo"), TRL[0]],
    )
    assert {name: row["outcome"] for name, row in rows.items()} == dict.fromkeys(rows, MEASURED)
    assert all(row["seconds"]["rollout"] > 0.1 * row["step_s"] for row in rows.values())
    assert rows["remax"]["tokens"] <= 2 * rows["remax"]["longest"]  # without the greedy response
    assert rows["grpo"]["responses"] == rows["grpo, TRL"]["responses"] == 16


@pytest.mark.slow
def test_gradients_that_differ_have_no_time(monkeypatch):
    pytest.importorskip("trl")
    from sppo.algorithms import GRPO

    right = GRPO.advantages
    monkeypatch.setattr(GRPO, "advantages", lambda self, outcomes: right(self, outcomes) * 1.01)
    rows = last(QUICK, [TrainerVariant("sppo", "sppo"), TrainerVariant("sppo", "grpo"), TRL[0]])
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "sppo": MEASURED,
        "grpo": DIFFERS,
        "grpo, TRL": DIFFERS,
    }
    assert rows["grpo, TRL"]["gradient_error"] == pytest.approx(0.01, rel=0.05)
    assert "step_s" not in rows["grpo"]
    (failure,) = step.failures_of(list(rows.values()))
    assert failure.startswith("grpo, TRL, tiny, mixed, 16 responses: gradients differ by 1.0e-02")


@pytest.mark.parametrize(("equal", "prompts"), [("responses", [32, 32, 4, 8]), ("prompts", [4, 4, 4, 4])])
def test_as_many_responses_or_as_many_prompts(equal, prompts):
    case = Case("tiny", "mixed", 8, equal=equal)
    variants = [TrainerVariant("sppo", name) for name in ("sppo", "remax", "grpo", "rloo")]
    rows = [case.new_row(variant) for variant in variants]
    assert [row["prompts"] for row in rows] == prompts
    assert [row["responses"] for row in rows] == [
        n * variant.generations for n, variant in zip(prompts, variants, strict=True)
    ]
    made = [case.prepared(variant) for variant in variants]
    assert all(each.responses == made[2].responses[: len(each.responses)] for each in made)
    texts = [list(each.dataset["prompt"]) for each in made]
    assert all(each == texts[0][: len(each)] for each in texts)


def test_prepared_responses_are_right_and_wrong_by_turns():
    prepared = QUICK.prepared(TrainerVariant("sppo", "sppo"))
    sampled, greedy = (prepared.generate(prepared.dataset["prompt"], temperature=each) for each in (1.0, 0.0))
    assert [sample.response_ids for sample in sampled] == prepared.responses
    assert all(24 <= len(sample.prompt_ids) <= 40 and not sample.truncated for sample in sampled)
    rewards = [odd_end([sample.completion for sample in samples]) for samples in (sampled, greedy)]
    assert rewards == [[0, 1] * 8, [1, 0] * 8]
    assert odd_end(["", "1 2 3"]) == [0, 1]


def faulty(monkeypatch, error):
    """Steps take no time, but PPO's fail."""

    def train(case, variant, policy, probe, steps):
        if variant.algorithm == "ppo":
            raise error
        probe.steps += [Step({"rollout": 1.0, "update": float(i)}, {}, 5.0) for i in range(steps)]

    monkeypatch.setattr(cases, "_train", train)


def test_out_of_memory_is_a_row_and_the_rest_go_on(monkeypatch):
    faulty(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    rows = last(QUICK, SPPO, Limits(rounds=2, steps=3))
    assert rows["ppo"]["outcome"] == OUT_OF_MEMORY
    assert {row["outcome"] for name, row in rows.items() if name != "ppo"} == {MEASURED}
    assert (rows["grpo"]["step_s"], rows["grpo"]["steps_s"]) == (3, [2, 3, 4, 2, 3, 4])
    assert rows["grpo"]["tokens_per_s"] == 16 * 5 / 3
    assert step.failures_of(list(rows.values())) == []
    assert "out of memory" in step.results.table(rows.values(), step.COLUMNS)


def test_another_error_is_a_failure_and_the_rest_go_on(monkeypatch):
    faulty(monkeypatch, ValueError("no such attention"))
    rows = last(QUICK, SPPO)
    assert step.failures_of(list(rows.values())) == [
        "ppo, tiny, mixed, 16 responses: failed: ValueError: no such attention"
    ]
    assert rows["reinforce"]["outcome"] == MEASURED


def test_nothing_is_begun_when_the_time_is_up():
    rows = last(QUICK, SPPO + TRL, Limits(1, 1, end=time.monotonic() - 1))
    assert {row["outcome"] for row in rows.values()} == {NO_TIME}
    assert step.failures_of(list(rows.values())) == []


def test_what_is_too_slow_is_a_failure():
    row = {
        "model": "tiny",
        "lengths": "mixed",
        "equal": "responses",
        "updates": 1,
        "algorithm": "grpo",
        "responses": 16,
    }
    ours = {**row, "variant": "grpo", "trainer": "sppo", "outcome": MEASURED, "step_s": 2.0}
    theirs = {**ours, "variant": "grpo, TRL", "trainer": "TRL"}
    assert step.failures_of([ours, theirs | {"step_s": 3.0}]) == []
    slow = [ours, theirs | {"step_s": 2.8}]
    assert step.failures_of(slow) == ["grpo, TRL, tiny, mixed, 16 responses: 1.40 times as fast as TRL, required 1.5"]
    assert step.failures_of(slow, timed=False) == []
    assert step.compared_with_trl([ours, theirs | {"algorithm": "rloo"}]) == []
    assert step.compared_with_trl([each | {"lengths": "live"} for each in (ours, theirs)]) == []
    assert step.failures_of([theirs | {"outcome": DIFFERS, "gradient_error": float("nan")}]) == [
        "grpo, TRL, tiny, mixed, 16 responses: gradients differ by nan"
    ]


def test_several_updates_are_one_step():
    parts = [Step({"rollout": 1.0, "update": 2.0}, {"update": 7}, 5.0), Step({"update": 3.0}, {"update": 9}, None)] * 2
    assert cases.whole_steps(parts, 2) == [Step({"rollout": 1.0, "update": 5.0}, {"update": 9}, 5.0)] * 2


def test_a_probe_keeps_the_phases_of_each_step():
    probe = Probe()
    for _ in range(2):
        with probe.phase("critic"), probe.phase("log-probabilities"):
            time.sleep(0.01)
        probe.read(list)
    for each in probe.steps:
        assert each.seconds.keys() == {"critic", "log-probabilities", "update"}
        assert each.seconds["critic"] < 0.01 <= each.seconds["log-probabilities"]
        assert each.peak_bytes == {}


def test_models():
    policy = make_policy(MODELS["tiny"].size, CPU)
    assert entropy_of(policy) == pytest.approx(ENTROPY, rel=0.01)
    again = make_policy(MODELS["tiny"].size, CPU)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    layers = [
        make_critic(make_policy(MODELS["small"].size, CPU), small).config.num_hidden_layers for small in (False, True)
    ]
    assert layers == [4, 1]


@pytest.mark.parametrize(("name", "count"), [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304)])
def test_real_sizes(name, count, monkeypatch):
    monkeypatch.setattr("benchmarks.step.models.sharpen", lambda policy: None)
    policy = make_policy(MODELS[name].size, torch.device("meta"))
    assert sum(p.numel() for p in policy.parameters()) == count
