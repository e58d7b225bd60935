"""Integration with the real TRL: training and gradients with and without the patch, and which operation ran."""

import time
import warnings
from collections import Counter
from contextlib import nullcontext
from importlib import metadata

import pytest
import torch
import trl
from datasets import Dataset
from tiny_models import ALPHABET, char_tokenizer, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import utils

from sppo_kernels.integrations import _compatibility
from sppo_kernels.integrations import trl as fused
from sppo_kernels.ops.linear_logprobs import lm_head

NAMES = ("_ChunkedLogProbFunction", "_use_triton", "_fused_logprob_entropy", "_supports_trl_loss_kernel")
ORIGINALS = {name: getattr(utils, name) for name in NAMES}


@pytest.fixture(autouse=True)
def _unpatch_after_each_test():
    yield
    fused.unpatch()
    assert {name: getattr(utils, name) for name in NAMES} == ORIGINALS


class Operations(TorchDispatchMode):
    """Count the registered operations of this package that run inside the context."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sppo_kernels":
            self.count[func.name().removeprefix("sppo_kernels::")] += 1
        return func(*args, **(kwargs or {}))


def digit_share(completions, **_):
    return [sum(c.isdigit() for c in completion) / 10 for completion in completions]


def train(trainer_class, config_class, family, folder, **settings):
    """Make three SGD updates -> logs [3, 3] (loss, entropy, gradient norm), weights, calls of each operation."""
    tiny_model(family).save_pretrained(folder / "model")  # TRL loads the reference model from a folder
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    args = config_class(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        max_steps=3, optim="sgd", learning_rate=0.5, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": [ALPHABET[i : i + 2 + i % 3] for i in range(8)]})
    with Operations() as operations:
        trainer = trainer_class(model, digit_share, args=args, train_dataset=dataset, processing_class=char_tokenizer())
        trainer.train()
    steps = [step for step in trainer.state.log_history if "loss" in step]
    logs = torch.tensor([[step[name] for name in ("loss", "entropy", "grad_norm")] for step in steps])
    return logs, model.state_dict(), operations.count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "trainer_class", "config_class", "settings"),
    [
        ("qwen2", GRPOTrainer, GRPOConfig, {"beta": 0.1, "temperature": 0.7, "num_iterations": 2}),
        ("gemma2", GRPOTrainer, GRPOConfig, {"beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.8}),
        ("qwen2", RLOOTrainer, RLOOConfig, {"beta": 0.1, "temperature": 0.7}),
    ],
    ids=["grpo-qwen2", "grpo-entropy-gemma2", "rloo-qwen2"],
)
def test_training_is_unchanged(tmp_path, family, trainer_class, config_class, settings):
    """Losses, entropies, gradient norms and weights agree; policy and reference both run the operation."""
    logs, weights, count = train(trainer_class, config_class, family, tmp_path, **settings)
    assert not count
    with fused.patch():
        fused_logs, fused_weights, count = train(trainer_class, config_class, family, tmp_path, **settings)
    assert count["linear_logprobs"] > count["linear_logprobs_backward"] == 3
    torch.testing.assert_close(fused_logs, logs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused_weights, weights, rtol=1e-4, atol=2e-5)
    start = tiny_model(family).state_dict()
    change = max((weights[name] - start[name]).abs().max() for name in weights)
    assert change > 1e-2  # otherwise the comparison above would be vacuous


def test_cpo_training_is_unchanged(tmp_path):
    """CPO computes log-probabilities from the model's logits."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    rows = {"prompt": ["12", "3+4"], "chosen": ["12", "7"], "rejected": ["3-1", "123"]}
    losses, counts = [], []
    for context in (nullcontext, fused.patch):
        args = CPOConfig(
            output_dir=str(tmp_path), max_steps=2, optim="sgd", learning_rate=0.1, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_length=16,
        )  # fmt: skip
        with context(), Operations() as operations:
            trainer = CPOTrainer(
                tiny_model(), args=args, train_dataset=Dataset.from_dict(rows), processing_class=char_tokenizer()
            )
            trainer.train()
        losses.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
        counts.append(operations.count)
    assert not counts[0]
    assert counts[1]["selective_logprobs"] >= counts[1]["selective_logprobs_backward"] == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][1]


