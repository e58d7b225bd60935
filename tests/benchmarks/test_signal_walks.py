"""Pools of digit walks, the values of their prefixes, trained critics, and sums for a language model."""

import pytest
import torch

pytest.importorskip("triton")
from tiny_models import char_tokenizer, tiny_model

from benchmarks.learn import digit_walk
from benchmarks.learn.policy import new_config, tokenizer
from benchmarks.signal.arithmetic import sample_pool as sample_pool_of_sums
from benchmarks.signal.arithmetic_case import explained_by, left_out, variance_of_success
from benchmarks.signal.comparison import CONSTANT
from benchmarks.signal.critics import explained_share, prompt_values, samples_of, token_values, train_offline
from benchmarks.signal.pools import Pool
from benchmarks.signal.tables import predictions_that_hold
from benchmarks.signal.walks import choose_prompts, ideal_values, sample_pool, wrong_steps
from sppo.models.critic_io import build_critic
from sppo.models.critics import PromptCritic, TokenCritic
from sppo.models.probe import ProbeCritic
from sppo.rewards.builtin import numeric


class KnowsTheRules:
    """A policy that writes each right step with a probability, in digits or letters, and every other token else."""

    def __init__(self, right):
        self.right = right

    def __call__(self, tokens, use_cache):
        encode = tokenizer()
        vocabulary = new_config().vocab_size
        logits = torch.full((*tokens.shape, vocabulary), (1 - self.right) / (vocabulary - 2)).log()
        for row, ids in enumerate(tokens.tolist()):
            text = encode.decode(ids).replace(" ", "").translate(str.maketrans(digit_walk.LETTERS, digit_walk.DIGITS))
            for t in range(2, len(ids)):
                following = digit_walk.walk(text[0] + text[t - 1 : t + 1], 1)
                spelled = [following, digit_walk.LETTERS[int(following)]]
                logits[row, t, torch.tensor(encode(spelled)["input_ids"])[:, 0]] = torch.tensor(self.right / 2).log()
        return type("Output", (), {"logits": logits})


def test_ideal_values_are_products_of_the_remaining_probabilities_and_0_after_a_wrong_step():
    prompts = ["A37", "H01"]
    encode = lambda text: tokenizer()(text)["input_ids"]
    walks = [digit_walk.walk(prompt, 4) for prompt in prompts]
    wrong = walks[0][0] + str((int(walks[0][1]) + 1) % 10) + walks[0][2:]
    pool = Pool(
        prompts=[encode(prompt) for prompt in prompts],
        responses=[[encode(walks[0]), encode(wrong)], [encode(walks[1]), encode(walks[1])]],
        rewards=torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        greedy_rewards=torch.ones(2),
    )
    values = ideal_values(KnowsTheRules(0.8), pool, prompts, 4)
    right = [0.8**4, 0.8**3, 0.8**2, 0.8]
    assert values[0, 0].tolist() == pytest.approx(right)
    assert values[0, 1].tolist() == pytest.approx([0.8**4, 0.8**3, 0, 0])
    assert values[1, 1].tolist() == pytest.approx(right)
    assert wrong_steps(pool, prompts)[1].tolist() == [0, 0]
    assert wrong_steps(pool, prompts)[0, 1] >= 1


def test_pools_are_graded_and_repeatable():
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    policy = LlamaForCausalLM(new_config()).eval()
    prompts = choose_prompts(4)
    assert len({prompt[0] for prompt in choose_prompts(16)}) == 8
    pool, again = (sample_pool(policy, prompts, 3, responses=2, seed=1) for _ in range(2))
    assert pool.responses == again.responses
    assert pool.rewards.shape == (4, 2)
    assert pool.greedy_rewards.shape == (4,)
    assert pool.longest <= 3
    texts = tokenizer().batch_decode([group[0] for group in pool.responses], skip_special_tokens=True)
    ends = [digit_walk.walk(prompt, 3)[-2:] for prompt in prompts]
    assert pool.rewards[:, 0].tolist() == digit_walk.reward(prompts, texts, ends, [3] * 4)


