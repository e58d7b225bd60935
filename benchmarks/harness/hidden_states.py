"""Hidden states of SmolLM2-135M-Instruct before each token of its own answers to reasoning prompts.

Sampling takes minutes on a CPU, so the states are saved to a folder and read from there the next time.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SYSTEM_PROMPT = "Think step by step, then give the answer."  # for sets of prompts without one


class HiddenStates(NamedTuple):
    """Hidden states and the tokens that were sampled from them.

    Attributes:
        hidden: ``[N, H]`` float32.
        weight: ``[V, H]`` float32, the output embedding.
        labels: ``[N]``, the sampled tokens.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor


class Truncation(NamedTuple):
    """Which tokens the sampler keeps, after the temperature, in the terms of transformers.

    Attributes:
        top_k: how many at most; 0 for no limit.
        top_p: the fewest whose probabilities add up to at least this; 1 for no limit.
        min_p: those of at least this share of the largest probability; 0 for all.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self._asdict().items() if value != _DEFAULTS[name])


_DEFAULTS = Truncation._field_defaults
NOT_TRUNCATED = Truncation()


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``--states``."""
    parser.add_argument(
        "--states", type=Path, default=Path("runs/states"), metavar="DIR", help="folder of sampled states (%(default)s)"
    )


def sampled_states(
    folder: Path,
    source: str,
    temperature: float,
    prompts: int,
    tokens: int,
    truncation: Truncation = NOT_TRUNCATED,
) -> HiddenStates:
    """Sample answers of at most ``tokens`` tokens to the first ``prompts`` prompts of ``source`` (see load_prompts).

    Raises:
        ImportError: the packages of the model, or the trainer that samples, are not installed.
    """
    from safetensors.torch import load_file, save_file

    settings = "-".join([f"t{temperature}", *filter(None, [str(truncation)]), f"{prompts}x{tokens}"])
    name = re.sub(r"[^\w.-]+", "_", f"{source.rpartition('/')[2]}-{settings}")
    path = folder / f"{name}.safetensors"
    if not path.exists():
        print(
            f"sampling answers to {prompts} prompts of {source} at temperature {temperature} {truncation}",
            file=sys.stderr,
            flush=True,
        )
        found = _sample(source, temperature, prompts, tokens, truncation)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_file(found._asdict(), unfinished)
        unfinished.replace(path)
    return HiddenStates(**load_file(path))


def random_states(tokens: int) -> HiddenStates:
    """Make states in place of the model's for quick forms: half of the tokens peaked, half not."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(3000, 32) / 32**0.5, torch.randn(tokens, 32)
    hidden[::2] *= 12
    return HiddenStates(hidden, weight, (hidden @ weight.t()).argmax(-1))


@torch.no_grad()
def _sample(source: str, temperature: float, prompts: int, tokens: int, truncation: Truncation) -> HiddenStates:
    from sppo.data import load_prompts
    from sppo.models.packed_attention import PACKED_ATTENTION, Packed, packed_hidden, use_attention
    from sppo.rollout import HFRollout
    from sppo.rollout.batching import pack_policy_batch
    from sppo.tasks import smollm2

    policy, tokenizer = smollm2.policy()
    own_settings = {"size": prompts, "system_prompt": SYSTEM_PROMPT} if source.startswith("reasoning_gym:") else {}
    rows = load_prompts(source, seed=0, limit=prompts, **own_settings)
    top_k, top_p, min_p = truncation
    engine = HFRollout(
        policy,
        tokenizer,
        max_completion_length=tokens,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p or None,
        return_support=False,
    )
    samples = engine.generate([row["prompt"] for row in rows], seed=0, temperature=temperature, batch_size=32)
    hidden, labels = [], []
    with use_attention(policy, PACKED_ATTENTION):
        for sample in samples:
            sample.reward = sample.advantage = 0.0
            batch = pack_policy_batch([sample])
            packed = Packed(batch["input_ids"], batch["position_ids"], batch["cu_seqlens"])
            hidden.append(packed_hidden(policy, packed, packed.input_ids.numel())[batch["response_index"]])
            labels.append(batch["response_ids"])
    weight = policy.get_output_embeddings().weight.detach().clone()
    return HiddenStates(torch.cat(hidden).contiguous(), weight, torch.cat(labels))
