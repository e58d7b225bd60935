"""Tests of the commands that a run suggests, and of the evaluation after it."""

import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest

from sppo.cli.main import main
from sppo.cli.train import _eval_command, _evaluate_after, _omits_chat_template, program
from sppo.data import format_options


@pytest.mark.parametrize(
    ("argv0", "found", "expected"),
    [
        ("/usr/bin/sppo", {"sppo": "/usr/bin/sppo"}, "sppo"),
        ("/my env/bin/sppo", {}, "'/my env/bin/sppo'"),
        ("/src/sppo/cli/__main__.py", {"python": "PYTHON", "sppo": "/usr/bin/sppo"}, "python -m sppo.cli"),
        ("/src/sppo/cli/__main__.py", {"python": "/usr/bin/python"}, "PYTHON -m sppo.cli"),
        ("/src/sppo/cli/__main__.py", {}, "PYTHON -m sppo.cli"),
    ],
)
def test_suggested_commands_call_the_program_as_the_user_did(monkeypatch, argv0, found, expected):
    monkeypatch.setattr(sys, "argv", [argv0, "train"])
    monkeypatch.setattr(sys, "executable", "PYTHON")
    monkeypatch.setattr(shutil, "which", found.get)
    assert program() == expected


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("mine.jsonl", "FILE"),
        ("mine.jsonl?chat=true", "FILE?chat=true"),
        ("mine.jsonl?limit=3&chat=True", "FILE?chat=True"),
        ("mine.jsonl?chat=False", "FILE"),
        ({"name": "mine.jsonl", "chat": True}, "FILE?chat=true"),
        ({"name": "mine.jsonl?chat=1"}, "FILE?chat=1"),
        ({"name": "chat=true.jsonl", "system_prompt": "Be brief."}, "FILE?system_prompt=Be+brief."),
        ({"name": "mine.jsonl", "prompt_template": "{prompt} &?"}, "FILE?prompt_template=%7Bprompt%7D+%26%3F"),
    ],
)
def test_the_suggested_evaluation_sends_prompts_as_training_did(source, file):
    recipe = {"args": {"output_dir": "my runs"}, "train_dataset": source, "reward": "numeric"}
    words = shlex.split(_eval_command(recipe, "", {}))
    assert words == ["my runs", "--dataset", file, "--reward", "numeric"]
    assert format_options(words[2]) == format_options(source)


def test_a_plan_says_that_the_chat_template_is_not_used():
    for template, prompt, said in (
        ("{{ x }}", "2 + 2", True),
        (None, "2 + 2", False),
        ("{{ x }}", [{"role": "user", "content": "2 + 2"}], False),
    ):
        trainer = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=template), train_dataset=[{"prompt": prompt}])
        assert _omits_chat_template(trainer) is said


def test_a_finished_run_suggests_the_same_command_into_another_folder(tmp_path, capsys):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/summary.json").write_text("{}")
    overrides = ["--model", "a b", "--train_dataset", "mine.jsonl?chat=true", "--output_dir", str(tmp_path / "a b")]
    assert main(["train", *overrides]) == 0
    suggested = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert suggested[suggested.index("train") + 1 :] == [*overrides[:-1], f"{tmp_path}/a b-2"]


@pytest.mark.parametrize(
    ("log", "best", "evaluated"),
    [
        ([{"eval_reward": 0.4, "step": 4}, {"loss": 1, "step": 4}], False, False),
        ([{"eval_reward": 0.4, "step": 3}, {"loss": 1, "step": 4}], False, True),
        ([{"eval_reward": 0.4, "step": 4}], True, True),  # another checkpoint was loaded since
        ([], False, True),
    ],
)
def test_a_model_that_was_just_evaluated_is_not_evaluated_again(log, best, evaluated):
    trainer = SimpleNamespace(
        eval_dataset=[1],
        state=SimpleNamespace(log_history=log, global_step=4),
        args=SimpleNamespace(load_best_model_at_end=best),
        evaluate=lambda: {"eval_reward": 0.6},
    )
    assert _evaluate_after(trainer)["eval_reward"] == (0.6 if evaluated else 0.4)
    trainer.eval_dataset = None
    assert _evaluate_after(trainer) == {}
