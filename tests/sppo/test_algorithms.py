"""Advantages and losses against the published formulas, written out in float64 on fixed tensors."""

import pytest
import torch
from torch import tensor

from sppo import Algorithm, RolloutBatch, SPPOConfig
from sppo.algorithms import ALGORITHMS, algorithm_class
from sppo.models.critics import clipped_value_loss
from sppo_kernels import policy_loss

REWARDS = [1.0, 0.0, 0.5, 0.0, 1.0, 1.0]
LENGTHS = [3, 1, 2, 2, 4, 1]
GROUPS = [0, 0, 0, 1, 1, 1]
CU_SEQLENS = tensor([0, 3, 4, 6, 8, 12, 13], dtype=torch.int32)
OLD = torch.linspace(-2.0, -0.3, 13, dtype=torch.float64)
NEW = OLD + 0.6 * torch.sin(torch.arange(13, dtype=torch.float64))  # ratios from 0.55 to 1.8


def config(**settings):
    return SPPOConfig(output_dir="unused", use_cpu=True, per_device_train_batch_size=24, **settings)


def make(name, **settings):
    args = config(algorithm=name, **settings)
    return algorithm_class(name)(args)


TRACES = [([5, 6], [-1.0, -2.0])] * 6


def outcomes(**facts):
    return RolloutBatch(
        traces=TRACES,
        rewards=tensor(REWARDS),
        group_ids=tensor(GROUPS),
        prompts=["a", "a", "b", "c", "c", "b"],
        lengths=tensor(LENGTHS),
        mean_reward=0.3,
        **facts,
    )


def token_values():
    values = torch.zeros(6, 4)
    for i, n in enumerate(LENGTHS):
        values[i, :n] = torch.linspace(0.1, 0.7, 6)[i] + 0.1 * torch.arange(n)
    return values


def by_group(rewards):
    for group in (0, 1):
        yield [r for r, g in zip(rewards, GROUPS, strict=True) if g == group]


def gae_by_hand(gamma, lam):
    """Equation 16 of arXiv 1506.02438, one sequence and one token at a time; the reward comes with the last token."""
    advantages, values = torch.zeros(6, 4, dtype=torch.float64), token_values().double()
    for i, n in enumerate(LENGTHS):
        running = 0.0
        for t in reversed(range(n)):
            reward, following = (REWARDS[i], 0.0) if t == n - 1 else (0.0, values[i, t + 1])
            running = reward + gamma * following - values[i, t] + gamma * lam * running
            advantages[i, t] = running
    return advantages


def flat(padded):
    return torch.cat([row[:n] for row, n in zip(padded, LENGTHS, strict=True)])


def test_sppo_is_outcome_minus_value():
    values = tensor([0.5, 0.25, 0.0, 0.75, 0.5, 1.0])
    assert make("sppo").advantages(outcomes(values=values)).tolist() == [0.5, -0.25, 0.5, -0.75, 0.5, 0.0]


def test_poise_is_outcome_minus_the_value_of_the_probe():
    values = tensor([0.5, 0.25, 0.0, 0.75, 0.5, 1.0])
    assert make("poise").advantages(outcomes(values=values)).tolist() == [0.5, -0.25, 0.5, -0.75, 0.5, 0.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5)])
def test_ppo_is_whitened_gae_and_its_critic_predicts_the_return(gamma, lam):
    algorithm, given = make("ppo", gamma=gamma, lam=lam), outcomes(values=token_values())
    expected = gae_by_hand(gamma, lam)
    tokens = flat(expected)
    whitened = (tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    torch.testing.assert_close(flat(algorithm.advantages(given)).double(), whitened, rtol=1e-4, atol=1e-5)
    returns = flat(expected + token_values())
    torch.testing.assert_close(flat(algorithm.returns(given)).double(), returns, rtol=1e-5, atol=1e-6)


def test_value_loss_is_the_maximum_of_unclipped_and_clipped():
    values, old, returns = tensor([0.9, 0.5, 0.1]), tensor([0.5, 0.5, 0.5]), tensor([1.0, 0.0, 0.6])
    #   clipped to 0.7: (0.7 - 1)^2 is worse than (0.9 - 1)^2; not clipped; clipped to 0.3, (0.1 - 0.6)^2 is worse
    expected = tensor([0.09, 0.25, 0.25]) / 2
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.2), expected)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, float("inf")), (values - returns) ** 2 / 2)


