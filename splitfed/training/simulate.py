"""A whole run in one process: the same client step, the same trunk step, the link without a wire."""

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splitfed.config import AggregationSection, CodecSection, FederationSection, LoraSection, TrainingSection
from splitfed.models import Partition, Trunk
from splitfed.training.data import Example
from splitfed.training.objective import Objective
from splitfed.training.releases import OpenReleases, Releases
from splitfed.training.simulated_plan import check_clients, federation_of
from splitfed.training.simulated_run import SimulatedRun
from splitfed.training.simulation import Simulation

__all__ = ["Simulation", "examples_of", "simulate"]


def simulate(
    parts: Partition | Mapping[str, Partition],
    tokenizer: PreTrainedTokenizerBase,
    shards: Mapping[str, Sequence[str] | Sequence[Example]],
    *,
    training: TrainingSection | None = None,
    lora: LoraSection | None = None,
    codecs: CodecSection | None = None,
    federation: FederationSection | None = None,
    aggregation: AggregationSection | None = None,
    trunk: Trunk | None = None,
    ranks: Mapping[str, int] | None = None,
    personal: Collection[str] = (),
    seconds: Mapping[str, float] | None = None,
    seed: int = 0,
    releases: Callable[[str], Releases] | None = None,
    on_round: Callable[[int, Mapping[str, Tensor]], None] | None = None,
) -> Simulation:
    """Fine-tune a partitioned model over clients in this process.

    Segments that are given get an adapter, in place, and end with the run's result. One that they have already, such as
    that of a run before, is taken off first: a second run on the same parts is a run of its own.

    The sections are those of a run file, with its defaults where one is left out, and come from `splitfed.config`:
    `TrainingSection`, `LoraSection`, `CodecSection`, `FederationSection` and `AggregationSection`.

    Args:
        parts: The segments; or those of each client, cut from one model.
        tokenizer: The model's tokenizer.
        shards: Each client's texts, or its examples.
        training: Rounds, steps, batch size, optimiser.
        lora: Size and place of the adapter.
        codecs: Codec of each direction.
        federation: Variant, cohort, quorum, merge_ends and staleness. ``agents`` may be left out, for they are those of
            ``shards``; a section with a ``cohort`` or a ``quorum`` needs them all the same. Nobody is late or silent
            here: ``straggler_margin``, ``over_selection`` and ``late_updates`` are refused, and ``agent_timeout_s`` has
            no effect. Left out = SFLV1, with every client in every round.
        aggregation: What becomes of a round's updates. A round goes on without an update that is refused, and undoes
            what its client trained; as a server does.
        trunk: The server's, where no client's trunk has the blocks of all others.
        ranks: Rank of a client's own adapter, where it is less than the run's.
        personal: "bottom", "top", both or neither: whose adapter every client keeps to itself.
        seconds: With variant "async": virtual seconds that an answer takes each client; left out = all are as fast.
        seed: Seed of adapters, data order, cohorts and dropout.
        releases: Gives each client's gate; none: everything leaves as it is.
        on_round: Told the round and the run's adapter after each.

    Returns:
        The adapter, the losses, and whose update was refused.

    Raises:
        ValueError: If a client has nothing to train on, settings do not go together or name no client, or refused
            updates leave a round with fewer than ``federation.quorum``.
        NonFiniteLoss: If a client's loss is not finite.
    """
    personal = {personal} if isinstance(personal, str) else set(personal)
    lora, settled = lora or LoraSection(), federation_of(federation, shards)
    check_clients(shards, settled, lora, parts=parts, ranks=ranks or {}, personal=personal, seconds=seconds)
    training = training or TrainingSection()
    return SimulatedRun(
        {client: parts if isinstance(parts, Partition) else parts[client] for client in shards},
        {client: _examples(client, shard, tokenizer, training.max_tokens) for client, shard in shards.items()},
        training=training,
        lora=lora,
        codecs=codecs or CodecSection(),
        federation=settled,
        aggregation=aggregation or AggregationSection(),
        trunk=trunk,
        ranks=ranks or {},
        personal=personal,
        seconds=seconds,
        seed=seed,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        releases=releases or (lambda client: OpenReleases()),
    ).run(on_round or (lambda round, adapter: None))


def examples_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[Example]:
    """Cut texts into examples of at most ``max_tokens`` tokens; a text's place in the list is its record.

    Args:
        texts: Plain texts.
        tokenizer: The base model's tokenizer.
        max_tokens: The run's T.
    """
    rows = Objective("text", ("text",), "texts").sequences(
        [(text,) for text in texts], tokenizer, max_tokens=max_tokens
    )
    return [
        Example(sequence.input_ids, sequence.labels, record=str(number))
        for number, sequences in enumerate(rows)
        for sequence in sequences
    ]


def _examples(
    client: str, shard: Sequence[str] | Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Sequence[Example]:
    examples = [example for example in shard if isinstance(example, Example)]
    if texts := [text for text in shard if isinstance(text, str)]:
        examples += examples_of(texts, tokenizer, max_tokens=max_tokens)
    if not examples:
        raise ValueError(f"The client {client!r} has nothing to train on; give it a text of 2 tokens or more.")
    return examples
