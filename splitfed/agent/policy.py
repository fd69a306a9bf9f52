"""What a device's owner insists on: a run that is weaker is refused before anything is loaded or sent."""

from splitfed.config import AgentPrivacySection, ChannelName, PrivacySection, RunConfig, refuse_unsound
from splitfed.errors import ConfigError, JoinRefused

_WORDS: dict[ChannelName, str] = {
    "smashed": "smashed data",
    "output_gradient": "output gradients",
    "adapter": "the adapter update",
}


def agree(policy: AgentPrivacySection, run: RunConfig) -> PrivacySection:
    """Settle what holds on this device: the owner's word, and for the rest the run's.

    Args:
        policy: The owner's section.
        run: What the server says about the run.

    Returns:
        The section that holds.

    Raises:
        JoinRefused: If the run is weaker than the owner's policy allows, or sends what that protection is not for.
        ConfigError: If the two do not go together.
    """
    most = {"bottom_blocks": policy.most_bottom_blocks, "top_blocks": policy.most_top_blocks}
    for name, limit in most.items():
        asked = getattr(run.model, name)
        if limit is not None and asked > limit:
            raise JoinRefused(
                f"The run {run.run.name!r} asks this device to hold {name} = {asked}, but its owner allows {limit} "
                f"(most_{name}); ask for another split point, or raise the limit."
            )
    try:
        privacy = policy.over(run.privacy)
        refuse_unsound(privacy, bottom_blocks=run.model.bottom_blocks, top_blocks=run.model.top_blocks)
    except ValueError as error:
        raise ConfigError(f"[privacy] of this agent and of the run {run.run.name!r}: {_reason(error)}") from error
    _refuse_open_channels(policy, privacy, run)
    if run.federation.merge_ends == "step" and privacy.is_on and privacy.adapter == "update":
        raise JoinRefused(
            f'The run {run.run.name!r} merges bottom and top at every step, but adapter = "update" protects no '
            'gradient of a step; set adapter = "dp-sgd" in this agent\'s [privacy], or ask for merge_ends = "round".'
        )
    refuse_weak_noise(policy, privacy, run)
    return privacy


def refuse_weak_noise(policy: AgentPrivacySection, privacy: PrivacySection, run: RunConfig) -> None:
    """Refuse noise below, and clips above, what the owner allows; figures that are not settled yet are left aside.

    Args:
        policy: The owner's section.
        privacy: What is to hold on this device.
        run: What the server says about the run.

    Raises:
        JoinRefused: If the run is weaker than the owner's policy allows.
    """
    least, run_id = policy.least_noise_multiplier, run.run.name
    noises = {
        "noise_multiplier": privacy.noise_multiplier,
        "noise_multiplier_adapter": privacy.noise_multiplier_adapter,
    }
    for name, noise_multiplier in noises.items():
        if least is None or noise_multiplier is None:
            continue
        of_sequence = noise_multiplier / (_rows_a_unit(privacy, run) ** 0.5 if name == "noise_multiplier" else 1)
        if of_sequence < least:
            per_token = f" ({of_sequence:.3g} for a sequence)" if of_sequence < noise_multiplier else ""
            raise JoinRefused(
                f"The run {run_id!r} asks for {name} = {noise_multiplier:g}{per_token}, but this device's owner "
                f"insists on {least:g} at least (least_noise_multiplier); raise it in the run, or in this agent's "
                "[privacy]."
            )
    limits = {
        "clipping_norm_smashed": policy.largest_clipping_norm_smashed,
        "clipping_norm_output_gradient": policy.largest_clipping_norm_output_gradient,
    }
    for name, limit in limits.items():
        norm = getattr(privacy, name)
        if limit is not None and norm is not None and norm > limit:
            raise JoinRefused(
                f"The run {run_id!r} asks for {name} = {norm:g}, but this device's owner allows {limit:g} "
                f"(largest_{name}); lower it in the run, or in this agent's [privacy]."
            )


def _refuse_open_channels(policy: AgentPrivacySection, privacy: PrivacySection, run: RunConfig) -> None:
    trains = run.model.bottom_blocks + run.model.top_blocks > 0
    wanted = policy.protected_channels
    if wanted is None:
        said = _open_channels(policy)
        wanted = [channel for channel in _WORDS if channel not in said]
    for channel, how in _open_channels(privacy).items():
        if channel == "adapter" and not trains:
            continue
        word = _WORDS[channel]
        if channel in wanted:
            sends = f"The run {run.run.name!r} sends {word} {how}"
            if policy.protected_channels is None:
                raise JoinRefused(
                    f"{sends}, and nothing in this agent's [privacy] allows that; ask for another protection in the "
                    "run, or name there the protected_channels that are to be enough (none: protected_channels = [])."
                )
            raise JoinRefused(
                f"{sends}, but this device's owner insists on its protection (protected_channels); ask for another one "
                "in the run, or set it in this agent's [privacy]."
            )
        if policy.epsilon_budget is not None:
            raise ConfigError(
                f"[privacy] epsilon_budget = {policy.epsilon_budget:g} cannot be kept: {word} would leave {how}; "
                "protect that channel, or leave epsilon_budget out"
            )


def _rows_a_unit(privacy: PrivacySection, run: RunConfig) -> float:
    """Give the squared signal of a sequence ÷ that of a unit, where it is largest."""
    tokens = run.training.max_tokens
    smashed = tokens if privacy.smashed == "token" else 1
    return max(smashed, tokens / 2 if privacy.output_gradient == "token" else 1)


def _open_channels(privacy: PrivacySection) -> dict[ChannelName, str]:
    """Say which channels have no epsilon, and how they leave."""
    if not privacy.is_on:
        return dict.fromkeys(_WORDS, "without noise")
    found: dict[ChannelName, str] = {}
    if privacy.smashed == "metric":
        found["smashed"] = "under metric privacy, which has no epsilon"
    if privacy.adapter == "none":
        found["adapter"] = "without noise"
    return found


def _reason(error: ValueError) -> str:
    details = getattr(error, "errors", None)
    return str(details()[0].get("ctx", {}).get("error", error)) if details is not None else str(error)
