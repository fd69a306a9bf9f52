"""A whole run in one process: the same client step, the same trunk step, the link without a wire."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splitfed.config import CodecSection, LoraSection, TrainingSection
from splitfed.federation import FixedPointMean
from splitfed.models import Partition, adapter_state, add_adapter, export_adapter, load_adapter_state
from splitfed.training.client_step import ClientTrainer
from splitfed.training.data import Example
from splitfed.training.link import InProcessLink, LinkCodecs, link_codecs
from splitfed.training.objective import Objective
from splitfed.training.order import step_examples
from splitfed.training.releases import OpenReleases, Releases
from splitfed.training.sampling import poisson_sample
from splitfed.training.setup import lora_settings
from splitfed.training.trunk_step import TrunkTrainer


@dataclass
class Simulation:
    """What came of a run.

    Attributes:
        lora: Size and place of the adapter.
        adapter: The whole model's adapter, by whole-model name.
        losses: Mean loss per token of every local step, by client, over all rounds.
    """

    lora: LoraSection
    adapter: dict[str, Tensor]
    losses: dict[str, list[float]] = field(default_factory=dict)

    def export(self, folder: str | Path, *, base: str | Path) -> None:
        """Write the adapter as one that ``PeftModel.from_pretrained(base, folder)`` loads.

        Args:
            folder: Where to write it; it may exist.
            base: Folder of the base model.
        """
        export_adapter(
            Path(folder), self.adapter, lora_settings(self.lora), base_folder=Path(base), base_name=str(base)
        )


def simulate(
    parts: Partition,
    tokenizer: PreTrainedTokenizerBase,
    shards: Mapping[str, Sequence[str] | Sequence[Example]],
    *,
    training: TrainingSection | None = None,
    lora: LoraSection | None = None,
    codecs: CodecSection | None = None,
    seed: int = 0,
    releases: Callable[[str], Releases] | None = None,
) -> Simulation:
    """Fine-tune a partitioned model over clients in this process (SFLV1, FedAvg by examples).

    The segments get an adapter, in place, and end with the run's result.

    Args:
        parts: The segments; without an adapter yet.
        tokenizer: The model's tokenizer.
        shards: Each client's texts, or its examples.
        training: Rounds, steps, batch size, optimiser; the defaults of a run file where left out.
        lora: Size and place of the adapter; as above.
        codecs: Codec of each direction; as above.
        seed: Seed of adapters, data order and dropout.
        releases: Gives each client's gate; none: everything leaves as it is.

    Returns:
        The adapter and the losses.

    Raises:
        ValueError: If a client has nothing to train on.
    """
    training, lora, codecs = training or TrainingSection(), lora or LoraSection(), codecs or CodecSection()
    examples = {client: _examples(client, shard, tokenizer, training.max_tokens) for client, shard in shards.items()}
    for segment in parts:
        add_adapter(segment, lora_settings(lora), seed=seed)
    trunk = TrunkTrainer(parts.trunk, training, seed=seed)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    clients = {
        client: ClientTrainer(
            parts.bottom,
            parts.top,
            training,
            releases(client) if releases is not None else OpenReleases(),
            client=client,
            seed=seed,
            pad_token_id=pad_token_id,
        )
        for client in shards
    }
    by_direction = link_codecs(codecs)
    adapter = _merged(adapter_state(segment) for segment in parts)
    result = Simulation(lora, adapter, {client: [] for client in shards})
    optimisers: dict[str, dict[str, Tensor]] = {}
    for round in range(1, training.rounds + 1):
        mean = FixedPointMean()
        for client, trainer in clients.items():
            trainer.load_adapter_state(adapter)
            trunk.open_round(client, round, adapter, optimisers.get(client, {}))
            result.losses[client] += _train(
                trainer, trunk, examples[client], client, training, by_direction, seed, round
            )
            trunk_adapter, optimisers[client] = trunk.result(client)
            ends = trainer.adapter_state()
            start = {name: adapter[name] for name in ends}
            ends = trainer.releases.adapter_update(start, ends, round=round)
            mean.add({**trunk_adapter, **ends}, len(examples[client]))
            trunk.close(client)
        adapter = mean.result()
    result.adapter = adapter
    for segment in parts:
        load_adapter_state(segment, adapter)
    return result


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


def _train(
    trainer: ClientTrainer,
    trunk: TrunkTrainer,
    examples: Sequence[Example],
    client: str,
    training: TrainingSection,
    codecs: LinkCodecs,
    seed: int,
    round: int,
) -> list[float]:
    link = InProcessLink(trunk, client, codecs)
    losses = []
    for step in range(training.local_steps):
        sampling = trainer.releases.sampling
        chosen: Sequence[int | None]
        if sampling is not None:
            chosen = poisson_sample(len(examples), sample_rate=sampling.sample_rate, capacity=training.batch_size)
        else:
            chosen = step_examples(
                len(examples),
                seed=seed,
                client=client,
                round=round,
                step=step,
                batch_size=training.batch_size,
                local_steps=training.local_steps,
            )
        batch = [None if index is None else examples[index] for index in chosen]
        losses.append(trainer.step(link, batch, round=round, step=step).loss)
    return losses


def _examples(
    client: str, shard: Sequence[str] | Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Sequence[Example]:
    examples = [example for example in shard if isinstance(example, Example)]
    if texts := [text for text in shard if isinstance(text, str)]:
        examples += examples_of(texts, tokenizer, max_tokens=max_tokens)
    if not examples:
        raise ValueError(f"The client {client!r} has nothing to train on; give it a text of 2 tokens or more.")
    return examples


def _merged(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for state in states for name, tensor in state.items()}
