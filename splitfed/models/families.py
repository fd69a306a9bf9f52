"""What truly differs between decoder-only families: where the parts of a model are, and what must not happen twice.

A family that is not in ``FAMILIES`` is refused by name. It enters the table only together with a tiny configuration in
``tests/equivalence/tiny_models.py``, which proves it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from splitfed.errors import UnsupportedFamily


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, as paths relative to the base model (``model.base_model``).

    Attributes:
        blocks: The block list.
        tokens: The token embedding: only the bottom has one.
        positions: The learned positions, where the model itself adds them: a zero in trunk and top.
        entry: Modules between embeddings and first block (dropout, norm, projection): they pass through in trunk and
            top.
        exit: Modules between last block and head (final norm, projection): they pass through in bottom and trunk.
        neutral: Attributes between embeddings and first block (multiplier, dropout rate), each with the value that
            passes hidden states through: set so in trunk and top.
        neutral_config: The same for entries of the configuration.
        targets: Last name components of the layers that LoRA can adapt; None for every linear layer of the blocks.
            Mixtures of experts have a list: their routers stay as they are, and peft takes the names of the other
            feed-forward layers for those of the experts.
    """

    blocks: str = "layers"
    tokens: str = "embed_tokens"
    positions: str | None = None
    entry: tuple[str, ...] = ()
    exit: tuple[str, ...] = ("norm",)
    neutral: Mapping[str, float] = field(default_factory=dict)
    neutral_config: Mapping[str, float | bool] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None


# Everything where Llama has it: embedding, blocks with rotary positions, final norm.
_PLAIN = """
    apertus arcee bitnet cohere cohere2 cwm diffllama doge ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 helium
    hunyuan_v1_dense internlm3 iquestcoder jais2 llama minicpm3 ministral ministral3 mistral nemotron olmo olmo2 olmo3
    olmo_hybrid phi3 qwen2 qwen3 qwen3_5_text seed_oss smollm3 stablelm vaultgemma youtu
"""
# The same with mixtures of experts, whose experts are one parameter a block and no linear layers.
_EXPERTS = """
    aria_text cohere2_moe dots1 ernie4_5_moe exaone_moe flex_olmo flint glm4_moe gpt_oss hunyuan_v1_moe hy_v3 kolibri1
    laguna mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open
"""
_LATENT_EXPERTS = """
    axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite
"""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LATENT_ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_MULTIPLIED = {"embedding_multiplier": 1.0}

_GPT = Family(blocks="h", tokens="wte", positions="wpe", entry=("drop",), exit=("ln_f",))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_PLAIN.split(), Family()),
    **dict.fromkeys(_EXPERTS.split(), Family(targets=_ATTENTION)),
    **dict.fromkeys(_LATENT_EXPERTS.split(), Family(targets=_LATENT_ATTENTION)),
    "afmoe": Family(neutral_config={"mup_enabled": False}, targets=_ATTENTION),
    "bailing_hybrid": Family(targets=(*_ATTENTION, *_LATENT_ATTENTION, "g_proj", "f_proj", "b_proj")),
    "bamba": Family(exit=("final_layernorm",)),
    "biogpt": Family(positions="embed_positions", exit=("layer_norm",), neutral={"dropout": 0.0}),
    "bloom": Family(blocks="h", tokens="word_embeddings", entry=("word_embeddings_layernorm",), exit=("ln_f",)),
    "codegen": Family(blocks="h", tokens="wte", entry=("drop",), exit=("ln_f",)),
    "falcon": Family(blocks="h", tokens="word_embeddings", exit=("ln_f",)),
    "falcon_h1": Family(  # peft refuses the out_proj of Mamba
        exit=("final_layernorm",), targets=(*_ATTENTION, "in_proj", "gate_proj", "up_proj", "down_proj")
    ),
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": _GPT,
    "gpt_neox": Family(tokens="embed_in", entry=("emb_dropout",), exit=("final_layer_norm",)),
    "gpt_neox_japanese": Family(tokens="embed_in", exit=("final_layer_norm",)),
    "gptj": Family(blocks="h", tokens="wte", entry=("drop",), exit=("ln_f",)),
    **dict.fromkeys(("granite", "granite_swa", "hyperclovax"), Family(neutral=_MULTIPLIED)),
    **dict.fromkeys(("granitemoe", "granitemoe_swa"), Family(neutral=_MULTIPLIED, targets=_ATTENTION)),
    "granitemoehybrid": Family(
        neutral=_MULTIPLIED, targets=(*_ATTENTION, "in_proj", "out_proj", "input_linear", "output_linear")
    ),
    "granitemoeshared": Family(neutral=_MULTIPLIED, targets=(*_ATTENTION, "input_linear", "output_linear")),
    "jamba": Family(exit=("final_layernorm",), targets=(*_ATTENTION, "in_proj", "x_proj", "out_proj")),
    "jetmoe": Family(targets=("kv_proj",)),
    "kimi_linear": Family(
        targets=(*_ATTENTION, *_LATENT_ATTENTION, "b_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj")
    ),
    "lfm2": Family(exit=("embedding_norm",)),
    "lfm2_moe": Family(exit=("embedding_norm",), targets=("q_proj", "k_proj", "v_proj", "in_proj", "out_proj")),
    "lfm3": Family(exit=("embedding_norm",)),
    "mpt": Family(blocks="blocks", tokens="wte", exit=("norm_f",)),
    "nemotron_h": Family(tokens="embeddings", exit=("norm_f",), targets=(*_ATTENTION, "in_proj")),
    "opt": Family(
        blocks="decoder.layers",
        tokens="decoder.embed_tokens",
        positions="decoder.embed_positions",
        entry=("decoder.project_in",),
        exit=("decoder.final_layer_norm", "decoder.project_out"),
    ),
    "persimmon": Family(exit=("final_layernorm",)),
    "phi": Family(entry=("embed_dropout",), exit=("final_layernorm",)),
    "qwen3_5_moe_text": Family(targets=(*_ATTENTION, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")),
    "qwen3_next": Family(targets=(*_ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj")),
    "starcoder2": Family(neutral={"embedding_dropout": 0.0}),
    "xglm": Family(positions="embed_positions", exit=("layer_norm",), neutral={"dropout": 0.0}),
}


def family_of(model_type: str) -> Family:
    """Look up where a family keeps its parts.

    Args:
        model_type: ``config.model_type``.

    Raises:
        UnsupportedFamily: If the family is not proven to split.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UnsupportedFamily(
            f"The model family {model_type!r} is not proven to split without changing its numbers; "
            f"use one of: {', '.join(sorted(FAMILIES))}."
        ) from None
