"""Settings of which each is sound and the whole is not: what is refused as a run's file is read."""

from splitfed.config.aggregation import AggregationSection
from splitfed.config.federation import FederationSection
from splitfed.config.privacy import PrivacySection
from splitfed.config.run import LoraSection, ModelSection, decided_rule


def refuse_contradictions(
    model: ModelSection,
    lora: LoraSection,
    federation: FederationSection,
    aggregation: AggregationSection,
    privacy: PrivacySection,
) -> None:
    """Refuse settings of which each is sound and the whole is not.

    Args:
        model: The run's section.
        lora: The run's section.
        federation: The run's section.
        aggregation: The run's section.
        privacy: What the run asks of its agents.

    Raises:
        ValueError: If no round could be over, or an update could never be counted, or would leave unprotected.
    """
    try:
        rule = decided_rule(lora, aggregation, privacy)
    except ValueError as error:
        raise ValueError(f"[aggregation] {error}") from error
    has_unlike_devices = lora.has_unlike_ranks or model.widest != model
    if federation.merge_ends == "step" and has_unlike_devices:
        raise ValueError(
            'federation.merge_ends = "step" needs agents that hold the same; leave out [model] least_bottom_blocks and '
            'least_top_blocks and [lora] least_rank, or set merge_ends = "round"'
        )
    if privacy.denoise and model.widest != model:
        raise ValueError(
            "privacy.denoise takes noise away at one split point; leave out [model] least_bottom_blocks and "
            "least_top_blocks, or denoise"
        )
    if federation.quorum < aggregation.least_updates:
        bound = "agents" if federation.cohort is None else "cohort"
        has_room = aggregation.least_updates <= getattr(federation, bound)
        raise ValueError(
            f"federation.quorum is {federation.quorum}, but aggregation.{aggregation.needs} needs "
            f"{aggregation.least_updates} updates in every round; raise quorum{'' if has_room else f' and {bound}'}"
        )
    refuse_nothing_to_merge(federation, rule)
    if federation.late_updates == "merge":
        if federation.variant != "sflv1":
            raise ValueError(
                f'federation.late_updates = "merge" needs variant = "sflv1", not "{federation.variant}": only with a '
                'trunk adapter of its own can an agent go on once its round is over; set "drop"'
            )
        if rule.lora == "alternating":
            raise ValueError(
                'federation.late_updates = "merge" does not go with aggregation.lora = "alternating": the next round '
                'trains the other factor; set "drop"'
            )
    if federation.merge_ends == "step" and privacy.is_on and privacy.adapter == "update":
        raise ValueError(
            'federation.merge_ends = "step" sends a gradient at every step, which privacy.adapter = "update" does not '
            'protect; set adapter = "dp-sgd", or merge_ends = "round"'
        )


def refuse_nothing_to_merge(federation: FederationSection, rule: AggregationSection) -> None:
    """Refuse what works on the differences between agents where they all end a round with the same.

    Args:
        federation: The run's section.
        rule: The run's section, with nothing left open.

    Raises:
        ValueError: If bottom and top are merged at every step, and a key asks for more than their mean at the end.
    """
    if federation.merge_ends != "step":
        return
    asked = {
        "rule": rule.rule != "mean",
        "norm_bound": rule.norm_bound is not None,
        "refuse_norm": rule.refuse_norm is not None,
        "server_optimiser": rule.server_optimiser is not None,
        "lora": rule.lora in ("flora", "flexlora"),
    }
    for key in [key for key, is_set in asked.items() if is_set]:
        value = getattr(rule, key)
        shown = f"{value:g}" if isinstance(value, float) else f'"{value}"'
        raise ValueError(
            f"aggregation.{key} = {shown} works on what agents bring to the end of a round, and with "
            'federation.merge_ends = "step" all bring the same bottom and top; '
            f'leave {key} out, or set merge_ends = "round"'
        )
