"""Tests of the comparison of runs: equal amounts, scores, the table, the figure and JSON."""

import json
import re
from pathlib import Path

import pytest

from sppo.cli.main import main
from sppo.reporting.compare import draw_comparison, read_run


def run(folder, rewards, *, tokens=100, seconds=1.0, held_out=None, **settings):
    """Write the log of a run with an evaluation before training and one after the update ``held_out`` names."""
    folder.mkdir()
    log = []
    if held_out is not None:
        log.append({"eval_success_rate": 0.0, "eval_reward": 0.125, "step": 0})
    for step, reward in enumerate(rewards, 1):
        times = {"seconds/rollout": seconds / 2, "seconds/update": seconds / 2}
        log.append({"loss": 0.5, "reward": reward, "total_generated_tokens": tokens * step, "step": step} | times)
        if step == held_out:
            log.append({"eval_success_rate": 0.5, "eval_reward": 0.625, "step": step})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in log))
    if settings:
        (folder / "training_args.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A run of 4 short updates, and one of 3 updates with twice the tokens in four times the time."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "a", [0.5] * 4, held_out=3, algorithm="sppo", seed=1)
    run(tmp_path / "b", [0.25, 0.25, 0.75], tokens=200, seconds=4.0)
    (tmp_path / "b" / "summary.json").write_text('{"algorithm": "grpo"}')
    return ["a", "b"]


def test_runs_are_compared_at_what_all_of_them_reached(two, capsys):
    assert main(["compare", *two, "--json", "new/c.json"]) == 0
    result = json.loads(Path("new/c.json").read_text())
    assert result["equal"] == {"tokens": 400, "updates": 3, "seconds": 4.0}
    first, second = result["runs"]
    assert first == {
        "run": "a",
        "folder": first["folder"],
        "algorithm": "sppo",
        "seed": 1,
        "updates": 4,
        "tokens": 400,
        "seconds": 4.0,
        "reward": pytest.approx(dict.fromkeys(("tokens", "updates", "seconds", "end"), 0.5)),
        "held_out": dict.fromkeys(("tokens", "updates", "seconds", "end"), 0.625),
    }
    mean = (0.8 * (0.8 * 0.25 + 0.25) + 0.75) / (0.8 * 1.8 + 1)
    assert second["reward"] == pytest.approx({"tokens": 0.25, "updates": mean, "seconds": 0.25, "end": mean})
    assert set(second["held_out"].values()) == {None}
    assert (second["algorithm"], second["seed"]) == ("grpo", None)
    tables = capsys.readouterr().out
    assert re.search(r"^a +sppo +1 +4 +400 +4$", tables, re.MULTILINE)
    assert re.search(r"^b +grpo +- +3 +600 +12$", tables, re.MULTILINE)
    assert re.search(r"^ +400 tokens +3 updates +4 seconds +end$", tables, re.MULTILINE)
    assert re.search(rf"^b +0\.250 +{mean:.3f} +0\.250 +{mean:.3f}$", tables, re.MULTILINE)
    assert re.search(r"^b +- +- +- +-$", tables, re.MULTILINE)
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_after_the_equal_amount_does_not_count(tmp_path):
    scores = read_run("a", run(tmp_path / "a", [0.5] * 4, held_out=3)).scores({"tokens": 290, "updates": 3})
    assert scores["held_out"] == {"tokens": 0.125, "updates": 0.625, "end": 0.625}
    assert scores["reward"]["tokens"] == pytest.approx(0.5)
    nearly = read_run("a", tmp_path / "a").scores({"tokens": 299, "updates": 3})
    assert nearly["held_out"]["tokens"] == 0.625  # within one in a hundred


def test_an_amount_before_the_first_entry_has_no_score(tmp_path):
    scores = read_run("a", run(tmp_path / "a", [0.5])).scores({"tokens": 99})
    assert scores["reward"]["tokens"] is None


def test_settings_come_from_the_newest_checkpoint_of_an_unfinished_run(tmp_path):
    folder = run(tmp_path / "a", [0.5])
    for number, seed in ((9, 1), (10, 2)):
        (folder / f"checkpoint-{number}").mkdir()
        (folder / f"checkpoint-{number}/training_args.json").write_text(json.dumps({"seed": seed}))
    assert read_run("a", folder).seed == 2


def test_the_figure_has_a_panel_per_axis_with_the_equal_amount(two):
    runs = [read_run(name, Path(name)) for name in two]
    equal = {"tokens": 400.0, "updates": 3.0, "seconds": 4.0}
    panels = draw_comparison(runs, equal).axes
    assert [axes.get_xlabel() for axes in panels] == ["generated tokens", "updates", "seconds of training"]
    for axes, limit in zip(panels, equal.values(), strict=True):
        lines = {line.get_linestyle(): list(line.get_xdata()) for line in axes.lines}
        assert lines[":"] == [limit, limit]
        assert lines["--"][0] == 0
    assert [axis for line in panels[0].lines[:1] for axis in line.get_xdata()] == [100, 200, 300, 400]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "nothing"], r"nothing' holds no run: neither metrics.jsonl nor .*; give the output_dir of sppo train"),
        (["a", "early"], r"early' has logged no update yet; try again"),
        (["a", "--output", "picture.doc"], r"output must end in one of .*\.png.*, got 'picture.doc'"),
        (["a", "--x", "tokens"], "unknown option --x; sppo compare --help lists them"),
    ],
)
def test_invalid_arguments_name_the_run_and_the_remedy(two, tmp_path, capsys, arguments, message):
    run(tmp_path / "early", [], held_out=1)
    assert main(["compare", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("*.png"))
