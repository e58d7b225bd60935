"""Episodes: one response to each prompt, in one turn, or in several with an environment between them.

    prompt -> policy -> environment -> policy -> ... -> sample

A sample of several turns has the first prompt, which the critic reads, and one response of all that follows. Its
``mask`` tells which tokens the policy wrote.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from sppo.config import SPPOConfig
from sppo.rewards.limits import run_within
from sppo.rewards.worker import RewardError, run_async
from sppo.rollout.engine import ChatPrompt, Prompt, RolloutEngine, Sample, encode, rollout_seed
from sppo.rollout.environments import Environment, Messages
from sppo.rollout.prompts import prompt_of
from sppo_kernels import Support

Row = dict[str, Any]
_ANSWER = "THE ANSWER OF THE ASSISTANT"  # stands for a turn in the chat template


class Episodes(Protocol):
    """Plays episodes."""

    name: str
    """What returned the samples, for messages."""
    tools: list[Any]
    """What the chat template describes to the policy."""
    identity: dict[str, Any]
    """What a resumed run compares: the environment and the tools, if there are any."""
    engine: RolloutEngine
    """What samples the turns."""

    def play(self, rows: Sequence[Row], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """Return one sample per row; see :meth:`sppo.RolloutEngine.generate`."""


class SingleTurn:
    """Episodes of one turn: the engine's completions."""

    def __init__(self, engine: RolloutEngine, args: SPPOConfig) -> None:
        self.engine, self.args = engine, args
        self.name = type(engine).__name__
        self.tools: list[Any] = []
        self.identity: dict[str, Any] = {}

    def play(self, rows: Sequence[Row], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`Episodes`."""
        prompts = [prompt_of(row, self.args) for row in rows]
        return self.engine.generate(prompts, seed=seed, temperature=temperature, batch_size=batch_size)


class MultiTurn:
    """Episodes of up to ``max_turns`` turns of the policy.

    A response has at most ``max_completion_length`` tokens, those of the environment included. It is truncated if the
    episode could not end within that or within the number of turns.

    Args:
        engine: samples the turns; it must accept token ids as prompts, as :func:`sppo.rollout.encode` does.
        make_environment: returns a new environment.
        tokenizer: the policy's.
        args: settings of the run. ``reward_timeout`` limits each call of an environment, in seconds.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        make_environment: Callable[[], Environment],
        tokenizer: PreTrainedTokenizerBase,
        args: SPPOConfig,
    ) -> None:
        self.engine, self.make_environment, self.tokenizer, self.args = engine, make_environment, tokenizer, args
        self.name = type(engine).__name__
        example = make_environment()
        self.tools = list(getattr(example, "tools", ()))
        kind = type(getattr(example, "environment", example))
        names = [str(getattr(tool, "__name__", tool)) for tool in self.tools]
        self.identity = {"environment": f"{kind.__module__}.{kind.__qualname__}", "tools": names}

    def play(self, rows: Sequence[Row], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`Episodes`."""
        episodes = [Episode(row, self.make_environment()) for row in rows]
        firsts = self._call_each(episodes, lambda episode: episode.environment.reset(dict(episode.row)))
        for episode, first in zip(episodes, firsts, strict=True):
            episode.start(first, self.tokenizer, self.args)
        active = [episode for episode in episodes if not episode.ended]
        for turn in range(self.args.max_turns):
            if not active:
                break
            turns = self.engine.generate(
                [episode.next_prompt for episode in active],
                seed=rollout_seed(seed, turn) if turn else seed,
                temperature=temperature,
                batch_size=batch_size,
            )
            for episode, sample in zip(active, turns, strict=True):
                episode.add_turn(sample, self.tokenizer, self.args.max_completion_length)
            active = [episode for episode in active if not episode.ended]
            answers = self._call_each(active, lambda episode: episode.environment.step(episode.last_text))
            is_last = turn == self.args.max_turns - 1
            for episode, answer in zip(active, answers, strict=True):
                episode.add_answer(answer, self.tokenizer, self.args.max_completion_length, is_last=is_last)
            active = [episode for episode in active if not episode.ended]
        finished = [episode for episode in episodes if episode.error is None]
        rewards = self._call_each(finished, lambda episode: episode.environment.reward())
        for episode, reward in zip(finished, rewards, strict=True):
            episode.finish(reward)
        return [episode.sample(self.tokenizer) for episode in episodes]

    def _call_each(self, episodes: Sequence[Episode], function: Callable[[Episode], Any]) -> list[Any]:
        """Call a function for each episode; async ones run concurrently. A failure is returned in place of a result."""
        results: list[Any] = []
        for episode in episodes:
            try:
                results += run_within(self.args.reward_timeout, lambda episode=episode: [_attempt(function, episode)])  # type: ignore[misc]
            except RewardError as error:
                results.append(error)
        waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            found = _in_own_loop(self._gather([results[i] for i in waiting]))
            for i, result in zip(waiting, found, strict=True):
                results[i] = result
        return results

    async def _gather(self, results: Sequence[Any]) -> list[Any]:
        limited = (asyncio.wait_for(result, self.args.reward_timeout) for result in results)
        return await asyncio.gather(*limited, return_exceptions=True)


def _attempt(function: Callable[[Episode], Any], episode: Episode) -> Any:
    """Return the result of a call, or the error that it raises."""
    try:
        return function(episode)
    except (Exception, SystemExit) as error:
        return error


def _in_own_loop(work: Any) -> list[Any]:
    """Run a coroutine, also where this thread has a running event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run_async(work)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run_async, work).result()


