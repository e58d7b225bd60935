"""The engine on a vLLM server, against a stand-in for the server; test_vllm.py has a real one."""

import socket
import threading
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from tiny_models import char_tokenizer, tiny_model
from tiny_run import has_a, logged, make
from vllm_http_stand_in import serving

from sppo import SPPOConfig
from sppo.rollout import make_engine
from sppo.rollout.generation import engine_settings, sampling_settings
from sppo.rollout.vllm_serve import command
from sppo.rollout.vllm_server import ServerError

PROMPTS = ["1+2=", "7", "12+34="]
RANKS = Path(__file__).parents[2] / "helpers" / "vllm_server_ranks_run.py"


def engine(url, model=None, timeout=5.0, own=None, **settings):
    args = SPPOConfig(
        "unused",
        use_cpu=True,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        vllm_server_timeout=timeout,
        rollout_engine_kwargs=own,
        max_completion_length=8,
        **settings,
    )
    name, own_settings = engine_settings(args, bf16=False)
    return make_engine(name, model or tiny_model(), char_tokenizer(), own_settings, **sampling_settings(args))


def sample(rollout, seed=0, temperature=0.7):
    return rollout.generate(PROMPTS, seed=seed, temperature=temperature, batch_size=1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_receive_the_weights_before_each_rollout(num_workers):
    with serving(num_workers) as server:
        rollout = engine(server.url)
        for i in range(2):
            server.calls.clear()
            with torch.no_grad():
                rollout.policy.model.norm.weight.add_(1.0)
            sample(rollout)
            weights = dict(rollout.policy.named_parameters(remove_duplicate=False))
            for worker in server.workers:
                assert worker.weights.keys() == weights.keys()
                assert all(worker.weights[name].equal(weight) for name, weight in weights.items())
            connected = ["sppo_connect"] if i == 0 else []
            assert server.calls == [*connected, "sppo_receive", "/reset_prefix_cache", *["/inference/v1/generate"] * 3]


def test_weights_have_the_precision_of_the_server():
    with serving(dtype="bfloat16") as server:
        sample(rollout := engine(server.url))
        name, weight = "model.norm.weight", rollout.policy.model.norm.weight
        assert server.workers[0].weights[name].dtype == torch.bfloat16
        assert server.workers[0].weights[name].equal(weight.bfloat16())


def test_a_new_run_replaces_the_connection():
    with serving() as server:
        for seed in (0, 1):
            sample(rollout := engine(server.url, tiny_model(seed=seed)))
            assert server.workers[0].weights["lm_head.weight"].equal(rollout.policy.lm_head.weight)


def test_tokens_and_seeds_go_in_and_tokens_come_out():
    with serving() as server:
        rollout, reports = engine(server.url, stop_strings=["a b"], generation_kwargs={"presence_penalty": 0.5}), []
        rollout.on_progress = lambda *numbers: reports.append(numbers)
        samples = sample(rollout, seed=5)
        requests = sorted(server.requests, key=lambda body: body["sampling_params"]["seed"])
    assert [body["token_ids"] for body in requests] == [s.prompt_ids for s in samples]
    assert [body["sampling_params"]["seed"] for body in requests] == [5, 6, 7]
    given = requests[0]["sampling_params"]
    assert (given["temperature"], given["stop"], given["presence_penalty"], given["max_tokens"]) == (
        0.7,
        ["a b"],
        0.5,
        8,
    )
    assert [s.response_ids for s in samples] == [
        [2 + (len(s.prompt_ids) + 5 + i) % 10, 1] for i, s in enumerate(samples)
    ]
    assert [s.logprobs for s in samples] == [[-0.5, -0.5]] * 3
    assert [s.prompt for s in samples] == PROMPTS
    assert reports == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("has_mask", "other"), [(True, 13), (False, 12)])
