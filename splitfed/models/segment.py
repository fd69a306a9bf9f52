"""Bottom, trunk and top: what each takes and returns.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from inspect import signature
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from splitfed.models.cut import block_list_name

SegmentKind = Literal["bottom", "trunk", "top"]


class Segment(nn.Module):
    """Some consecutive blocks of a causal language model, as a model of the same class.

    Attributes:
        kind: Which of the three.
        blocks: The segment's blocks, as indices in the whole model.
        model: The model's own class with these blocks only; it shares the whole model's parameters.
        adaptable_names: Last name components of the layers that LoRA can adapt, over all blocks of the whole model.
    """

    kind: SegmentKind

    def __init__(self, model: PreTrainedModel, *, blocks: range, adaptable_names: frozenset[str]) -> None:
        super().__init__()
        self.blocks = blocks
        self.model = model
        self.adaptable_names = adaptable_names
        self._block_list_name = block_list_name(model)
        self.train(model.training)

    @property
    def config(self) -> PreTrainedConfig:
        """The segment's own configuration: block count and per-block lists are the segment's."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """D, the size of what crosses a split point."""
        return int(self.config.hidden_size)

    def new_cache(self) -> Cache:
        """An empty key-value cache of this segment's blocks, to pass as ``past_key_values``."""
        cache = DynamicCache(config=self.config)
        if cache.layers and not self._has_attention:
            cache.layers.append(DynamicLayer())  # see _count_tokens
        return cache

    @property
    def _has_attention(self) -> bool:
        return any(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=self.config).layers)

    def _count_tokens(self, cache: Cache | None, hidden_BTD: Tensor) -> None:
        """Let a cache know how many tokens it has seen where no attention block of the segment does."""
        if cache is not None and not self._has_attention:
            token_BHTD = hidden_BTD.new_empty((hidden_BTD.shape[0], 1, hidden_BTD.shape[1], 1))
            cache.update(token_BHTD, token_BHTD, len(self.blocks))

    def whole_model_name(self, name: str) -> str:
        """Translate a parameter name of ``model`` to the whole model's name (block indices restored)."""
        head, found, tail = name.partition(f"{self._block_list_name}.")
        if not found or head:
            return name
        index, dot, rest = tail.partition(".")
        return f"{self._block_list_name}.{int(index) + self.blocks.start}{dot}{rest}"

    def _positions(self, position_ids: Tensor | None) -> dict[str, Tensor]:
        """Pass positions to a family that takes any (ALiBi needs the mask only)."""
        if position_ids is None or "position_ids" not in signature(self.model.base_model.forward).parameters:
            return {}
        return {"position_ids": position_ids}

    def _hidden_states(
        self,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        **inputs: Tensor,
    ) -> Tensor:
        output = self.model.base_model(
            **inputs,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **self._positions(position_ids),
        )
        hidden_BTD = cast(Tensor, output[0])
        self._count_tokens(past_key_values, hidden_BTD)
        return hidden_BTD


class Bottom(Segment):
    """Embeddings and first blocks: tokens to smashed data."""

    kind = "bottom"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Run tokens up to the first split point.

        Args:
            input_ids: Token ids, shape [B, T].
            attention_mask: 1 for a token and 0 for padding, shape [B, past + T].
            position_ids: Positions, shape [B, T]; the family's own rule where absent.
            past_key_values: This segment's cache (``new_cache``), extended in place.

        Returns:
            Smashed data, shape [B, T, D].
        """
        return self._hidden_states(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )


class Trunk(Segment):
    """Middle blocks: smashed data to trunk output."""

    kind = "trunk"

    def forward(
        self,
        hidden_BTD: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Run smashed data up to the second split point.

        Args:
            hidden_BTD: Smashed data, shape [B, T, D].
            attention_mask: 1 for a token and 0 for padding, shape [B, past + T].
            position_ids: Positions, shape [B, T]; the family's own rule where absent.
            past_key_values: This segment's cache (``new_cache``), extended in place.

        Returns:
            Trunk output, shape [B, T, D], before the final norm.
        """
        return self._hidden_states(
            inputs_embeds=hidden_BTD,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )


class Top(Segment):
    """Last blocks, final norm and head: trunk output to logits and loss."""

    kind = "top"

    def forward(
        self,
        hidden_BTD: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Run the trunk output to the family's own causal-LM output.

        Args:
            hidden_BTD: Trunk output, shape [B, T, D].
            attention_mask: 1 for a token and 0 for padding, shape [B, past + T].
            position_ids: Positions, shape [B, T]; the family's own rule where absent.
            past_key_values: This segment's cache (``new_cache``), extended in place.
            labels: Token ids to predict, not shifted, -100 where no loss is wanted, shape [B, T].
            options: Further arguments of the family's forward (``num_items_in_batch``, ``logits_to_keep``).

        Returns:
            The family's output, with ``logits`` of shape [B, T, V] and ``loss`` where labels are given.

        Raises:
            ValueError: If router logits are asked for.
        """
        if options.get("output_router_logits"):
            raise ValueError(
                "output_router_logits=True needs the routers of every block in one place; "
                "leave it out when the model is split."
            )
        options.setdefault("use_cache", past_key_values is not None)
        output = self.model(
            inputs_embeds=hidden_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            labels=labels,
            **self._positions(position_ids),
            **options,
        )
        self._count_tokens(past_key_values, hidden_BTD)
        return cast(CausalLMOutputWithPast, output)
