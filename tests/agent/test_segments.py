"""Fetching the agent's segments: what the server has arrives, and what a hostile server lists does not."""

import asyncio
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitfed.agent import segments
from splitfed.agent.segments import fetch_segments
from splitfed.config import ModelSection
from splitfed.errors import WeightsError
from splitfed.models import canonical_config, load_bottom_and_top, segment_tensor_names, tensor_hashes
from splitfed.proto.v1 import joining_pb2
from splitfed.server.base import BaseFolder
from splitfed.server.services import Identity, JoiningService
from tests.equivalence.tiny_models import tiny_model

CONFIG = b'{"model_type": "llama"}'
WEIGHT = bytes(range(24))


class RealServer:
    """The real joining service, without a wire; notes what was asked of it."""

    def __init__(self, folder: Path) -> None:
        coordinator: Any = SimpleNamespace(config=SimpleNamespace(run_id="run"))
        base = BaseFolder(folder)
        self._worker = ThreadPoolExecutor(1)
        self._service = JoiningService(coordinator, base, Identity("run", is_secure=False), self._worker)
        self.asked: list[str] = []
        self.ListSegments, self.FetchSegments = self._list, self._fetch

    def _list(self, request: joining_pb2.ListSegmentsRequest) -> joining_pb2.ListSegmentsReply:
        return asyncio.run(self._service.ListSegments(request, None))

    def _fetch(self, request: joining_pb2.FetchSegmentsRequest) -> Iterator[joining_pb2.FileChunk]:
        self.asked.append(request.file or request.tensor)

        async def gather() -> list[joining_pb2.FileChunk]:
            return [chunk async for chunk in self._service.FetchSegments(request, None)]

        return iter(asyncio.run(gather()))

    def close(self) -> None:
        self._worker.shutdown()


class AnyServer:
    """A server that lists and sends whatever a test wants; untouched, it is an honest one."""

    def __init__(self) -> None:
        self.listing = joining_pb2.ListSegmentsReply(
            files=[
                joining_pb2.FileIdentity(
                    name="config.json", size_bytes=len(CONFIG), sha256=hashlib.sha256(CONFIG).digest()
                )
            ],
            tensors=[
                joining_pb2.TensorIdentity(
                    name="model.norm.weight", dtype="F32", shape=[2, 3], sha256=hashlib.sha256(WEIGHT).digest()
                )
            ],
        )
        self.pieces: dict[str, list[bytes]] = {
            "config.json": [CONFIG],
            "model.norm.weight": [WEIGHT[:10], WEIGHT[10:]],
        }
        self.asked: list[str] = []
        self.ListSegments, self.FetchSegments = self._list, self._fetch

    def _list(self, request: joining_pb2.ListSegmentsRequest) -> joining_pb2.ListSegmentsReply:
        return self.listing

    def _fetch(self, request: joining_pb2.FetchSegmentsRequest) -> Iterator[joining_pb2.FileChunk]:
        name = request.file or request.tensor
        self.asked.append(name)
        for piece in self.pieces[name]:
            if piece == b"broken":
                raise ConnectionError("the stream broke")
            yield joining_pb2.FileChunk(data=piece)


@pytest.fixture
def server() -> AnyServer:
    return AnyServer()


def fetch(server: Any, cache: Path) -> Path:
    return fetch_segments(server, "run", ModelSection(base="demo"), cache)


def everything_in(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*") if path.is_file()}


@pytest.fixture(params=["llama", "gpt2"])
def real_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RealServer]:
    tiny_model(request.param, tie_word_embeddings=request.param == "gpt2").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    server = RealServer(tmp_path / "base")
    yield server
    server.close()


def test_what_was_fetched_is_the_servers_bottom_and_top(real_server: RealServer, tmp_path: Path) -> None:
    base = tmp_path / "base"
    fetched = fetch(real_server, tmp_path / "cache")
    assert canonical_config(fetched) == canonical_config(base)
    assert (fetched / "tokenizer.json").read_text() == "{}"
    names = segment_tensor_names(base, bottom_blocks=1, top_blocks=1)
    ends = names["bottom"] | names["top"]
    assert tensor_hashes(fetched, ends) == tensor_hashes(base, ends)
    assert not names["trunk"] & set(real_server.asked)
    for own, servers in zip(
        load_bottom_and_top(fetched, bottom_blocks=1, top_blocks=1, dtype=torch.float32),
        load_bottom_and_top(base, bottom_blocks=1, top_blocks=1, dtype=torch.float32),
        strict=True,
    ):
        wanted = servers.state_dict()
        assert own.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in own.state_dict().items())


def test_what_is_there_already_is_not_fetched_again(real_server: RealServer, tmp_path: Path) -> None:
    first = fetch(real_server, tmp_path / "cache")
    real_server.asked.clear()
    assert fetch(real_server, tmp_path / "cache") == first
    assert real_server.asked == []


