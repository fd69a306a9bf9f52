"""What a split run is compared with, in the same harness: central LoRA and FedLoRA; and what each asks of a client.

Both are thin, because both are `simulate` in disguise. Without noise and with nothing encoded, a client and its own
copy of the trunk adapter compute what the client would compute with the whole model: SFLV1 is FedLoRA, and with one
client it is central LoRA. What differs is who holds what, and what crosses; hence `Burden`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from splitfed.config import CodecSection, FederationSection, LoraSection, TrainingSection
from splitfed.config.aggregation import LoraRule
from splitfed.federation import trained_factors
from splitfed.models import partition
from splitfed.models.factors import factor_of
from splitfed.training.data import Example
from splitfed.training.link import Traffic
from splitfed.training.simulate import Simulation, simulate

CENTRAL = "central"
"""The one client of central training, by whose name its data order is drawn."""

_OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")
_NUMBER_BYTES = 4
_PERIOD = 2  # rounds after which the trained factors are the same again, whatever the rule

OnRound = Callable[[int, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Burden:
    """What a way to train asks of one client, beside what crosses between its segments and the trunk.

    Attributes:
        trainable_parameters: Numbers of the adapter that the client's own optimiser moves in a round.
        sent_bytes: From client to server for these in a round: float32, without framing or codec.
        received_bytes: The other way.
        data_bytes: Its examples, where they leave as they are: 4 bytes a token, once, before the first round.
    """

    trainable_parameters: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    data_bytes: int = 0


def central_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Mapping[str, Sequence[str] | Sequence[Example]],
    *,
    training: TrainingSection | None = None,
    lora: LoraSection | None = None,
    seed: int = 0,
    on_round: OnRound | None = None,
) -> Simulation:
    """Train the whole model in one place, on everybody's examples.

    Args:
        model: The whole model; it stays usable, its parameters are frozen.
        tokenizer: Its tokenizer.
        shards: Each client's texts, or its examples; they are put one after the other, by the clients' names.
        training: As for `simulate`. A round is ``local_steps`` steps and merges nothing; for the joint batch of a
            cohort, give the sum of the clients' batch sizes.
        lora: Size and place of the adapter.
        seed: Seed of the adapter, the data order and dropout.
        on_round: Told the round and the adapter after each.

    Returns:
        The adapter, and the losses of the one client, `CENTRAL`.

    Raises:
        ValueError: If there is nothing to train on, or a setting is not possible.

    Guarantees:
        * Loss at every step as with stock transformers + PEFT on the same batches, to 1e-5 in float32.
    """
    together: list[Any] = [each for client in sorted(shards) for each in shards[client]]
    return _whole(model, tokenizer, {CENTRAL: together}, training=training, lora=lora, seed=seed, on_round=on_round)


def fed_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Mapping[str, Sequence[str] | Sequence[Example]],
    *,
    training: TrainingSection | None = None,
    lora: LoraSection | None = None,
    seed: int = 0,
    on_round: OnRound | None = None,
) -> Simulation:
    """Train the whole model on every client, and average the adapters by examples once a round.

    Args:
        model: The whole model; it stays usable, its parameters are frozen.
        tokenizer: Its tokenizer.
        shards: Each client's texts, or its examples.
        training: As for `simulate`.
        lora: Size and place of the adapter.
        seed: Seed of the adapter, the data order and dropout.
        on_round: Told the round and the mean adapter after each.

    Returns:
        The adapter and the losses.

    Raises:
        ValueError: If a client has nothing to train on, or a setting is not possible.

    Guarantees:
        * Loss at every step as in federated averaging by hand with stock transformers + PEFT, to 1e-5 in float32.
        * The same for SFLV1 at any split point, without noise and dropout and with codec "none".

    Source: McMahan et al. 2017, Communication-efficient learning of deep networks from decentralized data, algorithm 1,
    on the factors of LoRA; optimiser state stays with the client.
    """
    return _whole(model, tokenizer, shards, training=training, lora=lora, seed=seed, on_round=on_round)


def central_burden(examples: Sequence[Example]) -> Burden:
    """Say what central training asks of a client: no arithmetic, and all of its data.

    Args:
        examples: The client's.
    """
    return Burden(data_bytes=_NUMBER_BYTES * sum(len(example.input_ids) for example in examples))


def adapter_burden(
    held: Mapping[str, Tensor], *, rule: LoraRule = "factors", residual_rank: int = 0, exchanges: int = 0
) -> Burden:
    """Say what training a part of the adapter asks of the client that holds it.

    Args:
        held: What the client trains itself: the whole adapter for FedLoRA, those of bottom and top for a split.
        rule: What is averaged; a factor that a round does not train is not sent in it. Rounds that differ are averaged.
        residual_rank: Rank of a second, frozen adapter that comes down with each round's start; 0 for none.
        exchanges: Steps of a round at which the gradients cross as well, both ways: where they are merged at every
            step, its ``local_steps``.
    """
    sizes = {name: tensor.numel() for name, tensor in held.items()}
    trained = sum(
        size
        for round in range(1, _PERIOD + 1)
        for name, size in sizes.items()
        if factor_of(name) in trained_factors(rule, round)
    )
    trained //= _PERIOD
    residual = residual_rank * sum(
        tensor.shape[1] if factor_of(name) == "A" else tensor.shape[0] for name, tensor in held.items()
    )
    return Burden(
        trainable_parameters=trained,
        sent_bytes=_NUMBER_BYTES * (1 + exchanges) * trained,
        received_bytes=_NUMBER_BYTES * (sum(sizes.values()) + residual + exchanges * trained),
    )


def _whole(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Mapping[str, Sequence[str] | Sequence[Example]],
    *,
    training: TrainingSection | None,
    lora: LoraSection | None,
    seed: int,
    on_round: OnRound | None,
) -> Simulation:
    """Run SFLV1 with all blocks in one segment; the link between is none, so what crossed it is not counted."""
    result = simulate(
        partition(model, bottom_blocks=0, top_blocks=0),
        tokenizer,
        shards,
        training=training,
        lora=lora,
        codecs=_OPEN,
        federation=FederationSection(agents=len(shards)),
        seed=seed,
        on_round=on_round,
    )
    result.traffic = {client: Traffic() for client in shards}
    return result
