"""From the configuration to the run's rule."""

from functools import partial

from splitfed.config.aggregation import AggregationSection
from splitfed.federation.aggregate.aggregator import Aggregator
from splitfed.federation.aggregate.factors import FactorAggregator, RobustRule
from splitfed.federation.aggregate.flexlora import FlexLora
from splitfed.federation.aggregate.flora import Flora
from splitfed.federation.aggregate.robust import coordinate_median, multi_krum, trimmed_mean
from splitfed.federation.aggregate.server_optimiser import ServerOptimiser


def make_aggregator(config: AggregationSection, lora_rank: int) -> Aggregator:
    """Make a run's rule.

    Args:
        config: The section, with ``lora`` decided; left out = "factors".
        lora_rank: R of the run, 1 or more.

    Raises:
        ValueError: If the rank is below 1.
    """
    if lora_rank < 1:
        raise ValueError(f"An adapter of rank {lora_rank} has nothing to train; choose 1 or more.")
    if config.lora == "flexlora":
        return FlexLora(norm_bound=config.norm_bound, refuse_norm=config.refuse_norm)
    if config.lora == "flora":
        rank = lora_rank if config.flora_rank is None else config.flora_rank
        return Flora(rank, norm_bound=config.norm_bound, refuse_norm=config.refuse_norm)
    return FactorAggregator(
        config.lora or "factors",
        _robust(config),
        _optimiser(config),
        norm_bound=config.norm_bound,
        refuse_norm=config.refuse_norm,
    )


def _robust(config: AggregationSection) -> RobustRule | None:
    if config.rule == "median":
        return coordinate_median
    if config.trim is not None:
        return partial(trimmed_mean, trim=config.trim)
    if config.byzantine is not None:
        return partial(multi_krum, byzantine=config.byzantine)
    return None


def _optimiser(config: AggregationSection) -> ServerOptimiser | None:
    if config.server_optimiser is None:
        return None
    return ServerOptimiser(
        config.server_optimiser,
        learning_rate=config.server_learning_rate,
        momentum=config.momentum,
        beta2=config.beta2,
        tau=config.tau,
    )
