"""Settings of a run that its rollout engine receives."""

import json
import logging

import pytest
from tiny_run import DATASET, changed, has_a, logged, make, snapshot

from sppo import SPPOConfig, SPPOTrainer
from sppo.cli.main import main

STOPS = ["g", "7", "b c"]


def config(**settings):
    return SPPOConfig(**({"output_dir": "unused", "use_cpu": True, "per_device_train_batch_size": 2} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stop_strings": "END"},
            r"stop_strings must be a list of texts that are not empty, or None, got 'END'",
        ),
        ({"stop_strings": []}, r"stop_strings must be .*got \[\]"),
        ({"stop_strings": ["END", ""]}, r"stop_strings must be .*got \['END', ''\]"),
        ({"generation_kwargs": ["top_k"]}, r"generation_kwargs must be a dict of arguments by name, or None, got \["),
        ({"generation_kwargs": {"temperature": 2.0}}, r"{'temperature': 2.0} is not for you to set: set temperature="),
        (
            {"generation_kwargs": {"max_tokens": 9}},
            r"{'max_tokens': 9} is not for you to set: set max_comp",
        ),
        ({"generation_kwargs": {"stop": "END"}}, "set stop_strings="),
        ({"generation_kwargs": {"n": 2}}, "set num_generations="),
        ({"generation_kwargs": {"eos_token_id": 2}}, "it comes from the tokenizer"),
        ({"generation_kwargs": {"logprobs": 2}}, "the engine sets it itself"),
        ({"generation_kwargs": {"_eos_token_id": 2}}, "the engine sets it itself"),
        ({"generation_kwargs": {"num_beams": 2}}, "from samples of the policy, not from a search"),
        ({"generation_kwargs": {"max_time": 2.0}}, "a run must repeat itself with the same bits"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("settings", [{"stop_strings": STOPS}, {"generation_kwargs": {"suppress_tokens": [1]}}])
def test_an_engine_of_ones_own_does_not_ignore_them(tmp_path, settings):
    trainer = make(tmp_path)
    args = SPPOConfig(str(tmp_path), use_cpu=True, **settings)
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* and you pass rollout_engine=: give it to yours"):
        SPPOTrainer(
            trainer.actor_critic.policy,
            has_a,
            args=args,
            processing_class=trainer.tokenizer,
            rollout_engine=trainer.rollout_engine,
        )


def test_training_and_evaluation_use_them(tmp_path):
    settings = {"max_completion_length": 24, "max_steps": 1, "eval_dataset": DATASET, "save_strategy": "steps"}
    trainer = make(tmp_path, stop_strings=STOPS, generation_kwargs={"suppress_tokens": [1]}, **settings)
    plain = trainer.evaluate()
    trainer.train()
    samples = trainer.rollouts.samples
    ended = [s for s in samples if not s.truncated]
    assert 0 < len(ended) < len(samples)
    assert all(any(s.completion.endswith(stop) for stop in STOPS) for s in ended)
    assert logged(trainer, "truncated") == [1 - len(ended) / len(samples)]
    trainer.rollout_engine.stop_strings = None
    assert trainer.evaluate()["eval_truncated"] == 1 > plain["eval_truncated"]  # no response ends otherwise


def test_a_run_resumes_only_with_the_same(tmp_path):
    make(tmp_path, stop_strings=STOPS, max_steps=1, save_strategy="steps", save_steps=1).train()
    for other, message in (
        ({"stop_strings": ["g"]}, "stop_strings: .*'g', '7', 'b c'.* there, .*'g'.* here"),
        ({"stop_strings": STOPS, "generation_kwargs": {"suppress_tokens": [5]}}, "generation_kwargs: None there"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, max_steps=2, save_strategy="steps", **other).train(resume_from_checkpoint=True)


def test_a_resumed_run_has_the_same_bits(tmp_path):
    """Also where the steps of a batch, and so the random numbers of the next, depend on stop strings."""
    settings = {"stop_strings": STOPS, "generation_kwargs": {"suppress_tokens": [5]}, "max_completion_length": 24}
    settings |= {"rollout_batch_size": 3, "save_strategy": "steps", "save_steps": 2}
    (whole := make(tmp_path / "whole", max_steps=4, **settings)).train()
    make(tmp_path / "parts", max_steps=2, **settings).train()
    (resumed := make(tmp_path / "parts", max_steps=4, **settings)).train(resume_from_checkpoint=True)
    assert changed(snapshot(whole.actor_critic), resumed.actor_critic) == []
    assert [s.response_ids for s in resumed.rollouts.samples] == [s.response_ids for s in whole.rollouts.samples]


@pytest.mark.parametrize(
    ("kwargs", "warned"),
    [({"repetition_penalty": 1.2, "prefill_chunk_size": 8}, True), ({"prefill_chunk_size": 8}, False)],
)
def test_another_distribution_is_warned_of_once(tmp_path, caplog, kwargs, warned):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        make(tmp_path, generation_kwargs=kwargs)
    warnings = [
        r.message for r in caplog.records if "of another distribution than the one that was sampled" in r.message
    ]
    assert len(warnings) == warned
    assert all("how completions are sampled (repetition_penalty), but" in message for message in warnings)


def test_an_evaluation_records_them(tmp_path, monkeypatch):
    """The command takes stop strings from the run that saved the model; other arguments are given."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run", stop_strings=STOPS, max_completion_length=24, max_steps=1).save_model()
    (tmp_path / "ends.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in DATASET["prompt"][:8]))
    (tmp_path / "one.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    command = ["eval", "run", "--dataset", "ends.jsonl", "--reward", "one.py:one", "--use_cpu", "--overwrite"]
    command += ["--temperature", "2"]
    read = []
    for further in ([], ["--generation_kwargs", "{suppress_tokens: [1, 5]}"], ["--stop_strings", "[zzz]"]):
        assert main([*command, *further]) == 0
        header, *results = map(json.loads, (tmp_path / "run/eval/ends.jsonl").read_text().splitlines())
        read.append((header["stop_strings"], header["generation_kwargs"], tuple(r["completions"][0] for r in results)))
    assert [entry[:2] for entry in read] == [(STOPS, None), (STOPS, {"suppress_tokens": [1, 5]}), (["zzz"], None)]
    assert len({entry[2] for entry in read}) == 3  # other completions
