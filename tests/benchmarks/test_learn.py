"""The suite that compares how algorithms learn: its task, its statistics, its plan, and a walk through all of it."""

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import learn
from benchmarks.__main__ import main
from benchmarks.harness.learning import curves_figure, intervals
from benchmarks.harness.learning.comparison import compared
from benchmarks.harness.learning.jobs import finished_rows
from benchmarks.harness.palette import PAPER
from benchmarks.learn import digit_walk, figures, policy
from benchmarks.learn.run_plan import Plan
from benchmarks.learn.runs import Run, config_of
from benchmarks.learn.variants import ALGORITHMS, MIDDLE, MIXED, VARIANTS, Centred, OtherPrompts, RuleMean
from benchmarks.report import ROOT
from sppo import SPPOConfig
from sppo._utils import run_lock
from sppo.algorithms import RolloutBatch
from sppo.rollout.prompts import prompt_hash
from sppo.settings import SPPOSettings

# The task


def test_a_walk_follows_its_rule():
    steps = digit_walk.rule("C")
    digits = [3, 7, *map(int, digit_walk.walk("C37", 50))]
    assert all(digits[t + 1] == (digits[t - 1] + steps[digits[t]]) % 10 for t in range(1, 51))


def test_a_slip_is_never_made_good():
    right = digit_walk.walk("C37", 64)
    for wrong in range(10):
        state = f"C{right[9]}{wrong}"  # step 11, after ten right ones
        ends_alike = digit_walk.walk(state, 53)[-2:] == right[-2:]
        assert ends_alike == (str(wrong) == right[10])


def test_no_prompt_is_in_both_splits():
    train, test = digit_walk.prompts("train"), digit_walk.prompts("test")
    assert len(train) + len(test) == len({*train, *test}) == 800
    assert (len(train), len(test)) == (708, 92)
    with pytest.raises(ValueError, match="'eval'"):
        digit_walk.prompts("eval")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("0123", 1.0),
        ("abcd", 1.0),
        ("9923", 1.0),
        ("0132", 0.0),
        ("123", 0.0),
        ("00123", 0.0),
        ("01AC", 0.0),
        ("", 0.0),
    ],
)
def test_reward_is_for_length_and_end(completion, reward):
    assert digit_walk.reward(["A00"], [completion], answer=["23"], steps=[4]) == [reward]


def test_right_walks_are_rewarded_however_they_are_written():
    rows = digit_walk.dataset("test", 16, copies=2)
    assert len(rows) == 2 * len(digit_walk.prompts("test"))
    rng = random.Random(0)
    written = [digit_walk.demonstration(prompt, 16, 0.0, rng)[0] for prompt in rows["prompt"]]
    assert digit_walk.reward(rows["prompt"], written, rows["answer"], rows["steps"]) == [1.0] * len(rows)
    assert any(character in digit_walk.LETTERS for character in written[0])


@pytest.mark.parametrize(("difficulty", "horizon"), [("even", 16), ("even", 256), ("mixed", 64), ("graded", 64)])
def test_teachers_slip_as_often_as_the_task_wants(difficulty, horizon):
    slip, rng = policy.slips(difficulty, horizon), random.Random(0)
    for name, success in (("A", policy.SUCCESS[difficulty][0]), ("H", policy.SUCCESS[difficulty][-1])):
        answer = digit_walk.walk(f"{name}12", horizon)[-2:]
        written = [digit_walk.demonstration(f"{name}12", horizon, slip[name], rng)[0] for _ in range(400)]
        right = statistics.fmean(digit_walk.reward([""] * 400, written, [answer] * 400, [horizon] * 400))
        # A drawn digit is right in a tenth of the cases, and several can cancel in a hundredth.
        assert right == pytest.approx(success, abs=0.08)