def arguments(n=7, hidden=5, vocab=11, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    tensors = [torch.randn(n, hidden, dtype=dtype), torch.randn(vocab, hidden, dtype=dtype)]
    tensors.append(torch.randn(vocab, dtype=dtype) if bias else None)
    return [x if x is None else x.requires_grad_() for x in tensors], torch.randint(vocab, (n,))


def chunked_logprobs(
    tensors, targets, *, entropy_coef=0.0, temperature=0.7, softcap=None, scale=1.0, outputs=("log_probs", "entropy")
):
    """Call TRL's function as currently installed -> all its results, and the gradients of a weighted sum."""
    results = utils._ChunkedLogProbFunction.apply(*tensors, targets, temperature, 4, softcap, scale, outputs)
    loss = (results[0] * torch.linspace(-1, 1, len(targets))).sum()
    if entropy_coef:
        loss = loss + entropy_coef * results[1].sum()
    inputs = [x for x in tensors if x is not None]
    return results, torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.0625, 3.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_chunked_logprobs_agree_with_trl(bias, scale, softcap, entropy_coef):
    """Agrees with bias, logit scale (Cohere, Granite), softcap (Gemma) and a gradient of the entropy."""
    tensors, targets = arguments(bias=bias)
    settings = {"softcap": softcap, "scale": scale, "entropy_coef": entropy_coef}
    expected, expected_gradients = chunked_logprobs(tensors, targets, **settings)
    with fused.patch(backward="recompute"), Operations() as operations:
        results, gradients = chunked_logprobs(tensors, targets, **settings)
    assert operations.count == {"linear_logprobs": 1, "linear_logprobs_backward": 1}
    assert results[2:] == expected[2:] == (None, None, None)
    torch.testing.assert_close(results[:2], expected[:2])
    torch.testing.assert_close(gradients, expected_gradients)


def test_entropy_is_returned_only_on_request():
    with fused.patch():
        results, _ = chunked_logprobs(*arguments(), outputs=("log_probs",))
    assert results[1:] == (None,) * 4


def test_a_float32_lm_head_is_cast_as_trl_casts_it():
    """Products with bfloat16 hidden states are bfloat16, as TRL's."""
    tensors, targets = arguments(dtype=torch.bfloat16)
    tensors[1] = tensors[1].detach().float().requires_grad_()
    expected, expected_gradients = chunked_logprobs(tensors, targets)
    with fused.patch():
        results, gradients = chunked_logprobs(tensors, targets)
    torch.testing.assert_close(results[:2], expected[:2], rtol=2e-2, atol=2e-2)  # TRL's logits are bfloat16
    torch.testing.assert_close(gradients, expected_gradients, rtol=5e-2, atol=5e-2)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    "case", ["is_top1", "mean_logits", "log_sum_sq_probs", "scale 0", "scale < 0", "ZeRO-3", "float64"]
)
def test_unsupported_cases_run_trls_function(case):
    """Other outputs, scales that the operation cannot fold, an LM head sharded by DeepSpeed: exactly TRL's results."""
    tensors, targets = arguments(dtype=torch.float64 if case == "float64" else torch.float32)
    settings = {"scale": {"scale 0": 0.0, "scale < 0": -2.0}.get(case, 1.0)}
    if case in ("is_top1", "mean_logits", "log_sum_sq_probs"):
        settings["outputs"] = ("log_probs", "entropy", case)
    if case == "ZeRO-3":
        tensors[1].ds_id = 0
    expected, expected_gradients = chunked_logprobs(tensors, targets, **settings)
    with fused.patch(), Operations() as operations:
        results, gradients = chunked_logprobs(tensors, targets, **settings)
    assert not operations.count
    for a, b in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_settings_reach_the_operation():
    """Backward takes two products with cached gradients, three without. A second call replaces the settings."""
    tensors, targets = arguments(bias=False)
    flops = {}
    with fused.patch(backward="recompute"):
        for backward in ("recompute", "cache"):
            fused.patch(backward=backward)
            with FlopCounterMode(display=False) as counter:
                chunked_logprobs(tensors, targets)
            flops[backward] = counter.get_total_flops()
    assert flops["recompute"] / flops["cache"] == pytest.approx(4 / 3)


