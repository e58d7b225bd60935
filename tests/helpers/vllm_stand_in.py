"""What the documentation's example needs of vLLM, without its engine: sampling by transformers, with masks."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SamplingParams = SimpleNamespace


class LLM:
    """Samples with transformers, and returns the attributes of vLLM's ``RequestOutput`` that the example reads."""

    def __init__(self, model: str, *, return_sampling_mask: bool, logprobs_mode: str):
        assert return_sampling_mask
        assert logprobs_mode == "processed_logprobs"
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def generate(self, prompts: list[str], params: SimpleNamespace) -> list[SimpleNamespace]:
        """Return one completion per prompt; the n-th has at most n + 2 tokens, so that lengths differ."""
        requests = []
        for i, prompt in enumerate(prompts):
            inputs = self.tokenizer(prompt, return_tensors="pt")
            ids = inputs.input_ids
            generated = self.model.generate(
                ids, attention_mask=inputs.attention_mask, do_sample=True,
                temperature=params.temperature, top_k=params.top_k, top_p=params.top_p,
                max_new_tokens=min(params.max_tokens, i + 2), output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
            tokens = generated.sequences[0, ids.shape[1] :].tolist()
            logprobs = torch.cat(generated.scores).log_softmax(-1)
            rows = [row.isfinite().nonzero().flatten().tolist() for row in logprobs]
            sample = SimpleNamespace(
                token_ids=tokens,
                logprobs=[
                    {token: SimpleNamespace(logprob=float(row[token]))}
                    for token, row in zip(tokens, logprobs, strict=True)
                ],
                sampling_mask=SimpleNamespace(token_ids=rows),
            )
            requests.append(SimpleNamespace(prompt_token_ids=ids[0].tolist(), outputs=[sample]))
        return requests


def module() -> ModuleType:
    """Return the stand-in as a module."""
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, SamplingParams
    return vllm
