import pytest
import torch
from older_transformers import skip_if_old
from tiny_models import char_tokenizer, tiny_model
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sppo.rollout import HFRollout, encode, engine_class, make_engine, rollout_seed
from sppo.rollout.continuous import ContinuousRollout

PROMPTS = ["1+2=", "7", "12+34="]


def engine(model=None, **settings):
    return HFRollout(model or tiny_model(), char_tokenizer(), **({"max_completion_length": 8} | settings))


def sample(engine, seed=1, prompts=PROMPTS, temperature=1.0, batch_size=3):
    samples = engine.generate(prompts, seed=seed, temperature=temperature, batch_size=batch_size)
    return [s.response_ids for s in samples]


def test_a_rollout_is_a_function_of_weights_and_seed():
    rollout = engine()
    before = torch.random.get_rng_state()
    first = sample(rollout)
    assert before.equal(torch.random.get_rng_state())
    torch.manual_seed(99)
    assert sample(rollout) == first
    assert sample(rollout, seed=2) != first


def test_responses_end_with_eos_or_are_truncated():
    rollout = engine(max_completion_length=40)
    samples = rollout.generate(PROMPTS * 20, seed=0, temperature=2.0, batch_size=60)
    ended = [s for s in samples if not s.truncated]
    assert 0 < len(ended) < 60
    assert all(s.response_ids.index(1) == len(s.response_ids) - 1 for s in ended)
    assert all(len(s.response_ids) == 40 and 1 not in s.response_ids for s in samples if s.truncated)
    assert all("<eos>" not in s.completion for s in samples)


def test_greedy_does_not_depend_on_padding_or_batch():
    rollout = engine()
    together = sample(rollout, temperature=0)
    assert sample(rollout, temperature=0, batch_size=1) == together
    model = rollout.policy
    for prompt, response in zip(PROMPTS, together, strict=True):
        ids = encode(prompt, rollout.tokenizer)
        for token in response:
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


def test_the_models_own_sampling_settings_are_ignored():
    model = tiny_model()
    plain = sample(engine(model))
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, eos_token_id=[5, 6], pad_token_id=0)
    model.generation_config = own
    rollout = engine(model)
    assert rollout.eos_ids == {1, 5, 6}  # but its other end-of-sequence tokens count
    rollout.eos_ids = {1}
    assert sample(rollout) == plain
    assert model.generation_config is own


def test_temperature_one_matches_the_models_probabilities():
    model = tiny_model()
    first = [ids[0] for ids in sample(engine(model, max_completion_length=1), prompts=["3+4="] * 4000, batch_size=4000)]
    expected = model(torch.tensor([encode("3+4=", char_tokenizer())])).logits[0, -1].softmax(-1)
    seen = torch.bincount(torch.tensor(first), minlength=len(expected)) / 4000
    assert (seen - expected).abs().max() < 0.04


def test_chat_prompts_go_through_the_template():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    prompt = [{"role": "user", "content": "1+2"}]
    assert encode(prompt, tokenizer) == encode("1+2=", tokenizer)
    rollout = HFRollout(tiny_model(), tokenizer, max_completion_length=3)
    (sample,) = rollout.generate([prompt], seed=0, temperature=1.0, batch_size=1)
    assert [m["role"] for m in sample.completion] == ["assistant"]


def test_an_empty_prompt_is_rejected():
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        encode("", char_tokenizer())


def test_seeds_differ():
    assert len({rollout_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def test_a_static_cache_gives_the_same():
    assert sample(engine(cache_implementation="static"), temperature=0) == sample(engine(), temperature=0)


WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}  # in transformers' order
TRUNCATIONS = [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.8, "min_p": 0.15}]


@torch.no_grad()
def check_support(policy, sample, truncation, temperature=0.7):
    """Compare with the tokens that transformers' warpers leave of the model's own logits.

    Returns:
        Log-probabilities of the response over these tokens.
    """
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logits = policy(ids).logits[0, len(sample.prompt_ids) - 1 : -1]
    truncating = [warper(truncation[name]) for name, warper in WARPERS.items() if name in truncation]
    scores = LogitsProcessorList([TemperatureLogitsWarper(temperature), *truncating])(ids, logits)
    token_ids, offsets = sample.support
    assert (token_ids.dtype, offsets.dtype) == (torch.int32, torch.int64)
    kept = [part.tolist() for part in token_ids.split(offsets.diff().tolist())]
    assert kept == [row.isfinite().nonzero()[:, 0].tolist() for row in scores]
    return scores.log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_the_support_is_what_transformers_warpers_leave(truncation, cache):
    rollout = engine(**truncation, cache_implementation=cache, max_completion_length=20)
    samples = rollout.generate(PROMPTS * 8, seed=1, temperature=0.7, batch_size=7)  # the last batch is smaller
    assert {s.truncated for s in samples} == {False, True}  # rows that end early go on as padding
    assert len({len(s.response_ids) for s in samples}) > 2
    for s in samples:
        check_support(rollout.policy, s, truncation)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_recording_the_support_does_not_change_the_samples(truncation, temperature):
    recorded, plain = (
        sample(engine(**truncation, return_support=recorded), temperature=temperature) for recorded in (True, False)
    )
    assert recorded == plain


