"""Tests of the model card, of the recipe in it, and of uploads to the hub."""

import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from tiny_models import tiny_model
from tiny_run import DATASET, make

from sppo.cli.main import main
from sppo.cli.recipes import config_from, read_recipe
from sppo.reporting.model_card import is_hub_name, model_card, recipe_of

HERE = Path(__file__).parents[2] / "helpers/cli_run.py"


def block(card, language):
    return re.search(rf"```{language}\n(.*?)```", str(card), re.S).group(1)


def test_the_card_has_metadata_and_results(tmp_path):
    policy = tiny_model()
    policy.config._name_or_path = "acme/tiny"
    trainer = make(tmp_path / "my-run", model=policy, eval_dataset=DATASET.select(range(3)), max_steps=2)
    trainer.evaluate()
    trainer.train()
    final = trainer.evaluate()
    trainer.create_model_card(dataset_tags="acme/sums", tags="math", license="mit", language="en")
    card = ModelCard.load(tmp_path / "my-run" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "acme/tiny",
        "datasets": ["acme/sums"],
        "language": "en",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["generated_from_trainer", "math", "reinforcement-learning", "rlvr", "sppo", "sppo-kernels"],
    }
    assert card.text.strip().startswith("# my-run\n\n`acme/tiny`, trained by")
    assert "36 prompts of `acme/sums`" in card.text
    assert "Sequence-Level PPO (arXiv 2604.08865)" in card.text
    rows = re.findall(r"\| held-out prompts \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", card.text)
    assert [row[0] for row in rows] == ["0", "2"]
    assert float(rows[-1][2]) == pytest.approx(final["eval_reward"], abs=1e-3)
    assert "load_critic(folder)" in card.text
    assert "arXiv:2604.08865" in card.text


def test_the_card_omits_what_a_run_lacks(tmp_path):
    card = model_card(make(tmp_path, algorithm="grpo", num_generations=4))
    assert {"base_model", "datasets", "license"}.isdisjoint(card.data.to_dict())
    assert "grpo" in card.data.tags
    assert "sppo" not in card.data.tags
    assert "load_critic" not in card.text
    assert "## Results" not in card.text


def test_the_recipe_has_the_settings_of_the_run(tmp_path):
    given = {"learning_rate": 3e-4, "dual_clip": float("inf"), "lr_scheduler_type": "linear", "reward_weights": [0.5]}
    trainer = make(tmp_path, **given, algorithm="ppo", hub_token="secret", run_name="mine")
    text = block(model_card(trainer), "yaml")
    assert "secret" not in text
    assert str(tmp_path) not in text
    settings = yaml.safe_load(text)["args"]
    expected = given | {"algorithm": "ppo", "max_steps": 3}
    assert {name: settings[name] for name in expected} == expected
    assert settings.keys().isdisjoint({"run_name", "output_dir", "hub_token", "seed"})
    again = config_from({**settings, "output_dir": str(tmp_path)})
    actual, reloaded = (args.to_dict() for args in (trainer.args, again))
    differing = {name for name in actual if actual[name] != reloaded[name]}
    assert differing <= {"hub_token", "run_name", "save_strategy", "disable_tqdm"}


def test_the_recipe_contains_no_local_folders(tmp_path):
    trainer = make(tmp_path)
    trainer.recipe = {
        "model": "/home/someone/models/tiny",
        "critic": {"model": "~/critic"},
        "train_dataset": {"name": f"{HERE}:sums", "count": 20},
        "eval_dataset": "acme/sums?limit=3",
        "reward": ["math", f"{HERE}:letter"],
        "args": {"learning_rate": "1"},
    }
    recipe = recipe_of(trainer)
    assert recipe["model"] == "tiny"
    assert recipe["critic"] == {"model": "critic"}
    assert recipe["train_dataset"] == {"name": "cli_run.py:sums", "count": 20}
    assert recipe["eval_dataset"] == "acme/sums?limit=3"
    assert recipe["reward"] == ["math", "cli_run.py:letter"]
    assert recipe["args"]["learning_rate"] == 3e-3  # of the run, not of the recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(block(model_card(trainer), "yaml"))
    assert read_recipe(str(path), trust_code=True)["reward"] == recipe["reward"]


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [
        ("acme/tiny-1.5B", True),
        ("acme/train.parquet", False),
        ("folder/here", False),
        ("module:function", False),
        ("/home/tiny", False),
        ("tiny", False),
        ("", False),
        (None, False),
    ],
)
def test_hub_names_are_recognized(name, is_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "here").mkdir(parents=True)
    assert is_hub_name(name) == is_hub


