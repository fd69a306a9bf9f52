"""A session that says how far its member is, and that ends with a sentence once its round goes on without it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from splitfed.errors import ProtocolError, RoundLost, SplitFedError
from splitfed.proto.v1 import training_pb2
from splitfed.server.outlast import outlasting
from splitfed.server.sessions import Operation, TrainSession
from splitfed.training.together import TrunkCalls


class MemberSession(TrainSession):
    """A `TrainSession` of a member that may be too slow for its round, or lose its turn.

    Attributes:
        why_over: Gives the error that the member is to get where its round goes on without this session; None where it
            does not. Asked before each operation, right before the trunk is asked, and after one that failed.
        on_steps: Told the local steps made so far, after each.
        on_refused: Told of an operation that does not fit the round: others do not wait for this member any more.
    """

    why_over: Callable[[], SplitFedError | None]
    on_steps: Callable[[int], None]
    on_refused: Callable[[], Awaitable[None]]
    _answering = 0

    @property
    def is_answering(self) -> bool:
        """Something came whose answer is not ready yet."""
        return self._answering > 0

    async def answer(self, operation: Operation) -> list[training_pb2.TrainReply]:
        """Apply an operation once, as long as the round waits for this session.

        Raises:
            RoundLost: If it no longer does: what is left of the operation's slot says nothing to the member.
            ProtocolError: If the operation does not fit the round.
        """
        is_new = operation.number == self.next_number
        with self._while_it_is_waited_for():
            try:
                replies = await super().answer(operation)
            except ProtocolError:
                if self.why_over() is None:
                    await self.on_refused()
                raise
        if is_new and operation.body == "step":
            self.on_steps(operation.request.step.step + 1)
        return replies

    async def mean_gradient(self, step: int, gradients: Mapping[str, Tensor], *, tokens: int) -> dict[str, Tensor]:
        """Wait for the cohort's mean, as long as the round waits for this session; the arguments are `TrunkCalls`'.

        Raises:
            RoundLost: If it no longer does.
            ProtocolError: If the gradients are not finite, not of a step's tokens, or another step's are due.
        """
        if not 0 < tokens <= self.limits.sequences * self.limits.tokens:
            raise ProtocolError(f"Gradients of {tokens} tokens do not come from one of this run's steps.")
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            raise ProtocolError(f"The gradients of {self.client!r} are not finite; lower the learning rate.")
        with self._while_it_is_waited_for():
            mean = self._trunk().mean_gradient(self.slot, step, gradients, tokens=tokens)
            return await outlasting(asyncio.wrap_future(mean))

    def _trunk(self) -> TrunkCalls:
        if (error := self.why_over()) is not None:
            raise error
        return super()._trunk()

    @contextmanager
    def _while_it_is_waited_for(self) -> Iterator[None]:
        """Count what is on its way; what fails because the round goes on without this session says that."""
        if (error := self.why_over()) is not None:
            raise error
        self._answering += 1
        try:
            yield
        except (ProtocolError, RoundLost) as failure:
            if (error := self.why_over()) is not None and failure is not error:
                raise error from failure
            raise
        finally:
            self._answering -= 1
