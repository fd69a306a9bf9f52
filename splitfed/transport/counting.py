"""Bytes of messages as they cross the wire: counted in one way, on both sides."""

from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Final, Protocol, TypeVar

from splitfed.training.link import Traffic

FRAMING_BYTES: Final = 5
"""What gRPC puts before each message."""


class Message(Protocol):
    """A protobuf message."""

    def ByteSize(self) -> int:  # noqa: N802 - protobuf names it
        """Give its encoded size."""


M = TypeVar("M", bound=Message)


def framed_bytes(message: Message) -> int:
    """Give the bytes that a message takes, with what gRPC puts before it."""
    return message.ByteSize() + FRAMING_BYTES


def counting_sent(messages: Iterable[M], traffic: Traffic) -> Iterator[M]:
    """Give messages on, each counted as it goes to the server."""
    for message in messages:
        traffic.sent_bytes += framed_bytes(message)
        yield message


def counting_received(messages: Iterable[M], traffic: Traffic) -> Iterator[M]:
    """Give messages on, each counted as it has come from the server."""
    for message in messages:
        traffic.received_bytes += framed_bytes(message)
        yield message


def one_after_the_other(queued: "SimpleQueue[list[M] | None]") -> Iterator[M]:
    """Give the messages of each list that comes, until None comes."""
    for messages in iter(queued.get, None):
        yield from messages
