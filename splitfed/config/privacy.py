"""How what leaves a device is protected: what a run asks for, and what a device's owner insists on."""

from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from splitfed.config.section import Section

ClippingNorm = Annotated[float, Field(ge=1e-20, le=1e20)]
LEAST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 1e-6, 1e6
"""Less noise than this rounds away in float32, and protects nothing; more leaves nothing to learn from."""


def _no_noise_that_rounds_away(value: float) -> float:
    if 0 < value < LEAST_NOISE_MULTIPLIER:
        raise ValueError(
            f"is {value:g}, which would round away; give {LEAST_NOISE_MULTIPLIER:g} or more, or 0 for no noise"
        )
    return value


NoiseMultiplier = Annotated[float, Field(ge=0, le=LARGEST_NOISE_MULTIPLIER), AfterValidator(_no_noise_that_rounds_away)]
NoiseMultiplierAbove0 = Annotated[float, Field(ge=LEAST_NOISE_MULTIPLIER, le=LARGEST_NOISE_MULTIPLIER)]
ChannelName = Literal["smashed", "output_gradient", "adapter"]
CHANNELS: Final[tuple[ChannelName, ...]] = ("smashed", "output_gradient", "adapter")

DEFAULT_NOISE_MULTIPLIER = 0.002


class PrivacySection(Section):
    """How what leaves a device is protected. Noise is on unless it is set to 0."""

    noise_multiplier: NoiseMultiplier | None = None
    """Standard deviation of the noise ÷ sensitivity, for each release; 0 = no noise on any channel, nothing is
    guaranteed; left out = 0.002, or what epsilon asks for."""
    epsilon: Annotated[float, Field(gt=0)] | None = None
    """What the whole run may cost a record, over all channels; the noise is calibrated to it."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """The delta at which epsilon is stated; a device states its own, whatever the run says."""
    relation: Literal["replace-one", "zero-out"] = "replace-one"
    """Against what change: a sequence becomes any other, or nothing but noise; a device states its own."""
    smashed: Literal["sequence", "token", "metric"] = "sequence"
    """Unit that noise on smashed data protects; "token" and "metric" only with bottom_blocks = 0."""
    output_gradient: Literal["sequence", "token"] = "sequence"
    """Unit that noise on output gradients protects; "token" only with top_blocks = 0."""
    adapter: Literal["dp-sgd", "update", "none"] = "dp-sgd"
    """What protects the adapter update: noise on every step's gradient, noise on the update as a whole, or nothing."""
    clip: Literal["token", "sequence"] = "token"
    """What is clipped where the unit is a sequence: each token's vector, or all of them together."""
    clipping_norm_smashed: ClippingNorm | None = None
    """Largest L2 norm of smashed data; longer vectors are scaled down; left out = what is usual in the model."""
    clipping_norm_output_gradient: ClippingNorm = 0.01
    """Largest L2 norm of an output gradient; longer ones are scaled down."""
    clipping_norm_adapter: ClippingNorm = 0.1
    """Largest L2 norm of one example's gradient ("dp-sgd"), or of the update ("update")."""
    noise_multiplier_adapter: NoiseMultiplierAbove0 | None = None
    """The noise multiplier of the adapter update; left out = that of the other channels."""
    eta: Annotated[float, Field(ge=1e-25, le=1e25)] | None = None
    """With smashed = "metric": what is guaranteed is eta times the distance of two embeddings."""
    sample_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Probability with which a step draws each example, in secret; left out = examples come in their order."""

    denoise: bool = False
    """Whether the trunk takes noise away at its entrance, by what the base model alone shows; costs no privacy."""

    @property
    def is_on(self) -> bool:
        """Something is noised."""
        return self.noise_multiplier != 0

    def open_channels(self) -> dict[ChannelName, str]:
        """Give the channels that leave without an epsilon, each with the setting that lets it."""
        if not self.is_on:
            return dict.fromkeys(CHANNELS, "noise_multiplier = 0")
        found: dict[ChannelName, str] = {}
        if self.smashed == "metric":
            found["smashed"] = 'smashed = "metric"'
        if self.adapter == "none":
            found["adapter"] = 'adapter = "none"'
        return found

    @model_validator(mode="after")
    def _is_one_plan(self) -> Self:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError(
                f"epsilon = {self.epsilon:g} and noise_multiplier = {self.noise_multiplier:g} exclude each other; "
                "leave one of them out"
            )
        if (self.smashed == "metric") != (self.eta is not None):
            raise ValueError(
                'eta and smashed = "metric" belong together; give both or neither'
                if self.eta is not None
                else 'smashed = "metric" needs eta, the loss of privacy per unit of distance; set it'
            )
        if not self.is_on and (self.eta is not None or self.denoise):
            setting = "denoise" if self.denoise else "eta"
            raise ValueError(
                f"{setting} has no meaning with noise_multiplier = 0, which turns off all noise; leave one of them out"
            )
        if self.denoise and self.epsilon is not None:
            raise ValueError(
                "denoise needs noise_multiplier in place of epsilon: a server does not know the noise that each device "
                "calibrates for itself"
            )
        if self.sample_rate is not None and (self.adapter != "dp-sgd" or self.smashed == "metric"):
            raise ValueError(
                'sample_rate needs adapter = "dp-sgd" and a mechanism with an epsilon on every channel: only then '
                "does a secret sample hide a record; set them, or leave sample_rate out"
            )
        return self


class AgentPrivacySection(PrivacySection):
    """The owner's word on privacy, which outranks the run's: a key that is left out is as the run has it."""

    writes_defaults = False

    epsilon_budget: Annotated[float, Field(gt=0)] | None = None
    """Stop before the epsilon of a record, over all channels and runs, passes this; left out = report only."""
    aggregation_weight: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Weight of this agent's adapter in the average; left out = 1 with noise on, the number of examples without."""
    least_noise_multiplier: NoiseMultiplierAbove0 | None = None
    """Refuse a run with less noise than this for a sequence, on any channel; left out = any noise will do."""
    largest_clipping_norm_smashed: ClippingNorm | None = None
    """Refuse a run that clips smashed data to more than this; left out = any clip will do."""
    largest_clipping_norm_output_gradient: ClippingNorm | None = None
    """Refuse a run that clips output gradients to more than this; left out = any clip will do."""
    protected_channels: list[ChannelName] | None = None
    """Refuse a run that sends one of these without noise; left out = all, unless this file itself says otherwise."""
    most_bottom_blocks: Annotated[int, Field(ge=0)] | None = None
    """Refuse a run with more blocks in the bottom; left out = any number will do."""
    most_top_blocks: Annotated[int, Field(ge=0)] | None = None
    """Refuse a run with more blocks in the top; left out = any number will do."""

    @model_validator(mode="after")
    def _is_of_one_mind(self) -> Self:
        """Refuse what no run could make right: the file itself falls short of what it insists on."""
        if self.epsilon_budget is not None:
            self._refuse_to_overspend(self.epsilon_budget)
        if self.least_noise_multiplier is not None:
            for name in ("noise_multiplier", "noise_multiplier_adapter"):
                own = getattr(self, name)
                if own is not None and own < self.least_noise_multiplier:
                    raise ValueError(
                        f"{name} = {own:g} is less than least_noise_multiplier = {self.least_noise_multiplier:g}; "
                        "raise the one, or lower the other"
                    )
        for name in ("clipping_norm_smashed", "clipping_norm_output_gradient"):
            own, limit = getattr(self, name), getattr(self, f"largest_{name}")
            if name in self.model_fields_set and own is not None and limit is not None and own > limit:
                raise ValueError(
                    f"{name} = {own:g} is more than largest_{name} = {limit:g}; lower the one, or raise the other"
                )
        for channel in self.protected_channels or ():
            if channel in self.open_channels():
                raise ValueError(
                    f'protected_channels has "{channel}", which {self.open_channels()[channel]} leaves open; take it '
                    "out, or choose another protection"
                )
        return self

    def _refuse_to_overspend(self, budget: float) -> None:
        if self.noise_multiplier == 0:
            raise ValueError(
                f"epsilon_budget is {budget:g}, but without noise no budget can be kept; set noise_multiplier above 0"
            )
        for setting in self.open_channels().values():
            raise ValueError(
                f"epsilon_budget is {budget:g}, but with {setting} no budget can be kept; choose another protection, "
                "or leave epsilon_budget out"
            )
        if self.epsilon is not None and self.epsilon > budget:
            raise ValueError(
                f"epsilon = {self.epsilon:g} is more than epsilon_budget = {budget:g}, so no run would reach its end; "
                "lower the one, or raise the other"
            )

    def over(self, run: PrivacySection) -> PrivacySection:
        """Give what holds on this device: what the owner's file says, and for the rest what the run says.

        Args:
            run: The run's section.

        Raises:
            ValueError: If the two do not go together.
        """
        said = {name: getattr(self, name) for name in self.model_fields_set & PrivacySection.model_fields.keys()}
        asked = {name: getattr(run, name) for name in PrivacySection.model_fields}
        asked |= {"delta": self.delta, "relation": self.relation}  # what a budget means is not the run's to say
        if {"noise_multiplier", "epsilon"} & said.keys():
            asked["noise_multiplier"] = asked["epsilon"] = None
        return PrivacySection.model_validate(asked | said)


def refuse_unsound(privacy: PrivacySection, *, bottom_blocks: int, top_blocks: int) -> None:
    """Refuse a unit that a split point does not have.

    Args:
        privacy: The section.
        bottom_blocks: Blocks of the bottom.
        top_blocks: Blocks of the top.

    Raises:
        ValueError: If an attention block on the device spreads a token over other rows than those that the mechanism
            counts.
    """
    if privacy.smashed != "sequence" and bottom_blocks > 0:
        raise ValueError(
            f'smashed = "{privacy.smashed}" needs bottom_blocks = 0, not {bottom_blocks}: an attention block in the '
            'bottom spreads each token over all later rows; choose "sequence", or cut at 0'
        )
    if privacy.output_gradient != "sequence" and top_blocks > 0:
        raise ValueError(
            f'output_gradient = "{privacy.output_gradient}" needs top_blocks = 0, not {top_blocks}: an attention block '
            'in the top spreads each label over all earlier rows; choose "sequence", or cut at 0'
        )
