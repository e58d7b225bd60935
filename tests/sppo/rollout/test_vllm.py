"""vLLM samples from the trained policy. Opt-in: `make test-vllm` creates an environment with vLLM."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import char_tokenizer, tiny_model
from tiny_run import DATASET, has_a, logged

from sppo import SPPOConfig, SPPOTrainer
from sppo.rollout.support import take_supports
from sppo.settings import SPPOSettings
from sppo_kernels import linear_logprobs

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm")

TOLERANCE = 1e-4
"""Largest difference between vLLM's log-probability of a token and the trainer's, in nats, both in float32."""

ROOT = Path(__file__).parents[3]

SMALL = {"max_model_len": 64, "max_num_seqs": 16, "enforce_eager": True}

ENGINES = []
"""Engines of single tests; vLLM closes the groups of all others when one is deleted."""


def servable(**changes):
    """A tiny model with a head size that vLLM supports."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64, "num_attention_heads": 2}
    return tiny_model("llama", **sizes, **changes)


def make(folder, **settings):
    """Make a trainer for two updates on vLLM's samples, at a learning rate that moves the policy far."""
    args = SPPOConfig(
        str(folder),
        use_vllm=True,
        rollout_engine_kwargs=SMALL,
        per_device_train_batch_size=32,
        max_completion_length=16,
        temperature=0.7,
        learning_rate=3e-2,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        **settings,
    )
    model = servable(tie_word_embeddings=True)
    return SPPOTrainer(model, has_a, args=args, train_dataset=DATASET, processing_class=char_tokenizer())


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    made = make(tmp_path_factory.mktemp("run"))
    made.first = answers(made)
    made.train()
    return made


def answers(trainer, temperature=0.7, seed=0):
    return trainer.rollout_engine.generate(DATASET["prompt"], seed=seed, temperature=temperature, batch_size=16)


