"""What an agent measures at a round's end: its own model, and with a personal top the run's too."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import cast

from torch import Tensor

from splitfed.agent.local_round import evaluate_locally
from splitfed.agent.prepare import Prepared
from splitfed.models import adapter_state, load_adapter_state
from splitfed.training.evaluation import HeldOutLoss
from tests.training.split_client import TRAINING, SplitClient, examples, split_client, tiny_parts

HELD_OUT = examples(5, 9, 12, seed=40)


def measured(client: SplitClient, start: Mapping[str, Tensor], personal: Iterable[str] = ()) -> HeldOutLoss:
    prepared = SimpleNamespace(
        held_out=HELD_OUT, trainer=client.trainer, run=SimpleNamespace(training=TRAINING), personal=frozenset(personal)
    )
    found = evaluate_locally(client.link, cast(Prepared, prepared), start, round=1)
    assert found is not None
    return found


def of_ends(seed: int) -> dict[str, Tensor]:
    parts = tiny_parts(seed=seed)
    return {**adapter_state(parts.bottom), **adapter_state(parts.top)}


def test_a_personal_top_is_measured_and_so_is_the_one_that_the_round_began_with() -> None:
    client, start = split_client(parts=tiny_parts(seed=0)), of_ends(seed=1)
    found = measured(client, start, personal=adapter_state(client.parts.top))
    assert found.own == measured(client, start).own
    load_adapter_state(client.parts.top, start)
    assert found.merged == measured(client, start).own != found.own


def test_without_a_personal_top_there_is_one_loss() -> None:
    client = split_client(parts=tiny_parts(seed=0))
    assert measured(client, of_ends(seed=1)).merged is None
    assert measured(client, of_ends(seed=1), personal=adapter_state(client.parts.bottom)).merged is None
