"""Environments: what answers the policy between its turns, and what it may call.

    class Guess:                                       # an environment is an object of three methods
        def reset(self, row):                          # -> the first prompt, or None for that of the row
            self.number = row["number"]

        def step(self, completion):                    # -> text or chat messages to go on with, or None to end
            guess = int(completion)
            return None if guess == self.number else "higher" if guess < self.number else "lower"

        def reward(self):                              # -> the reward of the episode, or None for that of reward_funcs
            return 1.0

Any of the three may be async. One object plays one episode at a time; ``environment_factory`` makes it.

Environments in the form of TRL's ``environment_factory`` (public methods are tools, ``reset(**row)``, ``get_reward()``)
and of the package verifiers are adapted by :func:`as_environment`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sppo.rollout.engine import Prompt

Messages = list[dict[str, Any]]

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_MAX_RESULT_CHARS = 20_000


class Environment(Protocol):
    """An environment plays one episode: reset, then steps, then the reward."""

    def reset(self, row: dict[str, Any]) -> Any:
        """Start an episode.

        Args:
            row: the row of the dataset.

        Returns:
            The first prompt: text or chat messages, or None for the row's own.
        """

    def step(self, completion: str) -> Any:
        """Answer a turn of the policy.

        Args:
            completion: its text, without special tokens.

        Returns:
            What the episode goes on with: text, which is a user message if the prompt is chat messages, or a list of
            messages. None ends the episode.
        """

    def reward(self) -> Any:
        """Return the reward of the episode, which is added to that of ``reward_funcs``; None for no reward."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that the policy wrote."""

    name: str
    arguments: dict[str, Any]


def parse_tool_calls(completion: str) -> list[ToolCall]:
    """Read calls in the form ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Hermes, Qwen).

    A call that is not valid JSON of this form is left out.
    """
    calls = []
    for text in _TOOL_CALL.findall(completion):
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if isinstance(name, str) and isinstance(arguments, dict):
            calls.append(ToolCall(name, arguments))
    return calls


class ToolEnvironment:
    """Runs the tools that the policy calls, and ends where it calls none.

    Tools are your own functions. They run in this process with the arguments that the policy chose; their errors are
    returned to it as text.

    Args:
        tools: functions with type hints and a docstring, with which the chat template describes them, perhaps async.
        parse: reads the calls from a completion.
    """

    def __init__(
        self, tools: Sequence[Callable[..., Any]], parse: Callable[[str], list[ToolCall]] = parse_tool_calls
    ) -> None:
        self.tools = list(tools)
        self._by_name = {tool.__name__: tool for tool in tools}
        self._parse = parse

    def reset(self, row: dict[str, Any]) -> None:
        """See :class:`Environment`; the prompt is that of the row."""

    async def step(self, completion: str) -> Messages | None:
        """See :class:`Environment`; one message of the role ``tool`` per call."""
        calls = self._parse(completion)
        messages = [{"role": "tool", "name": call.name, "content": await self._run(call)} for call in calls]
        return messages or None

    def reward(self) -> None:
        """See :class:`Environment`; there is none."""

    async def _run(self, call: ToolCall) -> str:
        if call.name not in self._by_name:
            return f"error: there is no tool {call.name!r}; there are {', '.join(self._by_name)}"
        try:
            result = self._by_name[call.name](**call.arguments)
            if inspect.isawaitable(result):
                result = await result
            return str(result)[:_MAX_RESULT_CHARS]
        except (Exception, SystemExit) as error:
            return f"error: {type(error).__name__}: {error}"[:_MAX_RESULT_CHARS]


