"""Clients that train one trunk adapter: joint steps of a cohort, or steps as they come with a bound on their age."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from statistics import median_high
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from splitfed.errors import RoundLost
from splitfed.federation.variants import Staleness
from splitfed.training.barrier import Barrier, Key, hand_out
from splitfed.training.trunk_slot import TrunkBackward, TrunkForward
from splitfed.training.trunk_step import Applied, TrunkTrainer

T = TypeVar("T")

_STEPS_TO_GO_BY = 3

Submit = Callable[[Callable[[TrunkTrainer], Any]], Future[Any]]
"""Runs something on the trunk, now or in its turn, in the order in which it was asked."""


def at_once(trainer: TrunkTrainer) -> Submit:
    """Run on the trunk of this process, before the call returns."""

    def submit(work: Callable[[TrunkTrainer], Any]) -> Future[Any]:
        answer: Future[Any] = Future()
        try:
            answer.set_result(work(trainer))
        except Exception as error:  # noqa: BLE001  # whatever went wrong is the answer
            answer.set_exception(error)
        return answer

    return submit


class TrunkCalls(Protocol):
    """What the clients of a round ask of the trunk."""

    def forward(self, call: TrunkForward, *, tokens: int = 0) -> Future[Tensor]:
        """Ask for the trunk output; ``tokens`` is what the client's step counts for in a joint one."""

    def backward(self, call: TrunkBackward) -> Future[Tensor | None]:
        """Ask for the smashed gradient."""

    def step(self, slot: str, step: int, *, squared_norm: float | None = None) -> Future[Applied]:
        """Ask for the step to be applied."""

    def mean_gradient(
        self, slot: str, step: int, gradients: Mapping[str, Tensor], *, tokens: int
    ) -> Future[dict[str, Tensor]]:
        """Ask for the mean of the cohort's gradients of bottom and top, weighted by tokens."""

    def leave(self, slot: str) -> None:
        """Wait for this client no longer; what it has asked fails."""


class _NoCohort:
    """Nobody has a step in common."""

    def mean_gradient(
        self, slot: str, step: int, gradients: Mapping[str, Tensor], *, tokens: int
    ) -> Future[dict[str, Tensor]]:
        """Give the client's own back."""
        return _answered(dict(gradients))


class OwnCalls(_NoCohort):
    """Each client with an adapter of its own, or one after another: every call is run as it comes.

    Args:
        submit: Runs something on the trunk.
    """

    def __init__(self, submit: Submit) -> None:
        self._submit = submit

    def forward(self, call: TrunkForward, *, tokens: int = 0) -> Future[Tensor]:
        """Run the forward."""
        return self._submit(lambda trainer: trainer.forward_together([call])[0])

    def backward(self, call: TrunkBackward) -> Future[Tensor | None]:
        """Run the backward."""
        return self._submit(lambda trainer: trainer.backward_together([call])[0])

    def step(self, slot: str, step: int, *, squared_norm: float | None = None) -> Future[Applied]:
        """Apply the step."""
        return self._submit(lambda trainer: trainer.step(slot, step, others=squared_norm))

    def leave(self, slot: str) -> None:
        """Nobody waits for anybody."""


