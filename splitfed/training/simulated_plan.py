"""What a simulation is asked for, checked before anything is trained: names, ranks, and who takes part."""

import math
from collections.abc import Collection, Mapping

from pydantic import ValidationError

from splitfed.config import AggregationSection, FederationSection, LoraSection
from splitfed.config.contradictions import refuse_nothing_to_merge
from splitfed.config.explain import explain
from splitfed.models import Partition

_OF_TIME = ("straggler_margin", "over_selection", "late_updates")


def federation_of(federation: FederationSection | None, clients: Collection[str]) -> FederationSection:
    """Settle who takes part.

    Args:
        federation: As the caller has it; ``agents`` may be left out.
        clients: Names of those that have a shard.

    Raises:
        ValueError: If it is for another number of clients, or asks for what only time decides.
    """
    if not clients:
        raise ValueError("There is no client; give shards with one client at least.")
    asked = federation or FederationSection(agents=len(clients))
    for key in ("agents", "population"):
        value = getattr(asked, key)
        if key in asked.model_fields_set and value not in (None, len(clients)):
            raise ValueError(f"federation.{key} is {value}, but shards has {len(clients)}; make it {len(clients)}.")
    for key in _OF_TIME:
        if getattr(asked, key) != FederationSection.model_fields[key].default:
            raise ValueError(
                f"federation.{key} is about agents that are late, and in a simulation none is; leave {key} out."
            )
    values = {key: getattr(asked, key) for key in asked.model_fields_set} | {"agents": len(clients)}
    try:
        return FederationSection.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"federation: {explain(error, FederationSection)}.") from error


def check_rule(rule: AggregationSection, federation: FederationSection) -> None:
    """Refuse a rule that the rounds of a run are nothing for.

    Args:
        rule: The section, with nothing left open.
        federation: What `federation_of` gave.

    Raises:
        ValueError: If a round has too few updates for it, or updates that are all the same.
    """
    most = federation.cohort or federation.agents
    if most < rule.least_updates:
        raise ValueError(
            f"A round has {most} updates, but aggregation.{rule.needs} needs {rule.least_updates}; give more clients."
        )
    refuse_nothing_to_merge(federation, rule)


def check_clients(
    clients: Collection[str],
    federation: FederationSection,
    lora: LoraSection,
    *,
    parts: Partition | Mapping[str, Partition],
    ranks: Mapping[str, int],
    personal: Collection[str],
    seconds: Mapping[str, float] | None,
) -> None:
    """Refuse what names no client or segment, or what a client cannot have.

    Args:
        clients: Names of those that have a shard.
        federation: What `federation_of` gave.
        lora: The run's adapter.
        parts: The segments, or those of each client.
        ranks: Rank of a client's own adapter.
        personal: Segments that clients keep.
        seconds: Virtual seconds of an answer.

    Raises:
        ValueError: At the first of these.
    """
    if not isinstance(parts, Partition):
        _check_names("parts", parts, clients, of_all=True)
    _check_names("ranks", ranks, clients)
    least = lora.least_rank or 1
    for client, rank in ranks.items():
        if not least <= rank <= lora.rank:
            raise ValueError(
                f"ranks[{client!r}] is {rank}, but the run's ranks go from {least} to {lora.rank} (lora); choose one, "
                "or raise lora.rank."
            )
    if unknown := set(personal) - {"bottom", "top"}:
        raise ValueError(f'personal has {min(unknown)!r}; give a list of "bottom", "top", both or neither.')
    if seconds is not None:
        if federation.variant != "async":
            raise ValueError(f'seconds needs variant = "async", not "{federation.variant}"; leave seconds out.')
        _check_names("seconds", seconds, clients, of_all=True)
        for client, takes_s in seconds.items():
            if not 0 <= takes_s < math.inf:
                raise ValueError(f"seconds[{client!r}] is {takes_s}; give a finite number, 0 or more.")
    if federation.merge_ends == "step":
        cuts = set() if isinstance(parts, Partition) else {(p.bottom_blocks, p.top_blocks) for p in parts.values()}
        if personal or len(cuts) > 1 or any(rank != lora.rank for rank in ranks.values()):
            raise ValueError(
                'federation.merge_ends = "step" needs clients that hold the same; leave ranks and personal out and '
                'give all the same parts, or set merge_ends = "round".'
            )


def _check_names(what: str, given: Collection[str], clients: Collection[str], *, of_all: bool = False) -> None:
    for name in given:
        if name not in clients:
            raise ValueError(f"{what} has {name!r}, which is no client of shards; take it out.")
    for name in clients if of_all else ():
        if name not in given:
            raise ValueError(f"{what} has nothing for the client {name!r}; give something for every client of shards.")
