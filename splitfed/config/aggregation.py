"""What becomes of the updates of a round."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from splitfed.config.section import Section

LoraRule = Literal["factors", "ffa", "flora", "flexlora", "alternating"]
Norm = Annotated[float, Field(gt=0)]

_OF_AN_OPTIMISER = ("server_learning_rate", "momentum", "beta2", "tau")


class AggregationSection(Section):
    """How the updates of a round become one adapter."""

    rule: Literal["mean", "median", "trimmed-mean", "multi-krum"] = "mean"
    """"mean" is weighted; the others stand some agents that send anything at all, and take every agent as one."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """With rule = "trimmed-mean": fraction of the updates that is cut off at each end, value by value."""
    byzantine: Annotated[int, Field(ge=1)] | None = None
    """With rule = "multi-krum": agents f that may send anything; a round then takes 2f + 3 updates or more."""
    norm_bound: Norm | None = None
    """Largest L2 norm of what an agent changed; longer changes are scaled down; left out = any length."""
    refuse_norm: Norm | None = None
    """L2 norm of a change above which the update is refused; left out = none is."""
    server_optimiser: Literal["fedavgm", "fedadam", "fedyogi"] | None = None
    """How the server steps towards the mean; left out = it takes the mean."""
    server_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Length of the server optimiser's step; left out = 1 for "fedavgm", 0.01 for the others."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """What the server optimiser keeps of its earlier steps; beta1 of "fedadam" and "fedyogi"."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """What "fedadam" and "fedyogi" keep of the earlier squares."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """How little "fedadam" and "fedyogi" adapt: added to the root of the squares."""
    lora: LoraRule | None = None
    """What is averaged; left out = "flexlora" where agents have unlike ranks, "ffa" where the adapter update is noised,
    else "factors"."""
    flora_rank: Annotated[int, Field(ge=1)] | None = None
    """With lora = "flora": rank of the second, frozen adapter that holds the sum; left out = the rank of [lora]."""

    @property
    def least_updates(self) -> int:
        """Updates without which a round has no result: a quorum below this is a mistake."""
        return 1 if self.byzantine is None else 2 * self.byzantine + 3

    @property
    def renews_factors(self) -> bool:
        """A round's end leaves other factors than those that were trained: what an optimiser knew of them is void."""
        return self.lora in ("flora", "flexlora")

    @model_validator(mode="after")
    def _is_one_plan(self) -> Self:
        for key, rule in (("trim", "trimmed-mean"), ("byzantine", "multi-krum")):
            if (getattr(self, key) is None) == (self.rule == rule):
                raise ValueError(f'{key} and rule = "{rule}" belong together; give both or neither')
        if self.norm_bound is not None and self.refuse_norm is not None and self.refuse_norm <= self.norm_bound:
            raise ValueError(
                f"refuse_norm = {self.refuse_norm:g} refuses every update that norm_bound = {self.norm_bound:g} would "
                "scale down; raise refuse_norm, or leave one of them out"
            )
        for key in _OF_AN_OPTIMISER:
            if getattr(self, key) != type(self).model_fields[key].default:
                self._refuse_without_optimiser(key)
        if self.flora_rank is not None and self.lora != "flora":
            raise ValueError('flora_rank needs lora = "flora"; set it, or leave flora_rank out')
        if self.lora in ("flora", "flexlora"):
            for key, default in (("rule", "mean"), ("server_optimiser", None)):
                if getattr(self, key) != default:
                    raise ValueError(
                        f'{key} = "{getattr(self, key)}" works factor by factor, and lora = "{self.lora}" averages '
                        f'their products; leave {key} out, or set lora to "factors", "ffa" or "alternating"'
                    )
        return self

    def decided(self, *, has_unlike_ranks: bool, is_noised: bool) -> "AggregationSection":
        """Give the section with ``lora`` set to what holds in a run.

        Args:
            has_unlike_ranks: Agents train adapters of more than one rank.
            is_noised: Noise is added to the adapter update, or to the gradients that it comes of.

        Raises:
            ValueError: If what the section asks for cannot be had in such a run.
        """
        lora = self.lora or ("flexlora" if has_unlike_ranks else "ffa" if is_noised else "factors")
        if has_unlike_ranks and lora not in ("flora", "flexlora"):
            raise ValueError(
                f'lora = "{lora}" averages factor by factor, and agents of unlike ranks have factors of unlike shapes; '
                'choose "flexlora" or "flora", or give every agent the same rank'
            )
        values: dict[str, Any] = {**self.model_dump(), "lora": lora}
        return AggregationSection.model_validate(values)

    def _refuse_without_optimiser(self, key: str) -> None:
        if self.server_optimiser is None:
            raise ValueError(f"{key} needs server_optimiser; set it, or leave {key} out")
        if self.server_optimiser == "fedavgm" and key in ("beta2", "tau"):
            raise ValueError(f'{key} needs server_optimiser = "fedadam" or "fedyogi"; leave {key} out')