def test_a_policy_is_what_it_was_taught_and_made_once(tmp_path, monkeypatch):
    course = [lesson._replace(horizon=4, demonstrations=16, steps=30) for lesson in policy.lessons("even", 4)[1:]]
    file = policy.make_policy(tmp_path, course)
    made = policy.load_policy(file)
    probabilities = made(torch.tensor([policy.tokenizer()("C37")["input_ids"]])).logits[0, -1].softmax(-1)
    digits = policy.tokenizer()(digit_walk.DIGITS + digit_walk.LETTERS)["input_ids"]
    assert probabilities[digits].sum() > 0.8  # of 20 of 30 tokens: it has learned that steps are digits

    taught = []
    monkeypatch.setattr(policy, "imitate", lambda model, lesson: taught.append(lesson))
    assert policy.make_policy(tmp_path, course) == file
    assert taught == []
    shorter = [course[0], course[1]._replace(steps=2)]
    assert policy.make_policy(tmp_path, shorter) != file  # else a trial would be taken for the real one
    assert taught == shorter[1:]


def test_greedy_accuracy_is_of_the_held_out_prompts(tmp_path, monkeypatch):
    encode = policy.tokenizer()

    class KnowsTheFirst20:
        def generate(self, asked, *, max_new_tokens, do_sample, **_):
            assert not do_sample
            read = encode.batch_decode(asked)
            walked = [digit_walk.walk(prompt, max_new_tokens) for prompt in read]
            written = [right if i < 20 else "0" * len(right) for i, right in enumerate(walked)]
            assert read == digit_walk.prompts("test")
            return torch.cat([asked, torch.tensor(encode(written)["input_ids"])], 1)

    monkeypatch.setattr(policy, "load_policy", lambda file: KnowsTheFirst20())
    by_chance = sum(digit_walk.walk(prompt, 16).endswith("00") for prompt in digit_walk.prompts("test")[20:])
    assert policy.greedy_accuracy(tmp_path, 16) == pytest.approx((20 + by_chance) / 92)


# The statistics


def row(rewards, cost=100, **more):
    costs = [cost * i for i in range(len(rewards))]
    return {"reward": rewards, "tokens": costs, "updates": costs, "seconds": costs, **more}


def test_a_threshold_is_reached_by_two_evaluations_together():
    assert intervals.reached(row([0.3, 0.9, 0.4, 0.8, 0.7]), 0.7, "tokens") == pytest.approx(300 + 100 * 2 / 3)
    assert intervals.reached(row([0.7, 0.9, 0.4]), 0.7, "tokens") == 100
    assert intervals.reached(row([0.3, 0.6, 0.6]), 0.65, "tokens") is None


def test_ones_own_best_is_of_two_evaluations_too():
    assert intervals.own_best(row([0.3, 0.9, 0.4, 0.8, 0.7, 0.2]), "tokens") == 400


def test_students_interval():
    # Mean 2, standard deviation 1, error 0.57735, 2 degrees of freedom.
    assert intervals.mean([1, 2, 3])[:3] == pytest.approx((2, 2 - 4.303 * 0.57735, 2 + 4.303 * 0.57735), rel=1e-4)
    assert str(intervals.mean([1, 2, 3])) == "2 (-0.484 to 4.48)"
    assert str(intervals.mean([1.0])) == "1"


def test_intervals_cover_as_often_as_they_say():
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        cost = intervals.geometric_mean([math.exp(rng.gauss(1.0, 0.5)) for _ in range(5)])
        covered += cost.low <= math.exp(1.0) <= cost.high
    assert 0.93 < covered / 2000 < 0.97


def test_bounds_say_so():
    bound = intervals.at_least([100, 400])
    assert str(bound) == "at least 200"
    assert str(bound.times(1e-3)) == "at least 0.2"
    assert str(intervals.geometric_mean([100, 400]).times(0.01)).startswith("2 (")


# The plan


def finished(run, rewards=(0.3, 0.5)):
    fields = {"variant": run.variant, "learning_rate": run.learning_rate, "seed": run.seed}
    return row(list(rewards), run=run.key, task=run.task.name, critic_learning_rate=None, **fields)


def tuned(seeds=5, task=MIXED):
    """A plan with its rates chosen: the middle one, and the lower one of critics."""
    plan = Plan([], task, "a", seeds=seeds)
    for run in plan.tuning():
        good = (run.learning_rate, run.critic_learning_rate) == (3e-4, 1e-4)
        plan.done[run.key] = finished(run, (0.3, 0.9 if good else 0.5))
    return plan