@pytest.mark.parametrize(("settings", "is_fused"), [({}, False), ({"projection": "fused"}, True)])
def test_the_projection_reaches_the_operation(monkeypatch, settings, is_fused):
    tensors, targets = arguments()
    expected, expected_gradients = chunked_logprobs(tensors, targets, softcap=2.0)
    made = []
    original = lm_head.FusedProjection
    monkeypatch.setattr(lm_head, "FusedProjection", lambda *args, **given: made.append(1) or original(*args, **given))
    with fused.patch(backward="recompute", **settings):
        results, gradients = chunked_logprobs(tensors, targets, softcap=2.0)
    assert bool(made) is is_fused
    torch.testing.assert_close(results[:2], expected[:2])
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4), (5,), ()])
@pytest.mark.parametrize("masked", [False, True])
def test_functions_of_logits_agree_with_float64(dtype, shape, masked):
    """The three functions of trl.trainer.utils, called through names that trainers have already imported."""
    from trl.experimental.cpo import cpo_trainer
    from trl.experimental.tpo import tpo_trainer

    torch.manual_seed(0)
    logits = (3 * torch.randn(*shape, 13)).to(dtype).requires_grad_()
    index, mask = torch.randint(13, shape), torch.randint(2, shape)
    mask_or_none = mask if masked else None
    exact = logits.detach().double().requires_grad_()
    z = (exact / 0.7).log_softmax(-1)
    expected = z.gather(-1, index.unsqueeze(-1)).squeeze(-1), -(z.exp() * z).sum(-1)
    expected = [x * mask for x in expected] if masked else expected
    (expected_gradient,) = torch.autograd.grad(expected[0].sum() + 0.3 * expected[1].sum(), exact)
    with fused.patch(), Operations() as operations:
        logprobs = cpo_trainer.selective_log_softmax(logits, index, temperature=0.7, row_mask=mask_or_none)
        both = tpo_trainer.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask_or_none)
        (gradient,) = torch.autograd.grad(both[0].sum() + 0.3 * both[1].sum(), logits)
        entropy = utils.entropy_from_logits(logits)
    assert operations.count == {"selective_logprobs": 3, "selective_logprobs_backward": 1}
    torch.testing.assert_close(both, tuple(x.float() for x in expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(both[0], logprobs)
    plain = exact.log_softmax(-1)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


def test_unsupported_logits_run_trls_function():
    """Several indices per row and float64 logits are left to TRL."""
    logits = torch.randn(2, 3, 5)
    with fused.patch(), Operations() as operations:
        several = utils.selective_log_softmax(logits, torch.randint(5, (2, 3, 4)))
        double = utils.selective_log_softmax(logits.double(), torch.randint(5, (2, 3)))
    assert not operations.count
    assert several.shape == (2, 3, 4)
    assert double.dtype == torch.float64


def test_an_invalid_index_is_not_ignored():
    with fused.patch(), pytest.raises(ValueError, match="labels"):
        utils.selective_log_softmax(torch.randn(2, 3, 5), torch.full((2, 3), -100))


def test_only_the_chunked_function_is_replaced_without_triton(monkeypatch):
    """TRL defines no fused function of logits on macOS and Windows."""
    for name in NAMES[2:]:
        monkeypatch.delattr(utils, name)
    with fused.patch():
        assert utils._ChunkedLogProbFunction is not ORIGINALS["_ChunkedLogProbFunction"]
        assert not hasattr(utils, NAMES[2])
    monkeypatch.undo()


def test_patches_nest_and_unpatch_removes_all():
    with fused.patch():
        outer = utils._ChunkedLogProbFunction
        with fused.patch(backward="cache"):
            assert utils._ChunkedLogProbFunction is not outer
        assert utils._ChunkedLogProbFunction is outer
    assert utils._ChunkedLogProbFunction is trl.kernels.ChunkedLogProbFunction
    fused.patch()
    fused.patch()
    fused.unpatch()
    assert {name: getattr(utils, name) for name in NAMES} == ORIGINALS
    fused.unpatch()  # nothing to undo
    with fused.patch():
        fused.patch()
        fused.unpatch()
    assert {name: getattr(utils, name) for name in NAMES} == ORIGINALS


def test_an_untested_version_that_fits_warns_once(monkeypatch):
    monkeypatch.setattr(_compatibility, "_warned", set())
    monkeypatch.setattr(metadata, "version", lambda _: "1.17.0")
    with pytest.warns(UserWarning, match=r"trl 1\.17\.0 is not tested, only 1\.16\.0 is"), fused.patch():
        assert utils._use_triton is not ORIGINALS["_use_triton"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused.patch()


def test_checks_take_little_time():
    fused.patch()
    start = time.perf_counter()
    fused.patch()
    assert time.perf_counter() - start < 1


class _OtherScale(torch.autograd.Function):
    forward = staticmethod(utils._ChunkedLogProbFunction.forward)

    @classmethod
    def apply(cls, hidden, *args):
        return ORIGINALS["_ChunkedLogProbFunction"].apply(1.01 * hidden, *args)


@pytest.mark.parametrize(
    ("owner", "name", "new", "says"),
    [
        (
            utils,
            "_use_triton",
            lambda device, dtype: True,
            r"trl\.trainer\.utils\._use_triton has the parameters device, dt",
        ),
        (utils, "_use_triton", None, r"trl\.trainer\.utils\._use_triton does not exist"),
        (utils, "_ChunkedLogProbFunction", None, "_ChunkedLogProbFunction does not exist"),
        (utils, "_ChunkedLogProbFunction", _OtherScale, "result 0 of .*_ChunkedLogProbFunction differs .* by "),
        (
            GRPOTrainer,
            "_generate",
            lambda self, inputs: None,
            r"GRPOTrainer\._generate has the parameters self, inputs, not",
        ),
        (utils, "selective_log_softmax", lambda *args: 1 / 0, "selective_log_softmax raises ZeroDivisionError"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_replaced(monkeypatch, owner, name, new, says):
    monkeypatch.setattr(owner, name, new)
    before = {each: getattr(utils, each) for each in NAMES}
    with pytest.raises(ImportError, match=rf"trl .* does not fit this integration: .*{says}.*pip install 'trl~=1.16"):
        fused.patch()
    assert {each: getattr(utils, each) for each in NAMES} == before


def test_what_trl_adds_to_a_wrapped_method_is_passed_on(monkeypatch):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, new=None):
        return new

    monkeypatch.setattr(GRPOTrainer, "compute_loss", compute_loss)
    with fused.patch():
        assert GRPOTrainer.compute_loss(None, None, {}, new=5) == 5


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"backward": "recompuet"}, "backward"),
        ({"logits_budget_bytes": "4GB"}, "logits_budget_bytes"),
        ({"mass_tolerance": 2.0}, "mass_tolerance"),
        ({"projection": "fast"}, "projection"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_invalid_settings_are_rejected_at_once(settings, argument):
    with pytest.raises((ValueError, TypeError), match=argument):
        fused.patch(**settings)
    assert utils._use_triton is ORIGINALS["_use_triton"]


def test_missing_trl_is_reported(monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match="trl is not installed: pip install"):
        fused.patch()
