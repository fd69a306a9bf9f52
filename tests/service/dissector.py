"""Everything that a gRPC client sent over a connection, taken apart: HTTP/2 frames, headers, messages, fields."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from hpack import Decoder

from splitfed.proto.v1 import federation_pb2, generation_pb2, joining_pb2, training_pb2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, CONTINUATION = 0, 1, 9
END_HEADERS, PADDED, PRIORITY = 4, 8, 32
CONTROL = {2, 3, 4, 6, 7, 8}  # priority, reset, settings, ping, goaway, window update: no payload of the application's


def requests_by_path() -> dict[str, type[Message]]:
    """Look every method of every service up in the descriptors."""
    found = {}
    for module in (joining_pb2, training_pb2, federation_pb2, generation_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                found[f"/{service.full_name}/{method.name}"] = getattr(module, method.input_type.name)
    return found


@dataclass
class Call:
    """One call: its headers, and its messages in their order."""

    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""

    @property
    def path(self) -> str:
        """The method's full name."""
        return dict(self.headers)[":path"]

    def messages(self) -> list[Message]:
        """Parse the body, to its last byte."""
        kind, rest, found = requests_by_path()[self.path], self.body, []
        while rest:
            is_compressed, size = struct.unpack(">BI", rest[:5])
            assert is_compressed == 0
            found.append(kind.FromString(rest[5 : 5 + size]))
            assert len(UnknownFieldSet(found[-1])) == 0
            rest = rest[5 + size :]
        return found


def dissect(sent: bytes) -> list[Call]:
    """Take apart what a client sent over one connection.

    Raises:
        AssertionError: If there is a byte that is none of HTTP/2's frames, or a frame of an unknown type.
    """
    assert sent.startswith(PREFACE)
    rest, decoder = sent[len(PREFACE) :], Decoder()
    calls: dict[int, Call] = {}
    block = b""
    while rest:
        size = int.from_bytes(rest[:3])
        kind, flags, stream = rest[3], rest[4], int.from_bytes(rest[5:9]) & 0x7FFFFFFF
        payload, rest = rest[9 : 9 + size], rest[9 + size :]
        if len(payload) < size:
            break  # the connection was closed within a frame
        if kind in CONTROL:
            continue
        assert kind in (DATA, HEADERS, CONTINUATION), f"a frame of the unknown type {kind}"
        call = calls.setdefault(stream, Call())
        if flags & PADDED and kind != CONTINUATION:
            payload = payload[1 : len(payload) - payload[0]]
        if kind == DATA:
            call.body += payload
            continue
        block += payload[5:] if kind == HEADERS and flags & PRIORITY else payload
        if flags & END_HEADERS:
            call.headers += [(str(name), str(value)) for name, value in decoder.decode(block)]
            block = b""
    return [calls[stream] for stream in sorted(calls)]


def leaves(message: Message, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Go through every field that is set, down to numbers, bytes and strings; lists as a whole."""
    for descriptor, value in message.ListFields():
        name = f"{prefix}{descriptor.name}"
        if descriptor.message_type is None:
            yield name, list(value) if descriptor.is_repeated else value
        elif descriptor.is_repeated:
            for item in value:
                yield from leaves(item, f"{name}[].")
        else:
            yield from leaves(value, f"{name}.")
