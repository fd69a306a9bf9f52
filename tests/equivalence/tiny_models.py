"""Tiny random models, one or more a family: what the list of supported families rests on.

Settings are the hard ones of each family: sliding windows shorter than the sequences, mixed layer types, multipliers
other than 1, inverse-layer scaling, soft-capping. Weights are large enough for every part to matter.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
N_BLOCKS = 4
WINDOW = 5

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
_SLIDING = {"sliding_window": WINDOW, "layer_types": _MIXED}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_FIRST_DENSE = {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": None,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_RECURRENT = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": _RECURRENT,
}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
_ROPE_BY_TYPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

_OWN: dict[str, dict[str, Any]] = {
    "afmoe": {**_EXPERTS, **_SLIDING, "mup_enabled": True, "num_dense_layers": 1, "num_shared_experts": 1},
    "aria_text": {"moe_num_experts": 4},
    "axk1": {**_EXPERTS, **_LATENT, **_FIRST_DENSE},
    "bailing_hybrid": {
        **_EXPERTS,
        **_LATENT,
        "head_dim": 16,
        "layer_types": _RECURRENT,
        "num_expert_group": 1,
        "num_experts_per_token": 2,
        "first_k_dense_replace": 1,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "bamba": {**_MAMBA, "head_dim": ..., "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4, "n_ctx": 64},
    "cohere": {"logit_scale": 0.3, "use_qk_norm": True},
    "cohere2": {**_SLIDING, "logit_scale": 0.3},
    "cohere2_moe": {**_EXPERTS, **_SLIDING, **_FIRST_DENSE, "num_shared_experts": 1},
    "cwm": _SLIDING,
    "deepseek_v2": {**_EXPERTS, **_LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**_EXPERTS, **_LATENT, "first_k_dense_replace": 1},
    "doge": {"keep_window_size": 6},
    "dots1": {**_EXPERTS, **_SLIDING, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 24},
    "exaone4": _SLIDING,
    "exaone_moe": {**_EXPERTS, **_SLIDING, **_FIRST_DENSE},
    "falcon": {"head_dim": ..., "alibi": True, "multi_query": False},
    "falcon_h1": {**_MAMBA, "embedding_multiplier": 3.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.7},
    "flex_olmo": _EXPERTS,
    "flint": {**_EXPERTS, **_SLIDING, "mlp_only_layers": [0, 2]},
    "gemma2": {**_SLIDING, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
    "gemma3_text": {**_SLIDING, "rope_parameters": _ROPE_BY_TYPE, "query_pre_attn_scalar": 5},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {**_EXPERTS, "first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": {**_EXPERTS, **_LATENT, **_FIRST_DENSE, "head_dim": ...},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {**_EXPERTS, **_SLIDING},
    "gptj": {"rotary_dim": 4},
    "granite": _MULTIPLIERS,
    "granite_swa": {**_MULTIPLIERS, **_SLIDING, "layer_rope_theta": [100.0, 0.0, 10000.0, 100.0]},
    "granitemoe": {**_MULTIPLIERS, **_EXPERTS},
    "granitemoe_swa": {**_MULTIPLIERS, **_SLIDING, **_EXPERTS, "layer_rope_theta": [100.0, 0.0, 10000.0, 100.0]},
    "granitemoehybrid": {
        **_MULTIPLIERS,
        **_EXPERTS,
        **_MAMBA,
        "layer_types": _RECURRENT,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 24,
    },
    "granitemoeshared": {**_MULTIPLIERS, **_EXPERTS, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [1, 2, 1, 2]},
    "hy_v3": {**_EXPERTS, **_FIRST_DENSE, "num_shared_experts": 1},
    "hyperclovax": _MULTIPLIERS,
    "jamba": {
        **_EXPERTS,
        "head_dim": ...,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": {**_EXPERTS, "kv_channels": 8},
    "kolibri1": {**_EXPERTS, **_SLIDING},
    "laguna": {**_EXPERTS, **_SLIDING, **_FIRST_DENSE, "num_attention_heads_per_layer": [4, 2, 4, 2]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm2_moe": {
        **_EXPERTS,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "num_dense_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention", "conv"], "sliding_window": WINDOW},
    "mellum": {**_EXPERTS, **_SLIDING, **_FIRST_DENSE},
    "mimo_v2_flash": {**_EXPERTS, **_SLIDING, **_FIRST_DENSE, "v_head_dim": 8},
    "minicpm3": {**_LATENT, "scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 16},
    "minimax_m2": {**_EXPERTS, "rotary_dim": 4},
    "ministral": _SLIDING,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {**_EXPERTS, "sliding_window": WINDOW},
    "nemotron_h": {
        **_EXPERTS,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": None,
    },
    "kimi_linear": {
        **_EXPERTS,
        **_LATENT,
        "head_dim": ...,
        "layer_types": _RECURRENT,
        **_FIRST_DENSE,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "deepseek_v32": {
        **_EXPERTS,
        **_LATENT,
        "head_dim": ...,
        **_FIRST_DENSE,
        "index_topk": 6,
        "index_head_dim": 8,
        "index_n_heads": 2,
    },
    "axk2": {
        **_EXPERTS,
        **_LATENT,
        "head_dim": ...,
        **_FIRST_DENSE,
        "index_topk": 6,
        "index_head_dim": 8,
        "index_n_heads": 2,
    },
    "minimax_m3_vl_text": {**_EXPERTS, "rotary_dim": 4},
    "olmo": {"clip_qkv": 0.8},
    "olmo3": {**_SLIDING, "rope_parameters": _ROPE_BY_TYPE},
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "olmoe": _EXPERTS,
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 48, "do_layer_norm_before": True},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {**_EXPERTS, "sliding_window": WINDOW},
    "qwen2": {**_SLIDING, "use_sliding_window": True},
    "qwen2_moe": {**_EXPERTS, **_SLIDING, "use_sliding_window": True, "mlp_only_layers": [0, 2]},
    "qwen3": {**_SLIDING, "use_sliding_window": True},
    "qwen3_5_moe_text": {**_EXPERTS, **_DELTA},
    "qwen3_5_text": _DELTA,
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 2},
    "qwen3_next": {**_EXPERTS, **_DELTA, "mlp_only_layers": [1]},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "solar_open": _EXPERTS,
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": {**_SLIDING, "final_logit_softcapping": 3.0},
    "xglm": {"ffn_dim": 48},
    "youtu": _LATENT,
}


def tiny_config(family: str, **changes: Any) -> Any:
    settings = {**_BASE, **_OWN.get(family, {}), **changes}
    return AutoConfig.for_model(family, **{name: value for name, value in settings.items() if value is not ...})


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.eval()
    return model