def test_supports_come_from_the_mask_or_from_candidates(has_mask, other):
    with serving(return_sampling_mask=has_mask) as server:
        rollout = engine(server.url, top_k=5)
        (first, *_) = sample(rollout)
        token_ids, offsets = first.support
        assert (sorted(token_ids.tolist()), offsets.tolist()) == (
            sorted([first.response_ids[0], other, 1, other]),
            [0, 2, 4],
        )
        assert server.requests[0]["sampling_params"]["logprobs"] == (0 if has_mask else 27)
        assert sample(rollout, temperature=0.0)[0].support is None


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"vocab_size": 99}, {}, "serves another model: vocab_size is 99 there, 27 here; start it with the model that"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            {},
            r"architectures is .*Llama.* there, .*Qwen2.* here",
        ),
        ({"logprobs_mode": "raw_logprobs"}, {}, "start it with python -m .*, or --logprobs-mode processed_logprobs"),
        ({"data_parallel_size": 2}, {}, "start it with .*, or --data-parallel-size 1"),
        ({"has_tokenizer": False}, {"stop_strings": ["a"]}, "start it with .*, or without --skip-tokenizer-init"),
        ({"max_logprobs": 20}, {"top_k": 5}, "start it with .*, or --max-logprobs -1"),
        ({}, {"generation_kwargs": {"presence": 1.0}}, "SamplingParams has no 'presence'; did you mean 'presence_pen"),
        ({}, {"own": {"max_model_len": 64}}, "rollout_engine_kwargs=.* does not fit .*'max_model_len'"),
    ],
)
def test_what_the_server_does_not_do_is_named(changes, settings, message):
    with serving(**changes) as server, pytest.raises(ValueError, match=message):
        engine(server.url, **settings)


def test_a_whole_vocabulary_of_candidates_is_refused(monkeypatch):
    monkeypatch.setattr("sppo.rollout.vllm_server._MOST_CANDIDATES", 20)
    with (
        serving() as server,
        pytest.raises(ValueError, match=r"top_k=0: .*of 27 tokens for each; start it with --return-sampling-mask, set"),
    ):
        engine(server.url, top_p=0.9)
    with serving(return_sampling_mask=True) as server:
        engine(server.url, top_p=0.9)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/collective_rpc", 404, "has no endpoints for weights: start it with python -m .*VLLM_SERVER_DEV_MODE=1"),
        ("/collective_rpc", 500, r"cannot receive weights \(.* answered 500: the text\): start it with"),
    ],
)
def test_a_server_without_receivers_is_named(path, status, message):
    with serving() as server:
        server.answers[path] = (status, "the text")
        with pytest.raises(ServerError, match=message):
            engine(server.url)


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/inference/v1/generate", (404, ""), "has no /inference/v1/generate: start it with .*--enable-scale-out"),
        ("/inference/v1/generate", (400, "too long"), "generate answered 400: too long"),
        ("/reset_prefix_cache", (200, '{"success": false}'), "because it still answers other requests"),
    ],
)
def test_failures_of_a_rollout_are_raised(path, answer, message):
    with serving() as server:
        rollout = engine(server.url)
        server.answers[path] = answer
        with pytest.raises(RuntimeError, match=message):
            sample(rollout)


def test_workers_that_fail_do_not_leave_the_trainer_waiting():
    with serving() as server:
        sample(rollout := engine(server.url))
        server.answers["/collective_rpc"] = (500, "out of memory")
        with pytest.raises(ServerError, match="answered 500: out of memory"):
            sample(rollout)


def test_a_trainer_that_fails_does_not_leave_the_workers_waiting(monkeypatch):
    def two_weights(model):
        yield from list(model.named_parameters())[:2]
        raise MemoryError("no memory to merge an adapter")

    with serving() as server:
        sample(rollout := engine(server.url))
        monkeypatch.setattr("sppo.rollout.vllm_server.merged_weights", two_weights)
        with pytest.raises(MemoryError, match="no memory to merge"):
            sample(rollout)
        assert len(server.workers[0].weights) == 2


