"""Signal of gradient estimates: theory against simulation, estimators, gradients and statistics."""

import json

import pytest
import torch

pytest.importorskip("triton")
from tiny_models import tiny_model

from benchmarks.harness import suite
from benchmarks.signal.estimators import (
    TokenEstimator,
    gae_advantages,
    shrunk,
    shuffled,
    with_baseline,
    with_group,
)
from benchmarks.signal.gradients import ResponseGradients, Sketch
from benchmarks.signal.measure import measure
from benchmarks.signal.pools import Pool
from benchmarks.signal.predictions import Predictor
from benchmarks.signal.statistics import Moments, pair_mean, resamples, statistics
from benchmarks.signal.theory import Facts, Steps, fit_steps, standardized

SUCCESS = torch.tensor([0.15, 0.4, 0.9])
FACTS = Facts(SUCCESS, torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 3.0, 4.0]))


# Theory


def drawn(size, count=200_000):
    """Rewards and squared norms [M, count, size] of independent responses with the norms of FACTS."""
    torch.manual_seed(0)
    rewards = (torch.rand(len(SUCCESS), count, size) < SUCCESS[:, None, None]).float()
    norms = torch.where(rewards > 0, FACTS.right[:, None, None], FACTS.wrong[:, None, None])
    return rewards, norms


def test_moment_with_a_baseline():
    rewards, norms = drawn(1)
    baseline = torch.tensor([0.2, 0.5, 0.1])
    simulated = ((rewards - baseline[:, None, None]).square() * norms).mean((1, 2))
    torch.testing.assert_close(FACTS.baseline(baseline), simulated, rtol=0.02, atol=0)


def test_the_best_baseline_has_the_smallest_moment_and_is_the_success_rate_if_norms_are_equal():
    best = FACTS.best_baseline()
    least = FACTS.baseline(best)
    for other in (best + 0.02, best - 0.02, SUCCESS):
        assert (FACTS.baseline(other) >= least).all()
    even = Facts(SUCCESS, torch.ones(3), torch.ones(3))
    torch.testing.assert_close(even.best_baseline(), SUCCESS)
    torch.testing.assert_close(even.baseline(SUCCESS), SUCCESS * (1 - SUCCESS))


@pytest.mark.parametrize("size", [2, 8])
def test_moments_of_groups(size):
    rewards, norms = drawn(size)
    others = (rewards.sum(2, keepdim=True) - rewards) / (size - 1)
    simulated = ((rewards - others).square() * norms).mean((1, 2))
    torch.testing.assert_close(FACTS.rloo(size), simulated, rtol=0.02, atol=0)
    spread = rewards.std(2, keepdim=True)
    advantages = (rewards - rewards.mean(2, keepdim=True)) / (spread + 1e-6)
    torch.testing.assert_close(FACTS.grpo(size), (advantages.square() * norms).mean((1, 2)), rtol=0.02, atol=0)
    right, wrong = rewards > 0, rewards == 0
    gain = torch.stack([a[r].mean() - a[w].mean() for a, r, w in zip(advantages, right, wrong, strict=True)])
    torch.testing.assert_close(FACTS.grpo_gain(size), gain, rtol=0.02, atol=0)


def test_standardized_rewards_of_a_group():
    assert standardized(2, 4, 1) == pytest.approx(0.8660, abs=1e-3)
    assert standardized(4, 4, 1) == 0


@pytest.mark.parametrize("lam", [1.0, 0.9, 0.0])
def test_moment_of_ppo_with_the_values_of_a_walk(lam):
    horizon, steps = 6, Steps(SUCCESS, 6, torch.full((3,), 0.5), torch.full((3,), 7.0))
    torch.manual_seed(0)
    right = torch.rand(3, 200_000, horizon) >= steps.slip[:, None, None]
    so_far = torch.cat([torch.ones(3, 200_000, 1, dtype=torch.bool), right.cumprod(2).bool()], 2)
    q = (1 - steps.slip)[:, None, None]
    values = so_far * q ** (horizon - torch.arange(horizon + 1))
    changes = values.diff(dim=2)
    advantages = torch.zeros_like(changes)
    later = torch.zeros(3, 200_000)
    for t in reversed(range(horizon)):
        advantages[:, :, t] = later = changes[:, :, t] + lam * later
    norms = torch.where(right, 0.5, 7.0)
    # Steps after a wrong one have the value 0 and no advantage.
    simulated = (advantages.square() * norms * so_far[:, :, :-1]).sum(2).mean(1)
    torch.testing.assert_close(steps.ideal_gae(lam), simulated, rtol=0.03, atol=0)
    assert values[:, :, -1].mean(1).tolist() == pytest.approx(SUCCESS.tolist(), abs=0.01)