@pytest.mark.parametrize("name", ["grpo", "gspo", "dr_grpo", "rloo"])
def test_group_baselines(name):
    expected = []
    for group in by_group(REWARDS):
        rewards = tensor(group, dtype=torch.float64)
        others = (rewards.sum() - rewards) / (len(group) - 1)
        expected.append(
            {
                "grpo": (rewards - rewards.mean()) / (rewards.std() + 1e-6),
                "gspo": (rewards - rewards.mean()) / (rewards.std() + 1e-6),
                "dr_grpo": rewards - rewards.mean(),
                "rloo": rewards - others,
            }[name]
        )
    torch.testing.assert_close(make(name).advantages(outcomes()).double(), torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_remax_is_outcome_minus_that_of_the_greedy_response():
    algorithm = make("remax")
    assert algorithm.needs_greedy_baseline
    greedy = tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    assert algorithm.advantages(outcomes(greedy_rewards=greedy)).tolist() == [0.0, -1.0, 0.5, 0.0, 1.0, 0.0]


def test_grpo_can_divide_by_the_standard_deviation_of_the_batch_or_by_nothing():
    rewards = tensor(REWARDS, dtype=torch.float64)
    centered = torch.cat([tensor(group) - tensor(group).mean() for group in by_group(REWARDS)]).double()
    batch = make("grpo", scale_rewards="batch").advantages(outcomes()).double()
    torch.testing.assert_close(batch, centered / (rewards.std() + 1e-6))
    for none in ("none", False):
        torch.testing.assert_close(make("grpo", scale_rewards=none).advantages(outcomes()).double(), centered)
    whole = make("grpo", scale_rewards=True).advantages(outcomes())
    assert whole.equal(make("grpo").advantages(outcomes()))


def test_the_standard_deviation_of_a_batch_of_one_is_not_used():
    one = RolloutBatch(tensor([1.0]), tensor([0]), ["a"], tensor([3]), 0.3)
    assert make("grpo", scale_rewards="batch").advantages(one).tolist() == [0.0]


def test_dapo_and_cispo_keep_their_upper_bound():
    assert [config(algorithm=name, epsilon=0.1).epsilon_high for name in ("dapo", "cispo", "grpo")] == [0.28, 4.0, 0.1]


def test_opo_subtracts_the_length_weighted_mean_of_the_group():
    expected = []
    for group in (0, 1):
        members = [(r, n) for r, n, g in zip(REWARDS, LENGTHS, GROUPS, strict=True) if g == group]
        baseline = sum(n * r for r, n in members) / sum(n for _, n in members)
        expected += [r - baseline for r, _ in members]
    assert make("opo").advantages(outcomes()).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "sppo"])
def test_advantages_are_standardized_over_the_batch(name):
    values = torch.linspace(0.1, 0.9, 6)
    settings = {"standardize_advantages": True} if name == "sppo" else {}
    raw = tensor(REWARDS, dtype=torch.float64) - (values.double() if name == "sppo" else 0)
    expected = (raw - raw.mean()) / raw.std()
    found = make(name, **settings).advantages(outcomes(values=values))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_sppo_can_subtract_the_mean_advantage():
    values = torch.linspace(0.1, 0.9, 6)
    raw = tensor(REWARDS) - values
    found = make("sppo", center_advantages=True).advantages(outcomes(values=values))
    torch.testing.assert_close(found, raw - raw.mean())


