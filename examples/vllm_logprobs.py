"""vLLM reports the log-probabilities of linear_logprobs, the trainer's function, instead of those of its own sampler.

For vLLM on one device, in the process of the caller (VLLM_ENABLE_V1_MULTIPROCESSING=0), with its model runner V1:

    llm.collective_rpc(share_logprobs)

Tokens are still drawn from vLLM's logits. Logit processors, penalties, top-k, top-p and min-p are not in the results.
"""

import os
import sys

import torch

from sppo_kernels import linear_logprobs

SETTINGS = {"projection": "fused"}


def share_logprobs(worker, record=None):
    """Replace the log-probabilities of sampled tokens; append hidden states, tokens, temperatures and results."""
    model, sampler = worker.model_runner.model, worker.model_runner.sampler
    processor = model.logits_processor
    compute_logits, sample, seen = model.compute_logits, sampler.forward, {}
    assert processor.scale == 1.0
    assert model.lm_head.tp_size == 1

    def keep_hidden(hidden):
        seen["hidden"] = hidden
        return compute_logits(hidden)

    def sample_and_score(logits, sampling_metadata, **settings):
        output = sample(logits, sampling_metadata, **settings)
        if output.logprobs_tensors is None:  # nobody asked for log-probabilities
            return output
        hidden, weight = seen["hidden"], model.lm_head.weight[: processor.org_vocab_size]  # without vLLM's padding
        tokens = output.sampled_token_ids[:, 0].long()
        temperature = sampling_metadata.temperature  # one per request; vLLM has 0 for a greedy one, None if all are
        temperature = torch.ones(len(tokens)) if temperature is None else temperature.where(temperature >= 1e-5, 1.0)
        temperature = temperature.to(hidden.device)
        logprobs = linear_logprobs(
            hidden, weight, tokens, temperature=temperature, softcap=processor.soft_cap, **SETTINGS
        ).logprobs
        ids, reported, *_ = output.logprobs_tensors  # [n, 1 + k]: the sampled token and k likeliest ones
        reported.copy_(torch.where(ids == tokens[:, None], logprobs[:, None], reported))
        if record is not None:
            record.append([x.clone() for x in (hidden, tokens, temperature, logprobs)])
        return output

    model.compute_logits, sampler.forward = keep_hidden, sample_and_score


def main(model="HuggingFaceTB/SmolLM2-135M-Instruct"):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm, record = LLM(model, logprobs_mode="processed_logprobs", enforce_eager=True), []
    llm.collective_rpc(share_logprobs, kwargs={"record": record})
    llm.generate(["1 + 1 =", "The capital of France is"], SamplingParams(temperature=0.7, max_tokens=16, logprobs=0))
    hidden, tokens, temperature, logprobs = (torch.cat(x) for x in zip(*record, strict=True))
    (weight,) = llm.apply_model(lambda m: m.lm_head.weight[: m.logits_processor.org_vocab_size])
    again = linear_logprobs(hidden, weight, tokens, temperature=temperature, **SETTINGS).logprobs  # all in one batch
    print(f"{len(tokens)} tokens, log-probabilities have the same bits: {torch.equal(again, logprobs)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