def test_facts_of_walks_add_the_norms_of_their_steps():
    steps = Steps(SUCCESS, 5, torch.full((3,), 0.5), torch.full((3,), 7.0))
    torch.manual_seed(0)
    right = torch.rand(3, 200_000, 5) >= steps.slip[:, None, None]
    norms = torch.where(right, 0.5, 7.0).sum(2)
    success = right.all(2)
    facts = steps.facts()
    for m in range(3):
        assert facts.right[m].item() == pytest.approx(norms[m][success[m]].mean().item(), rel=0.01)
        assert facts.wrong[m].item() == pytest.approx(norms[m][~success[m]].mean().item(), rel=0.01)


def test_fit_of_step_norms():
    wrong = torch.tensor([[0, 1], [3, 0]])
    assert fit_steps(0.5 * (8 - wrong) + 7.0 * wrong, wrong, 8) == pytest.approx((0.5, 7.0))


# Gradients


def pool_of(prompts=2, responses=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, count: torch.randint(low, high, (count,), generator=generator).tolist()
    lengths = [[2 + (m + g) % 3 for g in range(responses)] for m in range(prompts)]
    return Pool(
        prompts=[draw(3, 9, 2 + m) for m in range(prompts)],
        responses=[[draw(3, 9, length) for length in row] for row in lengths],
        rewards=torch.randint(0, 2, (prompts, responses), generator=generator).float(),
        greedy_rewards=torch.ones(prompts),
    )


def test_gradients_are_those_of_each_response_and_padding_has_none():
    policy, pool = tiny_model().eval(), pool_of()
    gradients = ResponseGradients(policy, temperature=0.7)
    names = [name for name, _ in policy.named_parameters()]
    for m, prompt in enumerate(pool.prompts):
        mask = pool.mask(m)
        weights = mask * torch.randn(mask.shape)
        found = gradients(pool.tokens(m), len(prompt), weights)
        logprobs = gradients.logprobs(pool.tokens(m), len(prompt))
        for g, response in enumerate(pool.responses[m]):
            tokens = torch.tensor([prompt + response])
            logits = policy(tokens[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :] / 0.7
            own = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(logprobs[g, : len(response)], own, rtol=1e-4, atol=1e-5)
            expected = torch.autograd.grad((own * weights[g, : len(response)]).sum(), list(policy.parameters()))
            flat = torch.cat([each.flatten() for each in expected])
            torch.testing.assert_close(found[g], flat, rtol=1e-3, atol=1e-5)
    assert gradients.size == sum(dict(policy.named_parameters())[name].numel() for name in names)


def test_gradients_of_some_parameters():
    policy, pool = tiny_model().eval(), pool_of(1)
    name = next(name for name, _ in policy.named_parameters() if "layers.0.mlp.down_proj" in name)
    some = ResponseGradients(policy, names=[name])
    every = ResponseGradients(policy)
    tokens, mask = pool.tokens(0), pool.mask(0)
    start = 0
    for other, parameter in policy.named_parameters():
        if other == name:
            break
        start += parameter.numel()
    part = every(tokens, 2, mask)[:, start : start + some.size]
    torch.testing.assert_close(some(tokens, 2, mask), part)


def test_a_sketch_preserves_inner_products():
    torch.manual_seed(0)
    x = torch.randn(3, 20_000) + 1
    projected = Sketch.new(20_000, 8192).project(x)
    torch.testing.assert_close(projected @ projected.T, x @ x.T, rtol=0.06, atol=0)


# Estimators


def test_coefficients_of_a_baseline_and_of_groups():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert with_baseline(torch.tensor([0.0, 0.25])).coefficients(1, rewards).diag().tolist() == [
        0.75,
        -0.25,
        -0.25,
        0.75,
    ]
    rloo = with_group(4, "rloo")
    coefficients = rloo.coefficients(0, rewards)
    assert (rloo.responses, rloo.unbiased, with_group(2, "grpo").unbiased) == (4, True, False)
    expected = torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3]) / 4
    for row in coefficients:
        torch.testing.assert_close(row, expected)
    pairs = with_group(2, "rloo").coefficients(0, rewards)
    assert ((pairs != 0).sum(1) <= 2).all()
    assert (pairs.sum(1) == 0).all()