def differences(trainer, samples, temperature=0.7):
    """Differences between the engine's log-probabilities and the policy's, over all tokens."""
    gaps = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            logits = trainer.actor_critic.policy(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature
        own = logits.log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        gaps.append(own - torch.tensor(sample.logprobs))
    return torch.cat(gaps).abs()


def test_log_probabilities_are_the_trained_policys(trainer):
    gaps = differences(trainer, answers(trainer))
    print(f"\nlargest difference {gaps.max():.1e}, mean {gaps.mean():.1e} nats over {len(gaps)} tokens")
    assert gaps.max() < TOLERANCE
    assert differences(trainer, trainer.first).max() > 1000 * TOLERANCE  # the first policy's are far away


def test_responses_are_the_trained_policys(trainer):
    """A greedy token is the policy's likeliest; the same seed gives the same samples."""
    for sample in answers(trainer, temperature=0.0):
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            likeliest = trainer.actor_critic.policy(ids).logits[0, len(sample.prompt_ids) - 1 : -1].argmax(-1)
        assert likeliest.tolist() == sample.response_ids
        assert sample.truncated == (sample.response_ids[-1] != 1)
    texts = [[s.response_ids for s in answers(trainer, seed=seed)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_correction_measures_the_mismatch(trainer):
    assert len(logged(trainer, "rollout_kl")) == 2
    assert max(map(abs, logged(trainer, "rollout_kl"))) < TOLERANCE
    assert logged(trainer, "rollout_weight_mean") == pytest.approx([1, 1], abs=TOLERANCE)


@pytest.mark.parametrize("truncation", [{"top_k": 5, "top_p": 0.9}, {"min_p": 0.1}])
def test_the_support_is_what_the_sampler_kept(truncation):
    """The response token is in it, and the log-probabilities are the policy's over it."""
    from sppo.rollout.vllm import VLLMRollout

    model = servable()
    ENGINES.append(engine := VLLMRollout(model, char_tokenizer(), max_completion_length=16, **SMALL, **truncation))
    samples = engine.generate(DATASET["prompt"], seed=0, temperature=0.7, batch_size=16)
    take_supports(samples, "vllm", SPPOSettings(**truncation), engine.vocab_size)
    gaps, sizes = [], []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / 0.7
        token_ids, offsets = sample.support
        sizes += offsets.diff().tolist()
        for row, kept, token, own in zip(
            logits, token_ids.split(offsets.diff().tolist()), sample.response_ids, sample.logprobs, strict=True
        ):
            gaps.append(abs(row[token] - row[kept.long()].logsumexp(-1) - own))
            if "top_k" in truncation:
                likeliest = row.softmax(-1).sort(descending=True)
                assert set(kept.tolist()) == set(likeliest.indices[: len(kept)].tolist())
    print(f"\nlargest difference {max(gaps):.1e} nats, {min(sizes)} to {max(sizes)} tokens kept")
    assert max(gaps) < TOLERANCE
    assert 1 <= min(sizes) < max(sizes) <= truncation.get("top_k", 27)
    greedy = engine.generate(DATASET["prompt"], seed=0, temperature=0.0, batch_size=16)
    assert all(sample.support is None for sample in greedy)
    engine.records_support = False
    plain = engine.generate(DATASET["prompt"], seed=0, temperature=0.7, batch_size=16)
    assert [s.response_ids for s in plain] == [s.response_ids for s in samples]


@pytest.mark.parametrize("replay", [True, False])
def test_training_replays_the_support(tmp_path, replay):
    """The trainer's log-probabilities are those of vLLM's truncated samples; over the whole vocabulary they are not."""
    made = make(tmp_path, top_k=5, top_p=0.9, replay_sampling_support=replay)
    ENGINES.append(made.rollout_engine)
    made.train()
    differences = [abs(x) for x in logged(made, "rollout_kl")]
    print(f"\nreplay {replay}: rollout_kl {differences}")
    assert (max(differences) < TOLERANCE) == replay
    assert replay or min(differences) > 0.01


@pytest.mark.parametrize(
    ("mask", "kept"),
    [(SimpleNamespace(token_ids=[[1, 2], [0, 1, 2, 3]]), [[1, 2], []]), (None, "returned no sampling_mask")],
)
def test_the_mask_is_taken_where_vllm_has_it(mask, kept):
    """vLLM computes it with Triton, which its CPU version lacks here."""
    from sppo.rollout.vllm import VLLMRollout

    engine = object.__new__(VLLMRollout)
    engine.has_mask, engine.vocab_size = True, 4
    output = SimpleNamespace(sampling_mask=mask)
    if mask is None:
        with pytest.raises(RuntimeError, match=kept):
            engine._kept(output)
    else:
        assert engine._kept(output) == kept


def test_more_ties_than_candidates_raise():
    from sppo.rollout.vllm import VLLMRollout

    engine = object.__new__(VLLMRollout)
    engine.has_mask, engine.top_k, engine.vocab_size = False, 1, 1000
    tied = {token: SimpleNamespace(logprob=-1.0) for token in range(65)}
    with pytest.raises(RuntimeError, match="kept more than 64 tokens with top_k=1, because their logits are equal"):
        engine._kept(SimpleNamespace(logprobs=[tied]))
    del tied[0]
    assert engine._kept(SimpleNamespace(logprobs=[tied])) == [list(range(1, 65))]


def test_adapters_are_merged_when_weights_are_copied():
    from peft import LoraConfig

    from sppo.models.lora import add_adapter
    from sppo.rollout.vllm import VLLMRollout

    model = servable()
    add_adapter(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    engine = VLLMRollout(model, char_tokenizer(), max_completion_length=8, max_model_len=64, enforce_eager=True)
    (sample,) = engine.generate(["1+2="], seed=0, temperature=0.0, batch_size=1)
    with torch.no_grad():
        logits = model(torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0, len(sample.prompt_ids) - 1 :]
    assert logits.argmax(-1)[:-1].tolist() == sample.response_ids


def test_stop_strings_and_progress():
    """A response ends where it would if stop strings were searched afterwards."""
    from sppo.rollout.ending import Ending
    from sppo.rollout.vllm import VLLMRollout

    given = {"seed": 0, "temperature": 1.5, "batch_size": 16}
    model, stops, reports = servable(), ["7", "b c", "g h", "e"], []
    ENGINES.append(plain := VLLMRollout(model, char_tokenizer(), max_completion_length=16, **SMALL))
    whole = plain.generate(DATASET["prompt"], **given)
    engine = VLLMRollout(model, char_tokenizer(), max_completion_length=16, stop_strings=stops, **SMALL)
    ENGINES.append(engine)
    engine.on_progress = lambda *numbers: reports.append(numbers)
    stopped = engine.generate(DATASET["prompt"], **given)
    end = Ending(engine.eos_ids, engine.tokenizer, stops)
    assert [(s.response_ids, s.truncated) for s in stopped] == [end.cut(s.response_ids) for s in whole]
    assert all(len(s.logprobs) == len(s.response_ids) for s in stopped)
    assert sum(len(a.response_ids) < len(b.response_ids) for a, b in zip(stopped, whole, strict=True)) > 4
    assert len(reports) > 1
    assert reports == sorted(set(reports))
    assert reports[-1] == (36, 36)


def test_further_arguments_of_the_sampling():
    from sppo.rollout.vllm import VLLMRollout

    kwargs = {"logit_bias": {5: -100.0}, "structured_outputs": {"regex": "[0-9]*"}}
    engine = VLLMRollout(servable(), char_tokenizer(), max_completion_length=8, generation_kwargs=kwargs, **SMALL)
    ENGINES.append(engine)
    samples = engine.generate(DATASET["prompt"], seed=0, temperature=1.0, batch_size=16)
    assert {token for s in samples for token in s.response_ids} <= {1, *range(2, 12)} - {5}
    with pytest.raises(ValueError, match="SamplingParams has no 'logit_bia'; did you mean 'logit_bias'"):
        VLLMRollout(servable(), char_tokenizer(), max_completion_length=8, generation_kwargs={"logit_bia": 1}, **SMALL)
    with pytest.raises(ValueError, match="vLLM has no sleep mode on cpu"):
        VLLMRollout(servable(), char_tokenizer(), max_completion_length=8, enable_sleep_mode=True, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_engine_reports_what_the_trainers_function_computes(dtype, monkeypatch):
    """From the hidden states that the engine had, in another batch, the log-probabilities have the same bits."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from vllm import SamplingParams
    from vllm_logprobs import SETTINGS, share_logprobs

    from sppo.rollout.vllm import VLLMRollout

    model, record = servable(vocab_size=1000).to(dtype), []
    ENGINES.append(engine := VLLMRollout(model, char_tokenizer(), max_completion_length=16, **SMALL))
    own = engine.generate(DATASET["prompt"], seed=0, temperature=0.7, batch_size=16)
    engine.llm.collective_rpc(share_logprobs, kwargs={"record": record})
    shared = engine.generate(DATASET["prompt"], seed=0, temperature=0.7, batch_size=16)
    greedy = engine.generate(DATASET["prompt"][:4], seed=0, temperature=0.0, batch_size=4)
    monkeypatch.setattr(engine, "_sampling", lambda *_: SamplingParams(max_tokens=8, logprobs=3, detokenize=False))
    candidates = engine.generate(DATASET["prompt"][:4], seed=0, temperature=1.0, batch_size=4)
    assert [s.response_ids for s in shared] == [s.response_ids for s in own]  # the samples are vLLM's

    hidden, tokens, temperature, logprobs = (torch.cat(field) for field in zip(*record, strict=True))
    reported = [pair for s in [*shared, *greedy, *candidates] for pair in zip(s.response_ids, s.logprobs, strict=True)]
    assert sorted(zip(tokens.tolist(), logprobs.tolist(), strict=True)) == sorted(reported)
    weight = model.lm_head.weight.detach().requires_grad_()
    order = torch.randperm(len(tokens))
    again = linear_logprobs(hidden[order], weight, tokens[order], temperature=temperature[order], **SETTINGS).logprobs
    assert torch.equal(again, logprobs[order])

    differences = torch.tensor(
        [a - b for x, y in zip(own, shared, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)]
    )
    print(f"\nvLLM's own log-probabilities: {differences.abs().max():.1e} nats off at most")
    assert 0 < differences.abs().max() < (TOLERANCE if dtype == torch.float32 else 0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL of a server, started by this package's command, with other weights than those that are trained."""
    folder = tmp_path_factory.mktemp("served")
    servable(seed=7).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--port", port, "--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "16", "--enforce-eager"]
    command = [sys.executable, "-m", "sppo.rollout.vllm_serve", str(folder), *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def on_server(url, model, **settings):
    from sppo.rollout.vllm_server import VLLMServerRollout

    return VLLMServerRollout(model, char_tokenizer(), base_url=url, timeout=240.0, max_completion_length=16, **settings)


def test_training_on_a_server(server, tmp_path):
    """Two updates that move the policy far; the server's log-probabilities are the trained policy's each time."""
    args = SPPOConfig(
        str(tmp_path),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server,
        per_device_train_batch_size=32,
        max_completion_length=16,
        temperature=0.7,
        learning_rate=3e-2,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = SPPOTrainer(servable(), has_a, args=args, train_dataset=DATASET, processing_class=char_tokenizer())
    first = answers(trainer)
    trainer.train()
    gaps = differences(trainer, answers(trainer))
    print(f"\nlargest difference {gaps.max():.1e} nats over {len(gaps)} tokens")
    assert gaps.max() < TOLERANCE
    assert differences(trainer, first).max() > 1000 * TOLERANCE
    assert max(map(abs, logged(trainer, "rollout_kl"))) < TOLERANCE
    texts = [[s.response_ids for s in answers(trainer, seed=seed)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_server_stops_and_truncates_as_the_engine_in_this_process(server):
    """With a new connection to its workers, and other weights."""
    from sppo.rollout.ending import Ending

    model, stops, truncation = servable(seed=3), ["7", "b c", "e"], {"top_k": 5, "top_p": 0.9}
    given = {"seed": 0, "temperature": 1.5, "batch_size": 16}
    whole = on_server(server, model, **truncation).generate(DATASET["prompt"], **given)
    engine, reports = on_server(server, model, stop_strings=stops, **truncation), []
    engine.on_progress = lambda *numbers: reports.append(numbers)
    stopped = engine.generate(DATASET["prompt"], **given)
    end = Ending(engine.eos_ids, engine.tokenizer, stops)
    assert [(s.response_ids, s.truncated) for s in stopped] == [end.cut(s.response_ids) for s in whole]
    assert sum(len(a.response_ids) < len(b.response_ids) for a, b in zip(stopped, whole, strict=True)) > 4
    assert reports == [(i, 36) for i in range(1, 37)]
    take_supports(stopped, "vllm", SPPOSettings(**truncation), engine.vocab_size)
    for sample in stopped:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / 1.5
        for i, token in enumerate(sample.response_ids):
            kept = sample.support.token_ids[sample.support.offsets[i] : sample.support.offsets[i + 1]].long()
            own = logits[i, token] - logits[i, kept].logsumexp(0)
            assert abs(own - sample.logprobs[i]) < TOLERANCE


def test_a_server_with_another_model_or_arguments_it_does_not_know(server):
    from sppo.rollout.vllm_server import ServerError

    with pytest.raises(ValueError, match="serves another model: vocab_size is 27 there, 30 here"):
        on_server(server, servable(vocab_size=30))
    with pytest.raises(ValueError, match="SamplingParams has no 'logit_bia'; did you mean 'logit_bias'"):
        on_server(server, servable(), generation_kwargs={"logit_bia": 1})
    with pytest.raises(ServerError, match=r"answered 400: .*min_tokens must be"):
        on_server(server, servable(), generation_kwargs={"min_tokens": -1}).generate(
            ["1+2="], seed=0, temperature=1.0, batch_size=1
        )
    engine = on_server(server, servable())
    engine.policy = servable(vocab_size=30)
    with pytest.raises(ServerError, match="answered 500"):  # and not a trainer that waits; vLLM has half of the weights
        engine.sync()


def test_the_example_runs(tmp_path):
    """In a process of its own, because vLLM closes the groups of all engines when one is deleted."""
    servable().save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, ROOT / "examples/vllm_logprobs.py", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "log-probabilities have the same bits: True" in printed