def test_sums_are_answered_and_graded_in_the_order_of_the_prompts():
    from datasets import Dataset

    policy, tokenizer = tiny_model().eval(), char_tokenizer()
    rows = Dataset.from_dict({"prompt": ["1+2=", "1+22+3=", "4+4="], "answer": ["3", "26", "8"]})
    pool = sample_pool_of_sums(policy, tokenizer, rows, responses=3, batch_size=4)
    assert pool.prompts == [tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]]
    assert [len(group) for group in pool.responses] == [3, 3, 3]
    assert all(tokenizer.eos_token_id not in response[:-1] for group in pool.responses for response in group)
    texts = [tokenizer.decode(response, skip_special_tokens=True) for group in pool.responses for response in group]
    each = [row for row in rows for _ in range(3)]
    expected = numeric([row["prompt"] for row in each], texts, answer=[row["answer"] for row in each])
    assert pool.rewards.flatten().tolist() == expected
    ids = torch.tensor([pool.prompts[1]])
    own = policy.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0)
    text = tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True)
    assert pool.greedy_rewards[1].item() == numeric(["1+22+3="], [text], answer=["26"])[0]


def test_predictions_are_counted_if_they_are_near_the_interval():
    row = lambda name, predicted, low, high: {
        "estimator": name, "predicted": predicted, "times_low": low, "times_high": high
    }  # fmt: skip
    rows = [row(CONSTANT, 2.0, 1, 1), row("a", 4.0, 1.5, 2.5), row("b", 4.0, 2.1, 2.5), row("c", None, 1, 1)]
    assert predictions_that_hold({"rows": rows}) == "1 of 2"


def learnable_pool(count=24):
    """A pool in which the first token of a prompt decides the reward."""
    prompts = [[3 + m % 4, 3 + m % 5] for m in range(count)]
    rewards = torch.tensor([[float(prompt[0] < 5)] * 2 for prompt in prompts])
    return Pool(prompts, [[[4, 5], [4]] for _ in prompts], rewards, torch.zeros(count))


@pytest.mark.parametrize("kind", ["prompt", "probe", "token"])
def test_critics_learn_offline_as_in_the_trainer(kind):
    policy, pool = tiny_model(), learnable_pool()
    classifier = lambda: build_critic(None, policy, _Tokens(), kind)
    critic = {
        "prompt": lambda: PromptCritic(classifier()),
        "probe": lambda: ProbeCritic(policy),
        "token": lambda: TokenCritic(classifier(), cliprange=10.0),
    }[kind]()
    seen = []
    samples = samples_of(pool)
    train_offline(critic, [samples] * 12, rate=3e-3, after_rollout=lambda critic: seen.append(1))
    assert len(seen) == 12
    values = token_values(critic, pool)[:, 0, 0] if kind == "token" else prompt_values(critic, pool)
    assert explained_share(values, pool.rewards[:, 0]) > 0.5


class _Tokens:
    """As many tokens as the tiny model has embeddings."""

    def __len__(self):
        return 8


def test_explained_share_is_1_for_the_truth_and_0_for_the_mean():
    success = torch.tensor([0.1, 0.4, 0.9])
    assert explained_share(success, success) == 1
    assert explained_share(success.mean().expand(3), success) == pytest.approx(0, abs=1e-6)


def test_the_share_from_few_responses_has_no_bias():
    torch.manual_seed(0)
    success = torch.rand(4000)
    rewards = (torch.rand(4000, 8) < success[:, None]).float()
    pool = Pool([[3]] * 4000, [[[4]] * 8] * 4000, rewards, torch.zeros(4000))
    assert variance_of_success(pool) == pytest.approx(1 / 12, abs=0.005)
    assert explained_by(success, pool) == pytest.approx(1, abs=0.03)
    assert explained_by(torch.full((4000,), 0.5), pool) == pytest.approx(0, abs=0.03)
    others = left_out(rewards)
    assert others[0, 0].item() == pytest.approx(rewards[0, 1:].mean().item())
