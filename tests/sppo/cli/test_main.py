"""Tests of the command line: recipes, overrides, error messages and complete runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import char_tokenizer, tiny_model
from transformers import PreTrainedTokenizerFast

from sppo.cli.evaluate import _dataset_names
from sppo.cli.main import main
from sppo.cli.recipes import config_from, convert, override, read_recipe, shipped_recipes

HERE = Path(__file__).parents[2] / "helpers/cli_run.py"

RECIPE = {
    "model": f"{HERE}:policy",
    "critic": f"{HERE}:critic",
    "train_dataset": {"name": f"{HERE}:sums", "count": 20},
    "eval_dataset": {"name": f"{HERE}:sums", "count": 4, "start": 20},
    "reward": f"{HERE}:letter",
    "args": {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 5,
        "learning_rate": "1e-3",
        "use_cpu": True,
        "disable_tqdm": True,
    },
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path, RECIPE)


def write_recipe(folder, recipe):
    """Write a recipe, and the file with its functions beside it."""
    shutil.copy(HERE, folder)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe).replace(str(HERE), HERE.name))
    return str(path)


# Recipes and overrides


@pytest.mark.parametrize(
    ("value", "field_type", "expected"),
    [
        ("1e-5", float, 1e-5),
        (3, float, 3.0),
        ("7", int, 7),
        ("true", bool, True),
        ("none", int | None, None),
        (None, float | None, None),
        ("none", str | None, "none"),
        ("[0.5, 1]", list[float] | None, [0.5, 1.0]),
        ("{a: 1}", dict | str, {"a": 1}),
        ("linear", str, "linear"),
        ("12", int | str, 12),
    ],
)
def test_values_are_converted_to_the_type_of_their_field(value, field_type, expected):
    converted = convert("x", value, field_type)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "field_type"),
    [("fast", float), ("1.5", int), (1.5, int), (True, int), ("maybe", bool), (None, int), ([1], str)],
)
def test_values_of_a_wrong_type_raise(value, field_type):
    with pytest.raises(ValueError, match="learning_rate must be"):
        convert("learning_rate", value, field_type)


def test_overrides_change_every_part_of_a_recipe(recipe):
    changed = read_recipe(recipe)
    assert changed["args"]["output_dir"] == "runs/tiny"
    for name, text in {
        "learning_rate": "1e-5",
        "args.max_steps": "3",
        "train_dataset.count": "7",
        "train_dataset.drop_duplicates": "true",
        "eval_dataset": "test.parquet",
        "eval_dataset.limit": "2",
        "critic.seed": "3",
        "reward_funcs": "[exact, math]",
        "model_kwargs.seed": "5",
        "args": "{seed: 3}",
    }.items():
        override(changed, name, text)
    assert changed["train_dataset"] == {"name": "cli_run.py:sums", "count": 7, "drop_duplicates": True}
    assert changed["eval_dataset"] == {"name": "test.parquet", "limit": 2}
    assert changed["critic"] == {"model": "cli_run.py:critic", "seed": 3}
    assert changed["reward"] == ["exact", "math"]
    assert changed["model_kwargs"] == {"seed": 5}
    args = config_from(changed["args"])
    assert (args.learning_rate, args.max_steps, args.max_completion_length, args.seed) == (1e-5, 3, 5, 3)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid(name, tmp_path):
    recipe = read_recipe(name)
    config_from({**recipe["args"], "output_dir": str(tmp_path), "use_cpu": True})
    assert {"model", "train_dataset", "eval_dataset", "reward"} <= recipe.keys()


# Code


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("train_dataset", "subprocess:getoutput?cmd=touch ran", "'subprocess:getoutput' for train_dataset"),
        ("train_dataset", {"name": "subprocess:getoutput", "cmd": "touch ran"}, "for train_dataset.name"),
        ("train_dataset", {"name": "a.parquet", "exclude": ["os:system"]}, "'os:system' for train_dataset.exclude"),
        ("train_dataset", "a.parquet?exclude=os%3Asystem", "'os:system' for train_dataset"),
        ("eval_dataset", "os:system", "for eval_dataset"),
        ("model", "os:system", "for model"),
        ("model_kwargs", {"trust_remote_code": True}, "'trust_remote_code=True' for model_kwargs.trust_remote_code"),
        ("critic", {"model": "os:system"}, "for critic.model"),
        ("reward", ["math", "os:system?x=1"], "for reward"),
        ("reward", "elsewhere/mine.py:score", "'elsewhere/mine.py:score' for reward"),
        ("reward", "cli_run.py:os.system", "'cli_run.py:os.system' for reward"),
        ("reward", "sppo._utils:import_object", "for reward"),
        ("args", {"algorithm": "os:system"}, "for args.algorithm"),
        ("args", {"rollout_engine": "os:system"}, "for args.rollout_engine"),
        ("args", {"rollout_engine_kwargs": {"worker_extension_cls": "a.b.Worker"}}, "'a.b.Worker' for args"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_recipe_file_names_no_code_that_is_not_trusted(tmp_path, monkeypatch, capsys, command, key, value, named):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, RECIPE | {key: value})
    assert main([command, path]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert "give --trust-recipe-code" in message
    assert not (tmp_path / "ran").exists()
    assert read_recipe(path, trust_code=True)[key]


def test_the_command_line_is_trusted_and_a_flag_trusts_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, RECIPE | {"train_dataset": "os:getcwd"})
    for trusted in (["--trust-recipe-code"], ["--trust-recipe-code", "--train_dataset", "os:getcwd"]):
        assert main(["train", path, *trusted]) == 2
        assert "os:getcwd" in capsys.readouterr().err  # it was called, and returned no rows
    path = write_recipe(tmp_path, RECIPE)
    assert main(["train", path, "--train_dataset", "os:getcwd"]) == 2
    assert "--trust-recipe-code" not in capsys.readouterr().err


def test_recipes_may_name_data_and_text_with_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"name": "reasoning_gym:chain_sum", "system_prompt": "Answer like this: Answer:\nx", "url": "https://a.b/c"}
    path = write_recipe(tmp_path, RECIPE | {"train_dataset": data, "reward": "sppo.tasks.chain:reward"})
    assert read_recipe(path)["train_dataset"] == data


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tinny"], "no recipe 'tinny'"),
        (["train", "RECIPE", "--learning_rat", "1e-5"], "'learning_rat'; did you mean 'learning_rate'"),
        (["train", "RECIPE", "--learning_rate", "fast"], "learning_rate must be float, got 'fast'"),
        (["train", "RECIPE", "--epsilon", "-1"], "epsilon must be 0 or more"),
        (["train", "RECIPE", "--train_dataset.cuont", "3"], "no option 'cuont'; did you mean 'count'"),
        (["train", "RECIPE", "--train_dataset.count", "many"], "train_dataset.count must be int, got 'many'"),
        (["train", "RECIPE", "--train_dataset.count", "0"], "is empty"),
        (["train", "RECIPE", "--train_dataset", "no/such.jsonl"], "there is no such file"),
        (["train", "RECIPE", "--reward", "exat"], "no reward named 'exat'; did you mean 'exact'"),
        (["train", "RECIPE", "--model", "nowhere:policy"], "cannot import 'nowhere:policy'"),
        (["train", "RECIPE", "--model", f"{HERE}:sums", "--model_kwargs.count", "1"], "must return (model, tokenizer)"),
        (["train", "RECIPE", "--model", "7"], "model must be a folder, a hub name or module:function, got 7"),
        (["train", "RECIPE", "--critic", "7"], "critic must be a folder"),
        (["train", "RECIPE", "--critic", "{seed: 7}"], "the critic's model must be a folder"),
        (["train", "RECIPE", "--train_dataset", "5"], "train_dataset must be a source of prompts"),
        (["train", "RECIPE", "--args", "3"], "args must be a mapping of settings, got 3"),
        (["train", "RECIPE", "--args", "{max_step: 3}"], "'max_step'; did you mean 'max_steps'"),
        (["train", "RECIPE", "stray"], "unexpected argument 'stray'"),
        (["eval"], "no model to use; give --model"),
        (["eval", "--model", "m", "--reward", "exact"], "give --dataset"),
        (["eval", "RECIPE", "--k", "4"], "k=4 with temperature 0: greedy decoding gives the same completion 4 times"),
        (["eval", "RECIPE", "--dataset", "a", "--dataset", "b", "--output", "c"], "--output names one file for 2"),
        (["eval", "RECIPE", "--k", "0"], "k must be at least 1"),
    ],
)
def test_wrong_input_is_reported_in_one_line(recipe, capsys, arguments, message):
    assert main([recipe if argument == "RECIPE" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_an_invalid_recipe_is_reported_in_one_line(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    for text, message in (
        (b"modle: a", "did you mean 'model'"),
        (b"7: a", "no key 7"),
        (b"[1]", "give a mapping"),
        (b"a: b: c", "is not YAML"),
        (b"args: 5", "args must be a mapping of settings, got 5"),
        (b"model: 7", "model must be a folder"),
        ("model: süß".encode("latin-1"), "bad.yaml' is not UTF-8"),
    ):
        path.write_bytes(text)
        assert main(["train", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_traceback_is_shown_on_request(recipe, monkeypatch):
    with pytest.raises(ValueError, match="unexpected"):
        main(["train", recipe, "stray", "--traceback"])
    monkeypatch.setenv("SPPO_DEBUG", "1")
    with pytest.raises(ValueError, match="unexpected"):
        main(["train", recipe, "stray"])


def test_help_does_not_import_torch():
    script = (
        "import sys; from sppo.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    for arguments, text in (
        (["--help"], "train"),
        (["train", "--help"], "--critic_learning_rate"),
        (["eval", "-h"], "--limit"),
    ):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        assert text in done.stdout


# Complete runs


@pytest.mark.slow
def test_a_run_is_trained_resumed_and_evaluated(recipe, capsys):
    assert main(["train", recipe]) == 0
    output = capsys.readouterr().out
    assert "4, of 4 completions of at most 5 tokens" in output
    out = Path("runs/tiny")
    assert (out / "summary.json").exists()
    assert (out / "checkpoint-4").is_dir()
    assert (out / "config.json").is_file()

    assert main(["train", recipe]) == 0
    output = capsys.readouterr().out
    assert "finished run" in output
    assert "--output_dir" in output

    (out / "summary.json").unlink()
    assert main(["train", recipe]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", recipe, "--resume", "--temperature", "0.5"]) == 2
    assert "another run" in capsys.readouterr().err
    before = (out / "eval_before.json").read_text()
    assert main(["train", recipe, "--resume", "--max_steps", "6"]) == 0
    assert "resuming" in capsys.readouterr().out
    assert (out / "checkpoint-6").is_dir()
    assert (out / "eval_before.json").read_text() == before

    assert main(["eval", recipe, "--limit", "3"]) == 0
    output = capsys.readouterr().out
    assert "evaluating runs/tiny on sums (3 problems, k=1, at most 5 tokens)" in output
    header, *results = [json.loads(line) for line in (out / "eval/sums.jsonl").read_text().splitlines()]
    assert header["model"] == "runs/tiny"
    assert [row["index"] for row in results] == [0, 1, 2]
    assert results[0]["prompt"] == "6+0="
    assert all(0 <= row["rewards"][0] <= 1 for row in results)


def test_eval_resumes_and_adds_to_the_summary(recipe, capsys):
    from sppo.cli.recipes import load_model

    for part in load_model(f"{HERE}:policy", {}):
        part.save_pretrained("checkpoint")
    # The first option is one that argparse does not know; its value must not be taken for a checkpoint.
    model = ["--use_cpu", "--max_completion_length", "3", "--reward", f"{HERE}:letter", "--model", "checkpoint"]
    sets = ["--dataset", f"{HERE}:sums?count=3", "--dataset", f"{HERE}:sums?count=2"]
    sampled = ["--k", "2", "--temperature", "1"]
    assert main(["eval", *model, *sets, *sampled]) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split()[:6] == ["dataset", "problems", "avg@2", "standard_error", "pass@2", "maj@2"]
    assert [line.split()[:2] for line in table[1:]] == [["sums", "3"], ["sums-2", "2"]]
    summary = json.loads(Path("runs/eval/summary.json").read_text())
    assert [f"{summary[name]['avg@2']:.3f}" for name in ("sums", "sums-2")] == [line.split()[2] for line in table[1:]]
    assert summary["sums"]["seed"] == 42

    kept = {path: path.read_bytes() for path in Path("runs/eval").iterdir()}
    cut = Path("runs/eval/sums.jsonl")
    cut.write_bytes(kept[cut][:-30])
    assert main(["eval", *model, *sets, *sampled]) == 0
    assert {path: path.read_bytes() for path in Path("runs/eval").iterdir()} == kept

    assert main(["eval", *model, *sets]) == 2
    assert "'runs/eval/sums.jsonl' holds another evaluation (k: 2 there, 1 here" in capsys.readouterr().err
    assert main(["eval", *model, *sets[:2], "--overwrite", "--limit", "1"]) == 0
    summary = json.loads(Path("runs/eval/summary.json").read_text())
    assert summary["sums"]["problems"] == 1
    assert summary["sums-2"]["problems"] == 2

    command = ["eval", "checkpoint", *sets[:2], "--reward", "exact", "--use_cpu", "--max_completion_length", "3"]
    assert main([*command, "--output", "here/results.jsonl"]) == 0
    assert len(Path("here/results.jsonl").read_text().splitlines()) == 4
    assert Path("checkpoint/eval/summary.json").exists()


def test_eval_under_a_launcher_raises(recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", recipe]) == 2
    assert "sppo eval runs in one process, not 2 (WORLD_SIZE); start it without" in capsys.readouterr().err


def test_result_files_are_named_after_datasets():
    sources = ["data/math_500.parquet?limit=3", "org/MATH-500", "reasoning_gym:chain_sum", {"name": "b/math_500.jsonl"}]
    assert _dataset_names(sources) == ["math_500", "MATH-500", "chain_sum", "math_500-2"]
    assert _dataset_names(["a/test.jsonl", "test-2.jsonl", "b/test.jsonl"]) == ["test", "test-2", "test-3"]


# sppo value


@pytest.mark.slow
def test_value_prints_the_predictions_of_the_critic(recipe, capsys):
    from sppo.models.critic_io import load_critic
    from sppo.models.critics import prompt_values

    assert main(["train", recipe, "--output_dir", "run"]) == 0
    capsys.readouterr()
    assert main(["value", "2+2=", "3+4=", "--critic", "run"]) == 0
    critic, lines = load_critic("run/critic"), capsys.readouterr().out.splitlines()
    tokenizer = PreTrainedTokenizerFast.from_pretrained("run/critic")
    expected = prompt_values(critic, [tokenizer(prompt)["input_ids"] for prompt in ("2+2=", "3+4=")])
    assert [line.split(maxsplit=1) for line in lines] == [
        [f"{value:.3f}", prompt] for value, prompt in zip(expected, ("2+2=", "3+4="), strict=True)
    ]


@pytest.mark.slow
def test_value_without_a_prompt_critic_raises(recipe, capsys):
    assert main(["value", "2+2="]) == 2
    assert "there is no critic in 'runs/quickstart'; train one" in capsys.readouterr().err
    assert main(["value", "2+2=", "--folder", "x"]) == 2
    assert "unknown option --folder" in capsys.readouterr().err
    assert main(["train", recipe, "--output_dir", "grpo", "--algorithm", "grpo", "--num_generations", "2"]) == 0
    assert main(["value", "2+2=", "--critic", "grpo"]) == 2  # a policy, not a critic
    assert "there is no critic in 'grpo', nor in a folder 'critic' inside" in capsys.readouterr().err
    assert main(["train", recipe, "--output_dir", "ppo", "--algorithm", "ppo"]) == 0
    assert main(["value", "2+2=", "--critic", "ppo"]) == 2
    assert "is a token critic; only a prompt critic" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "remax"])
def test_algorithms_without_a_critic_save_none(recipe, algorithm, capsys):
    assert main(["train", recipe, "--algorithm", algorithm, "--num_generations", "2", "--output_dir", "run"]) == 0
    assert not Path("run/critic").exists()


@pytest.mark.slow
def test_suggested_commands_repeat_the_overrides(recipe, capsys):
    assert main(["train", recipe, "--algorithm", "ppo", "--output_dir", "run", "--max_steps", "2"]) == 0
    output = capsys.readouterr().out
    assert "algorithm   ppo, 1 per prompt, token ratio" in output
    assert f"train {recipe} --algorithm ppo --max_steps 2 --seed 43 --output_dir run-43" in output
    assert json.loads(Path("run/summary.json").read_text())["algorithm"] == "ppo"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Arguments for a run without a recipe: a model folder, prompts in JSONL, a reward in a Python file."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    char_tokenizer().save_pretrained("model")
    rows = [{"prompt": f"{i % 7}+{i % 5}=", "answer": "abcde"[i % 5]} for i in range(24)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_reward.py").write_text("def score(completion, answer):\n    return float(answer in completion)\n")
    given = ["--model", "model", "--train_dataset", "mine.jsonl", "--reward", "my_reward.py:score"]
    return [
        *given,
        "--max_steps",
        "1",
        "--per_device_train_batch_size",
        "8",
        "--max_completion_length",
        "4",
        "--use_cpu",
        "true",
        "--disable_tqdm",
        "true",
        "--save_strategy",
        "no",
    ]


@pytest.mark.slow
def test_training_needs_no_recipe(own, capsys):
    assert main(["train", *own, "--output_dir", "runs/mine"]) == 0
    assert "reward      score" in capsys.readouterr().out
    assert main(["eval", "runs/mine", "--dataset", "mine.jsonl", "--reward", "my_reward.py:score", "--limit", "4"]) == 0
    assert "mine" in capsys.readouterr().out
    assert main(["train", "--train_dataset", "mine.jsonl"]) == 2
    assert "the recipe has no 'model'; give --model" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_is_trained_evaluated_and_continued(own, capsys):
    assert main(["train", *own, "--peft_config.r", "4", "--output_dir", "runs/lora"]) == 0
    assert not Path("runs/lora/config.json").exists()
    evaluate = ["--dataset", "mine.jsonl", "--reward", "my_reward.py:score", "--limit", "4"]
    tables = []
    for target in (["runs/lora"], ["runs/lora", "--model", "model", "--output_dir", "runs/named"]):
        assert main(["eval", *target, *evaluate]) == 0
        tables.append(capsys.readouterr().out.splitlines()[-2:])
    assert tables[0] == tables[1]
    assert main(["train", *own, "--adapter", "runs/lora", "--output_dir", "runs/more"]) == 0
    assert Path("runs/more/adapter_config.json").exists()
    assert main(["train", *own, "--peft_config.rank", "4", "--output_dir", "runs/none"]) == 2
    assert "peft_config {'rank': 4} does not fit peft.LoraConfig" in capsys.readouterr().err
