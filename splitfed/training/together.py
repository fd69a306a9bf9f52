"""Clients that train one trunk adapter: joint steps of a cohort, or steps as they come with a bound on their age."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from splitfed.errors import LinkError, ProtocolError, RoundLost
from splitfed.federation.variants import Staleness
from splitfed.training.barrier import Barrier, Key, hand_out, open_answer, settle
from splitfed.training.joint_pace import JointPace
from splitfed.training.trunk_slot import TrunkBackward, TrunkForward
from splitfed.training.trunk_step import Applied, TrunkTrainer

T = TypeVar("T")

Submit = Callable[[Callable[[TrunkTrainer], Any]], Future[Any]]
"""Runs something on the trunk, now or in its turn, in the order in which it was asked."""


def at_once(trainer: TrunkTrainer) -> Submit:
    """Run on the trunk of this process, before the call returns."""

    def submit(work: Callable[[TrunkTrainer], Any]) -> Future[Any]:
        answer: Future[Any] = Future()
        settle(answer, lambda: work(trainer))
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

    def restart(self, slot: str) -> bool:
        """Take back what a client has asked that begins its round again; False if its place in it is lost."""

    def leave(self, slot: str) -> None:
        """Wait for this client no longer; what it has asked fails."""

    def close(self, error: LinkError) -> None:
        """Fail whatever waits for other clients, and whatever would."""


class _NoCohort:
    """Nobody has a step in common."""

    def restart(self, slot: str) -> bool:
        """Nobody loses a place; what was asked for a slot that is given up has left with it."""
        self.leave(slot)
        return True

    def leave(self, slot: str) -> None:
        """Nobody waits for anybody."""

    def close(self, error: LinkError) -> None:
        """Nothing waits."""

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
        return self._submit(lambda trainer: _only(trainer.forward_together([call])))

    def backward(self, call: TrunkBackward) -> Future[Tensor | None]:
        """Run the backward."""
        return self._submit(lambda trainer: _only(trainer.backward_together([call])))

    def step(self, slot: str, step: int, *, squared_norm: float | None = None) -> Future[Applied]:
        """Apply the step."""
        return self._submit(lambda trainer: trainer.step(slot, step, others=squared_norm))


class JointCalls:
    """Makes a local step one step of a cohort: its calls wait for one another and are run at once.

    A client's gradient counts by its tokens in the step: the gradient of the cohort's mean loss per token. Forwards for
    evaluation are run as they come.

    Args:
        slots: The cohort's slots, in an order that does not depend on who comes first.
        submit: Runs something on the trunk.
        clock: Monotonic seconds.
        pace: What joint steps took in the rounds before, to which this one's are added; None: nothing is known.

    Guarantees:
        * Calls are run in the order of the slots, whatever came first.
        * One client alone has the bits that it has with an adapter of its own.
        * A call that the trunk refuses fails alone; those of the others are run without it.
    """

    def __init__(
        self,
        slots: Iterable[str],
        submit: Submit,
        *,
        clock: Callable[[], float] = time.monotonic,
        pace: JointPace | None = None,
    ) -> None:
        self._submit = submit
        self._barrier = Barrier(slots, self._run)
        self._tokens: dict[str, int] = {}
        self._means = 0
        self._mean: dict[str, Tensor] = {}
        self._clock = clock
        self._pace = pace or JointPace()
        self._steps = 0
        self._waits_since_s = clock()
        self._named: set[str] = set()

    @property
    def slots(self) -> Sequence[str]:
        """Those that take part, in their order."""
        return self._barrier.members

    def holding_up(self, margin: float) -> set[str]:
        """Name the slots that keep the others waiting for more than a multiple of the median joint step.

        Args:
            margin: How many times the median; nobody is named while no such step is known, from this round or one
                before. Half of the cohort or more do not hold up the rest, nor those that were named before and have
                gone together with those that are missing now.
        """
        usual_s = self._pace.usual_s(is_first=self._steps == 0)
        if usual_s is None or self._clock() - self._waits_since_s <= margin * usual_s:
            return set()
        missing, gone = self._barrier.missing(), self._named - set(self.slots)
        if 2 * len(missing | gone) >= len(gone.union(self.slots)):
            return set()
        self._named |= missing
        return missing

    def forward(self, call: TrunkForward, *, tokens: int = 0) -> Future[Tensor]:
        """Wait for the cohort, then run the forwards; for evaluation, at once."""
        if not call.trains:
            return self._submit(lambda trainer: _only(trainer.forward_together([call])))
        return self._ask(("forward", call.step, call.micro_batch), call.slot, (call, max(tokens, 1)))

    def backward(self, call: TrunkBackward) -> Future[Tensor | None]:
        """Wait for the cohort, then run the backwards, each by its client's share."""
        return self._ask(("backward", call.step, call.micro_batch), call.slot, call)

    def step(self, slot: str, step: int, *, squared_norm: float | None = None) -> Future[Applied]:
        """Wait for the cohort, then apply the joint step."""
        return self._ask(("step", step, 0), slot, squared_norm)

    def mean_gradient(
        self, slot: str, step: int, gradients: Mapping[str, Tensor], *, tokens: int
    ) -> Future[dict[str, Tensor]]:
        """Wait for the cohort, then give each the weighted mean, float32; asked again, it is given again."""
        if self._means and step == self._means - 1 and slot in self.slots:
            return _answered({name: self._mean[name] for name in gradients})
        if step != self._means:
            return _refused(f"Gradients of step {step} came; those of step {self._means} are due.")
        return self._barrier.ask(("mean", step, 0), slot, (gradients, max(tokens, 1)))

    def restart(self, slot: str) -> bool:
        """Take back what a client has asked; False if joint calls of it were run already."""
        return self._barrier.restart(slot)

    def leave(self, slot: str) -> None:
        """Go on without a client; the shares of the others in a step that it had a forward in stay as they are."""
        self._barrier.leave(slot)

    def close(self, error: LinkError) -> None:
        """Fail every call that waits for others, and every one that would."""
        self._barrier.close(error)

    def _ask(self, key: Key, slot: str, argument: Any) -> Future[Any]:
        kind, step, _ = key
        if step != self._steps:
            return _refused(f"A {kind} of step {step} came; step {self._steps} is due.")
        return self._barrier.ask(key, slot, argument)

    def _run(self, key: Key, slots: Sequence[str], asked: Sequence[Any]) -> Future[Any]:
        kind, step, _ = key
        if kind == "forward":
            for slot, (_, tokens) in zip(slots, asked, strict=True):
                self._tokens.setdefault(slot, tokens)
            return self._submit(lambda trainer: trainer.forward_together([call for call, _ in asked]))
        if kind == "mean":
            self._means, self._mean = step + 1, _mean(asked)
            return _answered([{name: self._mean[name] for name in gradients} for gradients, _ in asked])
        if kind == "backward":
            calls = [replace(call, share=self._share(call.slot)) for call in asked]
            return self._submit(lambda trainer: trainer.backward_together(calls))
        others = None
        if any(norm is not None for norm in asked):
            others = sum(self._share(slot) * (norm or 0.0) for slot, norm in zip(slots, asked, strict=True))
        self._tokens.clear()
        now_s = self._clock()
        self._pace.note(now_s - self._waits_since_s, is_first=self._steps == 0)
        self._steps, self._waits_since_s = self._steps + 1, now_s
        return self._submit(lambda trainer: [trainer.step_together(slots, step, others=others)] * len(slots))

    def _share(self, slot: str) -> float:
        """Give what a client counts for; without a forward in the step, that is nothing to be divided."""
        return self._tokens[slot] / sum(self._tokens.values()) if slot in self._tokens else 1.0


