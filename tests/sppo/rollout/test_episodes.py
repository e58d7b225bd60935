"""Episodes of several turns: tokens, masks, limits, failures, and what the trainer makes of them."""

import asyncio
import logging
import time
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny_models import char_tokenizer
from tiny_run import DATASET, has_a, logged, make

from sppo import HFRollout, Sample
from sppo.config import SPPOConfig
from sppo.rollout.engine import ChatPrompt, encode
from sppo.rollout.environments import ToolEnvironment
from sppo.rollout.episodes import MultiTurn, _in_own_loop, answer_tokens
from sppo.rollout.prompts import prompt_of
from sppo_kernels import Support

TEMPLATE = (
    "{% for t in tools or [] %}T{% endfor %}{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def chat_tokenizer():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Script:
    """An engine that says given texts, turn by turn, with log-probabilities and supports of its own."""

    def __init__(self, *turns, end=1):
        self.turns, self.end, self.asked = list(turns), end, []

    def generate(self, prompts, *, seed, temperature, batch_size):
        self.asked.append((list(prompts), seed))
        ids = char_tokenizer()(self.turns.pop(0), add_special_tokens=False)["input_ids"]
        ids = ids + ([] if self.end is None else [self.end])
        return [
            Sample(
                prompt=prompt,
                completion="".join(char_tokenizer().convert_ids_to_tokens([i for i in ids if i != 1])),
                prompt_ids=encode(prompt, chat_tokenizer()),
                response_ids=list(ids),
                truncated=self.end is None,
                logprobs=[-0.5] * len(ids),
                support=[[i, 3] if i != 3 else [3] for i in ids],
            )
            for prompt in prompts
        ]


class Echo:
    """Repeats what it hears, twice, and gives the number of turns as the reward."""

    def reset(self, row):
        self.heard = []
        return row.get("first")

    def step(self, completion):
        self.heard.append(completion)
        return f"-{completion}-" if len(self.heard) < 3 else None

    def reward(self):
        return len(self.heard) / 4


class Brief(HFRollout):
    """Ends each turn after two tokens, which a model of random weights seldom does."""

    def generate(self, *args, **kwargs):
        samples = super().generate(*args, **kwargs)
        for sample in samples:
            sample.response_ids, sample.truncated = [*sample.response_ids[:2], 1], False
            sample.completion = self.tokenizer.decode(sample.response_ids, skip_special_tokens=True)
            if sample.support is not None:
                first = torch.arange(len(sample.support.sizes())) < 2
                sample.support = Support.cat([sample.support.select(first), Support.of([[]] * (3 - int(first.sum())))])
        return samples


def play(engine, environment=Echo, tokenizer=None, rows=({"prompt": "1+2="},), **settings):
    args = SPPOConfig("out", use_cpu=True, **({"max_completion_length": 40} | settings))
    episodes = MultiTurn(engine, environment, tokenizer or char_tokenizer(), args)
    return episodes.play(rows, seed=5, temperature=1.0, batch_size=8)


def text(ids):
    return "".join(char_tokenizer().convert_ids_to_tokens(list(ids)))


def test_a_sample_has_all_turns_with_a_mask_of_those_of_the_policy():
    engine = Script("ab", "c", "d")
    (sample,) = play(engine)
    assert text(sample.response_ids) == "ab<eos>-ab-c<eos>-c-d<eos>"
    written = [token for token, own in zip(sample.response_ids, sample.mask, strict=True) if own]
    assert text(written) == "ab<eos>c<eos>d<eos>"
    assert text(sample.prompt_ids) == "1+2="
    assert (sample.num_policy_tokens, sample.num_turns, sample.truncated) == (7, 3, False)
    assert sample.logprobs == [-0.5 if own else 0.0 for own in sample.mask]
    support = Support(*sample.support)
    assert [bool(n) for n in support.sizes()] == sample.mask
    assert sample.columns["environment_rewards"] == 0.75


def test_later_turns_continue_from_exactly_the_same_tokens():
    engine = Script("ab", "c", "d")
    (sample,) = play(engine)
    (first, _), (second, _), (third, _) = engine.asked
    assert first == ["1+2="]
    assert text(second[0]) == "1+2=ab<eos>-ab-"
    assert text(third[0]) == "1+2=ab<eos>-ab-c<eos>-c-"
    assert (sample.prompt_ids + sample.response_ids)[: len(third[0])] == third[0]
    assert len({seed for _, seed in engine.asked}) == 3


def test_chat_answers_go_through_the_template():
    engine = Script("ab", "c", "d")
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}]
    (sample,) = play(engine, tokenizer=chat_tokenizer(), rows=rows)
    whole = "ab<eos><u>-ab-<a>c<eos><u>-c-<a>d<eos>"
    assert sample.response_ids == chat_tokenizer()(whole, add_special_tokens=False)["input_ids"]
    assert [m["role"] for m in sample.completion] == ["assistant", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in sample.completion] == ["ab", "-ab-", "c", "-c-", "d"]


