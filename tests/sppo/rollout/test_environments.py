"""Environments: tools, and the forms of TRL and verifiers."""

import asyncio

import datasets
import pytest

from sppo.rollout.environments import (
    ToolCall,
    ToolEnvironment,
    TRLEnvironment,
    VerifiersEnvironment,
    as_environment,
    parse_tool_calls,
)


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


async def shout(text: str) -> str:
    """Shout."""
    return text.upper()


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def step(environment, completion):
    return asyncio.run(environment.step(completion))


@pytest.mark.parametrize(
    ("completion", "calls"),
    [
        (call("add", '{"a": 1}'), [ToolCall("add", {"a": 1})]),
        (f"I think.{call('a', '{}')}{call('b', '{}')}", [ToolCall("a", {}), ToolCall("b", {})]),
        ('<tool_call>{"name": "f"}</tool_call>', [ToolCall("f", {})]),
        (call("f", '{"x": {"y": 1}}'), [ToolCall("f", {"x": {"y": 1}})]),
        ("<tool_call>not json</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"arguments": {}}</tool_call>', []),
        (call("f", "[1]"), []),
        ('<tool_call>{"name": "f"}', []),
        ("", []),
    ],
)
def test_calls_are_read_from_a_completion(completion, calls):
    assert parse_tool_calls(completion) == calls


def test_tools_run_and_their_errors_are_told_to_the_policy():
    environment = ToolEnvironment([add, shout])
    assert environment.reset({"prompt": "p"}) is None
    assert step(environment, call("add", '{"a": 2}')) == [{"role": "tool", "name": "add", "content": "3"}]
    assert step(environment, call("shout", '{"text": "hi"}'))[0]["content"] == "HI"
    assert step(environment, call("sub", "{}"))[0]["content"] == "error: there is no tool 'sub'; there are add, shout"
    assert "error: TypeError: add() missing 1 required" in step(environment, call("add", "{}"))[0]["content"]
    assert len(step(environment, call("shout", f'{{"text": "{"a" * 30_000}"}}'))[0]["content"]) == 20_000
    assert step(environment, "the answer is 3") is None
    assert environment.reward() is None


class Counter:
    """In the form of TRL's environment_factory."""

    def reset(self, prompt, start, **row):
        self.count = start
        return f" from {start}"

    def increment(self, by: int) -> int:
        """Increment the counter.

        Args:
            by: how far.
        """
        self.count += by
        return self.count

    def get_reward(self):
        return float(self.count == 5)

    def _private(self):
        raise AssertionError


def test_an_environment_of_trl_is_adapted():
    environment = as_environment(Counter(), [add])
    assert isinstance(environment, TRLEnvironment)
    prompt = asyncio.run(environment.reset({"prompt": [{"role": "user", "content": "count"}], "start": 2}))
    assert prompt == [{"role": "user", "content": "count from 2"}]
    assert [tool.__name__ for tool in environment.tools] == ["add", "increment"]
    assert step(environment, call("increment", '{"by": 3}'))[0]["content"] == "5"
    assert environment.reward() == 1.0


class Rubric:
    async def score_rollout(self, state):
        state["reward"] = float(len(state["completion"])) / 4


class Verifiers:
    """The part of verifiers' MultiTurnEnv that is used."""

    rubric = Rubric()

    async def init_state(self, task, client, model, sampling_args):
        return {"task": task, "trajectory": []}

    async def setup_state(self, state):
        state["ready"] = True

    async def is_completed(self, state):
        return len(state["trajectory"]) == 2

    async def env_response(self, messages, state):
        assert messages[-1]["role"] == "assistant"
        return [{"role": "user", "content": "again", "extra": 1}]


def test_an_environment_of_verifiers_is_adapted():
    environment = as_environment(Verifiers())
    assert isinstance(environment, VerifiersEnvironment)

    async def episode():
        await environment.reset({"prompt": [{"role": "user", "content": "p"}]})
        assert environment.state["ready"]
        assert environment.state["task"]["answer"] == ""
        assert await environment.step("one") == [{"role": "user", "content": "again"}]
        assert await environment.step("two") is None
        return await environment.reward()

    assert asyncio.run(episode()) == 0.75  # two answers and one message of three


def test_an_environment_of_the_package_verifiers_is_adapted():
    vf = pytest.importorskip("verifiers", minversion="0.1.14")

    class Guess(vf.MultiTurnEnv):
        async def env_response(self, messages, state, **kwargs):
            return [{"role": "user", "content": "lower"}]

    def solved(completion, answer, **kwargs):
        return float(completion[-1]["content"] == answer)

    prompts = [[{"role": "user", "content": "?"}]]
    dataset = datasets.Dataset.from_dict({"prompt": prompts, "answer": ["3"]})
    environment = as_environment(Guess(max_turns=2, dataset=dataset, rubric=vf.Rubric(funcs=[solved])))

    async def episode():
        await environment.reset(dict(dataset[0]))
        assert await environment.step("5") == [{"role": "user", "content": "lower"}]
        assert await environment.step("3") is None
        return await environment.reward()

    assert asyncio.run(episode()) == 1.0


def test_something_else_is_refused():
    with pytest.raises(TypeError, match="made a dict; an environment has the methods"):
        as_environment({})
    with pytest.raises(TypeError, match="tools are for an environment in TRL's form"):
        as_environment(type("Own", (), {n: lambda *a: None for n in ("reset", "step", "reward")})(), [add])
