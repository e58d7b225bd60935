"""Packed sequences give the results and gradients of separate sequences, in every supported family."""

import pytest
import torch
import transformers
from older_transformers import needs_a_newer_one
from tiny_models import FAMILIES, SIZES, char_tokenizer, tiny_model

from sppo.models import packed_attention as attention
from sppo.models.actor_critic import ActorCritic
from sppo.models.critic_io import build_critic
from sppo.models.critics import PromptCritic
from sppo.models.packed_attention import PACKED_ATTENTION, Packed, pack, packed_attention, packed_hidden, use_attention

SEQUENCES = [[3, 7, 2, 9, 4, 4, 8], [5], [6, 2, 3, 2], [7, 2, 9, 9], [10, 11]]


def hidden_alone(model, sequences):
    """Run the model's own forward on each sequence separately."""
    ids = [torch.tensor([sequence]) for sequence in sequences]
    return torch.cat([model.base_model(input_ids=row, use_cache=False).last_hidden_state[0] for row in ids])


def gradients(model, hidden):
    model.zero_grad()
    torch.manual_seed(1)
    (hidden * torch.randn_like(hidden)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.base_model.parameters() if p.grad is not None])


@pytest.mark.parametrize("part", ["policy", "critic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_each_sequence_alone(family, part):
    model = tiny_model(family).double()
    if part == "critic":
        model = build_critic(None, model, char_tokenizer())
        assert model.config._attn_implementation == FAMILIES[family][2].get("attn_implementation", "sdpa")
    own = hidden_alone(model, SEQUENCES)
    own_gradients = gradients(model, own)
    with use_attention(model, PACKED_ATTENTION):
        ours = packed_hidden(model, pack(SEQUENCES), 7)
        our_gradients = gradients(model, ours)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-7)  # rotary angles are float32
    torch.testing.assert_close(our_gradients, own_gradients, rtol=1e-5, atol=1e-6)


def test_pack():
    packed = pack([[5, 6, 7], [8], [9, 5]])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 5]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packed.cu_seqlens.dtype == torch.int32


def test_autocast_applies_to_float32_query_and_key(monkeypatch):
    seen = []
    attend = attention._attend
    record = lambda *qkv, **settings: seen.extend(x.dtype for x in qkv) or attend(*qkv, **settings)
    monkeypatch.setattr(attention, "_attend", record)
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8).bfloat16()
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    call = {"cu_seq_lens_q": cu_seqlens, "max_length_q": 3}
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = packed_attention(torch.nn.Module(), q, k, v, None, **call)
    assert set(seen) == {torch.bfloat16} == {out.dtype}
    exact, _ = packed_attention(torch.nn.Module(), q, k, v.float(), None, **call)
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)


def test_use_attention_restores_after_an_error():
    model = tiny_model()
    seen = []

    def fail():
        with use_attention(model, PACKED_ATTENTION):
            seen.append(model.config._attn_implementation)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert seen == [PACKED_ATTENTION]
    assert model.config._attn_implementation == "sdpa"


def test_activation_checkpointing_recomputes_the_same():
    model = tiny_model().train()
    with use_attention(model, PACKED_ATTENTION):
        plain = gradients(model, packed_hidden(model, pack(SEQUENCES), 7))
        ActorCritic(model, None).gradient_checkpointing_enable()
        again = gradients(model, packed_hidden(model, pack(SEQUENCES), 7))
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_check_accepts_supported_models(family):
    policy = tiny_model(family)
    ActorCritic(policy, PromptCritic(build_critic(None, policy, char_tokenizer()))).check_packing()


@pytest.mark.parametrize(("wrong", "says"), [("attention", "attention over packed"), ("logits", "log-probabilities")])
def test_check_rejects_a_model_that_differs(wrong, says, monkeypatch):
    policy = tiny_model()
    if wrong == "attention":
        monkeypatch.setattr(
            "sppo.models.actor_critic.packed_hidden", lambda model, packed, _: leaking_hidden(model, packed)
        )
    else:
        policy.lm_head.register_forward_hook(lambda module, inputs, output: output.square())
    with pytest.raises(ValueError, match=says):
        ActorCritic(policy, None).check_packing()


def test_check_rejects_a_model_that_does_not_pass_on_boundaries():
    config = transformers.StableLmConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(ValueError, match=r"StableLmForCausalLM .* cannot be trained here yet"):
        ActorCritic(transformers.StableLmForCausalLM(config), None).check_packing()


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 2}, "GptOssAttention has attention sinks"),
        ("Llama4", {"num_local_experts": 2, "head_dim": 8}, "does not support packed sequences"),  # chunked attention
    ],
)
def test_check_names_what_packed_attention_lacks(family, changes, says):
    config = "Llama4TextConfig" if family == "Llama4" else f"{family}Config"
    policy = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, config)(**(SIZES | changes)))
    with pytest.raises(ValueError, match=says):
        ActorCritic(policy, None).check_packing()