def test_the_plan_tunes_first_and_goes_on_where_it_stopped():
    plan = Plan([], MIXED, "a")
    with_critic = 3  # of the algorithms
    assert len(plan.left(plan.tuning())) == 2 * (len(ALGORITHMS) + with_critic)
    assert plan.counted() == {}
    with pytest.raises(KeyError):
        plan.counting()
    plan = tuned()
    assert not plan.left(plan.tuning())
    counting = plan.counting()
    assert len(counting) == 5 * (len(ALGORITHMS) + len(VARIANTS[MIXED]))
    assert {(run.learning_rate, run.critic_learning_rate) for run in counting} == {(3e-4, 1e-4)}
    assert {run.seed for run in counting} == set(range(5))
    plan.done[counting[0].key] = finished(counting[0])
    resumed = Plan(json.loads(json.dumps(list(plan.done.values()))), MIXED, "a")
    assert resumed.left(resumed.counting()) == counting[1:]


def test_a_run_is_done_only_if_it_was_the_same():
    run = tuned().counting()[0]
    others = [
        run._replace(policy="b"),
        run._replace(seed=7),
        run._replace(critic_learning_rate=1e-3),
        run._replace(settings=run.settings | {"critic": "one layer"}),
        run._replace(settings=run.settings | {"epsilon": 0.5}),
        run._replace(task=run.task._replace(rollouts=6)),
    ]
    assert len({run.key, *(other.key for other in others)}) == 7
    assert run._replace(task=run.task._replace(threshold=0.1)).key == run.key  # what it is judged by
    assert run._replace(variant="the same by another name").key == run.key


def test_variants_have_the_rates_of_what_they_vary():
    tuning = {run.variant for run in Plan([], MIDDLE, "a").tuning()}
    assert "sppo, 4 updates per rollout" in tuning
    assert "sppo, 4 updates, clip 0.8" not in tuning
    for task, variants in VARIANTS.items():
        for settings in variants.values():
            assert settings.get("rates_of", "sppo") in {**ALGORITHMS, **VARIANTS[task]}


def test_all_that_is_compared_has_settings_that_exist(tmp_path):
    variants = [(MIXED, name, settings) for name, settings in ALGORITHMS.items()]
    variants += [(task, name, settings) for task, those in VARIANTS.items() for name, settings in those.items()]
    for task, name, settings in variants:
        args = SPPOConfig(str(tmp_path), **config_of(Run(task, name, settings, 1e-3, 1e-3, 0, "a")))
        larger = settings.get("per_device_train_batch_size") == 512
        assert args.rollout_size == (512 if larger else 64), name
        assert args.max_steps == (20 if larger else task.rollouts) * args.updates_per_rollout, name
        assert args.eval_steps == (1 if larger else 5) * args.updates_per_rollout, name


def test_what_the_variants_make_of_values():
    outcomes = RolloutBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        group_ids=torch.arange(3),
        prompts="abc",
        lengths=torch.ones(3, dtype=torch.int64),
        mean_reward=0.5,
        values=torch.tensor([0.9, 0.1, 0.5]),
    )
    assert OtherPrompts(None).advantages(outcomes).tolist() == pytest.approx([0.5, -0.9, 0.9])
    mean = (0.1 - 0.1 + 0.5) / 3
    assert Centred(SPPOSettings()).advantages(outcomes).tolist() == pytest.approx([0.1 - mean, -0.1 - mean, 0.5 - mean])


def test_a_mean_a_rule_is_of_the_rewards_before():
    prompts = ["A12", "A34", "H56"]
    names = [prompt_hash(ids) for ids in policy.tokenizer()(prompts)["input_ids"]]
    outcomes = RolloutBatch(
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        group_ids=torch.arange(3),
        prompts=names,
        lengths=torch.ones(3, dtype=torch.int64),
        mean_reward=0.5,
    )
    algorithm = RuleMean(None)
    assert algorithm.advantages(outcomes).tolist() == pytest.approx([0.5, -0.5, 0.5])
    assert algorithm.advantages(outcomes).tolist() == pytest.approx([0.5, -0.5, 0.35])
    assert algorithm.state == pytest.approx({"A": 0.5, "H": 0.755})


def lines_of(curves):
    """The comparison of runs with these rewards, by variant and seed."""
    plan = tuned(seeds=2)
    for run in plan.counting():
        if run.variant in curves:
            plan.done[run.key] = finished(run, curves[run.variant][run.seed])
    return {line["variant"]: line for line in compared([plan])}


