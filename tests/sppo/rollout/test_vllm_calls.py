"""How the engine in this process calls vLLM, with a stand-in that records the calls."""

import sys

import pytest
import vllm_stand_in
from tiny_models import char_tokenizer, tiny_model

from sppo.rollout import make_engine

WEIGHTS = len(list(tiny_model().named_parameters(remove_duplicate=False)))


def stand_in(monkeypatch, **settings):
    module = vllm_stand_in.recording_module(**settings)
    for name in ("vllm", "vllm.platforms"):
        monkeypatch.setitem(sys.modules, name, module)


def make(engine_settings=None, **settings):
    given = {"max_completion_length": 8} | settings
    return make_engine("vllm", tiny_model(), char_tokenizer(), engine_settings or {}, **given)


def sample(engine):
    return engine.generate(["1+2=", "7", "8"], seed=0, temperature=1.0, batch_size=3)


def test_weights_and_cache_sleep_while_learning(monkeypatch):
    stand_in(monkeypatch)
    engine = make({"enable_sleep_mode": True})
    assert engine.llm.settings["enable_sleep_mode"]
    assert engine.llm.calls == [("sleep", 2)]  # already while the first critic values are computed
    for _ in range(2):
        engine.llm.calls.clear()
        assert [s.response_ids for s in sample(engine)] == [[5, 1]] * 3
        assert engine.llm.calls == [
            ("wake_up", "weights"),
            ("reload_weights", WEIGHTS),
            ("wake_up", "kv_cache"),
            ("reset_prefix_cache",),
            ("generate", 3),
            ("sleep", 2),
        ]


def test_it_stays_awake_otherwise(monkeypatch):
    stand_in(monkeypatch, has_sleep_mode=False)
    engine = make()
    sample(engine)
    assert [name for name, *_ in engine.llm.calls] == ["reload_weights", "reset_prefix_cache", "generate"]
    assert "enable_sleep_mode" not in engine.llm.settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_sleep_mode": True}, "vllm_enable_sleep_mode=True: vLLM has no sleep mode on cpu; leave it False"),
        ({"tensor_parallel_size": 2}, r"{'tensor_parallel_size': 2}: .*use vllm_mode='server'"),
        ({"pipeline_parallel_size": 2}, r"{'pipeline_parallel_size': 2}: .*use vllm_mode='server'"),
    ],
)
def test_what_vllm_cannot_do_here_is_named(monkeypatch, settings, message):
    stand_in(monkeypatch, has_sleep_mode=False)
    with pytest.raises(ValueError, match=message):
        make(settings)


def test_finished_requests_are_reported(monkeypatch):
    stand_in(monkeypatch)
    engine, reports = make(), []
    engine.on_progress = lambda *numbers: reports.append(numbers)
    sample(engine)
    assert reports == [(2, 3), (3, 3)]
    assert "step" not in vars(engine.llm)  # it is restored


def test_arguments_of_the_sampling(monkeypatch):
    stand_in(monkeypatch)
    plain = make()._sampling(3, 0.5)
    assert (plain.detokenize, plain.seed, plain.temperature, hasattr(plain, "stop")) == (False, 3, 0.5, False)
    engine = make(stop_strings=["a b"], generation_kwargs={"presence_penalty": 0.5})
    given = engine._sampling(3, 0.5)
    assert (given.stop, given.include_stop_str_in_output, given.presence_penalty) == (["a b"], True, 0.5)
    assert given.detokenize
    assert not given.skip_special_tokens
    assert (make().llm.settings["skip_tokenizer_init"], engine.llm.settings["skip_tokenizer_init"]) == (True, False)
    with pytest.raises(ValueError, match=r"vLLM's SamplingParams has no 'presence'; did you mean 'presence_penalty'"):
        make(generation_kwargs={"presence": 1.0})