def test_an_interrupted_fetch_goes_on_with_what_is_missing(server: AnyServer, tmp_path: Path) -> None:
    norm = server.listing.tensors[0]
    head = joining_pb2.TensorIdentity(name="lm_head.weight", dtype="F32", shape=[2, 3], sha256=norm.sha256)
    server.listing.tensors.append(head)
    server.pieces[head.name] = [WEIGHT[:10], b"broken"]
    with pytest.raises(ConnectionError):
        fetch(server, tmp_path)
    server.pieces[head.name] = [WEIGHT]
    server.asked.clear()
    folder = fetch(server, tmp_path)
    assert server.asked == ["config.json", head.name]
    hashes = tensor_hashes(folder, {norm.name, head.name})
    assert {identity.sha256 for identity in hashes.values()} == {norm.sha256.hex()}


def test_another_base_model_is_kept_beside_the_first(server: AnyServer, tmp_path: Path) -> None:
    first = fetch(server, tmp_path)
    other = bytes(24)
    server.listing.tensors[0].sha256 = hashlib.sha256(other).digest()
    server.pieces["model.norm.weight"] = [other]
    second = fetch(server, tmp_path)
    assert first != second
    assert (first / "model.norm.weight.safetensors").read_bytes().endswith(WEIGHT)
    assert (second / "model.norm.weight.safetensors").read_bytes().endswith(other)


def test_progress_is_told_in_bytes(server: AnyServer, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    stub: Any = server
    fetch_segments(
        stub, "run", ModelSection(base="demo"), tmp_path, on_progress=lambda done, total: told.append((done, total))
    )
    size_bytes = len(CONFIG) + len(WEIGHT)
    assert told == [(size_bytes, size_bytes)]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../config.json",
        "/etc/config.json",
        "a/config.json",
        "a\\config.json",
        ".hidden.json",
        "config.json\n",
        "config\0.json",
        "x" * 201 + ".json",
        "model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize("kind", ["file", "tensor"])
def test_a_name_that_is_no_plain_file_name_is_refused(server: AnyServer, tmp_path: Path, kind: str, name: str) -> None:
    (server.listing.files if kind == "file" else server.listing.tensors)[0].name = name
    with pytest.raises(WeightsError, match="cannot be the name"):
        fetch(server, tmp_path / "cache")
    assert server.asked == []
    assert everything_in(tmp_path) == set()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "modeling_evil.py", "config.pkl", "config"])
def test_a_file_of_another_kind_is_refused(server: AnyServer, tmp_path: Path, name: str) -> None:
    server.listing.files[0].name = name
    with pytest.raises(WeightsError, match="not expected"):
        fetch(server, tmp_path)
    assert server.asked == []


def test_a_huge_file_is_refused_before_it_is_fetched(server: AnyServer, tmp_path: Path) -> None:
    server.listing.files[0].size_bytes = 1 << 40
    with pytest.raises(WeightsError, match=f"{1 << 40} bytes"):
        fetch(server, tmp_path)
    assert server.asked == []


def test_more_than_fits_on_the_device_is_refused_before_it_is_fetched(server: AnyServer, tmp_path: Path) -> None:
    del server.listing.tensors[0].shape[:]
    server.listing.tensors[0].shape.extend([1 << 32, 1 << 32])
    with pytest.raises(WeightsError, match=r"needs .* MB, but only .* MB are free"):
        fetch(server, tmp_path)
    assert server.asked == []


@pytest.mark.parametrize("kind", ["file", "tensor"])
def test_a_name_that_is_listed_twice_is_refused(server: AnyServer, tmp_path: Path, kind: str) -> None:
    listed: Any = server.listing.files if kind == "file" else server.listing.tensors
    listed.append(listed[0])
    with pytest.raises(WeightsError, match=f"lists '{listed[0].name}' twice"):
        fetch(server, tmp_path)


def test_an_unknown_dtype_is_refused(server: AnyServer, tmp_path: Path) -> None:
    server.listing.tensors[0].dtype = "O"
    with pytest.raises(WeightsError, match="unknown dtype 'O'"):
        fetch(server, tmp_path)
    assert server.asked == []


@pytest.mark.parametrize("name", ["config.json", "model.norm.weight"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-1], "hash or length"),
        (lambda content: content[:-1] + b"!", "hash or length"),
        (lambda content: content + b"!", "longer than it said"),
        (lambda content: b"", "hash or length"),
    ],
)
def test_what_comes_otherwise_than_it_was_listed_is_not_kept(
    server: AnyServer, tmp_path: Path, name: str, change: Any, words: str
) -> None:
    server.pieces[name] = [change(b"".join(server.pieces[name]))]
    with pytest.raises(WeightsError, match=words):
        fetch(server, tmp_path)
    assert not {name, f"{name}.safetensors", segments._INDEX} & everything_in(tmp_path)


def test_an_endless_tensor_is_cut_off_at_its_size(server: AnyServer, tmp_path: Path) -> None:
    sent: list[bytes] = []

    def endless() -> Iterator[bytes]:
        while True:
            sent.append(WEIGHT)
            yield WEIGHT

    server.pieces["model.norm.weight"] = endless()  # type: ignore[assignment]
    with pytest.raises(WeightsError, match="longer than it said"):
        fetch(server, tmp_path)
    assert len(sent) == 2
