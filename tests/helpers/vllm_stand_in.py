"""Stand-ins for vLLM: one samples with transformers, for the documentation's example; one records how it is called."""

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


class RecordingLLM:
    """Answers each prompt with two tokens, and records the names of the calls with what distinguishes them."""

    def __init__(self, model: str, **settings):
        self.calls: list[tuple] = []
        self.settings = settings
        self.llm_engine = self

    def step(self):
        return self.finished

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, len(list(kwargs["weights_iterator"]))))

    def reset_prefix_cache(self):
        self.calls.append(("reset_prefix_cache",))

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self, tags):
        self.calls.append(("wake_up", *tags))

    def generate(self, prompts, params, *, use_tqdm):
        """Run a step in which nothing finishes, then one in which all but one do, then one in which the last does."""
        assert not use_tqdm
        self.calls.append(("generate", len(prompts)))
        for finished in ([], [True] * (len(prompts) - 1), [True]):
            self.finished = [SimpleNamespace(finished=each) for each in finished]
            self.llm_engine.step()
        logprobs = [{5: SimpleNamespace(logprob=-1.0)}, {1: SimpleNamespace(logprob=-2.0)}]
        output = SimpleNamespace(token_ids=[5, 1], logprobs=logprobs, finish_reason="stop", sampling_mask=None)
        return [SimpleNamespace(outputs=[output]) for _ in prompts]


def recording_module(*, has_sleep_mode: bool = True) -> ModuleType:
    """Return the stand-in that records its calls as a module, which is to be ``vllm`` and ``vllm.platforms``."""
    vllm = ModuleType("vllm")
    vllm.LLM = RecordingLLM
    vllm.SamplingParams = type("SamplingParams", (SimpleNamespace,), {"__struct_fields__": ("presence_penalty",)})
    vllm.current_platform = SimpleNamespace(is_sleep_mode_available=lambda: has_sleep_mode, device_type="cpu")
    return vllm
