"""Tests of plots: panels, axes and legends, and logs of finished, running and checkpointed runs."""

import json
import re

import pytest

from sppo.cli.main import main
from sppo.reporting.plots import draw, read_log, short_names, smooth

BEFORE = {"eval_reward": 0.3, "eval_response_length": 8.0, "eval_rewards/format_reward": 0.9, "step": 0}


def step(number, **changes):
    return {
        "loss": 0.5,
        "reward": 0.1 * number,
        "response_length": 10.0,
        "truncated": 0.5,
        "entropy": 1.0,
        "brier": 0.2,
        "brier_baseline": 0.25,
        "expected_calibration_error": 0.1,
        "total_generated_tokens": 100 * number,
        "seconds/rollout": 1.0,
        "seconds/update": 2.0,
        "step": number,
    } | changes


LOG = [
    BEFORE,
    step(1),
    {"eval_reward": 0.4, "step": 1},
    step(2, **{"seconds/evaluate": 0.5}),
    {"train_runtime": 99.0, "step": 2},
    {"eval_reward": 0.8, "eval_response_length": 9.0, "step": 2},
]


def panel(figure, label):
    """Return the points of a panel's lines, by line style."""
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel().startswith(label))
    return {line.get_linestyle(): line.get_xydata().tolist() for line in axes.lines}


def test_each_panel_has_its_metric():
    figure = draw({"run": LOG})
    reward = panel(figure, "mean reward")
    assert reward["--"] == [[0, 0.3], [100, 0.4], [200, 0.8]]
    assert reward["-"] == [[100, pytest.approx(0.1)], [200, pytest.approx(sum(w * r for w, r in MEAN))]]
    assert panel(figure, "critic's Brier") == {"-": [[100, 0.2], [200, 0.2]], ":": [[100, 0.25], [200, 0.25]]}
    assert panel(figure, "response length") == {"-": [[100, 10], [200, 10]], "--": [[0, 8], [200, 9]]}
    assert panel(figure, "expected calibration")["-"] == [[100, 0.1], [200, 0.1]]
    assert panel(figure, "truncated responses")["-"] == [[100, 0.5], [200, 0.5]]
    assert panel(figure, "entropy")["-"] == [[100, 1], [200, 1]]


MEAN = [(0.8 / 1.8, 0.1), (1 / 1.8, 0.2)]


@pytest.mark.parametrize(
    ("x", "label", "places"),
    [
        ("tokens", "generated tokens", [0, 100, 200]),
        ("updates", "updates", [0, 1, 2]),
        ("seconds", "seconds", [0, 3, 6.5]),
    ],
)
def test_the_x_axis_is_tokens_updates_or_seconds(x, label, places):
    figure = draw({"run": LOG}, x)
    assert [at for at, _ in panel(figure, "mean reward")["--"]] == places
    assert label in figure.axes[0].get_xlabel()


def test_phases_are_stacked_mean_seconds_per_update():
    axes = draw({"one": LOG, "other": [step(1)]}).axes[-1]
    bars = {bars.get_label(): [(bar.get_x(), bar.get_width()) for bar in bars] for bars in axes.containers}
    assert bars == {
        "rollout": [(0, 1), (0, 1)],
        "update": [(1, 2), (1, 2)],
        "evaluate": [(3, 0.25), (3, 0)],
    }


def test_runs_have_colors_and_a_legend():
    figure = draw({"one": LOG, "other": LOG})
    assert [text.get_text() for text in figure.legends[0].texts] == ["one", "other"]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2


def test_panels_without_data_say_not_logged():
    without = [{k: v for k, v in step(1).items() if "brier" not in k and "calibration" not in k}]
    for log in (without, []):
        figure = draw({"run": log})
        (axes,) = (axes for axes in figure.axes if axes.get_ylabel().startswith("critic's Brier"))
        assert [text.get_text() for text in axes.texts] == ["not logged"]


def test_updates_without_a_rollout_have_no_points():
    used_again = {"loss": 0.5, "total_generated_tokens": 200, "step": 2}
    assert panel(draw({"run": [step(1), used_again]}), "critic's Brier")["-"] == [[100, 0.2]]


def test_the_running_mean_has_no_startup_bias():
    assert smooth([1.0, 1.0, 1.0]) == pytest.approx([1, 1, 1])


# Saved runs


def save(folder, log, name="metrics.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{json.dumps(entry)}\n" for entry in log)
    (folder / name).write_text(lines if name.endswith("l") else json.dumps({"log_history": log}))
    return folder


def test_logs_are_read_from_metrics_or_the_last_checkpoint(tmp_path):
    for number in (9, 10):
        save(tmp_path / f"checkpoint-{number}", [step(number)], "trainer_state.json")
    assert read_log(tmp_path) == [step(10)]
    assert read_log(tmp_path / "checkpoint-9") == [step(9)]
    save(tmp_path, LOG)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 0.')  # cut short by a kill
    assert read_log(tmp_path) == LOG


def test_sppo_plot_writes_a_figure(tmp_path, capsys):
    runs = [str(save(tmp_path / kind / "run", LOG)) for kind in ("sppo", "grpo")]
    assert main(["plot", *runs, "--output", str(tmp_path / "new" / "both.png"), "--x", "seconds"]) == 0
    assert (tmp_path / "new" / "both.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["both.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], r"nothing' holds no run: neither metrics.jsonl nor .*; give the output_dir of sppo train"),
        (["early"], r"early' has logged no update yet; try again"),
        (["run", "--output", "picture.doc"], r"output must end in one of .*\.png.*, got 'picture.doc'"),
        (["run", "--smooth", "3"], "unknown option --smooth; sppo plot --help lists them"),
    ],
)
def test_invalid_arguments_raise(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "run", LOG)
    save(tmp_path / "early", [BEFORE])
    assert main(["plot", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("*.png"))


def test_runs_of_the_same_name_are_named_by_their_folders(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert list(short_names(paths)) == ["a/run", "b/run"]
    assert list(short_names(paths[:1])) == ["run"]
