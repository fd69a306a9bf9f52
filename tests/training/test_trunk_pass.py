"""Rows of several clients in one pass: which are joined, and that neither bits nor shares follow who comes first."""

import zlib
from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from torch import Tensor

from splitfed.config import TrainingSection
from splitfed.models import LoraSettings, Segment, adapter_parameters, adapter_state, add_adapter, partition
from splitfed.training.together import JointCalls, at_once
from splitfed.training.trunk_slot import TrunkBackward, TrunkForward
from splitfed.training.trunk_step import TrunkTrainer
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import tiny_model

WIDTH = 256
"""Hidden size, at which the number of a batch's rows changes bits."""

TRAINING = TrainingSection(rounds=1, local_steps=2, batch_size=4, max_tokens=3, learning_rate=1e-2)
SHAPES = {"a": (1, 3), "b": (1, 2), "c": (2, 3)}
"""Sequences and tokens of each client's micro-batches: those of a and c are alike, but for the number of sequences."""


def hidden(*name: object, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(name).encode()))
    return torch.randn(*shape, WIDTH, generator=generator)


class Passes:
    """A wide trunk that clients train jointly.

    Attributes:
        rows: Sequences of each pass so far.
    """

    def __init__(self) -> None:
        model = tiny_model("llama", hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=3)
        self.trunk: Segment = partition(model, bottom_blocks=1, top_blocks=1).trunk
        add_adapter(self.trunk, LoraSettings(rank=2, alpha=4.0, dropout=0.0), seed=0)
        generator = torch.Generator().manual_seed(0)
        for parameter in adapter_parameters(self.trunk).values():
            with torch.no_grad():
                parameter.normal_(std=0.1, generator=generator)
        self.rows: list[int] = []
        self.trunk.register_forward_pre_hook(lambda _, given: self.rows.append(len(given[0])))
        self.trainer = TrunkTrainer(self.trunk, TRAINING, seed=3)
        self.trainer.open_shared("all", adapter_state(self.trunk), {})
        for client in SHAPES:
            self.trainer.open_round(client, 1, shared="all", joint=True)

    def forwards(self, step: int) -> list[TrunkForward]:
        return [
            TrunkForward(client, step, 0, hidden(client, step, shape=shape), wants_smashed_gradient=True)
            for client, shape in SHAPES.items()
        ]

    def backwards(self, step: int) -> list[TrunkBackward]:
        return [
            TrunkBackward(client, step, 0, hidden(client, step, "back", shape=shape))
            for client, shape in SHAPES.items()
        ]


@pytest.fixture
def passes() -> Passes:
    return Passes()


def in_order(calls: Sequence[TrunkForward | TrunkBackward], order: Sequence[str]) -> list[TrunkForward | TrunkBackward]:
    return sorted(calls, key=lambda call: order.index(call.slot))


def test_rows_of_like_shape_are_joined_in_one_pass_and_others_have_their_own(passes: Passes) -> None:
    together = passes.trainer.forward_together(passes.forwards(0))
    assert passes.rows == [1 + 2, 1]
    alone = [Passes().trainer.forward_together([call])[0] for call in passes.forwards(0)]
    for output_BTD, own_BTD in zip(together, alone, strict=True):
        assert isinstance(output_BTD, Tensor)
        assert isinstance(own_BTD, Tensor)
        assert_equal_to_rounding(output_BTD, own_BTD, "the trunk output")


def test_what_clients_train_apart_is_never_joined(passes: Passes) -> None:
    for client in SHAPES:
        passes.trainer.open_round(client, 1, adapter_state(passes.trunk), {})
    passes.trainer.forward_together(passes.forwards(0))
    assert passes.rows == [1, 1, 2]


def test_at_this_width_a_batch_changes_bits(passes: Passes) -> None:
    """Or the test below could not fail."""
    together = passes.trainer.forward_together(passes.forwards(0))
    alone = [Passes().trainer.forward_together([call])[0] for call in passes.forwards(0)]
    assert torch.equal(together[1], alone[1])  # type: ignore[arg-type]  # none of them was refused
    assert not torch.equal(together[0], alone[0])  # type: ignore[arg-type]


def test_the_order_of_arrival_changes_no_bit_of_joint_steps() -> None:
    """Every call of a step arrives in another order in each run, and the two steps of a run differ as well."""
    results = []
    for order in permutations(SHAPES):
        passes = Passes()
        calls = JointCalls(SHAPES, at_once(passes.trainer))
        for step in range(TRAINING.local_steps):
            outputs = {
                call.slot: calls.forward(call, tokens=len(call.smashed_BTD))
                for call in in_order(passes.forwards(step), order)
            }
            gradients = {call.slot: calls.backward(call) for call in in_order(passes.backwards(step), order[::-1])}
            for client in order:
                calls.step(client, step)
        found = {
            f"{client}, {kind}": each[client].result(0)
            for kind, each in (("out", outputs), ("back", gradients))
            for client in SHAPES
        }
        results.append({**passes.trainer.shared_result("all")[0], **found})
    for result in results[1:]:
        assert [name for name in result if not torch.equal(result[name], results[0][name])] == []
