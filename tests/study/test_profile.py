"""Measuring a device, and the way to a server, as a user does."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from splitfed import cli
from splitfed.config.device import ComputeSection, DeviceProfile, DeviceSection, MatmulSection, load_profile
from splitfed.errors import ServerUnreachable
from splitfed.proto.v1 import joining_pb2, joining_pb2_grpc
from splitfed.study import profile, profile_request
from splitfed.study.profile_link import measure_link


class Joining(joining_pb2_grpc.JoiningServicer):
    """Gives a small file and a large one, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.chunks = 8

    def Describe(self, request, context):  # noqa: N802 - gRPC names the methods
        self.asked.append("Describe")
        return joining_pb2.DescribeReply(run_id="run")

    def FetchSegments(self, request, context):  # noqa: N802
        self.asked.append(request.file)
        for _ in range(1 if request.file == "config.json" else self.chunks):
            yield joining_pb2.FileChunk(data=bytes(1 << 10 if request.file == "config.json" else 1 << 20))


@pytest.fixture
def joining() -> Joining:
    return Joining()


@pytest.fixture
def address(joining: Joining) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    joining_pb2_grpc.add_JoiningServicer_to_server(joining, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure carelessly: what is tested is what is written, not how good the figures are."""
    monkeypatch.setattr(profile, "_WIDTHS", (16, 32))
    monkeypatch.setattr(profile, "_WIDTH", 64)
    monkeypatch.setattr(profile, "_TRY_S", 0.0)
    monkeypatch.setattr(profile, "_TRIES", 1)
    monkeypatch.setattr(profile, "_HEAD_SIZES", (8,))
    monkeypatch.setattr(profile_request, "_STEPS", 2)
    monkeypatch.setattr(profile, "prepare_process", lambda threads: None)  # else it holds for the tests after this one
    monkeypatch.setattr(profile, "_bare_process_bytes", lambda: 300_000_000)


def test_a_link_is_measured_by_calls_that_change_nothing(address: str, joining: Joining) -> None:
    link = measure_link(address, None)
    assert 0 < link.latency_s < 1
    assert link.up_bits_per_s > 1e6
    assert link.down_bits_per_s > 1e6
    assert set(joining.asked) == {"Describe", "config.json", "tokenizer.json"}


def test_without_a_file_that_is_large_enough_the_way_down_counts_as_the_way_up(address: str, joining: Joining) -> None:
    joining.chunks = 0
    link = measure_link(address, None)
    assert link.down_bits_per_s == link.up_bits_per_s


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ServerUnreachable, match=r"No server answers at 127\.0\.0\.1:1"):
        measure_link("127.0.0.1:1", None)


@pytest.mark.usefixtures("hasty")
def test_the_command_writes_a_profile_that_can_be_read(tmp_path: Path, address: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", "--output", str(tmp_path / "own.toml"), "--link-to", address])
    assert ended.value.code == 0
    found = load_profile(tmp_path / "own.toml")
    assert found.link is not None
    assert found.rate("bfloat16", 1e5) > 0
    assert found.rate("float16", 1e5, head_size=64) > 0
    assert 0 <= found.compute.request_s < 10
    assert found.process.memory_bytes == 300_000_000
    assert found.device.source.startswith("splitfed")


@pytest.mark.parametrize(("call_s", "has_rest"), [(0.0, True), (1.0, False)])
def test_a_request_takes_what_a_step_takes_beyond_its_computation(
    call_s: float, has_rest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_request, "_STEPS", 3)
    known = DeviceProfile(
        device=DeviceSection(name="d", source="test", memory_bytes=10**9),
        matmul=MatmulSection(float32=[[1.0, 1e17]]),
        compute=ComputeSection(bandwidth_bytes_per_s=1e15, call_s=call_s),
    )
    found_s = profile_request.request_s(profile._model(64, blocks=3), known)
    assert 0 < found_s < 10 if has_rest else found_s == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "0"], "--threads is 0"),
        (["--output", "nosuch/own.toml"], "in a folder that exists"),
        (["--link-to", "here"], "--link-to is 'here'; write host:port"),
        (["--config", "gone.toml"], "gone.toml: no such file"),
    ],
)
def test_a_mistake_is_explained_before_anything_is_measured(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_process_without_a_model_takes_what_its_libraries_take() -> None:
    assert 10**8 < profile._bare_process_bytes() < 2 * 10**9
