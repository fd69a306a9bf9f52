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
    """

    blocks: str = "layers"
    tokens: str = "embed_tokens"
    positions: str | None = None
    entry: tuple[str, ...] = ()
    exit: tuple[str, ...] = ("norm",)
    neutral: Mapping[str, float] = field(default_factory=dict)
    neutral_config: Mapping[str, float | bool] = field(default_factory=dict)


# Embedding, blocks, final norm, all where Llama has them; rotary positions in the blocks.
_PLAIN = """
    apertus arcee aria_text axk1 axk2 bailing_hybrid bitnet cohere cohere2 cohere2_moe cwm deepseek_v2
    deepseek_v3 deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint
    gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt_oss helium hunyuan_v1_dense hunyuan_v1_moe
    hy_v3 internlm3 iquestcoder jais2 jetmoe kimi_linear kolibri1 laguna llama mellum mimo_v2_flash minicpm3
    minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral nemotron olmo olmo2 olmo3 olmo_hybrid
    olmoe phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss
    smollm3 solar_open stablelm vaultgemma youtu
"""
# The same, and the model multiplies the embeddings.
_SCALED = """
    granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared hyperclovax
"""

_GPT = Family(blocks="h", tokens="wte", positions="wpe", entry=("drop",), exit=("ln_f",))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_PLAIN.split(), Family()),
    **dict.fromkeys(_SCALED.split(), Family(neutral={"embedding_multiplier": 1.0})),
    "afmoe": Family(neutral_config={"mup_enabled": False}),
    "bamba": Family(exit=("final_layernorm",)),
    "biogpt": Family(positions="embed_positions", exit=("layer_norm",), neutral={"dropout": 0.0}),
    "bloom": Family(blocks="h", tokens="word_embeddings", entry=("word_embeddings_layernorm",), exit=("ln_f",)),
    "codegen": Family(blocks="h", tokens="wte", entry=("drop",), exit=("ln_f",)),
    "falcon": Family(blocks="h", tokens="word_embeddings", exit=("ln_f",)),
    "falcon_h1": Family(exit=("final_layernorm",)),
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": _GPT,
    "gpt_neox": Family(tokens="embed_in", entry=("emb_dropout",), exit=("final_layer_norm",)),
    "gpt_neox_japanese": Family(tokens="embed_in", exit=("final_layer_norm",)),
    "gptj": Family(blocks="h", tokens="wte", entry=("drop",), exit=("ln_f",)),
    "jamba": Family(exit=("final_layernorm",)),
    "lfm2": Family(exit=("embedding_norm",)),
    "lfm2_moe": Family(exit=("embedding_norm",)),
    "lfm3": Family(exit=("embedding_norm",)),
    "mpt": Family(blocks="blocks", tokens="wte", exit=("norm_f",)),
    "nemotron_h": Family(tokens="embeddings", exit=("norm_f",)),
    "opt": Family(
        blocks="decoder.layers",
        tokens="decoder.embed_tokens",
        positions="decoder.embed_positions",
        entry=("decoder.project_in",),
        exit=("decoder.final_layer_norm", "decoder.project_out"),
    ),
    "persimmon": Family(exit=("final_layernorm",)),
    "phi": Family(entry=("embed_dropout",), exit=("final_layernorm",)),
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