FAST, SLOW, NEVER = (0.3, 0.9, 0.9, 0.9), (0.3, 0.3, 0.9, 0.9), (0.3, 0.3, 0.3, 0.3)  # 0.75: at 150, 250, never


def test_costs_stand_beside_sppos_seed_by_seed():
    lines = lines_of({"sppo": [FAST, SLOW], "grpo": [SLOW, SLOW]})
    sppo, grpo = lines["sppo"], lines["grpo"]
    assert sppo["tokens"].value == pytest.approx(math.sqrt(150 * 250))
    assert sppo["tokens_to_sppo"] is None
    assert grpo["tokens_to_sppo"].value == pytest.approx(math.sqrt(250 / 150))
    assert (grpo["reached"], grpo["runs"]) == (2, 2)
    assert sppo["own_best_to_sppo"] is sppo["mean_less_sppos"] is None
    assert grpo["mean_less_sppos"].value == pytest.approx(-0.6 / 4 / 2)  # one seed is behind by one evaluation of four
    assert grpo["own_best_to_sppo"].value == pytest.approx(math.sqrt(300 / 200))  # of seeds: SPPO's at 200 and 300
    assert grpo["after"].value == pytest.approx(0.9)


def test_seconds_per_update_are_those_of_whole_runs():
    plan = tuned(seeds=2)
    for run in plan.counting():
        if run.variant in ("sppo", "grpo"):
            plan.done[run.key] = finished(run, FAST)
        if run.variant == "grpo":
            plan.done[run.key] |= {"seconds": [0, 100, 300, 900], "updates": [0, 10, 20, 100]}
    lines = {line["variant"]: line for line in compared([plan])}
    assert lines["grpo"]["update_to_sppo"].value == pytest.approx(9)  # 9 seconds over 1
    assert lines["sppo"]["update_to_sppo"] is None


def test_what_never_arrives_is_a_bound():
    lines = lines_of({"sppo": [FAST, FAST], "grpo": [SLOW, NEVER]})
    assert str(lines["grpo"]["tokens"]) == "at least 274"  # the mean of 250 and all of 300
    assert lines["grpo"]["tokens_to_sppo"].is_bound
    assert lines["grpo"]["reached"] == 1
    lines = lines_of({"sppo": [FAST, NEVER], "grpo": [SLOW, SLOW]})
    assert lines["sppo"]["tokens"].is_bound
    assert lines["grpo"]["tokens_to_sppo"] is None  # it could be anything


def test_there_is_a_comparison_without_sppo():
    lines = lines_of({"grpo": [SLOW, SLOW]})
    assert list(lines) == ["grpo"]
    assert lines["grpo"]["tokens_to_sppo"] is None


# The figures


def drawn(figure, curves, task, monkeypatch):
    """Draw a figure of runs with these rewards, by variant and seed -> matplotlib's figure, or None."""
    plan = tuned(seeds=2, task=task)
    for run in plan.counting():
        if run.variant in curves:
            plan.done[run.key] = finished(run, curves[run.variant][run.seed])
    made = []

    def keep(path, size, fill):
        made.append(Figure(figsize=size))
        fill(made[0])

    for module in (curves_figure, figures):
        monkeypatch.setattr(module, "save_figure", keep)
    figures.FIGURES[figure](None, [plan])
    return made[0] if made else None


def test_a_figure_has_the_values_of_the_table_and_hollow_bounds(monkeypatch):
    curves = {"sppo": [FAST, FAST], "ppo": [SLOW, SLOW], "ppo, lambda 0.95": [SLOW, NEVER]}
    tokens, ratios = drawn("horizon", curves, MIDDLE, monkeypatch).axes
    markers = {line.get_marker(): line for line in ratios.lines if line.get_marker() not in ("None", "")}
    threshold = 200 + 100 * (0.65 - 0.6) / 0.3, 100 + 100 * (0.65 - 0.6) / 0.3
    assert markers["s"].get_ydata() == pytest.approx([threshold[0] / threshold[1]])
    assert markers["^"].get_markerfacecolor() == PAPER
    assert "D" not in markers
    assert [text.get_text() for text in tokens.get_xticklabels()] == ["64 (0.65)"]


