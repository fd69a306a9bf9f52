"""The agent's half of a local step: bottom, cut, top, loss and the way back, with micro-batches in flight."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from splitfed.config import TrainingSection
from splitfed.errors import NonFiniteLoss
from splitfed.models import Segment, adapter_parameters, adapter_state, load_adapter_state
from splitfed.privacy import PerExampleMechanism, bounded_reply
from splitfed.training.data import Batch, Example, collate
from splitfed.training.link import Link, Place
from splitfed.training.objective import IGNORED_LABEL
from splitfed.training.optimiser import StepOptimiser
from splitfed.training.per_example import GradientSum, PerExampleLayers, RecordedPass
from splitfed.training.releases import Releases
from splitfed.training.seeds import derive_seed
from splitfed.training.work import Work, done

Loss = Callable[[Tensor, Tensor, float], Tensor]
"""``(logits_BTV, labels_BT, divisor)`` to the sum of the token losses ÷ divisor, a scalar."""


def causal_lm_loss(logits_BTV: Tensor, labels_BT: Tensor, divisor: float) -> Tensor:
    """Give the library's next-token loss with a divisor of the caller's choice.

    Args:
        logits_BTV: Logits, shape [B, T, V].
        labels_BT: Labels, shape [B, T]; -100 where there is no loss.
        divisor: What the sum of the token losses is divided by.

    Returns:
        A scalar.
    """
    loss: Tensor = ForCausalLMLoss(
        logits_BTV, labels_BT, vocab_size=logits_BTV.shape[-1], num_items_in_batch=torch.tensor(divisor)
    )
    return loss


def count_label_tokens(labels_BT: Tensor) -> int:
    """Count the positions that carry loss once labels are shifted by one."""
    return int((labels_BT[:, 1:] != IGNORED_LABEL).sum())


@dataclass(frozen=True)
class StepResult:
    """What a local step came to, on the agent alone.

    Attributes:
        loss_sum: Sum of the token losses.
        label_tokens: Tokens that carry loss.
        sent_tokens: Rows that crossed the link in one direction, padding included.
    """

    loss_sum: float
    label_tokens: int
    sent_tokens: int

    @property
    def loss(self) -> float:
        """Mean loss per token, in nats."""
        return self.loss_sum / max(self.label_tokens, 1)


@dataclass
class _InFlight:
    """A micro-batch between its forward and its backward."""

    place: Place
    batch: Batch
    bottom_BTD: Tensor
    bottom_pass: RecordedPass | None
    output: Future[Tensor]


@dataclass
class _Returning:
    """A micro-batch between the backward of its top and that of its bottom."""

    sent: _InFlight
    top_pass: RecordedPass | None
    smashed_gradient: Future[Tensor | None]


@dataclass
class _Step:
    """A local step on its way."""

    link: Link
    round: int
    divisor: float
    gradients: GradientSum | None
    waiting: deque[_InFlight] = field(default_factory=deque)
    returning: deque[_Returning] = field(default_factory=deque)


class ClientTrainer:
    """One client: its bottom and top, its optimiser, and the gate that its releases pass.

    Args:
        bottom: The bottom, with its adapter.
        top: The top, with its adapter.
        training: Batch sizes, length and optimiser settings.
        releases: The gate.
        client: Name of the client, for its random streams.
        seed: The run's seed.
        pad_token_id: Token that fills the rows up.
        loss: The loss of logits and labels.
        exchanges: Gradients of bottom and top are those of the whole cohort, merged at every step.
    """

    def __init__(
        self,
        bottom: Segment,
        top: Segment,
        training: TrainingSection,
        releases: Releases,
        *,
        client: str,
        seed: int,
        pad_token_id: int,
        loss: Loss = causal_lm_loss,
        exchanges: bool = False,
    ) -> None:
        self.bottom = bottom
        self.top = top
        self.releases = releases
        self._training = training
        self._client = client
        self._seed = seed
        self.pad_token_id = pad_token_id
        self._loss = loss
        self._exchanges = exchanges
        self._bottom_trains = bool(adapter_parameters(bottom))
        self.optimiser = StepOptimiser(adapter_parameters(bottom), adapter_parameters(top), training=training)
        self._per_example: PerExampleMechanism | None = releases.per_example if self.is_training else None
        self._layers = {} if self._per_example is None else {s.kind: PerExampleLayers(s) for s in (bottom, top)}

    @property
    def is_training(self) -> bool:
        """The client has an adapter of its own to train."""
        return self._bottom_trains or bool(adapter_parameters(self.top))

    @property
    def segments(self) -> tuple[Segment, Segment]:
        """Bottom and top."""
        return self.bottom, self.top

    def adapter_state(self) -> dict[str, Tensor]:
        """Copy the adapters of bottom and top, by whole-model name."""
        return {**adapter_state(self.bottom), **adapter_state(self.top)}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapters of bottom and top.

        Raises:
            ValueError: If a tensor is missing, or has another shape.
        """
        load_adapter_state(self.bottom, state)
        load_adapter_state(self.top, state)

    def begin_round(self, start: Mapping[str, Tensor]) -> None:
        """Put the adapters of bottom and top at a round's start; the optimiser's state stays.

        Args:
            start: By whole-model name.

        Raises:
            ValueError: If a tensor is missing, or has another shape.
        """
        self.load_adapter_state(start)
        self.optimiser.clear_gradients()
        self.optimiser.hold_to(start)

    def step(self, link: Link, examples: Sequence[Example | None], *, round: int, step: int) -> StepResult:
        """Run one local step over a link; the arguments are those of `step_work`."""
        return done(self.step_work(link, examples, round=round, step=step), waiting=link.traffic.waiting)

    def step_work(self, link: Link, examples: Sequence[Example | None], *, round: int, step: int) -> Work[StepResult]:
        """Run one local step over a link, and stop where an answer is needed.

        Micro-batches go out in their order, at most ``max_in_flight`` between forward and backward; gradients are
        gathered in the same order, so the result does not depend on timing.

        Args:
            link: The client's link in this round.
            examples: The step's examples; None = a row that is noise alone, with the shape of any other.
            round: The round, from 1.
            step: Local step in the round, from 0.

        Returns:
            The loss and the counts of this step.

        Raises:
            NonFiniteLoss: If a loss is NaN or infinite; the output gradient has not been sent then.
            PrivacyError: If what is to be clipped holds a NaN or an infinity; it has not been sent, nor applied here.
            LinkError: If the round is lost.
            BudgetExhausted: If a release would cross the agent's budget.
        """
        batches = self._micro_batches(examples)
        label_tokens = sum(count_label_tokens(batch.labels_BT) for batch in batches)
        under_way = _Step(link, round, self._divisor(label_tokens), self._new_sum())
        loss_sum = 0.0
        for index, batch in enumerate(batches):
            if len(under_way.waiting) == self._training.max_in_flight:
                loss_sum += yield from self._turn(under_way)
            self._send(under_way, Place(step, index), batch)
        while under_way.waiting:
            loss_sum += yield from self._turn(under_way)
        if self._takes_one_norm:
            yield from self._apply_by_one_norm(under_way, batches, step)
        else:
            # One call at a time waits for the cohort: a stream that breaks could let the mean overtake the step.
            if not self._exchanges:
                applied = link.step(step)
            yield from self._gather(under_way, batches, step)
            if self._exchanges:
                applied = link.step(step)
            self.optimiser.step(self._step_in_run(round, step))
            yield applied
            applied.result()
        sent_tokens = sum(batch.input_ids_BT.numel() for batch in batches)
        return StepResult(loss_sum, label_tokens, sent_tokens)

    def _gather(self, under_way: _Step, batches: Sequence[Batch], step: int) -> Work[None]:
        """Bring the gradients of bottom and top together, as the optimiser is to see them."""
        while under_way.returning:
            yield from self._finish(under_way)
        if under_way.gradients is not None:
            records = [record for batch in batches for record in batch.records]
            noisy = self.releases.adapter_gradient(
                under_way.gradients.sums, records=records, round=under_way.round, step=step
            )
            self.optimiser.set_gradients({name: total / self._training.batch_size for name, total in noisy.items()})
        if self._exchanges:
            own = self.releases.step_gradient(self.optimiser.gradients(), round=under_way.round)
            mean = under_way.link.mean_gradient(step, own, tokens=int(under_way.divisor))
            yield mean
            self.optimiser.set_gradients(mean.result())
        self.optimiser.pull_to_start()

    def _apply_by_one_norm(self, under_way: _Step, batches: Sequence[Batch], step: int) -> Work[None]:
        """Apply the step by the norm over all segments: no noise is on, and the server tells its part."""
        yield from self._gather(under_way, batches, step)
        applied = under_way.link.step(step, squared_norm=self.optimiser.squared_norm())
        yield applied
        self.optimiser.step(self._step_in_run(under_way.round, step), squared_norm=applied.result())

    @property
    def _takes_one_norm(self) -> bool:
        """Gradients are clipped by one norm over all segments; with noise on, each segment's by its own."""
        return self._training.max_grad_norm is not None and not self.releases.is_noisy

    def _step_in_run(self, round: int, step: int) -> int:
        return (round - 1) * self._training.local_steps + step

    def _micro_batches(self, examples: Sequence[Example | None]) -> list[Batch]:
        """Cut a step's examples into what crosses the wire at once; with noise on, every row has the run's length."""
        size = self._training.micro_batch_size or self._training.batch_size
        length = self._training.max_tokens if self.releases.is_noisy else None
        return [
            collate(examples[start : start + size], pad_token_id=self.pad_token_id, length=length)
            for start in range(0, len(examples), size)
        ]

    def _divisor(self, label_tokens: int) -> float:
        """Give the divisor of the step's loss: its label tokens, or with noise on a constant of the run.

        A count of the step's own tokens would couple its records: one's length would scale the others' gradients.
        """
        if self.releases.is_noisy:
            return float(self._training.batch_size * self._training.max_tokens)
        return float(max(label_tokens, 1))

    def _new_sum(self) -> GradientSum | None:
        """Start a step's sum of clipped per-example gradients, with DP-SGD on."""
        if self._per_example is None:
            return None
        shapes = {name: shape for layers in self._layers.values() for name, shape in layers.shapes.items()}
        return GradientSum(self._per_example, shapes)

    def _recording(self, segment: Segment, batch: Batch) -> AbstractContextManager[RecordedPass | None]:
        """Record a segment's forward for per-example gradients, with DP-SGD on."""
        return self._layers[segment.kind].recording(batch.input_ids_BT) if self._layers else nullcontext()

    def _send(self, under_way: _Step, place: Place, batch: Batch) -> None:
        """Take a micro-batch through the bottom and send the smashed data."""
        self.bottom.train()
        with (
            torch.random.fork_rng(devices=[]),
            torch.set_grad_enabled(self._bottom_trains),
            self._recording(self.bottom, batch) as bottom_pass,
        ):
            torch.manual_seed(self._stream("bottom", under_way.round, place))
            bottom_BTD = self.releases.smashed(
                self.bottom(batch.input_ids_BT),
                records=batch.records,
                round=under_way.round,
                place=place,
                is_real_B=batch.is_real_B,
            )
        with refusing_what_is_not_finite("smashed data", under_way.round, place):
            output = under_way.link.forward(
                place,
                bottom_BTD.detach(),
                wants_smashed_gradient=self._bottom_trains,
                step_tokens=int(under_way.divisor),
            )
        under_way.waiting.append(_InFlight(place, batch, bottom_BTD, bottom_pass, output))

    def _turn(self, under_way: _Step) -> Work[float]:
        """Take the oldest trunk output through the top and send the output gradient back."""
        sent, round = under_way.waiting.popleft(), under_way.round
        yield sent.output
        trunk_output_BTD = bounded_reply(sent.output.result()).requires_grad_()
        self.top.train()
        with torch.random.fork_rng(devices=[]), self._recording(self.top, sent.batch) as top_pass:
            torch.manual_seed(self._stream("top", round, sent.place))
            loss = self._loss(self.top(trunk_output_BTD).logits, sent.batch.labels_BT, under_way.divisor)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"The loss of step {sent.place.step} in round {round} is {value}; nothing was sent back. "
                "Lower the learning rate or the noise, and start the agent again."
            )
        gradient_BTD = self._back_through_the_top(loss, trunk_output_BTD, top_pass)
        if sent.batch.is_real_B is not None:
            gradient_BTD = gradient_BTD.masked_fill(~sent.batch.is_real_B[:, None, None], 0)
        gradient_BTD = self.releases.output_gradient(
            gradient_BTD, records=sent.batch.records, round=round, place=sent.place
        )
        if self.releases.is_noisy:
            gradient_BTD = gradient_BTD / self._training.batch_size
        with refusing_what_is_not_finite("output gradient", round, sent.place):
            smashed_gradient = under_way.link.backward(sent.place, gradient_BTD)
        if under_way.gradients is not None and top_pass is not None and not self._bottom_trains:
            under_way.gradients.add(top_pass, is_real_B=sent.batch.is_real_B)
        under_way.returning.append(_Returning(sent, top_pass, smashed_gradient))
        while len(under_way.returning) > self._training.max_in_flight:
            yield from self._finish(under_way)
        return value * under_way.divisor

    def _back_through_the_top(self, loss: Tensor, trunk_output_BTD: Tensor, top_pass: RecordedPass | None) -> Tensor:
        """Give the gradient at the trunk output; with noise on, of per-sequence losses: the batch's divisor is last."""
        if top_pass is not None:
            gradient_BTD = top_pass.backward(loss * self._training.batch_size, wrt=trunk_output_BTD)
            assert gradient_BTD is not None
            return gradient_BTD
        loss.backward()
        assert trunk_output_BTD.grad is not None
        if self.releases.is_noisy:
            trunk_output_BTD.grad *= self._training.batch_size
        return trunk_output_BTD.grad

    def _finish(self, under_way: _Step) -> Work[None]:
        """Take the oldest smashed gradient through the bottom."""
        back = under_way.returning.popleft()
        yield back.smashed_gradient
        bottom_BTD, bottom_pass = back.sent.bottom_BTD, back.sent.bottom_pass
        gradient_BTD = back.smashed_gradient.result()
        if gradient_BTD is not None:
            gradient_BTD = bounded_reply(gradient_BTD)
        if under_way.gradients is None or bottom_pass is None or back.top_pass is None:
            if gradient_BTD is not None and bottom_BTD.requires_grad:
                bottom_BTD.backward(gradient_BTD)
        elif self._bottom_trains:
            if gradient_BTD is not None:
                bottom_pass.backward(bottom_BTD, gradient_BTD * self._training.batch_size)
            under_way.gradients.add(bottom_pass, back.top_pass, is_real_B=back.sent.batch.is_real_B)

    def _stream(self, segment: str, round: int, place: Place) -> int:
        return derive_seed(self._seed, segment, round, self._client, place.step, place.micro_batch)


@contextmanager
def refusing_what_is_not_finite(what: str, round: int, place: Place) -> Iterator[None]:
    """Say in a user's words that a codec refused a NaN or an infinity; nothing has left then."""
    try:
        yield
    except ValueError as error:
        raise NonFiniteLoss(
            f"The {what} of step {place.step} in round {round} cannot be sent: {error} "
            "Lower the learning rate or the noise, and start the agent again."
        ) from error