class JointCalls:
    """Makes a local step one step of a cohort: its calls wait for one another and are run at once.

    A client's gradient counts by its tokens in the step: the gradient of the cohort's mean loss per token. Forwards for
    evaluation are run as they come.

    Args:
        slots: The cohort's slots, in an order that does not depend on who comes first.
        submit: Runs something on the trunk.
        clock: Monotonic seconds.

    Guarantees:
        * Calls are run in the order of the slots, whatever came first.
        * One client alone has the bits that it has with an adapter of its own.
    """

    def __init__(self, slots: Iterable[str], submit: Submit, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._submit = submit
        self._barrier = Barrier(slots, self._run)
        self._tokens: dict[int, dict[str, int]] = {}
        self._mean: tuple[int, dict[str, Tensor]] | None = None
        self._clock = clock
        self._stepped_s: list[float] = []

    @property
    def slots(self) -> Sequence[str]:
        """Those that take part, in their order."""
        return self._barrier.members

    def holding_up(self, margin: float) -> set[str]:
        """Name the slots that keep the others waiting for more than a multiple of the median joint step.

        Args:
            margin: How many times the median; nobody holds up a cohort that has not made three steps yet.
        """
        if len(self._stepped_s) < _STEPS_TO_GO_BY + 1:
            return set()
        took_s = [later - earlier for earlier, later in pairwise(self._stepped_s)]
        waits_s = self._clock() - self._stepped_s[-1]
        return self._barrier.missing() if waits_s > margin * median_high(took_s) else set()

    def forward(self, call: TrunkForward, *, tokens: int = 0) -> Future[Tensor]:
        """Wait for the cohort, then run the forwards; for evaluation, at once."""
        if not call.trains:
            return self._submit(lambda trainer: trainer.forward_together([call])[0])
        self._tokens.setdefault(call.step, {})[call.slot] = max(tokens, 1)
        return self._barrier.ask(("forward", call.step, call.micro_batch), call.slot, call)

    def backward(self, call: TrunkBackward) -> Future[Tensor | None]:
        """Wait for the cohort, then run the backwards, each by its client's share."""
        return self._barrier.ask(("backward", call.step, call.micro_batch), call.slot, call)

    def step(self, slot: str, step: int, *, squared_norm: float | None = None) -> Future[Applied]:
        """Wait for the cohort, then apply the joint step."""
        return self._barrier.ask(("step", step, 0), slot, squared_norm)

    def mean_gradient(
        self, slot: str, step: int, gradients: Mapping[str, Tensor], *, tokens: int
    ) -> Future[dict[str, Tensor]]:
        """Wait for the cohort, then give each the weighted mean, float32; asked again, it is given again."""
        if self._mean is not None and self._mean[0] == step:
            return _answered(self._mean[1])
        return self._barrier.ask(("mean", step, 0), slot, (gradients, max(tokens, 1)))

    def leave(self, slot: str) -> None:
        """Go on without a client; the shares of the others in a step that has begun stay as they are."""
        self._barrier.leave(slot)

    def _run(self, key: Key, slots: Sequence[str], asked: Sequence[Any]) -> Future[Any]:
        kind, step, _ = key
        if kind == "forward":
            return self._submit(lambda trainer: trainer.forward_together(asked))
        if kind == "mean":
            self._mean = step, _mean(asked)
            return _answered([self._mean[1]] * len(slots))
        if kind == "backward":
            calls = [replace(call, share=self._share(step, call.slot)) for call in asked]
            return self._submit(lambda trainer: trainer.backward_together(calls))
        others = None
        if any(norm is not None for norm in asked):
            others = sum(self._share(step, slot) * (norm or 0.0) for slot, norm in zip(slots, asked, strict=True))
        del self._tokens[step]
        self._stepped_s.append(self._clock())
        return self._submit(lambda trainer: [trainer.step_together(slots, step, others=others)] * len(slots))

    def _share(self, step: int, slot: str) -> float:
        tokens = self._tokens[step]
        return tokens[slot] / sum(tokens.values())


class FreeCalls(_NoCohort):
    """Runs every call as it comes on the shared adapter; a step that would make another too old waits.

    Args:
        submit: Runs something on the trunk.
        staleness: How old a step may be, and what it then counts for.

    Attributes:
        oldest: Largest age of a step that was applied.
    """

    def __init__(self, submit: Submit, staleness: Staleness) -> None:
        self._submit = submit
        self._staleness = staleness
        self._version = 0
        self._begun: dict[str, int] = {}
        self._waiting: dict[str, tuple[int, float | None, Future[Applied]]] = {}
        self.oldest = 0

    def forward(self, call: TrunkForward, *, tokens: int = 0) -> Future[Tensor]:
        """Run the forward with the adapter as it is."""
        if call.trains:
            self._begun.setdefault(call.slot, self._version)
        return self._submit(lambda trainer: trainer.forward_together([call])[0])

    def backward(self, call: TrunkBackward) -> Future[Tensor | None]:
        """Run the backward with the adapter of its forward."""
        return self._submit(lambda trainer: trainer.backward_together([call])[0])

    def step(self, slot: str, step: int, *, squared_norm: float | None = None) -> Future[Applied]:
        """Apply the step as soon as no other one becomes too old by it."""
        answer: Future[Applied] = Future()
        self._waiting[slot] = step, squared_norm, answer
        self._run_those_that_may()
        return answer

    def leave(self, slot: str) -> None:
        """Wait for this client's step no longer."""
        self._begun.pop(slot, None)
        if slot in self._waiting:
            self._waiting.pop(slot)[2].set_exception(RoundLost("The round goes on without this client."))
        self._run_those_that_may()

    def _run_those_that_may(self) -> None:
        while (slot := next((slot for slot in self._waiting if self._may_step(slot)), None)) is not None:
            step, squared_norm, answer = self._waiting.pop(slot)
            self.oldest = max(self.oldest, self._version - self._begun.pop(slot, self._version))
            self._version += 1
            applied = self._submit(self._single_step(slot, step, squared_norm))
            applied.add_done_callback(lambda done, answer=answer: hand_out(done, [answer]))  # type: ignore[misc]

    def _single_step(self, slot: str, step: int, squared_norm: float | None) -> Callable[[TrunkTrainer], list[Applied]]:
        rate = self._staleness.rate
        return lambda trainer: [trainer.step(slot, step, rate=rate, others=squared_norm)]

    def _may_step(self, slot: str) -> bool:
        own_age = self._version - self._begun.get(slot, self._version)
        ages = [self._version + 1 - begun for other, begun in self._begun.items() if other != slot]
        return self._staleness.allows(max(ages, default=0), own_age)


def _mean(asked: Sequence[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Weigh gradients by tokens, in float64."""
    total = sum(tokens for _, tokens in asked)
    return {
        name: torch.stack([gradients[name].double() * (tokens / total) for gradients, tokens in asked]).sum(0).float()
        for name in asked[0][0]
    }


def _answered(value: T) -> Future[T]:
    answer: Future[T] = Future()
    answer.set_result(value)
    return answer
