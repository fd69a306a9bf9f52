"""What one agent sent in a run, what its gate let out meanwhile, and which fields say nothing of its texts."""

import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from splitfed.privacy import read_ledger
from splitfed.privacy.ledger_rows import Row
from splitfed.training.releases import LedgeredReleases
from tests.service.cutting_proxy import CuttingProxy
from tests.service.dissector import Call, dissect, leaves

FREE = {  # what an agent may say of itself and of its place in the run
    "protocol_version", "run_id", "client", "agent_id", "config_sha256", "file", "tensor", "codecs", "round",
    "bottom_blocks", "top_blocks", "rank", "personal",
    "tensors[].name", "tensors[].dtype", "tensors[].shape", "tensors[].sha256", "number", "received_below",
    "open.run_id", "open.client", "open.agent_id", "open.round", "open.first_block", "open.end_block",
    "forward.kind", "forward.step", "forward.micro_batch", "forward.wants_smashed_gradient",
    "backward.step", "backward.micro_batch", "step.step",
    "header.run_id", "header.client", "header.agent_id", "header.round", "header.tensors", "header.step",
    "tensor.name", "tensor.tensor.shape", "tensor.tensor.dtype", "tensor.tensor.codec", "tensor.tensor.payload_bytes",
}  # fmt: skip
SHAPED = ("forward.smashed", "backward.output_gradient")
PAYLOAD = {*(f"{tensor}.data" for tensor in SHAPED), "tensor.tensor.data", "chunk"}
NAMES = {"client", "open.client", "header.client"}
CHANGING = {"agent_id", "open.agent_id", "header.agent_id", "received_below"}  # random, or of the server's answers
HEADERS = {
    ":scheme": "http", ":method": "POST", "te": "trailers", "content-type": "application/grpc",
    "grpc-accept-encoding": None, "accept-encoding": None, "user-agent": None, "grpc-timeout": None,
    ":path": None, ":authority": None,
}  # fmt: skip
GATE = ("smashed", "output_gradient", "step_gradient", "adapter_update")

Released = dict[str, list[Any]]
"""What a gate let out, by its method, in its order."""


def watch_gates(monkeypatch: pytest.MonkeyPatch) -> dict[str, Released]:
    """Keep a copy of what every gate lets out from now on, by the name of the agent's thread."""
    seen: dict[str, Released] = defaultdict(lambda: {name: [] for name in GATE})
    for name in GATE:
        monkeypatch.setattr(LedgeredReleases, name, _remembering(getattr(LedgeredReleases, name), name, seen))
    return seen


def _remembering(method: Any, name: str, seen: dict[str, Released]) -> Any:
    def remember(self: Any, *arguments: Any, **named: Any) -> Any:
        released = method(self, *arguments, **named)
        copy = {n: t.clone() for n, t in released.items()} if isinstance(released, dict) else released.detach()
        seen[threading.current_thread().name][name].append(copy)
        return released

    return remember


class Overheard:
    """All that an agent sent.

    Args:
        proxy: What stood between it and the server, closed.
        state: The agent's state directory.
        released: What its gate let out.

    Attributes:
        calls: Its calls.
        rows: Its ledger.
    """

    def __init__(self, proxy: CuttingProxy, state: Path, released: Released) -> None:
        self.calls: list[Call] = [call for sent in proxy.sent for call in dissect(bytes(sent))]
        self.rows: list[Row] = read_ledger(state / "ledger.jsonl").rows
        self.released = released

    def messages(self) -> list[tuple[str, Message]]:
        """Give every message with the last part of its method's name."""
        return [(call.path.rpartition("/")[2], message) for call in self.calls for message in call.messages()]

    def fields(self) -> dict[str, set[Any]]:
        """Give every value that a field has anywhere."""
        found: dict[str, set[Any]] = defaultdict(set)
        for _, message in self.messages():
            for name, value in leaves(message):
                found[name].add(tuple(value) if isinstance(value, list) else value)
        return found

    def outside(self, *, but: set[str] = CHANGING) -> list[Any]:
        """Give all but the payloads: methods, headers, messages in their order within a call, fields, and sizes."""
        calls = []
        for call in self.calls:
            messages = [
                [(name, len(value) if name in PAYLOAD else value) for name, value in leaves(message) if name not in but]
                for message in call.messages()
            ]
            headers = [(name, value) for name, value in call.headers if HEADERS.get(name, value) is not None]
            calls.append((call.path, headers, messages))
        return sorted(calls, key=str)

    def payloads(self) -> dict[str, list[bytes]]:
        """Give the bytes of every tensor in their order: under "forward" and "backward", others under their method."""
        found: dict[str, list[bytes]] = defaultdict(list)
        current: list[bytes] = []
        for method, message in self.messages():
            fields = dict(leaves(message))
            if "chunk" in fields:
                current[-1] += fields["chunk"]
            for name in PAYLOAD & fields.keys() - {"chunk"}:
                current = found[method if name == "tensor.tensor.data" else name.partition(".")[0]]
                current.append(fields[name])
        return found


def assert_headers_are_grpc_s_own(seen: Overheard) -> None:
    """Look at every header of every call."""
    for call in seen.calls:
        for name, value in call.headers:
            assert name in HEADERS
            assert HEADERS[name] in (None, value)


def assert_fields_say_nothing(seen: Overheard, counts: dict[str, set[int]], shapes: set[tuple[int, ...]]) -> None:
    """Look at every field of every message.

    Args:
        seen: What was sent.
        counts: Numbers that may be sent, by field: constants of the run.
        shapes: Shapes that hidden vectors may have.
    """
    for name, values in seen.fields().items():
        if name in FREE | PAYLOAD:
            continue
        tensor, _, attribute = name.rpartition(".")
        if name in counts:
            assert values <= counts[name], f"{name} = {values}"
        elif attribute == "shape" and tensor in SHAPED:
            assert values <= shapes, f"{name} = {values}"
        else:
            assert tensor in SHAPED, f"{name} = {values} is sent"
            assert attribute in ("dtype", "codec", "payload_bytes"), f"{name} = {values} is sent"
