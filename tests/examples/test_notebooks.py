"""The notebooks run: the one for a CPU as it stands, the one for a GPU with a tiny model on a CPU."""

import json
from pathlib import Path

import pytest
from tiny_models import char_tokenizer, tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def cells(name):
    notebook = json.loads((EXAMPLES / name).read_text())
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(name, tmp_path, monkeypatch, **replaced):
    """Run the cells of a notebook in one namespace -> the namespace."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for cell in cells(name):
        for text, other in replaced.items():
            cell = cell.replace(text, other)
        exec(compile(cell, name, "exec"), names)
    return names


@pytest.mark.slow
def test_the_notebook_for_a_cpu(tmp_path, monkeypatch):
    names = run("operations_and_sppo.ipynb", tmp_path, monkeypatch)
    assert names["passes"] == {"cache": pytest.approx(3), "recompute": pytest.approx(4)}
    assert names["metrics"]["ratio_mean"].item() == pytest.approx(1, abs=1e-4)
    assert names["after"] > names["before"] + 0.05
    assert len(names["lines"]) >= 20


@pytest.mark.slow
def test_the_notebook_for_a_gpu_with_a_tiny_model(tmp_path, monkeypatch, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    names = run(
        "one_gpu.ipynb",
        tmp_path,
        monkeypatch,
        **{
            "Qwen/Qwen2.5-0.5B-Instruct": "model",
            "max_steps=100": "max_steps=1, use_cpu=True",
            "max_completion_length=256": "max_completion_length=4",
            "size=4000": "size=300",
            "size=200": "size=4",
        },
    )
    assert names["trainer"].state.global_step == 1
    assert names["settings"].algorithm == "sppo"
    assert (tmp_path / "runs/one_gpu/config.json").exists()
    assert "all correct" in capsys.readouterr().out


def test_outputs_are_not_committed():
    for path in EXAMPLES.glob("*.ipynb"):
        assert all(not cell.get("outputs") for cell in json.loads(path.read_text())["cells"]), path.name
