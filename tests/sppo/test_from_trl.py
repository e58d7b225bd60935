"""The script of docs/guides/from-trl.md trains with TRL, and with this trainer after two changed lines."""

import re
import runpy
from pathlib import Path

import pytest
from tiny_models import char_tokenizer, tiny_model
from tiny_run import changed, logged

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/from-trl.md").read_text()
SCRIPT = (ROOT / "tests/helpers/trl_script.py").read_text().partition("\n\n")[2]


def moved():
    """Return the script with the lines of the page's diff replaced."""
    removed, added = (re.findall(rf"^{re.escape(sign)}(.*)$", PAGE, re.M) for sign in "-+")
    assert len(removed) == len(added) == 2
    lines = SCRIPT.splitlines()
    for old, new in zip(removed, added, strict=True):
        (place,) = [i for i, line in enumerate(lines) if line == old]
        lines[place] = new
    return "\n".join(lines)


def run(script, folder, monkeypatch):
    monkeypatch.chdir(folder)
    tiny_model("llama").save_pretrained("path/to/model")
    char_tokenizer().save_pretrained("path/to/model")
    Path("script.py").write_text(script)
    return runpy.run_path("script.py")["trainer"]


def test_the_page_shows_the_script():
    assert re.search(r"<!-- script -->\n```text\n(.*?)```\n<!-- end script -->", PAGE, re.S)[1] == SCRIPT


@pytest.mark.slow
def test_the_script_trains_with_trl(tmp_path, monkeypatch):
    trainer = run(SCRIPT, tmp_path, monkeypatch)
    assert trainer.state.global_step == 3


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "sppo"])
def test_two_changed_lines_train_it_here(tmp_path, monkeypatch, algorithm):
    script = moved()
    if algorithm == "sppo":
        script = script.replace('algorithm="grpo", num_generations=8', 'algorithm="sppo"')
    trainer = run(script, tmp_path, monkeypatch)
    assert trainer.state.global_step == 3
    assert logged(trainer, "rejected_rewards") == [0.0] * 3
    assert {"rewards/has_a", "rewards/short_at_first", "custom/share with an a"} <= set(trainer.state.log_history[0])
    assert changed(tiny_model("llama").state_dict(), trainer.model.policy)