def test_means_of_unbiased_estimators_are_the_gradient():
    """Enumerate the responses of a bandit with two arms: the mean of R s is the gradient, whatever the baseline is."""
    p = torch.tensor([0.3, 0.7])
    scores = torch.eye(2) - p  # of a softmax policy
    reward = torch.tensor([1.0, 0.0])
    true = (p[:, None] * reward[:, None] * scores).sum(0)
    for estimator in (with_baseline(torch.tensor([0.6])), with_group(2, "rloo"), with_group(2, "grpo")):
        mean = torch.zeros(2)
        for first in range(2):
            for second in range(2):
                both = torch.tensor([first, second])
                units = estimator.coefficients(0, reward[both])
                mean += p[first] * p[second] * units.mean(0) @ scores[both]
        matches = torch.allclose(mean, true, atol=1e-6)
        assert matches == estimator.unbiased


def test_critics_that_explain_a_share():
    success = torch.tensor([0.1, 0.2, 0.9])
    for share in (0.0, 0.5, 1.0):
        error = (shrunk(success, share) - success).square().mean() / success.var(correction=0)
        assert 1 - error.item() == pytest.approx(share, abs=1e-5)
    assert sorted(shuffled(success).tolist()) == sorted(success.tolist())


def test_advantages_of_gae():
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    found = gae_advantages(torch.tensor([1.0]), torch.tensor([[0.5, 0.8, 0.3]]), mask, lam=0.5)
    assert found.tolist() == [pytest.approx([0.3 + 0.5 * 0.2, 0.2, 0.0])]


# Statistics


