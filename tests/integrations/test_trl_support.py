"""The sampler's support in the real GRPOTrainer: from the rollout function to each log-probability."""

import random
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from tiny_models import ALPHABET, SIZES, char_tokenizer, tiny_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

from sppo_kernels.integrations import trl as fused

V, EOS, PAD = SIZES["vocab_size"], 1, 0
METHODS = ("_generate", "_generate_and_score_completions", "compute_loss", "_get_per_token_logps_and_entropies")
ORIGINALS = {name: getattr(GRPOTrainer, name) for name in METHODS}


@pytest.fixture(autouse=True)
def _unpatch_after_each_test():
    yield
    fused.unpatch()
    assert {name: getattr(GRPOTrainer, name) for name in METHODS} == ORIGINALS


def kept_tokens(prefix, token):
    """Return the support of a token, a function of it and all tokens before it: 1 to 6 tokens, or none for no cut."""
    draw = random.Random(str([*prefix, token]))
    size = draw.choice([0, 1, 2, 3, 6])
    kept = {token, *draw.sample(range(V), size)} if size else set()
    return draw.sample(sorted(kept), len(kept))


class Rollouts:
    """A rollout function of TRL: completions of 1 to 6 tokens at random, with their supports."""

    def __init__(self, make_field=lambda supports: {"sampling_support": supports}, masked_share=0.0):
        self.draw = random.Random(0)
        self.make_field = make_field
        self.masked_share = masked_share

    def __call__(self, prompts, trainer):
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [[self.draw.randrange(2, V) for _ in range(self.draw.randint(1, 6))] for _ in prompts]
        completions = [ids if len(ids) == 6 else [*ids, EOS] for ids in completions]
        supports = [
            [kept_tokens(prompt + ids[:t], token) for t, token in enumerate(ids)]
            for prompt, ids in zip(prompt_ids, completions, strict=True)
        ]
        fields = {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}
        if self.masked_share:
            fields["env_mask"] = [[int(self.draw.random() > self.masked_share) for _ in ids] for ids in completions]
        return fields | self.make_field(supports)