@pytest.mark.parametrize(
    ("settings", "temperature"), [({}, 1.0), ({"top_k": 5}, 0.0), ({"top_k": 5, "return_support": False}, 1.0)]
)
@pytest.mark.parametrize("kind", ["hf", pytest.param("continuous", marks=pytest.mark.slow)])
def test_no_support_without_truncation(kind, settings, temperature):
    rollout = (engine if kind == "hf" else continuous)(**settings)
    assert all(s.support is None for s in rollout.generate(PROMPTS, seed=0, temperature=temperature, batch_size=3))


def continuous(**settings):
    skip_if_old()
    settings = {"max_completion_length": 8, "num_blocks": 8, "page_size": 16, "max_batch_tokens": 64} | settings
    return ContinuousRollout(tiny_model(), char_tokenizer(), **settings)


@pytest.mark.slow
def test_continuous_batching_samples_the_policy():
    """Greedy responses equal those of generate(); the log-probabilities of sampled ones are the model's."""
    rollout = continuous()
    assert sample(rollout, temperature=0) == sample(engine(), temperature=0)
    prompts = PROMPTS * 4  # more than fit at once
    samples = rollout.generate(prompts, seed=1, temperature=0.7, batch_size=2)
    assert [s.prompt for s in samples] == prompts
    assert len({tuple(s.response_ids) for s in samples}) > len(PROMPTS)
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        logits = rollout.policy(ids).logits[0, len(s.prompt_ids) - 1 : -1] / 0.7
        own = logits.log_softmax(-1).gather(1, ids[0, len(s.prompt_ids) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(s.logprobs), own, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"per_request_processors": True}, {"num_blocks": 3}, {"max_batch_tokens": 8}])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_continuous_batching_records_its_support(truncation, settings):
    """Also where a prompt is split over steps, and where requests are put back because the cache is full."""
    rollout = continuous(**truncation, **settings, max_completion_length=20)
    samples = rollout.generate(PROMPTS * 4, seed=1, temperature=0.7, batch_size=5)
    assert {s.truncated for s in samples} == {False, True}
    for s in samples:
        own = check_support(rollout.policy, s, truncation)
        torch.testing.assert_close(torch.tensor(s.logprobs), own, rtol=1e-4, atol=1e-4)
    assert "init_continuous_batching" not in vars(rollout.policy)


def test_continuous_batching_with_other_internals_says_so(monkeypatch):
    rollout = continuous(top_k=5)
    monkeypatch.setattr(type(rollout.policy), "init_continuous_batching", lambda *_, **__: object())
    with pytest.raises(RuntimeError, match=r"cannot record the sampling support with transformers .*has no attribute"):
        rollout.generate(PROMPTS, seed=0, temperature=1.0, batch_size=3)


def test_continuous_batching_cannot_record_asynchronous_steps():
    with pytest.raises(ValueError, match=r"use_async_batching=True prepares a step before .* leave it out"):
        continuous(top_k=5, use_async_batching=True)
    continuous(use_async_batching=True)
    continuous(top_k=5, use_async_batching=True, return_support=False)


@pytest.mark.slow
def test_continuous_batching_repeats_itself():
    before = torch.random.get_rng_state()
    assert sample(continuous()) == sample(continuous())
    assert sample(continuous()) != sample(continuous(), seed=2)
    assert before.equal(torch.random.get_rng_state())


def test_engines_by_name():
    assert engine_class("hf") is HFRollout
    assert engine_class("continuous") is ContinuousRollout
    assert engine_class("sppo.rollout.hf:HFRollout") is HFRollout
    with pytest.raises(
        ValueError, match="rollout_engine must be one of hf, continuous, vllm, or module:Class, got 'vlm'"
    ):
        engine_class("vlm")


def test_the_error_names_settings_that_an_engine_does_not_have():
    for name in ("hf", "continuous"):
        with pytest.raises(
            ValueError, match=f"rollout_engine_kwargs={{'pages': 3}} does not fit rollout_engine='{name}'"
        ):
            make_engine(name, tiny_model(), char_tokenizer(), {"pages": 3}, max_completion_length=4)
