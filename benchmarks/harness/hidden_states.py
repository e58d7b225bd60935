"""Hidden states of SmolLM2-135M-Instruct before each token of its own answers to reasoning prompts.

Sampling takes minutes on a CPU, so the states are saved to a folder and read from there the next time.
"""

from __future__ import annotations

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


def sampled_states(folder: Path, source: str, temperature: float, prompts: int, tokens: int) -> HiddenStates:
    """Sample answers of at most ``tokens`` tokens to the first ``prompts`` prompts of ``source`` (see load_prompts).

    Raises:
        ImportError: the packages of the model, or the trainer that samples, are not installed.
    """
    from safetensors.torch import load_file, save_file

    name = re.sub(r"[^\w.-]+", "_", f"{source.rpartition('/')[2]}-t{temperature}-{prompts}x{tokens}")
    path = folder / f"{name}.safetensors"
    if not path.exists():
        print(f"sampling answers to {prompts} prompts of {source} at temperature {temperature}", file=sys.stderr)
        found = _sample(source, temperature, prompts, tokens)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_file(found._asdict(), unfinished)
        unfinished.replace(path)
    return HiddenStates(**load_file(path))


@torch.no_grad()
def _sample(source: str, temperature: float, prompts: int, tokens: int) -> HiddenStates:
    from sppo.data import load_prompts
    from sppo.models.packed_attention import PACKED_ATTENTION, Packed, packed_hidden, use_attention
    from sppo.rollout import HFRollout
    from sppo.rollout.batching import pack_policy_batch
    from sppo.tasks import smollm2

    policy, tokenizer = smollm2.policy()
    own_settings = {"size": prompts, "system_prompt": SYSTEM_PROMPT} if source.startswith("reasoning_gym:") else {}
    rows = load_prompts(source, seed=0, limit=prompts, **own_settings)
    engine = HFRollout(policy, tokenizer, max_completion_length=tokens)
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
