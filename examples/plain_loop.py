"""SPPO in plain PyTorch, a minute on a CPU core: the policy learns to end its response with the largest of 3 digits."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from sppo_kernels import linear_logprobs, linear_policy_loss, prompt_value_loss

EOS, PAD, PROMPT, TEMPERATURE = 10, 11, 3, 0.9  # tokens 0 to 9 are digits; prompts of one length need no left padding
TINY = LlamaConfig(vocab_size=12, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
PROMPTS = torch.cartesian_prod(*[torch.arange(10)] * PROMPT)[torch.randperm(1000, generator=torch.Generator())]


class ActorCritic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.actor, self.critic, self.head = LlamaForCausalLM(TINY), LlamaModel(TINY), torch.nn.Linear(64, 1)
        torch.nn.init.constant_(self.head.bias, -3.0)  # near the initial success rate; 0 would predict 0.5

    @torch.no_grad()
    def rollout(self, prompts, **settings):  # no top_k or top_p: the loss covers all tokens
        settings |= {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0, "max_new_tokens": 8}
        tokens = self.actor.generate(prompts, eos_token_id=EOS, pad_token_id=PAD, **settings)
        # EOS is part of the response, so none is empty; -100 is masked. old: same op as the loss, so ratios start at 1
        labels = tokens[:, PROMPT:].masked_fill((tokens[:, PROMPT - 1 : -1] == EOS).cumsum(1) > 0, -100)
        old = linear_logprobs(*self.shifted(tokens), labels.flatten(), temperature=TEMPERATURE).logprobs.view_as(labels)
        right = tokens[:, PROMPT:-1] == prompts.amax(1, keepdim=True)  # reward: followed by EOS; 0 if cut off
        return tokens, labels, old, (right & (tokens[:, PROMPT + 1 :] == EOS)).any(1).float()

    def shifted(self, tokens):  # position t predicts token t + 1
        return self.actor.model(tokens).last_hidden_state[:, PROMPT - 1 : -1].flatten(0, 1), self.actor.lm_head.weight

    def forward(self, tokens, labels, old, rewards, normalizer=None):
        read, last = self.critic(tokens[:, :PROMPT]).last_hidden_state, torch.full_like(labels[:, 0], PROMPT - 1)
        value = prompt_value_loss(read, self.head.weight, last, rewards, bias=self.head.bias)
        starts = torch.arange(0, labels.numel() + 1, labels.shape[1], dtype=torch.int32, device=labels.device)
        inputs = *self.shifted(tokens), labels.flatten(), old.flatten(), value.advantages  # R - V
        settings = {"temperature": TEMPERATURE, "ratio_level": "token", "dual_clip": 3.0, "normalizer": normalizer}
        return value.loss + linear_policy_loss(*inputs, cu_seqlens=starts, **settings).loss


def main(updates=100, seed=0):
    torch.manual_seed(seed)
    model = ActorCritic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.rollout(PROMPTS[800:])[-1].mean()
    for update in range(updates):
        samples = model.rollout(PROMPTS[torch.randint(800, (256,))])
        print(f"update {update}: success {samples[-1].mean():.2f}")
        for half in zip(*(x.split(128) for x in samples), strict=True):  # two steps; each sample is used once
            optimizer.zero_grad()
            model(*half).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    after = model.rollout(PROMPTS[800:])[-1].mean()
    print(f"success on held-out prompts: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
