"""A small transformer for the task of :mod:`sppo.tasks.chain`, pretrained just enough for reinforcement learning.

It imitates a teacher whose steps are well formed but who mostly subtracts in the wrong order. The model learns both
orders: about a third of its sampled answers are correct, and no more of its greedy ones. Only the outcomes tell which
order is correct.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sppo.rollout import HFRollout
from sppo.tasks import chain

logger = logging.getLogger(__name__)

_VERSION = 1  # part of the cache key; increase it when the same settings give other weights
_WARMUP_STEPS = 30
_CHECK_STEPS = 10
_CHECK_PROMPTS = 256


def warm_started_model(
    length: int = 5,
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    accuracy: float = 1 / 3,
    max_steps: int = 400,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    slip: float = 0.7,
    seed: int = 0,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Create the model and train it to imitate worked examples of training prompts, or load it from a cache.

    The cache is the folder ``sppo-kernels`` in ``XDG_CACHE_HOME`` (default ``~/.cache``).

    Args:
        length: steps per prompt.
        hidden_size, num_hidden_layers: size of the transformer.
        accuracy: stop when this fraction of sampled answers (at temperature 1) is correct.
        max_steps: maximum number of steps, at which the learning rate reaches 0.
        batch_size: worked examples per step.
        learning_rate: peak learning rate.
        slip: probability that the teacher subtracts in the wrong order.
        seed: seed of weights and examples; the global random state is not changed.

    Returns:
        The model, in float32 on the CPU, and its tokenizer with one token per character.

    Raises:
        ValueError: a setting out of range.
    """
    settings = locals()
    for name in ("length", "num_hidden_layers", "max_steps", "batch_size"):
        if settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")
    for name in ("accuracy", "slip"):
        if not 0 <= settings[name] <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {settings[name]}")
    if hidden_size < 1 or hidden_size % 8:
        raise ValueError(f"hidden_size must be a multiple of 8 (4 heads of even size), got {hidden_size}")
    max_tokens = chain.prompt_tokens(length) + chain.completion_tokens(length)
    model = new_model(chain.ALPHABET, hidden_size, num_hidden_layers, max_tokens, seed=seed)

    def train() -> None:
        _imitate(
            model,
            length,
            accuracy=accuracy,
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            slip=slip,
            rng=random.Random(seed),
        )

    cached(model, "chain", settings, train)
    return model, char_tokenizer()


def cached(model: LlamaForCausalLM, name: str, settings: dict[str, Any], train: Callable[[], None]) -> None:
    """Load the weights of a model from the cache, or train it and save them there.

    Args:
        model: the model, in its initial state.
        name: name of the task.
        settings: what the weights depend on.
        train: trains the model.
    """
    file = _cache_folder() / f"{name}-{_digest(settings)}.safetensors"
    if file.is_file():
        logger.info(f"warm start: loaded from {file}")
        model.load_state_dict(load_file(file))
        model.eval()
        return
    train()
    try:
        _save(model, file)
    except OSError as error:
        logger.warning(f"warm start: not cached for the next run: {error}")


