from queue import SimpleQueue

from splitfed.proto.v1 import training_pb2
from splitfed.training.link import Traffic
from splitfed.transport.counting import counting_received, counting_sent, framed_bytes, one_after_the_other

REPLIES = [training_pb2.TrainReply(number=n, chunk=bytes(n)) for n in (0, 3, 500)]


def test_a_message_takes_its_size_and_five_bytes_of_framing() -> None:
    for reply in REPLIES:
        assert framed_bytes(reply) == len(reply.SerializeToString()) + 5


def test_messages_pass_untouched_and_count_as_they_pass() -> None:
    whole = sum(framed_bytes(reply) for reply in REPLIES)
    sent, received = Traffic(), Traffic()
    assert list(counting_sent(REPLIES, sent)) == list(counting_received(REPLIES, received)) == REPLIES
    assert (sent, received) == (Traffic(sent_bytes=whole), Traffic(received_bytes=whole))
    next(counting_sent(REPLIES, first := Traffic()))
    assert first.sent_bytes == framed_bytes(REPLIES[0])


def test_lists_that_are_queued_come_one_message_after_the_other() -> None:
    queued: SimpleQueue[list[training_pb2.TrainReply] | None] = SimpleQueue()
    for messages in (REPLIES[:2], [], REPLIES[2:], None, REPLIES):
        queued.put(messages)
    assert list(one_after_the_other(queued)) == REPLIES