class FreeCalls(_NoCohort):
    """Runs every call as it comes on the shared adapter; a step that would make another too old waits.

    More clients may come than were counted on, such as one that was replaced and is back: a step begins once fewer
    than `Staleness.clients` are on their way.

    Args:
        submit: Runs something on the trunk.
        staleness: How old a step may be, and what it then counts for.

    Attributes:
        ages: How many steps were applied at each age: the number of others between a step's first forward and itself.

    Guarantees:
        * No step is older than `Staleness.most` as it is applied.
        * While the clients that have begun a step go on, nothing waits for ever.
        * A client that has left holds nobody up, whatever still comes from it.
    """

    def __init__(self, submit: Submit, staleness: Staleness) -> None:
        self._submit = submit
        self._staleness = staleness
        self._version = 0
        self._begun: dict[str, int] = {}
        self._held: dict[str, list[tuple[TrunkForward, Future[Tensor]]]] = {}
        self._waiting: dict[str, tuple[int, float | None, Future[Applied]]] = {}
        self._left: set[str] = set()
        self._closed: LinkError | None = None
        self.ages: Counter[int] = Counter()

    def forward(self, call: TrunkForward, *, tokens: int = 0) -> Future[Tensor]:
        """Run the forward with the adapter as it is, once there is room for another step."""
        if not call.trains or call.slot in self._left:
            return self._submit(lambda trainer: _only(trainer.forward_together([call])))
        answer = open_answer()
        if self._closed is not None:
            answer.set_exception(type(self._closed)(*self._closed.args))
            return answer
        self._held.setdefault(call.slot, []).append((call, answer))
        self._begin_those_that_may()
        return answer

    def backward(self, call: TrunkBackward) -> Future[Tensor | None]:
        """Run the backward with the adapter of its forward."""
        return self._submit(lambda trainer: _only(trainer.backward_together([call])))

    def step(self, slot: str, step: int, *, squared_norm: float | None = None) -> Future[Applied]:
        """Apply the step as soon as no other one becomes too old by it."""
        answer = open_answer()
        if self._closed is not None or slot in self._left:
            answer.set_exception(self._closed or _lost())
            return answer
        if slot in self._waiting:
            self._waiting.pop(slot)[2].set_exception(_lost())
        self._waiting[slot] = step, squared_norm, answer
        self._run_those_that_may()
        return answer

    def leave(self, slot: str) -> None:
        """Wait for this client's step no longer."""
        self._left.add(slot)
        self._begun.pop(slot, None)
        for _, output in self._held.pop(slot, []):
            output.set_exception(_lost())
        if slot in self._waiting:
            self._waiting.pop(slot)[2].set_exception(_lost())
        self._run_those_that_may()

    def close(self, error: LinkError) -> None:
        """Fail what waits, and the steps that come or would begin."""
        self._closed = error
        answers: list[Future[Any]] = [answer for _, _, answer in self._waiting.values()]
        answers += [output for calls in self._held.values() for _, output in calls]
        self._waiting, self._held = {}, {}
        for answer in answers:
            answer.set_exception(type(error)(*error.args))

    def _run_those_that_may(self) -> None:
        while (slot := next((slot for slot in self._waiting if self._may_step(slot)), None)) is not None:
            step, squared_norm, answer = self._waiting.pop(slot)
            self.ages[self._version - self._begun.pop(slot, self._version)] += 1
            self._version += 1
            applied = self._submit(self._single_step(slot, step, squared_norm))
            applied.add_done_callback(lambda done, answer=answer: hand_out(done, [answer]))  # type: ignore[misc]
        self._begin_those_that_may()

    def _begin_those_that_may(self) -> None:
        for slot in list(self._held):
            if slot not in self._begun and len(self._begun) >= self._staleness.clients:
                continue
            self._begun.setdefault(slot, self._version)
            for call, output in self._held.pop(slot):
                run = self._submit(lambda trainer, call=call: trainer.forward_together([call]))  # type: ignore[misc]
                run.add_done_callback(lambda done, output=output: hand_out(done, [output]))  # type: ignore[misc]

    def _single_step(self, slot: str, step: int, squared_norm: float | None) -> Callable[[TrunkTrainer], list[Applied]]:
        rate = self._staleness.rate
        return lambda trainer: [trainer.step(slot, step, rate=rate, others=squared_norm)]

    def _may_step(self, slot: str) -> bool:
        own_age = self._version - self._begun.get(slot, self._version)
        ages = [self._version + 1 - begun for other, begun in self._begun.items() if other != slot]
        return self._staleness.allows(max(ages, default=0), own_age)


def _mean(asked: Sequence[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Weigh gradients by tokens, in float64; each one's mean is over those that have it."""
    names = dict.fromkeys(name for gradients, _ in asked for name in gradients)
    means = {}
    for name in names:
        given = [(gradients[name], tokens) for gradients, tokens in asked if name in gradients]
        total = sum(tokens for _, tokens in given)
        means[name] = torch.stack([gradient.double() * (tokens / total) for gradient, tokens in given]).sum(0).float()
    return means


def _only(answers: Sequence[T | ProtocolError]) -> T:
    """Give the answer to a call that was made alone, or raise why it was refused."""
    (answer,) = answers
    if isinstance(answer, ProtocolError):
        raise answer
    return answer


def _answered(value: T) -> Future[T]:
    answer: Future[T] = Future()
    answer.set_result(value)
    return answer


def _refused(why: str) -> Future[Any]:
    answer: Future[Any] = Future()
    answer.set_exception(ProtocolError(why))
    return answer


def _lost() -> RoundLost:
    return RoundLost("The round goes on without this agent; it takes part again when it is asked.")