@pytest.mark.parametrize("after", [0, 3])
def test_a_worker_that_fails_midway_does_not_either(after):
    def fails(weights_iterator):
        for _ in range(after):
            next(weights_iterator)
        raise ValueError("no such weight")

    with serving() as server:
        sample(rollout := engine(server.url))
        server.workers[0].reload_weights = fails
        with pytest.raises(ServerError, match="answered 500: no such weight"):
            sample(rollout)
        del server.workers[0].reload_weights
        sample(rollout)  # the stream is intact


def test_a_server_that_does_not_answer_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        ConnectionError, match=rf"no vLLM server answers at {url} after 0.1 seconds .*start one \(python"
    ):
        engine(url, timeout=0.1)


def test_it_waits_for_a_server_that_starts(monkeypatch):
    monkeypatch.setattr("sppo.rollout.vllm_server._PAUSE", 0.05)
    with serving() as server:
        server.answers["/health"] = (503, "loading")
        threading.Timer(0.3, server.answers.clear).start()
        engine(server.url)
        assert server.calls.count("/health") > 2


def test_training_and_evaluation(tmp_path):
    with serving() as server:
        trainer = make(
            tmp_path,
            has_a,
            max_steps=2,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_port=server.server_address[1],
            rollout_engine_kwargs={"max_concurrent_requests": 2},
            eval_dataset=None,
        )
        trainer.train()
        assert len(logged(trainer, "rollout_kl")) == 2
        assert server.calls.count("sppo_receive") == 2


def test_processes_take_turns(tmp_path):
    """Weights are sent once per rollout, when no process is sampling, also if one has no prompts."""
    with serving() as server:
        server.delays = {101: 0.5}  # the other process is long done then
        run_ranks(RANKS, 2, tmp_path, server.url)
        rollout = ["sppo_receive", "/reset_prefix_cache", *["/inference/v1/generate"] * 6]
        alone = ["sppo_receive", "/reset_prefix_cache", *["/inference/v1/generate"] * 3]
        started = [call for call in server.calls if call not in ("/health", "sppo_describe", "sppo_connect")]
        assert started == [*rollout, *rollout, *alone]


def test_all_processes_learn_of_a_failure(tmp_path):
    with serving() as server:
        server.answers["/reset_prefix_cache"] = (500, "no cache")
        run_ranks(RANKS, 2, tmp_path, server.url, "fails")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_mode": "remote"}, "vllm_mode must be one of colocate, server, got 'remote'"),
        (
            {"vllm_mode": "server", "use_vllm": False},
            "vllm_mode='server' is for rollout_engine='vllm', got rollo",
        ),
        ({"vllm_server_port": 9000}, "vllm_server_port=9000 is for vllm_mode='server', got vllm_mode='colocate'"),
        (
            {"vllm_mode": "server", "vllm_enable_sleep_mode": True},
            "vllm_enable_sleep_mode=True is for vllm_mode='col",
        ),
        ({"vllm_mode": "server", "vllm_server_timeout": -1.0}, "vllm_server_timeout must be 0 or more"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SPPOConfig("unused", **({"use_cpu": True, "use_vllm": True} | settings))


def test_the_command_line_of_the_server():
    given = command(["some/model", "--port", "9000", "--max-model-len=64"])
    assert given[:5] == ["serve", "some/model", "--port", "9000", "--max-model-len=64"]
    assert given[5:] == [
        "--worker-extension-cls", "sppo.rollout.vllm_worker.WeightReceiver", "--logprobs-mode", "processed_logprobs",
        "--max-logprobs", "-1", "--enable-scale-out", "--host", "127.0.0.1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"usage: python -m sppo.rollout.vllm_serve MODEL"):
        command(["--port", "9000"])
    with pytest.raises(ValueError, match="--logprobs-mode is set for the trainer; leave it out"):
        command(["some/model", "--logprobs_mode=raw_logprobs"])