def char_tokenizer(alphabet: str = chain.ALPHABET) -> PreTrainedTokenizerFast:
    """Create a tokenizer with one token per character of the alphabet, after ``<pad>`` (0) and ``<eos>`` (1)."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without a decoder, text has spaces between tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def new_model(
    alphabet: str, hidden_size: int, num_hidden_layers: int, max_tokens: int, *, seed: int
) -> LlamaForCausalLM:
    """Create a transformer with the vocabulary of :func:`char_tokenizer`; the global random state is not changed.

    Args:
        alphabet: the characters.
        hidden_size, num_hidden_layers: its size; four heads.
        max_tokens: number of tokens of the longest sequence in the warm start; twice as many have positions.
        seed: seed of the weights.
    """
    config = LlamaConfig(
        vocab_size=len(alphabet) + 2,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * max_tokens,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _imitate(
    model: LlamaForCausalLM,
    length: int,
    *,
    accuracy: float,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    slip: float,
    rng: random.Random,
) -> None:
    """Train on worked examples, each used once, until the accuracy or the maximum number of steps is reached."""
    tokenizer = char_tokenizer()
    engine = HFRollout(model, tokenizer, max_completion_length=chain.completion_tokens(length))
    logger.info(
        f"warm start: imitating a teacher who subtracts in the wrong order {slip:.0%} of the time, "
        f"until {accuracy:.0%} of the answers are correct"
    )
    imitate(
        model,
        loss=lambda: _imitation_loss(model, _examples(tokenizer, length, batch_size, slip, rng), length),
        measure=lambda: _accuracy(engine, length, rng),
        accuracy=accuracy,
        max_steps=max_steps,
        learning_rate=learning_rate,
    )


def imitate(
    model: LlamaForCausalLM,
    *,
    loss: Callable[[], Tensor],
    measure: Callable[[], float],
    accuracy: float,
    max_steps: int,
    learning_rate: float,
) -> None:
    """Train a model until it has an accuracy, or for ``max_steps`` steps. It ends on the CPU, in evaluation mode.

    Args:
        model: the model, trained on a GPU if there is one.
        loss: returns the loss of the next batch, 0-d.
        measure: returns the accuracy reached so far, in [0, 1].
        accuracy: stop at this accuracy.
        max_steps: maximum number of steps, at which the learning rate reaches 0.
        learning_rate: peak learning rate.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nn.Module.to(model, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - step / max_steps)
    )
    reached = 0.0
    with tqdm(total=max_steps, desc="warm start", unit="step", mininterval=1) as progress:
        for step in range(1, max_steps + 1):
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()
            if step % _CHECK_STEPS == 0:
                reached = measure()
                progress.set_postfix(loss=f"{value.item():.2f}", accuracy=f"{reached:.2f}", refresh=False)
                if reached >= accuracy:
                    break
    logger.info(f"warm start: {step} steps, accuracy {reached:.2f}")
    nn.Module.to(model, "cpu").eval()


def _examples(tokenizer: PreTrainedTokenizerFast, length: int, count: int, slip: float, rng: random.Random) -> Tensor:
    """Return token ids ``[count, T]`` of training prompts with worked examples, all of the same length."""
    prompts = [chain.random_prompt(length, "train", rng) for _ in range(count)]
    texts = [f"{prompt}{chain.worked_example(prompt, slip, rng)}<eos>" for prompt in prompts]
    return torch.tensor(tokenizer(texts)["input_ids"])


def _imitation_loss(model: LlamaForCausalLM, tokens: Tensor, length: int) -> Tensor:
    """Compute the mean cross-entropy of the completions, a 0-d tensor."""
    start = chain.prompt_tokens(length)
    tokens = tokens.to(model.device)
    logits = model(tokens[:, :-1]).logits[:, start - 1 :]
    return cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten())


def _accuracy(engine: HFRollout, length: int, rng: random.Random) -> float:
    """Measure the accuracy of sampled answers to new training prompts; held-out prompts are not used."""
    prompts = [chain.random_prompt(length, "train", rng) for _ in range(_CHECK_PROMPTS)]
    samples = engine.generate(prompts, seed=rng.getrandbits(32), temperature=1.0, batch_size=_CHECK_PROMPTS)
    answers = [chain.answer(prompt) for prompt in prompts]
    return sum(chain.reward(prompts, [sample.completion for sample in samples], answers)) / _CHECK_PROMPTS


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sppo-kernels"


def _digest(settings: dict[str, Any]) -> str:
    return sha256(json.dumps(settings | {"version": _VERSION}, sort_keys=True).encode()).hexdigest()[:16]


def _save(model: LlamaForCausalLM, file: Path) -> None:
    """Write a temporary file per process and rename it, so that ``file`` is complete or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        staged.write_bytes(save(model.state_dict()))
        os.replace(staged, file)
    finally:
        staged.unlink(missing_ok=True)