def test_the_end_of_a_turn_is_not_repeated():
    tokenizer = chat_tokenizer()
    with_end = answer_tokens([{"role": "user", "content": "b"}], tokenizer, ended_by=1, prompt=[])
    without = answer_tokens([{"role": "user", "content": "b"}], tokenizer, ended_by=5, prompt=[])
    assert without == [1, *with_end]
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="the chat template leaves out earlier turns of the assistant"):
        answer_tokens([{"role": "user", "content": "b"}], tokenizer, ended_by=1, prompt=[])


@pytest.mark.parametrize(
    ("settings", "end", "expected"),
    [
        ({"max_completion_length": 8}, 1, "ab<eos>-ab-c"),  # the second turn is cut
        ({"max_completion_length": 7}, 1, "ab<eos>"),  # the answer leaves no room for a turn
        ({"max_turns": 2}, 1, "ab<eos>-ab-c<eos>"),
        ({}, None, "ab"),  # the engine's own limit
    ],
)
def test_limits_end_an_episode_with_what_the_policy_wrote(settings, end, expected):
    (sample,) = play(Script("ab", "c", "d", end=end), **settings)
    assert text(sample.response_ids) == expected
    assert sample.truncated
    assert sample.mask[-1]
    assert len(sample.mask) == len(sample.logprobs) == len(sample.response_ids)


def test_an_environment_may_be_async_and_choose_the_first_prompt():
    class Slow(Echo):
        async def reset(self, row):
            self.heard = []
            return "9="

        async def step(self, completion):
            await asyncio.sleep(0.05)
            return super().step(completion)

        async def reward(self):
            return 0.25

    samples = play(Script("a", "b", "c"), Slow, rows=[{"prompt": "1="}] * 20)
    assert {(s.prompt, s.columns["environment_rewards"]) for s in samples} == {("9=", 0.25)}


@pytest.mark.parametrize("method", ["reset", "step", "reward"])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_failure_of_an_environment_costs_only_its_sample(method, hangs):
    class Broken(Echo):
        pass

    def fail(self, *args):
        if hangs:
            while True:
                pass
        raise KeyError("lost")

    setattr(Broken, method, fail)
    made = [Echo(), Echo(), Broken()]  # the first one shows what kind they are
    settings = {"reward_timeout": 0.3} if hangs else {}
    good, bad = play(Script("a", "b", "c"), lambda: made.pop(0), rows=[{"prompt": "1="}] * 2, **settings)
    assert good.error is None
    reason = "took longer than 0.3 s" if hangs else "raised KeyError: 'lost' (test_episodes.py:"
    assert f"environment Broken: {method} {reason}" in bad.error
    assert any(bad.mask)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (5, "it returned 5; return text, a list of messages with 'content', or None"),
        ({"role": "user", "content": "x"}, "return text, a list of messages"),
        ([{"role": "user"}], "return text, a list of messages"),
    ],
)
def test_an_answer_of_another_kind_costs_only_its_sample(answer, reason):
    class Wrong(Echo):
        def step(self, completion):
            return answer

    (sample,) = play(Script("a"), Wrong)
    assert sample.error.startswith("environment Wrong: step raised TypeError: ")
    assert reason in sample.error


