"""Construction of what samples, from the settings and arguments of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sppo.config import SPPOConfig
from sppo.rewards import Reward
from sppo.rewards.samples import RewardFunction
from sppo.rollout import RolloutEngine, make_engine
from sppo.rollout.engine import eos_tokens
from sppo.rollout.environments import ToolEnvironment, as_environment
from sppo.rollout.episodes import Episodes, MultiTurn, SingleTurn
from sppo.rollout.generation import check_own_engine, engine_settings, sampling_settings, warn_of_other_distribution
from sppo.rollout.rollout_func import RolloutFunction

logger = logging.get_logger(__name__)


def build_engine(
    trainer: Any,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    given: RolloutEngine | None,
    rollout_func: Callable[..., Any] | None,
    several_turns: bool,
    trains: bool,
) -> RolloutEngine:
    """Build the rollout engine, and warn where it samples from another distribution than the one that is trained.

    Args:
        trainer: an argument of ``rollout_func``.
        policy, tokenizer: the policy and its tokenizer.
        given: an engine to use as it is.
        rollout_func: a function to use as the engine.
        several_turns: whether there is an environment or tools.
        trains: whether there is a training dataset.

    Raises:
        ValueError: both an engine and a function are given, or the settings name no engine.
    """
    args: SPPOConfig = trainer.args
    if rollout_func is not None and several_turns:
        raise ValueError("rollout_func samples complete responses; leave environment_factory and tools out")
    if given is not None and rollout_func is not None:
        raise ValueError("rollout_engine and rollout_func are both given; give one of them")
    if given is not None or rollout_func is not None:
        check_own_engine(args)
    if trains:
        warn_of_other_distribution(args, is_truncated=args.is_truncated)
    if rollout_func is not None:
        return RolloutFunction(rollout_func, trainer, tokenizer, eos_tokens(policy, tokenizer))
    if given is not None:
        return given
    name, settings = engine_settings(args, bf16=args.bf16)
    return make_engine(
        name,
        policy,
        tokenizer,
        settings,
        **sampling_settings(args),
        return_support=args.replay_sampling_support and trains,
    )


def build_episodes(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    args: SPPOConfig,
    *,
    environment_factory: Callable[[], Any] | None,
    tools: Sequence[Callable[..., Any]],
) -> Episodes:
    """Build what plays episodes: one turn, or several with an environment or tools.

    Raises:
        TypeError: what ``environment_factory`` makes is no environment.
        ValueError: processes cannot play episodes of several turns with this engine.
    """
    several_turns = environment_factory is not None or tools
    if several_turns and args.world_size > 1 and hasattr(engine, "skip"):
        raise ValueError(
            f"an environment or tools with vllm_mode='server' on {args.world_size} processes: episodes end at other "
            "turns, and processes wait for each other before each; use one process, or vllm_mode='colocate'"
        )
    if environment_factory is not None:
        as_environment(environment_factory(), tools)  # fails here rather than in the first rollout
        return MultiTurn(engine, lambda: as_environment(environment_factory(), tools), tokenizer, args)
    if tools:
        return MultiTurn(engine, lambda: ToolEnvironment(tools), tokenizer, args)
    return SingleTurn(engine, args)


def described_tools(
    environment_factory: Callable[[], Any] | None,
    tools: Sequence[Callable[..., Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Any]:
    """Return the tools that the chat template describes, those of the environment included; warn if it does not."""
    described: list[Any] = list(tools)
    if environment_factory is not None:
        described = list(getattr(as_environment(environment_factory(), tools), "tools", ()))
    if described and tokenizer.chat_template:
        asked = [{"role": "user", "content": "?"}]
        without = tokenizer.apply_chat_template(asked, tokenize=False)
        if tokenizer.apply_chat_template(asked, tokenize=False, tools=described) == without:
            logger.warning(
                "the chat template leaves out tools: the policy does not learn from its prompt that it has any"
            )
    return described


def with_environment(
    reward_funcs: RewardFunction | Sequence[RewardFunction], environment_factory: Callable[[], Any] | None
) -> list[RewardFunction]:
    """Return the rewards, and after them that of the environment, if it may have one.

    Raises:
        ValueError: there is no reward.
        TypeError: ``environment_factory`` cannot be called.
    """
    rewards = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [cast(RewardFunction, reward_funcs)]
    if environment_factory is not None and not callable(environment_factory):
        raise TypeError(
            f"environment_factory={environment_factory!r} cannot be called; pass the class, or a function that returns "
            "a new environment"
        )
    if environment_factory is not None:
        environment = environment_factory()
        if hasattr(environment, "reward") or hasattr(environment, "get_reward") or hasattr(environment, "rubric"):
            rewards.append(Reward(type(environment).__name__, _environment_rewards))
    if not rewards:
        raise ValueError("reward_funcs is empty; give a reward, or an environment with one")
    return rewards


def _environment_rewards(environment_rewards: Sequence[Any]) -> list[Any]:
    return list(environment_rewards)
