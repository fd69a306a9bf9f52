"""What truly differs between decoder-only families: where the parts of a model are, and what may not be run twice.

A family that is not in ``FAMILIES`` is refused by name. It enters the table only together with a tiny configuration in
``tests/equivalence/tiny_models.py``, which proves it.
"""

from dataclasses import dataclass

from splitfed.errors import UnsupportedFamily


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, relative to the base model (``model.base_model``).

    Attributes:
        blocks: Path of the block list.
        final_norm: Path of the norm after the last block, or None where the family has none.
        embeddings: Embedding tables which only the bottom holds; looked up, their sum enters the first block.
        bottom_only: Other modules between embeddings and first block (dropout, norm, projection): they pass
            through in trunk and top.
        bottom_only_or_none: The same, where the family itself leaves the attribute None.
        top_only: Modules after the final norm which only the top holds.
        multipliers: Number attributes of the base model which scale the embeddings: 1 in trunk and top.
    """

    blocks: str = "layers"
    final_norm: str | None = "norm"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    bottom_only: tuple[str, ...] = ()
    top_only: tuple[str, ...] = ()
    multipliers: tuple[str, ...] = ()


_LLAMA_LIKE = Family()

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "gpt2": Family(blocks="h", final_norm="ln_f", embeddings=("wte", "wpe"), bottom_only=("drop",)),
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