class DenseTrainer(GRPOTrainer):
    """GRPOTrainer that masks all logits in float64, with supports computed from the tokens of each row."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **_
    ):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].double() / self.temperature
        labels = input_ids[:, 1:]
        is_scored = attention_mask[:, 1:].bool()
        is_scored[:, :-logits_to_keep] = False
        cut = torch.zeros_like(logits, dtype=torch.bool)
        for b, t in is_scored.nonzero().tolist():
            row = input_ids[b, : t + 1][attention_mask[b, : t + 1].bool()].tolist()
            kept = kept_tokens(row, int(labels[b, t]))
            cut[b, t] = bool(kept)
            cut[b, t, kept] = False
        logprobs = logits.masked_fill(cut, -1e300).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs.masked_fill(cut, 0.0)).sum(-1)
        chosen = logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        chosen, entropy = (x.masked_fill(~is_scored, 0.0)[:, -logits_to_keep:].float() for x in (chosen, entropy))
        return chosen, entropy if compute_entropy else None, None


def digit_share(completions, **_):
    return [sum(c.isdigit() for c in completion) / 10 for completion in completions]


def train(folder, rollouts, trainer_class=GRPOTrainer, max_steps=4, **settings):
    """Make SGD updates -> logs (loss, entropy, gradient norm), weights."""
    tiny_model().save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    settings = {"per_device_train_batch_size": 4, "num_generations": 4} | settings
    args = GRPOConfig(
        output_dir=str(folder), max_completion_length=6, max_steps=max_steps, optim="sgd", learning_rate=0.5,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": [ALPHABET[i : i + 2 + i % 3] for i in range(16)]})
    trainer = trainer_class(
        model, digit_share, args=args, train_dataset=dataset, processing_class=char_tokenizer(), rollout_func=rollouts
    )
    trainer.train()
    names = ["loss", "entropy", "grad_norm", *(["kl"] if settings.get("beta") else [])]
    steps = [step for step in trainer.state.log_history if "loss" in step]
    return torch.tensor([[step[name] for name in names] for step in steps]), model.state_dict()


def assert_same_training(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=2e-5)


BUFFERED = {
    "steps_per_generation": 4,  # a rollout of 16 samples is shuffled, and split into 4 micro-batches
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "beta": 0.1,
    "temperature": 0.7,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "masked_share"),
    [
        (BUFFERED, 0.0),
        (BUFFERED | {"per_device_train_batch_size": 2, "num_generations": 2, "entropy_coef": 0.1}, 0.3),
        (BUFFERED | {"mask_truncated_completions": True, "pad_to_multiple_of": 4}, 0.0),
        ({}, 0.0),
    ],
    ids=["buffered", "entropy-and-masked-tokens", "truncated-and-padded", "on-policy"],
)
def test_training_agrees_with_masked_logits_in_float64(tmp_path, settings, masked_share):
    """Supports follow their samples through shuffling, micro-batches, two iterations and the reference model."""
    expected = train(tmp_path, Rollouts(masked_share=masked_share), DenseTrainer, **settings)
    with fused.patch():
        actual = train(tmp_path, Rollouts(masked_share=masked_share), **settings)
        full = train(tmp_path, Rollouts(lambda _: {}, masked_share), **settings)
    assert_same_training(actual, expected)
    assert (actual[0] - full[0]).abs().max() > 1e-2  # otherwise the supports would make no difference


def test_the_training_above_scores_in_parts_and_shuffles(tmp_path, monkeypatch):
    """Old policy and reference score 16 samples 4 at a time; the loss scores the same samples in another order."""
    seen = []
    with fused.patch():
        score = GRPOTrainer._get_per_token_logps_and_entropies

        def spy(trainer, model, input_ids, *args, **kwargs):
            seen.append((kwargs.get("batch_size"), len(input_ids), input_ids[:, -7:].tolist()))
            return score(trainer, model, input_ids, *args, **kwargs)

        monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
        train(tmp_path, Rollouts(), max_steps=2, **BUFFERED)
        monkeypatch.undo()
    generated, trained = seen[0][2], [row for part, _, rows in seen if part is None for row in rows]
    assert [(part, size) for part, size, _ in seen] == [(4, 16)] * 2 + [(None, 4)] * 4
    assert sorted(trained) == sorted(generated)
    assert trained != generated


@pytest.mark.parametrize(
    ("settings", "make_field", "warnings"),
    [
        ({"top_p": 0.9}, lambda supports: {"support": supports}, 1),  # a misspelled name
        ({"top_k": 5}, lambda _: {"sampling_support": None}, 1),
        ({"min_p": 0.1}, lambda supports: {"sampling_support": supports}, 0),
        ({}, lambda _: {}, 0),
    ],
)
def test_truncation_without_the_field_is_warned_about_once(tmp_path, caplog, settings, make_field, warnings):
    with fused.patch(), caplog.at_level("WARNING", logger="sppo_kernels"):
        train(tmp_path, Rollouts(make_field), max_steps=2, **settings)
    found = [message for message in caplog.messages if "returned no sampling_support" in message]
    assert len(found) == warnings


@pytest.mark.slow
def test_nothing_changes_without_the_field(tmp_path):
    """A rollout function without supports, and without any cut, gives what TRL gives without the patch."""
    expected = train(tmp_path, Rollouts(lambda _: {}), **BUFFERED)
    with fused.patch():
        for field in ({}, {"sampling_support": None}):
            assert_same_training(train(tmp_path, Rollouts(lambda _, f=field: f), **BUFFERED), expected)
        uncut = Rollouts(lambda supports: {"sampling_support": [None] * len(supports)})
        assert_same_training(train(tmp_path, uncut, **BUFFERED), expected)


def test_the_field_reaches_reward_functions_as_returned(tmp_path):
    """TRL hands extra fields to reward functions, with and without the patch."""
    for context in (nullcontext, fused.patch):
        seen = []

        def reward(completions, sampling_support, seen=seen, **_):
            seen.extend(sampling_support)
            return digit_share(completions)

        with context():
            args = GRPOConfig(
                str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=1, use_cpu=True, bf16=False,
                save_strategy="no", report_to="none", disable_tqdm=True,
            )  # fmt: skip
            data = Dataset.from_dict({"prompt": ["12"]})
            GRPOTrainer(
                tiny_model(), reward, args=args, train_dataset=data, processing_class=char_tokenizer(),
                rollout_func=Rollouts(),
            ).train()  # fmt: skip
        assert len(seen) == 4
        assert all(isinstance(kept, list) for support in seen for kept in support)


@pytest.mark.parametrize(
    ("make_field", "message"),
    [
        (lambda s: s[:-1], "sampling_support must be a list of 4 supports, one per completion, got 3 supports"),
        (lambda s: "top_p", "sampling_support must be a list of 4 supports, one per completion, got str"),
        (lambda s: [*s[:2], s[2][:-1], s[3]], r"sampling_support\[2\], for a completion of . tokens: .*offsets"),
        (lambda s: [[[0]] * len(s[0]), *s[1:]], r"sampling_support\[0\].* label \d+ of token \d+ is not among"),
        (lambda s: [*s[:3], [[*k, V] for k in s[3]]], rf"sampling_support\[3\].* in \[0, {V}\), got {V} in the"),
    ],
)
def test_malformed_fields_are_rejected(tmp_path, make_field, message):
    rollouts = Rollouts(lambda supports: {"sampling_support": make_field(supports)})
    with fused.patch(), pytest.raises(ValueError, match=message):
        train(tmp_path, rollouts, max_steps=1)


def test_a_trainer_that_would_drop_the_field_is_rejected(tmp_path):
    class OwnScores(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return self._generate([example["prompt"] for example in inputs])

    with fused.patch(), pytest.raises(ValueError, match=r"sampling_support .*OwnScores, which overrides"):
        train(tmp_path, Rollouts(), OwnScores, max_steps=1)


def test_a_head_that_the_operation_cannot_compute_is_rejected(tmp_path, monkeypatch):
    """A head that is left to TRL's own function would silently normalize over the complete vocabulary."""
    with fused.patch():
        apply = utils._ChunkedLogProbFunction.apply

        def in_float64(hidden, weight, *args):
            return apply(hidden.double(), weight.double(), *args)

        monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", in_float64)
        with pytest.raises(ValueError, match=r"sampling_support must be used with .*, got torch.float64"):
            train(tmp_path, Rollouts(), max_steps=1)


def test_settings_are_replaced_and_removed_in_any_order(tmp_path):
    first, second = fused.patch(backward="recompute"), fused.patch(backward="cache")
    first.close()
    train(tmp_path, Rollouts(), max_steps=1)
    second.close()
    assert {name: getattr(GRPOTrainer, name) for name in METHODS} == ORIGINALS