@dataclass
class Episode:
    """An episode as far as it has been played."""

    row: Row
    environment: Environment
    prompt: Prompt = ""
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] | None = None
    supports: list[Support] | None = None
    messages: Messages = field(default_factory=list)
    last_text: str = ""
    truncated: bool = False
    ended: bool = False
    reward: Any = None
    error: str | None = None

    def start(self, first: Any, tokenizer: PreTrainedTokenizerBase, args: SPPOConfig) -> None:
        """Begin with the prompt that the environment returned, or with the row's."""
        tools = getattr(self.environment, "tools", ())
        if first is not None and not self._failed("reset", first):
            try:
                self.prompt = prompt_of({**self.row, "prompt": _checked_prompt(first)}, args, tools=tools)
                self.prompt_ids = encode(self.prompt, tokenizer)
                return
            except Exception as error:
                self._failed("reset", error)
        self.prompt = prompt_of(self.row, args, tools=tools)
        self.prompt_ids = encode(self.prompt, tokenizer)

    @property
    def next_prompt(self) -> Prompt:
        """The prompt of the next turn: the first one as it is, later ones as token ids."""
        return self.prompt_ids + self.response_ids if self.response_ids else self.prompt

    def add_turn(self, turn: Sample, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Add a turn of the policy, cut at ``limit`` tokens of the whole response."""
        room = limit - len(self.response_ids)
        tokens = turn.response_ids[:room]
        self._add_engine_results(turn, len(tokens))
        self.response_ids += tokens
        self.mask += [True] * len(tokens)
        is_cut = len(tokens) < len(turn.response_ids)
        text = turn.completion if isinstance(turn.completion, str) else turn.completion[-1]["content"]
        text = str(tokenizer.decode(tokens, skip_special_tokens=True)) if is_cut else text
        self.last_text = text
        self.messages.append({"role": "assistant", "content": text})
        if turn.truncated or is_cut:
            self.truncated = self.ended = True

    def add_answer(self, answer: Any, tokenizer: PreTrainedTokenizerBase, limit: int, *, is_last: bool) -> None:
        """Add what the environment answered, or end."""
        if self._failed("step", answer) or answer is None:
            self.ended = True
            return
        try:
            messages, tokens = self._encoded(answer, tokenizer)
        except Exception as error:
            self._failed("step", error)
            return
        if is_last or len(self.response_ids) + len(tokens) >= limit:
            self.truncated = self.ended = True  # the response ends with what the policy wrote
            return
        self.messages += messages
        self.response_ids += tokens
        self.mask += [False] * len(tokens)
        if self.logprobs is not None:
            self.logprobs += [0.0] * len(tokens)
        if self.supports is not None:
            self.supports.append(Support.of([[]] * len(tokens)))

    def _encoded(self, answer: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[Messages, list[int]]:
        """Return the messages of an answer, and the tokens from the end of the turn to the next one."""
        messages = [{"role": "user", "content": answer}] if isinstance(answer, str) else answer
        if not isinstance(messages, list) or not all(isinstance(each, dict) and "content" in each for each in messages):
            raise TypeError(f"it returned {answer!r}; return text, a list of messages with 'content', or None")
        if not isinstance(self.prompt, str):
            return messages, answer_tokens(messages, tokenizer, ended_by=self.response_ids[-1], prompt=self.prompt)
        text = "".join(message["content"] for message in messages)
        return messages, tokenizer(text, add_special_tokens=False)["input_ids"]

    def finish(self, reward: Any) -> None:
        """Set the reward of the environment."""
        if not self._failed("reward", reward):
            self.reward = reward

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> Sample:
        """Return the sample of the episode."""
        response_ids = self.response_ids or [tokenizer.eos_token_id]  # the environment could not be reset
        is_chat = not isinstance(self.prompt, str)
        text = "" if is_chat else tokenizer.decode(self.response_ids, skip_special_tokens=True)
        return Sample(
            prompt=self.prompt,
            completion=self.messages if is_chat else text,
            prompt_ids=self.prompt_ids,
            response_ids=response_ids,
            truncated=self.truncated,
            mask=self.mask or [True],
            logprobs=self.logprobs,
            support=None if self.supports is None else Support.cat(self.supports),
            columns={
                "environments": getattr(self.environment, "environment", self.environment),
                "environment_rewards": self.reward,
            },
            error=self.error,
        )

    def _add_engine_results(self, turn: Sample, count: int) -> None:
        if turn.logprobs is not None:
            self.logprobs = (self.logprobs or []) + turn.logprobs[:count]
        if turn.support is not None:
            given = turn.support
            support = Support(*map(torch.as_tensor, given)) if isinstance(given, tuple) else Support.of(given)
            first = torch.arange(len(support.sizes())) < count
            self.supports = [*(self.supports or []), support.select(first)]

    def _failed(self, call: str, result: Any) -> bool:
        """Record the failure of a call of the environment, if its result is one."""
        if not isinstance(result, BaseException):
            return False
        frames = traceback.extract_tb(result.__traceback__)
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        text = str(result) or type(result).__name__
        kind = "" if isinstance(result, RewardError) else f"raised {type(result).__name__}: "
        self.error = f"environment {type(self.environment).__name__}: {call} {kind}{text}{where}"
        self.ended = True
        return True


def _checked_prompt(prompt: Any) -> Prompt:
    if not prompt or not isinstance(prompt, str | list):
        raise TypeError(f"it returned {prompt!r}; return text or chat messages that are not empty, or None")
    return prompt


def answer_tokens(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, ended_by: int, prompt: Prompt
) -> list[int]:
    """Return the tokens between the last one of a turn and the first one of the next, by the chat template.

    Args:
        messages: what the environment answered.
        tokenizer: has the template.
        ended_by: the last token of the turn, usually one that ends it.
        prompt: the first prompt, for its arguments of the template.

    Raises:
        ValueError: the template leaves out the turn before the last message.
    """
    settings = prompt.template_kwargs if isinstance(prompt, ChatPrompt) else {}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}, *messages]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **settings))
    _, found, after = text.rpartition(_ANSWER)
    if not found:
        raise ValueError("the chat template leaves out earlier turns of the assistant; use one that keeps them")
    end = str(tokenizer.decode([ended_by], skip_special_tokens=False))
    return tokenizer(after.removeprefix(end), add_special_tokens=False)["input_ids"]
