"""Configs of published models, one of each family at least, as their authors' config.json files have them."""

from __future__ import annotations

from typing import Any


def _config(family: str, architecture: str, **sizes: Any) -> dict[str, Any]:
    return {"model_type": family, "architectures": [architecture], "torch_dtype": "bfloat16", **sizes}


def _sizes(
    hidden: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab, **more,
    }  # fmt: skip


_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "cache_implementation": "hybrid",
}
_LATENT = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "norm_topk_prob": True, "moe_layer_freq": 1, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2-7b": _config(
        "llama", "LlamaForCausalLM", **_sizes(4096, 32, 32, 32, 11008, 32000, hidden_act="silu")
    ),
    "llama-3.2-1b": _config(
        "llama",
        "LlamaForCausalLM",
        **_sizes(2048, 16, 32, 8, 8192, 128256, hidden_act="silu", head_dim=64, tie_word_embeddings=True),
        attention_bias=False,
        mlp_bias=False,
    ),
    "llama-with-biases": _config(
        "llama", "LlamaForCausalLM", **_sizes(256, 2, 8, 4, 512, 1000), attention_bias=True, mlp_bias=True
    ),
    "mistral-7b-v0.1": _config(
        "mistral", "MistralForCausalLM", **_sizes(4096, 32, 32, 8, 14336, 32000, sliding_window=4096)
    ),
    "mixtral-8x7b": _config(
        "mixtral",
        "MixtralForCausalLM",
        **_sizes(4096, 32, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
        output_router_logits=False,
        router_aux_loss_coef=0.02,
        sliding_window=None,
    ),
    "qwen2.5-7b": _config(
        "qwen2",
        "Qwen2ForCausalLM",
        **_sizes(3584, 28, 28, 4, 18944, 152064, max_window_layers=28, sliding_window=131072),
        use_sliding_window=False,
        tie_word_embeddings=False,
    ),
    "qwen3-0.6b": _config(
        "qwen3",
        "Qwen3ForCausalLM",
        **_sizes(1024, 28, 16, 8, 3072, 151936, head_dim=128, tie_word_embeddings=True),
        attention_bias=False,
    ),
    "qwen3-30b-a3b": _config(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        **_sizes(2048, 48, 32, 4, 6144, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8),
        moe_intermediate_size=768,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        tie_word_embeddings=False,
    ),
    "gemma-2-9b": _config(
        "gemma2",
        "Gemma2ForCausalLM",
        **_sizes(3584, 42, 16, 8, 14336, 256000, head_dim=256, sliding_window=4096, **_GEMMA),
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "gemma-3-1b": _config(
        "gemma3_text",
        "Gemma3ForCausalLM",
        **_sizes(1152, 26, 4, 1, 6912, 262144, head_dim=256, sliding_window=512, **_GEMMA),
        sliding_window_pattern=6,
        rope_local_base_freq=10000,
    ),
    "gpt-oss-20b": _config(
        "gpt_oss",
        "GptOssForCausalLM",
        **_sizes(2880, 24, 64, 8, 2880, 201088, head_dim=64, sliding_window=128, num_local_experts=32),
        num_experts_per_tok=4,
        experts_per_token=4,
        swiglu_limit=7.0,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "deepseek-v2-lite": _config(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        **_sizes(2048, 27, 16, 16, 10944, 102400, n_routed_experts=64, n_shared_experts=2, **_LATENT),
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        q_lora_rank=None,
        topk_method="greedy",
    ),
    "deepseek-v3": _config(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        **_sizes(7168, 61, 128, 128, 18432, 129280, n_routed_experts=256, n_shared_experts=1, **_LATENT),
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        n_group=8,
        topk_group=4,
        num_nextn_predict_layers=1,
    ),
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257, "activation_function": "gelu_new",
    },
}  # fmt: skip
