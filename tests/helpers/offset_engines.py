"""Rollout engines whose log-probabilities differ from the trainer's, as those of an engine with its own kernels."""

import torch

from sppo.models.packed_attention import use_attention
from sppo.rollout.hf import HFRollout


class OffByATenth(HFRollout):
    """Underestimates every log-probability by a tenth of a nat."""

    def offset(self, sample):
        return 0.1

    def generate(self, prompts, **settings):
        samples = super().generate(prompts, **settings)
        for sample in samples:
            ids = torch.tensor([sample.prompt_ids + sample.response_ids])
            with use_attention(self.policy, self.attention):
                logits = self.policy(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / settings["temperature"]
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
            sample.logprobs = (chosen - self.offset(sample)).tolist()
        return samples


class OffByLength(OffByATenth):
    """Underestimates the log-probabilities of longer responses by more."""

    def offset(self, sample):
        return 0.02 * len(sample.response_ids)
