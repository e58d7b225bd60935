"""Models and prompts of the tasks: SmolLM2-135M-Instruct on sums, and a tiny model for a trial."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness import arithmetic_prompts
from benchmarks.learn_smollm2.variants import QUICK, SUMS
from sppo.tasks import chain, smollm2
from sppo.tasks.chain_model import new_model, warm_started_model

HELD_OUT, TRAINING = 96, 4096  # prompts
KINDS = arithmetic_prompts.SUMS[:2]  # two and three terms of one digit
HELD_OUT_SEED, TRAINING_SEED = 2, 1


class Setup(NamedTuple):
    """What runs on a task begin with.

    Attributes:
        policy: loads the policy and its tokenizer.
        small_critic: makes the critic "small".
        prompts: makes the prompts for training and those held out.
        reward: reward of the trainer.
        weights: returns a hash of the policy's weights.
    """

    policy: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    small_critic: Callable[[], PreTrainedModel]
    prompts: Callable[[], tuple[Dataset, Dataset]]
    reward: str | Callable[..., list[float]]
    weights: Callable[[], str]

    def identity(self) -> str:
        """Return a hash of weights and prompts.

        Raises:
            ImportError: a package of the model is not installed.
        """
        weights = self.weights()  # first: its error says what to install
        prompts = [row for dataset in self.prompts() for row in dataset]
        return sha256(f"{weights} {prompts}".encode()).hexdigest()[:16]


def _sums() -> tuple[Dataset, Dataset]:
    held_out = arithmetic_prompts.prompts(HELD_OUT, HELD_OUT_SEED, KINDS)
    return arithmetic_prompts.training_prompts(TRAINING, TRAINING_SEED, held_out, KINDS), held_out


# A process loads a model once and copies it for each run, because decoding the file takes longer than an update.
@cache
def _smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return smollm2.policy()


@cache
def _smollm2_critic() -> PreTrainedModel:
    return smollm2.critic(layers=6)


def _copied_policy() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = _smollm2()
    return copy.deepcopy(model), tokenizer


def _tiny_critic() -> PreTrainedModel:
    from transformers import LlamaForSequenceClassification

    config = new_model(chain.ALPHABET, 16, 1, 32, seed=0).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


SETUPS: Mapping[str, Setup] = {
    SUMS.name: Setup(
        policy=_copied_policy,
        small_critic=lambda: copy.deepcopy(_smollm2_critic()),
        prompts=_sums,
        reward="numeric",
        weights=lambda: sha256(smollm2.file().read_bytes()).hexdigest(),
    ),
    QUICK.name: Setup(
        policy=lambda: warm_started_model(1),
        small_critic=_tiny_critic,
        prompts=lambda: (chain.dataset("train", 32, 1), chain.dataset("test", 5, 1)),
        reward=chain.reward,
        weights=lambda: "warm start",
    ),
}


def critic_of(setup: Setup, settings: Mapping[str, Any]) -> PreTrainedModel | str | None:
    """Return the argument ``critic`` of the trainer for a variant."""
    critic = settings.get("critic")
    return setup.small_critic() if critic == "small" else critic