def test_differences_are_drawn_seed_by_seed(monkeypatch):
    curves = {"sppo": [FAST, SLOW], "reinforce, mean per rule": [FAST, FAST]}
    (axes,) = drawn("difficulty", curves, MIXED, monkeypatch).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["baseline that knows the rules"]
    seeds, interval, center, _ = axes.lines
    assert list(seeds.get_xdata()) == pytest.approx([0, 0.6 / 4])
    assert list(interval.get_xdata()) == pytest.approx(list(intervals.mean([0, 0.6 / 4])[1:3]))
    assert list(center.get_xdata()) == pytest.approx([0.6 / 8])


@pytest.mark.parametrize("question", [name for name in figures.FIGURES if name != "algorithms"])
def test_runs_without_an_answer_have_no_figure(question, monkeypatch):
    assert drawn(question, {"sppo": [FAST, SLOW]}, MIXED, monkeypatch) is None


@pytest.mark.parametrize("question", figures.FIGURES)
def test_a_figure_shows_only_what_the_study_runs(question):
    shown = getattr(figures, question.upper())
    known = {name for variants in (ALGORITHMS, *VARIANTS.values()) for name in variants}
    assert set(shown) <= known
    looks = [(style.colour, style.line, style.marker) for style in shown.values()]
    if question not in ("difficulty", "groups"):  # others name each row
        assert len(set(looks)) == len(looks)


# All of it


def test_a_run_that_breaks_is_noted_and_the_others_go_on(tmp_path, monkeypatch):
    runs = Plan([], MIXED, "a").tuning()[:3]

    def train(run, file):
        if run == runs[1]:
            raise ValueError("no such policy")
        return finished(run)

    failures = []
    with ThreadPoolExecutor(1) as pool:
        rows = list(finished_rows(pool, train, runs, [tmp_path], failures))
    assert len(rows) == 2
    assert failures == [f"{MIXED.name}, {runs[1].variant}, seed 1000: ValueError: no such policy"]


@pytest.mark.slow
def test_learn_walks_through_all_of_it_and_resumes(tmp_path, capsys, monkeypatch):
    command = ["learn", "--quick", "--workers", "1", "--out", str(tmp_path)]
    full = tmp_path / "learn.json"
    full.write_text("what took two hours")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("sppo", "grpo", "reinforce"))
    report = json.loads((tmp_path / "learn-quick.json").read_text())
    # Three algorithms at one rate, SPPO's critic at two, then a seed that counts.
    assert (report["failures"], len(report["rows"])) == ([], 7)
    assert list(report["greedy"]) == list(report["policies"])
    for found in report["rows"]:
        assert found["updates"] == [0, 5, 10]
        assert found["tokens"][0] == 0 < found["tokens"][1] < found["tokens"][2]
        assert found["seconds"][0] == 0 < found["seconds"][1] < found["seconds"][2]
        assert all(0 <= reward <= 1 for reward in found["reward"])
    assert [chart.name for chart in tmp_path.glob("*.svg")] == ["learn-quick-algorithms.svg"]
    monkeypatch.setattr(learn, "train", lambda *args: pytest.fail("a run that is done, again"))
    assert main(command) == 0
    assert json.loads((tmp_path / "learn-quick.json").read_text())["rows"] == report["rows"]
    assert full.read_text() == "what took two hours"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupted_command_ends_at_once_and_keeps_what_it_has(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "learn", "--quick", "--workers", "2", "--out", str(tmp_path)]
    # A shell's background jobs ignore SIGINT, and so would the command if the tests run in one.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=heed, **pipes)
    results = tmp_path / "learn-quick.json"
    for _ in range(1200):
        if results.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; the same command resumes from here" in errors
    assert json.loads(results.read_text())["rows"]


def test_two_commands_do_not_write_the_same_results(tmp_path):
    with run_lock(tmp_path), pytest.raises(ValueError, match="by another process"):
        main(["learn", "--quick", "--out", str(tmp_path)])


def test_wrong_numbers_are_named(tmp_path):
    with pytest.raises(SystemExit, match="--workers must be at least 1, got 0"):
        main(["learn", "--workers", "0", "--out", str(tmp_path)])