@pytest.mark.parametrize("prompt", ["", 3])
def test_a_prompt_of_another_kind_costs_only_its_sample(prompt):
    class Wrong(Echo):
        def reset(self, row):
            return prompt

    (sample,) = play(Script("a"), Wrong)
    assert "reset raised TypeError: it returned" in sample.error


def test_an_environment_that_exits_does_not_end_the_run():
    class Leaving(Echo):
        def step(self, completion):
            raise SystemExit(3)

    (sample,) = play(Script("a"), Leaving)
    assert "step raised SystemExit: 3" in sample.error


def test_a_turn_that_is_cut_has_the_text_of_the_tokens_that_are_left():
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}]
    engine = Script("ab", "0123456789")
    (sample,) = play(engine, tokenizer=chat_tokenizer(), rows=rows, max_completion_length=18)
    assert sample.truncated
    assert sample.completion[-1]["content"].replace(" ", "") == text(sample.response_ids)[-5:] == "01234"


# In training


@pytest.mark.parametrize("algorithm", ["sppo", "ppo", "grpo", "spo"])
def test_every_kind_of_algorithm_trains_on_masked_responses(tmp_path, algorithm):
    settings = {"algorithm": algorithm, "max_completion_length": 12, "num_iterations": 2}
    trainer = with_environment(make, tmp_path, Echo, top_k=5, **settings)
    trainer.train()
    assert any(not all(s.mask) for s in trainer.rollouts.samples)
    for batch in (b for update in trainer.rollouts.updates for b in update.micro_batches):
        count = len(batch["response_ids"])
        assert len(batch["response_index"]) == count == batch["response_cu_seqlens"][-1]
        assert len(batch["support_offsets"]) == count + 1
    assert all(0 <= outside < 1e-6 for outside in logged(trainer, "support_outside"))


def with_environment(make, tmp_path, environment, reward=has_a, **settings):
    from tiny_models import tiny_model

    from sppo import SPPOTrainer

    model = make(tmp_path, rollout_engine=f"{__file__}:Brief", **settings)
    return SPPOTrainer(
        tiny_model(),
        reward,
        args=replace(model.args, reward_weights=[0.5, 0.5]) if reward else model.args,
        train_dataset=DATASET,
        processing_class=char_tokenizer(),
        environment_factory=environment,
    )


def test_values_of_a_token_critic_are_those_before_the_policys_tokens(tmp_path):
    trainer = with_environment(make, tmp_path, Echo, algorithm="ppo", max_completion_length=12, max_steps=1)
    trainer.train()
    sample = next(s for s in trainer.rollouts.samples if not all(s.mask))
    whole = Sample(**{**vars(sample), "mask": None})
    critic = trainer.model.critic
    (some,), (all_,) = critic.values([sample]), critic.values([whole])
    assert some.equal(all_[torch.tensor(sample.mask)])


def test_the_reward_of_the_environment_is_added_and_logged(tmp_path):
    class Half(Echo):
        def reward(self):
            return 0.5

    trainer = with_environment(make, tmp_path, Half, reward=(), max_steps=1)
    trainer.train()
    assert logged(trainer, "reward") == logged(trainer, "rewards/Half") == [0.5]


def test_a_failed_episode_is_logged_and_left_out(tmp_path, caplog):
    class Broken(Echo):
        def step(self, completion):
            raise RuntimeError("no such move")

    trainer = with_environment(make, tmp_path, Broken, reward=has_a, max_steps=1)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        trainer.train()
    assert sum(logged(trainer, "rejected_rewards")) > 0


def test_a_resumed_run_of_several_turns_has_the_same_bits(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_completion_length": 12}
    whole = with_environment(make, tmp_path / "whole", Echo, max_steps=4, **settings)
    whole.train()
    with_environment(make, tmp_path / "part", Echo, max_steps=2, **settings).train()
    rest = with_environment(make, tmp_path / "part", Echo, max_steps=4, **settings)
    rest.train(resume_from_checkpoint=True)
    assert all(a.equal(b) for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True))


