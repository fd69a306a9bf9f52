"""A session that says how far its member is, and that ends with a sentence once its round goes on without it."""

from collections.abc import Callable

from splitfed.errors import ProtocolError, SplitFedError
from splitfed.proto.v1 import training_pb2
from splitfed.server.sessions import Operation, TrainSession


class MemberSession(TrainSession):
    """A `TrainSession` of a member that may be too slow for its round, or lose its turn.

    Attributes:
        is_answering: An operation came whose answer is not ready yet.
        why_over: Gives the error that the member is to get where its round goes on without this session; None where it
            does not. Asked before each operation, and after one that failed.
        on_steps: Told the local steps made so far, after each.
    """

    is_answering = False
    why_over: Callable[[], SplitFedError | None]
    on_steps: Callable[[int], None]

    async def answer(self, operation: Operation) -> list[training_pb2.TrainReply]:
        """Apply an operation once, as long as the round waits for this session.

        Raises:
            RoundLost: If it no longer does: what is left of the operation's slot says nothing to the member.
            ProtocolError: If the operation does not fit the round.
        """
        if (error := self.why_over()) is not None:
            raise error
        is_new = operation.number == self.next_number
        self.is_answering = True
        try:
            replies = await super().answer(operation)
        except ProtocolError as failure:
            if (error := self.why_over()) is not None:
                raise error from failure
            raise
        finally:
            self.is_answering = False
        if is_new and operation.body == "step":
            self.on_steps(operation.request.step.step + 1)
        return replies