class TRLEnvironment:
    """Adapts an environment of TRL's ``environment_factory``.

    Its public methods but ``reset`` and ``get_reward`` are tools. ``reset(**row)`` may return text, which is added to
    the last message of the prompt.

    Args:
        environment: the environment.
        tools: further tools.
    """

    def __init__(self, environment: Any, tools: Sequence[Callable[..., Any]] = ()) -> None:
        self.environment = environment
        names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
        own = [getattr(environment, n) for n in names if not n.startswith("_") and n not in ("reset", "get_reward")]
        self._tools = ToolEnvironment([*tools, *own])
        self.tools = self._tools.tools

    async def reset(self, row: dict[str, Any]) -> Prompt | None:
        """See :class:`Environment`."""
        observation = self.environment.reset(**row)
        if inspect.isawaitable(observation):
            observation = await observation
        if observation is None:
            return None
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return prompt + observation
        return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + observation}]

    async def step(self, completion: str) -> Messages | None:
        """See :class:`Environment`."""
        return await self._tools.step(completion)

    def reward(self) -> Any:
        """See :class:`Environment`."""
        get_reward = getattr(self.environment, "get_reward", None)
        return None if get_reward is None else get_reward()


class VerifiersEnvironment:
    """Adapts a ``MultiTurnEnv`` of the package verifiers, 0.1.

    Uses its ``init_state``, ``setup_state``, ``env_response``, ``is_completed`` and ``rubric``. Its own clients and
    sampling are not used, and its tool definitions come from the dataset's column ``tools``.

    Args:
        environment: the environment, which is shared: an episode's state is separate.
    """

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.state: Any = None

    async def reset(self, row: dict[str, Any]) -> Prompt | None:
        """See :class:`Environment`."""
        task = {"answer": "", "example_id": 0, **row}
        self.state = await self.environment.init_state(task, client=_unused_client(), model="", sampling_args=None)
        self.state = await self.environment.setup_state(self.state) or self.state
        self.messages: Messages = list(row["prompt"])
        return None

    async def step(self, completion: str) -> Messages | None:
        """See :class:`Environment`."""
        answer = {"role": "assistant", "content": completion}
        self.state["trajectory"].append({"prompt": list(self.messages), "completion": [answer]})
        self.messages.append(answer)
        if await self.environment.is_completed(self.state):
            return None
        added = await self.environment.env_response(list(self.messages), self.state)
        messages = [_as_dict(message) for message in added]
        self.messages += messages
        return messages

    async def reward(self) -> float:
        """See :class:`Environment`; the weighted sum of the rubric."""
        num_prompt = len(self.state["trajectory"][0]["prompt"])
        self.state["completion"] = self.messages[num_prompt:]
        await self.environment.rubric.score_rollout(self.state)
        return self.state["reward"]


def _unused_client() -> Any:
    """Return the client that a state of verifiers must have; nothing is asked of it."""
    try:
        from verifiers.types import ClientConfig
    except ImportError:
        return None
    return ClientConfig()


def _as_dict(message: Any) -> dict[str, Any]:
    fields = message if isinstance(message, dict) else message.model_dump(exclude_none=True)
    return {name: fields[name] for name in ("role", "content", "name") if name in fields}


def as_environment(environment: Any, tools: Sequence[Callable[..., Any]] = ()) -> Environment:
    """Return an environment, adapted if it has the form of TRL's or of verifiers.

    Args:
        environment: see above.
        tools: further tools, for one in TRL's form.

    Raises:
        TypeError: it has none of the forms, or ``tools`` are given for one that does not take them.
    """

    def has(*names: str) -> bool:
        return all(callable(getattr(environment, name, None)) for name in names)

    if has("reset", "step", "reward"):
        if tools:
            raise TypeError("tools are for an environment in TRL's form; call them in step() of your own environment")
        return environment
    if has("env_response", "is_completed"):
        return VerifiersEnvironment(environment)
    if has("reset"):
        return TRLEnvironment(environment, tools)
    raise TypeError(
        f"environment_factory made a {type(environment).__name__}; an environment has the methods reset, step and "
        "reward, those of TRL's environments (reset, and tools), or those of verifiers' MultiTurnEnv"
    )
