"""One contract for every link: in this process, and over gRPC on loopback."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitfed.agent.server_calls import ServerCalls
from splitfed.compress import get_codec
from splitfed.config import CodecSection, ServerConfig
from splitfed.errors import LinkError, ProtocolError
from splitfed.models import adapter_state, canonical_config, resolve_base
from splitfed.proto.v1 import training_pb2
from splitfed.training.link import InProcessLink, Kind, Link, Place, link_codecs
from splitfed.training.setup import open_trunk
from splitfed.training.together import OwnCalls, at_once
from splitfed.training.trunk_step import TrunkTrainer
from splitfed.transport.backoff import Backoff
from splitfed.transport.link import GrpcLink
from tests.service.conftest import OPEN, server_config
from tests.service.local import serving

B, T = 2, 7
FIRST = Place(0, 0)


@dataclass
class Opened:
    """A link at the start of round 1, and a second trunk to compare with."""

    link: Link
    reference: TrunkTrainer
    hidden_size: int

    def hidden(self, seed: int) -> Tensor:
        return torch.randn(B, T, self.hidden_size, generator=torch.Generator().manual_seed(seed))


def new_trainer(config: ServerConfig) -> TrunkTrainer:
    trunk = open_trunk(resolve_base("demo"), config.model, config.lora, seed=config.run.seed)
    trainer = TrunkTrainer(trunk, config.training, seed=config.run.seed)
    trainer.open_round("a", 1, adapter_state(trunk), {})
    return trainer


def open_link(kind: str, folder: Path, codecs: CodecSection, stack: ExitStack) -> Opened:
    config = server_config(folder, codecs=codecs, training={"max_in_flight": 2, "local_steps": 2})
    reference = new_trainer(config)
    by_direction = link_codecs(codecs)
    if kind == "in process":
        link: Link = InProcessLink(OwnCalls(at_once(new_trainer(config))), "a", by_direction)
        return Opened(link, reference, reference.hidden_size)
    server = stack.enter_context(serving(config))
    calls = ServerCalls(server.address, None, None, client="a", agent_id=b"0" * 16)
    stack.callback(calls.close)
    calls.join(config.run_id, canonical_config(resolve_base("demo")), {}, weight=1)
    opening = training_pb2.OpenRound(
        run_id=config.run_id,
        client="a",
        agent_id=b"0" * 16,
        round=1,
        first_block=reference.blocks.start,
        end_block=reference.blocks.stop,
    )
    grpc_link = GrpcLink(calls.training, opening, by_direction, backoff=Backoff(5), silence_s=60)
    stack.enter_context(grpc_link)
    return Opened(grpc_link, reference, reference.hidden_size)


@pytest.fixture(params=["in process", "grpc"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    with ExitStack() as stack:
        yield open_link(request.param, tmp_path, OPEN, stack)


def test_the_trunk_output_and_the_smashed_gradient_are_the_trunks(opened: Opened) -> None:
    smashed_BTD, gradient_BTD = opened.hidden(0), opened.hidden(1)
    output_BTD = opened.link.forward(FIRST, smashed_BTD, wants_smashed_gradient=True).result(60)
    smashed_gradient_BTD = opened.link.backward(FIRST, gradient_BTD).result(60)
    wanted_BTD = opened.reference.forward("a", 0, 0, smashed_BTD.clone(), wants_smashed_gradient=True)
    assert torch.equal(output_BTD, wanted_BTD)
    wanted_gradient_BTD = opened.reference.backward("a", 0, 0, gradient_BTD)
    assert smashed_gradient_BTD is not None
    assert wanted_gradient_BTD is not None
    assert torch.equal(smashed_gradient_BTD, wanted_gradient_BTD)


def test_a_bottom_with_nothing_to_train_gets_no_gradient(opened: Opened) -> None:
    opened.link.forward(FIRST, opened.hidden(0)).result(60)
    assert opened.link.backward(FIRST, opened.hidden(1)).result(60) is None


def test_a_step_changes_the_next_output_as_the_trunk_would(opened: Opened) -> None:
    for step in range(2):
        smashed_BTD, gradient_BTD = opened.hidden(step), opened.hidden(step + 10)
        output_BTD = opened.link.forward(Place(step, 0), smashed_BTD).result(60)
        assert torch.equal(output_BTD, opened.reference.forward("a", step, 0, smashed_BTD.clone()))
        opened.link.backward(Place(step, 0), gradient_BTD)
        opened.link.step(step).result(60)
        opened.reference.backward("a", step, 0, gradient_BTD)
        opened.reference.step("a", step)


def test_micro_batches_in_flight_are_answered_each_with_its_own(opened: Opened) -> None:
    places = [Place(0, 0), Place(0, 1)]
    futures = [opened.link.forward(place, opened.hidden(place.micro_batch)) for place in places]
    for place, future in zip(places, futures, strict=True):
        wanted_BTD = opened.reference.forward("a", 0, place.micro_batch, opened.hidden(place.micro_batch))
        assert torch.equal(future.result(60), wanted_BTD)


def test_mask_and_positions_reach_the_trunk(opened: Opened) -> None:
    mask_BT = torch.ones(B, T, dtype=torch.int64)
    mask_BT[0, :3] = 0
    position_ids_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask_BT": mask_BT, "position_ids_BT": position_ids_BT}
    output_BTD = opened.link.forward(FIRST, opened.hidden(0), **inputs).result(60)
    assert torch.equal(output_BTD, opened.reference.forward("a", 0, 0, opened.hidden(0), **inputs))
    plain_BTD = opened.reference.forward("a", 0, 1, opened.hidden(0))
    assert not torch.allclose(output_BTD, plain_BTD)


def test_evaluation_waits_for_no_backward(opened: Opened) -> None:
    for index in range(5):  # more than may be in flight
        place = Place(0, index, Kind.EVALUATE)
        output_BTD = opened.link.forward(place, opened.hidden(index)).result(60)
        assert torch.equal(output_BTD, opened.reference.forward("a", 0, index, opened.hidden(index), trains=False))


def test_a_backward_without_its_forward_is_refused(opened: Opened) -> None:
    with pytest.raises(ProtocolError, match="without its forward"):
        opened.link.backward(FIRST, opened.hidden(0)).result(60)


def test_a_backward_is_not_applied_twice(opened: Opened) -> None:
    opened.link.forward(FIRST, opened.hidden(0)).result(60)
    opened.link.backward(FIRST, opened.hidden(1)).result(60)
    with pytest.raises(ProtocolError, match="without its forward"):
        opened.link.backward(FIRST, opened.hidden(1)).result(60)


def test_a_step_out_of_turn_is_refused(opened: Opened) -> None:
    with pytest.raises(ProtocolError, match="the next is 0"):
        opened.link.step(1).result(60)


def test_a_step_before_its_backwards_is_refused(opened: Opened) -> None:
    opened.link.forward(FIRST, opened.hidden(0)).result(60)
    with pytest.raises(ProtocolError, match="1 micro-batches still waiting"):
        opened.link.step(0).result(60)


def test_a_forward_of_a_later_step_is_refused(opened: Opened) -> None:
    with pytest.raises(ProtocolError, match="the next one is 0"):
        opened.link.forward(Place(1, 0), opened.hidden(0)).result(60)


def test_more_micro_batches_than_the_run_allows_are_refused(opened: Opened) -> None:
    for index in range(2):
        opened.link.forward(Place(0, index), opened.hidden(index)).result(60)
    with pytest.raises(ProtocolError, match="2 micro-batches in flight"):
        opened.link.forward(Place(0, 2), opened.hidden(2)).result(60)


def test_an_output_gradient_of_another_shape_is_refused(opened: Opened) -> None:
    opened.link.forward(FIRST, opened.hidden(0)).result(60)
    with pytest.raises((ProtocolError, LinkError), match="shape"):
        opened.link.backward(FIRST, opened.hidden(1)[:, 1:]).result(60)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_gradient_that_is_not_finite_does_not_leave(opened: Opened, value: float) -> None:
    opened.link.forward(FIRST, opened.hidden(0)).result(60)
    gradient_BTD = opened.hidden(1)
    gradient_BTD[0, 0, 0] = value
    with pytest.raises(ValueError, match="NaN or an infinite"):
        opened.link.backward(FIRST, gradient_BTD)


@pytest.mark.parametrize("kind", ["in process", "grpc"])
def test_both_directions_go_through_their_codec(kind: str, tmp_path: Path) -> None:
    codecs = CodecSection(smashed="int8", trunk_output="bf16", output_gradient="fp16", smashed_gradient="int8")
    table = {name: get_codec(codec) for name, codec in codecs.model_dump().items()}

    def cross(direction: str, x_BTD: Tensor) -> Tensor:
        codec = table[direction]
        return codec.decode(codec.encode(x_BTD), tuple(x_BTD.shape), x_BTD.dtype)

    with ExitStack() as stack:
        opened = open_link(kind, tmp_path, codecs, stack)
        smashed_BTD, gradient_BTD = opened.hidden(0), opened.hidden(1)
        output_BTD = opened.link.forward(FIRST, smashed_BTD, wants_smashed_gradient=True).result(60)
        smashed_gradient_BTD = opened.link.backward(FIRST, gradient_BTD).result(60)
        raw_BTD = opened.reference.forward("a", 0, 0, cross("smashed", smashed_BTD), wants_smashed_gradient=True)
        assert torch.equal(output_BTD, cross("trunk_output", raw_BTD))
        raw_gradient_BTD = opened.reference.backward("a", 0, 0, cross("output_gradient", gradient_BTD))
        assert smashed_gradient_BTD is not None
        assert raw_gradient_BTD is not None
        assert torch.equal(smashed_gradient_BTD, cross("smashed_gradient", raw_gradient_BTD))


def test_traffic_counts_payload_and_framing(opened: Opened) -> None:
    opened.link.forward(FIRST, opened.hidden(0)).result(60)
    payload_bytes = B * T * opened.hidden_size * 4
    for counted in (opened.link.traffic.sent_bytes, opened.link.traffic.received_bytes):
        assert payload_bytes <= counted < payload_bytes + 400
