"""What becomes of the updates of a round."""

import math
from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from splitfed.config.section import Section

LoraRule = Literal["factors", "ffa", "flora", "flexlora", "alternating"]
Norm = Annotated[float, Field(gt=0)]

_OF_AN_OPTIMISER = ("server_learning_rate", "momentum", "beta2", "tau")


class AggregationSection(Section):
    """How the updates of a round become one adapter."""

    rule: Literal["mean", "median", "trimmed-mean", "multi-krum"] = "mean"
    """"mean" is weighted; the others stand some agents that send anything at all, and take every agent as one."""
    trim: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    """With rule = "trimmed-mean": fraction of the updates that is cut off at each end, value by value; a round then
    takes 1 / trim updates or more."""
    byzantine: Annotated[int, Field(ge=1)] | None = None
    """With rule = "multi-krum": agents f that may send anything; a round then takes 2f + 3 updates or more."""
    norm_bound: Norm | None = None
    """Largest L2 norm of what an agent changed; longer changes are scaled down; left out = no change is scaled down."""
    refuse_norm: Norm | None = None
    """L2 norm of a change above which the update is refused; left out = no update is refused for its length."""
    server_optimiser: Literal["fedavgm", "fedadam", "fedyogi"] | None = None
    """How the server steps towards the mean; left out = the next round starts from the mean itself."""
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
    """With lora = "flora": rank of the second, frozen adapter that holds the sum, which adds to the rank of what is
    exported; left out = the rank of [lora]."""

    @property
    def least_updates(self) -> int:
        """Updates with fewer of which the rule has no result, or is the mean: a quorum below this is a mistake."""
        if self.byzantine is not None:
            return 2 * self.byzantine + 3
        if self.trim is not None:
            return math.ceil(1 / Fraction(str(self.trim)))  # as it is written: 0.1 of 10 is 1
        return 3 if self.rule == "median" else 1

    @property
    def needs(self) -> str:
        """Say which key asks for so many updates."""
        if self.byzantine is not None:
            return f"byzantine = {self.byzantine}"
        return f'rule = "{self.rule}"' if self.trim is None else f"trim = {self.trim:g}"

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
            for key in self._factor_by_factor:
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
        for key in self._factor_by_factor if has_unlike_ranks else ():
            raise ValueError(
                f'{key} = "{getattr(self, key)}" works factor by factor, and lora = "{lora}", which agents of unlike '
                f"ranks need, averages their products; leave {key} out, or give every agent the same rank"
            )
        return self.model_copy(update={"lora": lora})

    @property
    def _factor_by_factor(self) -> list[str]:
        """Keys that are set and ask for a rule that has to see the factors one by one."""
        set_to = {"rule": self.rule != "mean", "server_optimiser": self.server_optimiser is not None}
        return [key for key, is_set in set_to.items() if is_set]

    def _refuse_without_optimiser(self, key: str) -> None:
        if self.server_optimiser is None:
            raise ValueError(f"{key} needs server_optimiser; set it, or leave {key} out")
        if self.server_optimiser == "fedavgm" and key in ("beta2", "tau"):
            raise ValueError(f'{key} needs server_optimiser = "fedadam" or "fedyogi"; leave {key} out')