def test_spo_tracks_each_prompt_and_forgets_by_the_drift():
    """Algorithm 1 of arXiv 2509.13232, with drifts below, between and above those of the limits."""
    algorithm = make("spo")
    assert algorithm.prompt_weights(["a", "new"]) == pytest.approx([0.55, 0.55])
    drifts = [0.0, 0.0, 0.0, 0.008, 1.0, 0.0]
    found = algorithm.advantages(outcomes(drifts=tensor(drifts)))
    raw = tensor(REWARDS) - 0.5
    torch.testing.assert_close(found, (raw - raw.mean()) / raw.std())
    trackers, names = {}, ["a", "a", "b", "c", "c", "b"]
    for name, reward, drift in zip(names, REWARDS, drifts, strict=True):
        a, b = trackers.get(name, (0.5, 0.5))
        rho = min(0.96, max(0.875, 2 ** (-drift / 0.06)))
        trackers[name] = (rho * a + reward, rho * b + 1 - reward)
    for name, (a, b) in trackers.items():
        value = a / (a + b)
        assert algorithm.prompt_weights([name]) == pytest.approx([(value * (1 - value)) ** 0.5 + 0.05])
    assert algorithm.trace("a") == TRACES[0]
    assert algorithm.trace("new") is None
    again = algorithm.advantages(outcomes(drifts=torch.zeros(6)))
    values = tensor([trackers[name][0] / sum(trackers[name]) for name in names])
    raw = tensor(REWARDS) - values
    torch.testing.assert_close(again, (raw - raw.mean()) / raw.std(), rtol=1e-5, atol=1e-6)


def test_dapo_penalizes_the_last_fifth_of_the_length():
    assert make("dapo", max_completion_length=100).overlong_buffer() == 20
    assert make("dapo", max_completion_length=100, overlong_buffer=7).overlong_buffer() == 7
    assert make("dapo", overlong_buffer=0).overlong_buffer() == 0
    assert make("grpo", overlong_buffer=9).overlong_buffer() == 9
    assert make("grpo").overlong_buffer() == 0


def test_reinforce_against_each_baseline():
    constant = make("reinforce", baseline=0.25).advantages(outcomes())
    assert constant.tolist() == [r - 0.25 for r in REWARDS]
    running = make("reinforce").advantages(outcomes())
    assert running.tolist() == pytest.approx([r - 0.3 for r in REWARDS])
    algorithm = make("reinforce", baseline="prompt_mean")
    assert algorithm.advantages(outcomes()).tolist() == pytest.approx([r - 0.3 for r in REWARDS])  # none seen before
    means = {"a": 0.5, "b": 0.75, "c": 0.5}  # of the first rollout
    expected = [r - means[p] for r, p in zip(REWARDS, ["a", "a", "b", "c", "c", "b"], strict=True)]
    assert algorithm.advantages(outcomes()).tolist() == pytest.approx(expected)
    assert algorithm.state["a"] == (4, 2.0)


TOKEN_MEANS = ("ppo", "poise", "dapo", "cispo", "spo", "reinforce_plus_plus")