# The chat template


def test_arguments_of_the_template_come_from_settings_and_columns():
    chat = [{"role": "user", "content": "hi"}]
    args = SimpleNamespace(chat_template_kwargs={"enable_thinking": False, "x": 1})
    assert prompt_of({"prompt": "text"}, args) == "text"
    prompt = prompt_of({"prompt": chat, "chat_template_kwargs": {"x": 2, "unset": None}}, args)
    assert (list(prompt), prompt.template_kwargs) == (chat, {"enable_thinking": False, "x": 2})
    assert prompt_of({"prompt": chat}, SimpleNamespace(chat_template_kwargs=None)) is chat
    described = prompt_of({"prompt": chat, "tools": '[{"name": "f"}]'}, SimpleNamespace(chat_template_kwargs=None))
    assert described.template_kwargs == {"tools": [{"name": "f"}]}
    tokenizer = chat_tokenizer()
    plain = encode(chat, tokenizer)
    assert encode(described, tokenizer) != plain == encode(ChatPrompt(chat, {}), tokenizer)
    assert encode([5, 6], tokenizer) == [5, 6]


def test_settings_of_the_template_need_chat_prompts(tmp_path):
    with pytest.raises(ValueError, match="chat_template_kwargs is for the chat template, and the prompts are text"):
        make(tmp_path, chat_template_kwargs={"enable_thinking": False})


def test_a_prompts_length_includes_the_tools(tmp_path):
    from tiny_models import tiny_model

    from sppo import SPPOTrainer

    def look(place: str) -> str:
        """Look at a place.

        Args:
            place: where.
        """
        return place

    chats = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "ab"}]] * 8})
    args = make(tmp_path).args
    args.max_prompt_length = len(encode(chats[0]["prompt"], chat_tokenizer()))
    common = {"args": args, "train_dataset": chats, "processing_class": chat_tokenizer()}
    SPPOTrainer(tiny_model(), has_a, **common)
    with pytest.raises(ValueError, match="leaves no prompt of 8"):
        SPPOTrainer(tiny_model(), has_a, tools=[look], **common)


def test_tools_of_an_environment_without_calls_end_the_episode():
    (sample,) = play(Script("ab"), lambda: ToolEnvironment([]))
    assert (sample.num_turns, sample.truncated) == (1, False)


def test_a_resumed_run_has_the_same_environment(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_completion_length": 12}
    with_environment(make, tmp_path, Echo, max_steps=1, **settings).train()
    other = type("Other", (Echo,), {})
    with pytest.raises(ValueError, match="is a checkpoint of another run"):
        with_environment(make, tmp_path, other, max_steps=2, **settings).train(resume_from_checkpoint=True)


def test_prompts_of_an_environment_are_named_by_their_row(tmp_path):
    """So that SPO draws by what it learned of a row, although reset() changes its text."""

    class Longer(Echo):
        def reset(self, row):
            self.heard = []
            return row["prompt"] + "1"

    trainer = with_environment(make, tmp_path, Longer, algorithm="spo", max_steps=2, max_completion_length=12)
    trainer.train()
    assert set(trainer.algorithm.state) <= set(trainer.rollouts.sampler.prompts._names)
    choosing = with_environment(make, tmp_path, Longer, max_steps=1, prompt_value_range=[0.1, 0.9])
    with pytest.raises(ValueError, match="the environment replaced one in reset"):
        choosing.train()


def test_a_factory_that_is_no_function_is_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot be called; pass the class, or a function that returns a new env"):
        with_environment(make, tmp_path, Echo())


def test_a_thread_that_outlives_the_time_limit_is_not_waited_for():
    async def stuck():
        await asyncio.wait_for(asyncio.to_thread(time.sleep, 3), 0.1)

    start = time.monotonic()
    with pytest.raises(TimeoutError):
        _in_own_loop(stuck())
    assert time.monotonic() - start < 2