@pytest.mark.parametrize("std", [0.02, 0.2])
def test_check_rejects_layers_that_read_across_the_boundary(std):
    """With small weights they change hidden states by less than rounding in bfloat16 does."""
    if not hasattr(transformers, "FalconH1Config"):
        pytest.skip(f"transformers {transformers.__version__} has no Falcon-H1")
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "lm_head_multiplier": 0.5}
    torch.manual_seed(0)
    policy = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**(SIZES | sizes)))
    for parameter in policy.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    with pytest.raises(ValueError, match=r"model=FalconH1ForCausalLM.* cannot be trained here yet"):
        ActorCritic(policy, None).check_packing()


def test_check_is_made_without_dropout():
    config = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.attention_dropout = 0.5
    pair = ActorCritic(transformers.GPTNeoXForCausalLM(config).train(), None)
    pair.check_packing()
    assert pair.training
    tokens = torch.arange(20)[None]
    assert torch.equal(pair.policy(tokens).logits, pair.policy(tokens).logits)  # nor is there any in training


@pytest.mark.parametrize(
    ("installed", "capability", "chosen"),
    [
        ([2], (8, 0), 2),
        ([2, 3], (8, 6), 2),
        ([2, 3], (9, 0), 3),
        ([2, 3, 4], (9, 0), 4),
        ([2, 4], (10, 0), 4),
        ([2, 3], (10, 0), None),
        ([], (9, 0), None),
        ([2, 3, 4], (7, 5), None),
    ],
)
def test_the_newest_flash_attn_that_supports_the_device(installed, capability, chosen, monkeypatch):
    for version in (2, 3, 4):
        monkeypatch.setattr(attention, f"is_flash_attn_{version}_available", lambda v=version: v in installed)
    attention.flash_attention.cache_clear()
    assert attention.flash_attention(capability) == (chosen and f"flash_attention_{chosen}")
    attention.flash_attention.cache_clear()


@needs_a_newer_one
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 20.0)])
def test_flash_attn_gets_the_arguments_of_the_loop(window, softcap, monkeypatch):
    """Its variable-length function is replaced by the loop with the same signature."""
    settings = {"max_length_q": 5, "sliding_window": window, "softcap": softcap, "scaling": 0.3}
    q, k, v = (torch.randn(1, heads, 8, 4, dtype=torch.bfloat16) for heads in (4, 2, 2))
    cu = torch.tensor([0, 5, 8], dtype=torch.int32)
    expected, _ = packed_attention(None, q, k, v, None, cu_seq_lens_q=cu, **settings)

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, causal, **other):
        assert causal
        assert cu_seqlens_k is cu_seqlens_q
        window = other.get("window_size", (-1, -1))[0]
        out, _ = packed_attention(
            None,
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            None,
            cu_seq_lens_q=cu_seqlens_q,
            max_length_q=max_seqlen_q,
            scaling=softmax_scale,
            softcap=other.get("softcap"),
            sliding_window=window + 1 if window >= 0 else None,
        )
        return out[0]

    def process(**given):
        kept = ("softmax_scale", "softcap", "max_seqlen_q", "max_seqlen_k")
        extra = {name: given[name] for name in kept if given.get(name) is not None}
        window = given["sliding_window"]
        return extra | {"causal": given["is_causal"]} | ({"window_size": (window - 1, 0)} if window else {})

    monkeypatch.setattr(
        transformers.modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda name: ((None, varlen, None, None, None), (process, None)),
    )
    ours = attention.by_flash_attention(
        q,
        k,
        v,
        name="flash_attention_2",
        cu_seqlens=cu,
        max_length=5,
        scale=0.3,
        sliding_window=window,
        softcap=softcap,
    )
    torch.testing.assert_close(ours, expected)


def leaking_hidden(model, packed):
    """Attend over everything as one causal sequence, so that the second sees the first."""
    one = Packed(packed.input_ids, packed.position_ids, packed.cu_seqlens[[0, -1]])
    return packed_hidden(model, one, packed.input_ids.shape[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gpu_kernel_equals_the_loop(window, kv_heads):
    lengths = [1, 30, 7, 64]
    cu = torch.tensor([0, 1, 31, 38, 102], dtype=torch.int32, device="cuda")
    q = torch.randn(1, 4, 102, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, 102, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    settings = {"cu_seq_lens_q": cu, "max_length_q": max(lengths), "sliding_window": window}
    fused, _ = packed_attention(None, q, k, v, None, **settings)
    loop, _ = packed_attention(None, q.float(), k.float(), v.float(), None, **settings)
    torch.testing.assert_close(fused.float(), loop, rtol=2e-2, atol=2e-2)
