"""One contract for every link of a sequence: in this process, and over gRPC on loopback."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitfed.agent.server_calls import ServerCalls
from splitfed.compress import get_codec
from splitfed.config import CodecSection, LoraSection
from splitfed.errors import LinkError, ProtocolError
from splitfed.models import adapter_parameters, adapter_state, canonical_config, load_residual, resolve_base
from splitfed.proto.v1 import generation_pb2, training_pb2
from splitfed.proto.v1.generation_pb2_grpc import GenerationStub
from splitfed.training.generation import GenerationLink, InProcessGenerationLink, TrunkSequence
from splitfed.training.link import Place, link_codecs
from splitfed.training.setup import open_trunk
from splitfed.transport.backoff import Backoff
from splitfed.transport.channel import open_channel
from splitfed.transport.generation import GrpcGenerationLink
from splitfed.transport.link import GrpcLink
from tests.service.conftest import OPEN, server_config
from tests.service.local import serving

MOST = 12
MIXED = CodecSection(smashed="int8", trunk_output="bf16")
Opens = Callable[..., AbstractContextManager[GenerationLink]]


@dataclass
class Contract:
    """A way to open links, and a trunk to compare with."""

    open: Opens
    trunk: torch.nn.Module
    codecs: CodecSection

    def hidden(self, rows: int, seed: int = 0) -> Tensor:
        return torch.randn(1, rows, self.trunk.hidden_size, generator=torch.Generator().manual_seed(seed))

    def cross(self, direction: str, x_1TD: Tensor) -> Tensor:
        codec = get_codec(self.codecs.model_dump()[direction])
        return codec.decode(codec.encode(x_1TD), tuple(x_1TD.shape), x_1TD.dtype)


@pytest.fixture(scope="module", params=[("in process", OPEN), ("grpc", OPEN), ("in process", MIXED), ("grpc", MIXED)])
def contract(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    kind, codecs = request.param
    generation = {"enabled": True, "max_tokens": MOST}
    config = server_config(tmp_path_factory.mktemp("run"), codecs=codecs, generation=generation)
    trunk = open_trunk(resolve_base("demo"), config.model, config.lora, seed=config.run.seed).eval()
    with ExitStack() as stack:
        if kind == "in process":

            def here(max_tokens: int = MOST) -> AbstractContextManager[GenerationLink]:
                sequence = TrunkSequence(trunk, adapter_state(trunk), {}, max_tokens=max_tokens)
                return nullcontext(InProcessGenerationLink(sequence, link_codecs(codecs)))

            yield Contract(here, trunk, codecs)
            return
        server = stack.enter_context(serving(config))
        calls = stack.enter_context(closing(ServerCalls(server.address, None, None, client="a", agent_id=b"0" * 16)))
        calls.join(config.run_id, canonical_config(resolve_base("demo")), {}, weight=1)
        channel = stack.enter_context(closing(open_channel(server.address, None)))

        def there(max_tokens: int = MOST) -> AbstractContextManager[GenerationLink]:
            opening = generation_pb2.OpenSequence(
                run_id=config.run_id,
                client="a",
                agent_id=b"0" * 16,
                first_block=trunk.blocks.start,
                end_block=trunk.blocks.stop,
                max_tokens=max_tokens,
            )
            return GrpcGenerationLink(
                GenerationStub(channel), opening, link_codecs(codecs), retry_for_s=5, silence_s=60
            )

        yield Contract(there, trunk, codecs)


@torch.no_grad()
def test_rows_are_answered_as_the_trunk_with_its_cache_would(contract: Contract) -> None:
    cache = contract.trunk.new_cache()
    with contract.open() as link:
        for seed, rows in enumerate((5, 1, 1, 3)):
            hidden_1TD = contract.hidden(rows, seed)
            answer_1TD = link.forward(hidden_1TD).result(60)
            whole_1TD = contract.trunk(contract.cross("smashed", hidden_1TD), past_key_values=cache)
            assert torch.equal(answer_1TD, contract.cross("trunk_output", whole_1TD))


def test_a_sequence_knows_nothing_of_the_one_before(contract: Contract) -> None:
    answers = []
    for _ in range(2):
        with contract.open() as link:
            answers.append(link.forward(contract.hidden(4)).result(60))
            link.forward(contract.hidden(1, seed=1)).result(60)
    assert torch.equal(*answers)


def test_more_rows_than_declared_are_refused(contract: Contract) -> None:
    with contract.open(max_tokens=4) as link:
        link.forward(contract.hidden(3)).result(60)
        with pytest.raises(ProtocolError):
            link.forward(contract.hidden(2)).result(60)
    with contract.open(max_tokens=4) as link:
        link.forward(contract.hidden(4)).result(60)
        with pytest.raises(ProtocolError, match="A sequence of 4 rows was declared, and"):
            link.forward(contract.hidden(1)).result(60)


def test_traffic_counts_payload_and_framing(contract: Contract) -> None:
    with contract.open() as link:
        link.forward(contract.hidden(8)).result(60)
        for direction, counted in (("smashed", link.traffic.sent_bytes), ("trunk_output", link.traffic.received_bytes)):
            codec = get_codec(contract.codecs.model_dump()[direction])
            payload_bytes = len(codec.encode(contract.hidden(8)))
            assert payload_bytes <= counted < payload_bytes + 200


@torch.no_grad()
def test_the_residual_beside_the_adapter_takes_part() -> None:
    config = LoraSection(rank=4, alpha=8.0)
    cut = server_config(Path("unused")).model
    trunk = open_trunk(resolve_base("demo"), cut, config, seed=0, residual_rank=3).eval()
    draw = torch.Generator().manual_seed(0)
    adapter = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in adapter_state(trunk).items()}
    residual = {
        name: torch.randn((2, *t.shape[1:]) if name.endswith("A.weight") else (t.shape[0], 2), generator=draw)
        for name, t in adapter.items()
    }
    hidden_1TD = torch.randn(1, 5, trunk.hidden_size, generator=draw)
    before_1TD = trunk(hidden_1TD)
    found = [TrunkSequence(trunk, adapter, beside, max_tokens=5).forward(hidden_1TD) for beside in (residual, {})]
    assert torch.equal(trunk(hidden_1TD), before_1TD)
    for each_1TD, beside in zip(found, (residual, {}), strict=True):
        trunk.load_state_dict({local: adapter[name] for name, local in _names(trunk).items()}, strict=False)
        load_residual(trunk, beside)
        assert torch.equal(each_1TD, trunk(hidden_1TD))
    assert not torch.allclose(*found)


def _names(trunk: torch.nn.Module) -> dict[str, str]:
    local = {id(parameter): name for name, parameter in trunk.named_parameters()}
    return {name: local[id(parameter)] for name, parameter in adapter_parameters(trunk).items()}


@pytest.mark.parametrize("variant", ["sflv1", "sflv2"])
def test_what_a_round_in_progress_has_trained_is_not_used(tmp_path: Path, variant: str) -> None:
    config = server_config(
        tmp_path,
        federation={"variant": variant},
        training={"learning_rate": 0.5, "local_steps": 2},
        generation={"enabled": True},
    )
    trunk = open_trunk(resolve_base("demo"), config.model, config.lora, seed=config.run.seed).eval()
    blocks = {"first_block": trunk.blocks.start, "end_block": trunk.blocks.stop}
    whose = {"run_id": config.run_id, "client": "a", "agent_id": b"0" * 16, **blocks}
    draw = torch.Generator().manual_seed(0)
    hidden_1TD, gradient_1TD = (torch.randn(1, 6, trunk.hidden_size, generator=draw) for _ in range(2))
    codecs = link_codecs(OPEN)
    with ExitStack() as stack:
        server = stack.enter_context(serving(config))
        calls = stack.enter_context(closing(ServerCalls(server.address, None, None, client="a", agent_id=b"0" * 16)))
        calls.join(config.run_id, canonical_config(resolve_base("demo")), {}, weight=1)
        channel = stack.enter_context(closing(open_channel(server.address, None)))
        opening = training_pb2.OpenRound(round=1, **whose)
        training = stack.enter_context(GrpcLink(calls.training, opening, codecs, backoff=Backoff(5), silence_s=60))
        for step in range(2):
            output_1TD = training.forward(Place(step, 0), hidden_1TD).result(60)
            training.backward(Place(step, 0), gradient_1TD).result(60)
            training.step(step).result(60)
        sequence = generation_pb2.OpenSequence(round=0, max_tokens=6, **whose)
        link = GrpcGenerationLink(GenerationStub(channel), sequence, codecs, retry_for_s=5, silence_s=60)
        generated_1TD = stack.enter_context(link).forward(hidden_1TD).result(60)
    with torch.no_grad():
        assert torch.equal(generated_1TD, trunk(hidden_1TD))
    assert not torch.allclose(generated_1TD, output_1TD)


def test_a_link_that_was_closed_says_so(tmp_path: Path) -> None:
    channel = open_channel("127.0.0.1:1", None)
    link = GrpcGenerationLink(
        GenerationStub(channel), generation_pb2.OpenSequence(), link_codecs(OPEN), retry_for_s=60, silence_s=60
    )
    waiting = link.forward(torch.zeros(1, 1, 4))
    link.close()
    with pytest.raises(LinkError, match="The link was closed"):
        waiting.result(10)
    channel.close()