# The hub


@pytest.fixture
def hub(monkeypatch):
    """Record uploads instead of making them: for each its message and the files' paths in the repository."""
    uploads = []

    def upload_folder(self, *, repo_id, folder_path, path_in_repo="", ignore_patterns=None, **settings):
        from huggingface_hub.utils import filter_repo_objects

        paths = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        files = {path: Path(folder_path, path) for path in filter_repo_objects(paths, ignore_patterns=ignore_patterns)}
        card = files.get("README.md")
        uploads.append(
            {
                "repo": repo_id,
                "message": settings["commit_message"],
                "files": {str(Path(path_in_repo or "", path)) for path in files},
                "card": ModelCard.load(card) if card else None,
            }
        )
        done = Future()
        done.set_result(None)
        return done if settings.get("run_as_future") else None

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    return uploads


MODEL = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "critic/config.json"}
MODEL |= {"critic/model.safetensors", "critic/tokenizer.json"}


def test_push_uploads_model_critic_and_card(tmp_path, hub):
    trainer = make(tmp_path / "mine", hub_model_id="acme/mine")
    trainer.train()
    trainer.push_to_hub(dataset_tags=["acme/sums"], tags=["math"], model_name="Mine", license="mit")
    (upload,) = hub
    assert upload["repo"] == "acme/mine"
    assert upload["files"] >= MODEL
    data = upload["card"].data
    assert (data.datasets, data.license) == (["acme/sums"], "mit")
    assert "math" in data.tags
    assert "# Mine\n" in upload["card"].text


def test_checkpoints_are_pushed_with_their_critic(tmp_path, hub):
    trainer = make(
        tmp_path / "mine",
        push_to_hub=True,
        hub_model_id="acme/mine",
        hub_strategy="checkpoint",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
        max_steps=2,
    )
    trainer.train()
    model, checkpoint = hub[:2]
    assert model["message"] == "Training in progress, step 2"
    assert model["files"] >= MODEL
    assert not any("checkpoint" in path or "staging" in path for path in model["files"])
    assert {"last-checkpoint/critic/model.safetensors", "last-checkpoint/trainer_state.json"} <= checkpoint["files"]


@pytest.mark.slow
def test_sppo_train_writes_the_card_and_pushes(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": f"{HERE.name}:policy",
        "critic": f"{HERE.name}:critic",
        "train_dataset": {"name": f"{HERE.name}:sums", "count": 20},
        "eval_dataset": {"name": f"{HERE.name}:sums", "count": 4, "start": 20},
        "reward": "exact",
        "args": {"max_steps": 1, "per_device_train_batch_size": 4, "max_completion_length": 5, "use_cpu": True},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copy(HERE, tmp_path)
    push = ["--push_to_hub", "true", "--hub_model_id", "acme/mine", "--save_strategy", "no"]
    assert main(["train", "tiny.yaml", *push]) == 0
    last = hub[-1]
    assert last["files"] >= MODEL | {"summary.json", "learning_curve.png", "metrics.jsonl"}
    assert "![Learning curves](learning_curve.png)" in last["card"].text
    written = yaml.safe_load(block(last["card"], "yaml"))
    assert written["train_dataset"] == {"name": "cli_run.py:sums", "count": 20}
    assert written["args"]["max_completion_length"] == 5
    assert [line.split(" | ")[1] for line in last["card"].text.splitlines() if "held-out" in line] == ["0", "1"]