def published_loss(name, advantages, longest):
    """Each paper's loss to be minimized, in float64, from NEW and OLD; advantages per sequence or per token."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for i, n in enumerate(LENGTHS):
        part = slice(int(CU_SEQLENS[i]), int(CU_SEQLENS[i + 1]))
        a = advantages[i] if advantages.ndim == 1 else advantages[i, :n]
        difference = NEW.requires_grad_()[part] - OLD[part]
        clip = {"gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28)}.get(name, (0.2, 0.2))
        if name == "gspo":  # equation 5 and 7 of arXiv 2507.18071
            ratio = torch.exp(difference.mean())
        elif name == "rloo":  # the response one action (arXiv 2402.14740, section 3)
            ratio = torch.exp(difference.sum())
        else:
            ratio = torch.exp(difference)
        if name == "cispo":  # arXiv 2506.13585, equation 4, with the bound of arXiv 2510.13786
            total = total - (ratio.clamp(max=5.0).detach() * a * NEW[part]).sum()
            tokens += n
            continue
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip[0], 1 + clip[1]) * a)
        if name == "sppo" and a < 0:  # dual clip (arXiv 1912.09729), as released
            surrogate = torch.maximum(surrogate, 3.0 * a)
        if name in ("sppo", "grpo"):  # a mean over each response (arXiv 2402.03300, equation 3)
            total = total - surrogate.mean() / 6
        elif name == "dr_grpo":  # arXiv 2503.20783, with its constant of the greatest length
            total = total - surrogate.sum() / 6 / longest
        elif name in TOKEN_MEANS:
            total = total - surrogate.sum()
        else:
            total = total - surrogate.sum() / 6
        tokens += n
    return total / tokens if name in TOKEN_MEANS else total


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_and_its_gradient_are_the_published_ones(name):
    algorithm = make(name, max_completion_length=7)
    values = token_values() if name == "ppo" else torch.linspace(0.1, 0.9, 6)
    greedy = tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    given = {"values": values, "greedy_rewards": greedy, "drifts": torch.zeros(6)}
    advantages = algorithm.advantages(outcomes(**given))
    expected = published_loss(name, advantages.double(), longest=7)
    (expected_gradient,) = torch.autograd.grad(expected, NEW)
    logprobs = NEW.detach().clone().requires_grad_()
    loss = policy_loss(
        logprobs,
        OLD,
        (flat(advantages) if advantages.ndim == 2 else advantages).double(),
        cu_seqlens=CU_SEQLENS,
        normalizer=algorithm.normalizer(6, 13),
        backend="reference",
        **algorithm.loss_arguments(),
    ).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", ["rloo", "opo", "remax", "reinforce"])
def test_on_policy_the_gradient_is_that_of_reinforce(name):
    """``-A sum_t grad logprob_t``, averaged over responses: the gradient of these papers without the ratio."""
    algorithm = make(name)
    advantages = algorithm.advantages(outcomes(greedy_rewards=torch.zeros(6))).double()
    logprobs = OLD.clone().requires_grad_()
    loss = policy_loss(
        logprobs,
        OLD,
        advantages,
        cu_seqlens=CU_SEQLENS,
        normalizer=algorithm.normalizer(6, 13),
        backend="reference",
        **algorithm.loss_arguments(),
    ).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -advantages.repeat_interleave(tensor(LENGTHS)) / 6)


def test_settings_override_the_algorithms_defaults():
    args = config(algorithm="gspo")
    assert (args.num_generations, args.ratio_level, args.epsilon, args.epsilon_high) == (8, "sequence_mean", 3e-4, 4e-4)
    args = config(algorithm="gspo", num_generations=2, epsilon=0.1, ratio_level="token", dual_clip=2.0)
    assert (args.num_generations, args.ratio_level, args.epsilon, args.epsilon_high) == (2, "token", 0.1, 0.1)
    assert algorithm_class("gspo")(args).loss_arguments()["dual_clip"] == 2.0
    assert algorithm_class("gspo")(config(algorithm="gspo")).loss_arguments()["dual_clip"] is None


class Halved(Algorithm):
    """A custom class, found by its name."""

    defaults = Algorithm.defaults | {"num_generations": 2}

    def advantages(self, outcomes):
        return outcomes.rewards / 2


def test_custom_algorithm():
    name = f"{__name__}:Halved"
    assert config(algorithm=name).num_generations == 2
    assert make(name).advantages(outcomes()).tolist() == [r / 2 for r in REWARDS]


def test_groups_of_equal_rewards_have_zero_advantages():
    given = outcomes()
    given.rewards, given.group_ids = tensor([0.7] * 8 + [0.1, 0.3]), tensor([0] * 8 + [1, 1])
    for name in ("grpo", "dr_grpo", "rloo"):
        assert make(name).advantages(given)[:8].tolist() == [0.0] * 8
        assert make(name).advantages(given)[8:].all()


def test_dr_grpo_divides_only_sums_by_the_maximum_length():
    assert make("dr_grpo", max_completion_length=7).normalizer(6, 13) == 42
    assert make("dr_grpo", max_completion_length=7, ratio_level="sequence_mean").normalizer(6, 13) == 6
    assert make("dr_grpo", max_completion_length=7, aggregation="token-mean").normalizer(6, 13) == 13


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"critic": "prompts"}, "Mine.critic must be 'prompt', 'probe', 'token' or None, got 'prompts'"),
        ({"defaults": {"epsilon": 0.1}}, "Mine.defaults must have the keys num_generations, .*, got epsilon; write"),
        ({"defaults": Algorithm.defaults | {"beta": 0.1}}, "Mine.defaults must have the keys"),
    ],
)
def test_a_class_with_wrong_attributes_is_rejected(attributes, says, monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "mine", type("Mine", (Algorithm,), attributes))
    with pytest.raises(ValueError, match=says):
        config(algorithm="mine")