def test_signal_alignment_and_their_intervals():
    """Units with a known mean and variance: a signal of n |mu|^2 / v."""
    torch.manual_seed(0)
    prompts, units, size = 60, 40, 50
    mu = torch.full((size,), 0.1)
    noise = torch.randn(prompts, units, size)
    other = mu.clone()
    other[: size // 2] = 0
    moments = {}
    for name, mean, scale, unbiased in (("a", mu, 1.0, True), ("b", mu, 2.0, True), ("c", other, 1.0, False)):
        contributions = mean + scale * noise
        moments[name] = Moments(contributions.mean(1), contributions.square().sum(2).mean(1), 1, unbiased)
    a, b, c = statistics(moments, "a", responses=64, compared_with="b")
    expected = 64 * 0.5 / 50
    assert a["signal"] == pytest.approx(expected, rel=0.15)
    assert a["signal_low"] < expected < a["signal_high"]
    assert a["times"] == pytest.approx(4, rel=0.05)
    assert b["times"] == 1
    assert c["alignment"] == pytest.approx(0.5**0.5, abs=0.05)
    assert a["alignment"] == pytest.approx(1, abs=1e-6)
    assert c["signal"] == pytest.approx(expected / 4, rel=0.25)


def test_a_group_counts_all_of_its_responses():
    torch.manual_seed(0)
    contributions = 0.1 + torch.randn(50, 20, 10)
    mean, square = contributions.mean(1), contributions.square().sum(2).mean(1)
    _, four = statistics(
        {"one": Moments(mean, square, 1, True), "four": Moments(mean, square, 4, True)},
        "one",
        responses=8,
        compared_with="one",
    )
    assert four["times"] == pytest.approx(1 / 4)


def test_pairs_are_of_different_prompts():
    means = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    found = pair_mean(means @ means.T, weights)
    assert found.tolist() == pytest.approx([(2 + 4 + 8) / 3, 2.0])
    assert resamples(3).shape[1] == 3
    assert (resamples(3).sum(1) == 3).all()


def test_measured_moments_are_those_of_the_gradients():
    policy, pool = tiny_model().eval(), pool_of(3, 4)
    gradients = ResponseGradients(policy)
    advantages = torch.randn(3, 4, pool.longest)
    rloo = with_group(4, "rloo")
    moments, norms = measure(
        gradients,
        pool,
        {"base": with_baseline(torch.full((3,), 0.3)), "rloo": rloo},
        {"tokens": TokenEstimator(advantages, unbiased=False)},
    )
    for m, prompt in enumerate(pool.prompts):
        scores = gradients(pool.tokens(m), len(prompt), pool.mask(m))
        torch.testing.assert_close(norms[m], scores.square().sum(1), rtol=1e-4, atol=1e-4)
        base = (pool.rewards[m] - 0.3)[:, None] * scores
        torch.testing.assert_close(moments["base"].mean[m], base.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments["base"].square[m], base.square().sum(1).mean(), rtol=1e-3, atol=1e-3)
        group = rloo.coefficients(m, pool.rewards[m])[0] @ scores
        torch.testing.assert_close(moments["rloo"].square[m], group.square().sum(), rtol=1e-3, atol=1e-3)
        weights = advantages[m, :, : pool.mask(m).shape[1]] * pool.mask(m)
        of_tokens = gradients(pool.tokens(m), len(prompt), weights)
        torch.testing.assert_close(moments["tokens"].mean[m], of_tokens.mean(0), rtol=1e-4, atol=1e-5)
    assert (moments["base"].responses, moments["rloo"].responses, moments["tokens"].unbiased) == (1, 4, False)


@pytest.mark.parametrize("size", [1, 4])
def test_predictions_are_right_where_the_assumptions_hold(size):
    """Scores of a given norm in random directions, and a part along the prompt's gradient that the outcome decides."""
    torch.manual_seed(0)
    prompts, responses, width = 40, 400, 400
    success = torch.linspace(0.1, 0.9, prompts)
    gradients = torch.randn(1, width) * 0.3 / width**0.5 + torch.randn(prompts, width) * 0.2 / width**0.5
    rewards = (torch.rand(prompts, responses) < success[:, None]).float()
    along = torch.where(rewards > 0, 1 / success[:, None], -1 / (1 - success[:, None]))
    norms = torch.where(rewards > 0, 4.0, 9.0)
    directions = torch.nn.functional.normalize(torch.randn(prompts, responses, width), dim=2)
    scores = along[..., None] * gradients[:, None] + norms.sqrt()[..., None] * directions
    square = gradients.square().sum(1)
    facts = Facts(success, 4.0 + square / success**2, 9.0 + square / (1 - success) ** 2)
    estimators = {"ideal": with_baseline(success), "rloo": with_group(4, "rloo")}
    moments = {}
    for name, estimator in estimators.items():
        coefficients = [estimator.coefficients(m, rewards[m]) for m in range(prompts)]
        units = [c @ s for c, s in zip(coefficients, scores, strict=True)]
        mean = torch.stack([each.mean(0) for each in units])
        squares = torch.stack([each.square().sum(1).mean() for each in units])
        moments[name] = Moments(mean, squares, estimator.responses, True)
    measured = {row["estimator"]: row for row in statistics(moments, "ideal", responses=64, compared_with="ideal")}
    predictor = Predictor(moments["ideal"], facts, responses=responses, estimate=64)
    name = "ideal" if size == 1 else "rloo"
    predicted = predictor.signal(facts.baseline(success) if size == 1 else facts.rloo(4), size=size)
    assert predicted == pytest.approx(measured[name]["signal"], rel=0.1)


# The suite


@pytest.mark.slow
def test_the_suite_runs_resumes_and_draws(tmp_path, capsys, monkeypatch):
    from benchmarks.__main__ import main

    command = ["signal", "--quick", "--workers", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("sppo, probe, seed 0", "grpo, 2 responses", "ratio of sum, no clip"))
    path = tmp_path / "signal-quick.json"
    report = json.loads(path.read_text())
    assert report["failures"] == []
    walk = report["cases"]["walks: mixed, 4 steps"]
    assert [len(curve) for curve in walk["explained_by_rollout"]["sppo, probe"]] == [2]
    before = path.read_bytes()
    assert main(command) == 0
    assert path.read_bytes() == before  # nothing was left to do
    found = suite.load("signal")
    for table in found.tables.values():
        assert table(tmp_path).count("\n") >= 1
    drawn_files = found.charts(path)
    for file, draw in drawn_files.items():
        draw(file, report)
    assert {file.name for file in drawn_files if file.exists()} >= {"signal-quick-ratios.svg"}


def test_cases_and_arguments():
    from benchmarks import signal

    names = [case.name for case in signal.cases_of(list(signal.KINDS), quick=False)]
    assert len(names) == len(set(names)) == len(signal.WALKS) + 2
    assert names[0] == "walks: mixed, 256 steps"
    assert [case.name for case in signal.cases_of(["ratios"], quick=True)] == ["ratios: mixed, 4 steps"]
