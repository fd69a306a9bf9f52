"""An agent's work inside a round: its local steps, and its own held-out loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from splitfed.agent.prepare import Prepared
from splitfed.models import adapter_parameters
from splitfed.privacy import Ledger
from splitfed.training.data import Example
from splitfed.training.evaluation import HeldOutLoss, evaluate
from splitfed.training.link import Link
from splitfed.training.order import step_examples
from splitfed.training.sampling import poisson_sample


@dataclass(frozen=True)
class LocalRound:
    """What local training came to.

    Attributes:
        losses: Mean loss per token of each local step, in nats.
        loss: Mean loss per token over all of them.
        sent_tokens: Rows that crossed the link in one direction, padding included.
    """

    losses: list[float]
    loss: float
    sent_tokens: int


def check_budget_of_round(ledger: Ledger, prepared: Prepared, *, client: str, round: int) -> None:
    """Refuse a round that the budget does not allow to the end, before anything of it leaves.

    Args:
        ledger: The device's ledger.
        prepared: Gate and examples.
        client: Name of the client, for its order of examples.
        round: The round, from 1.

    Raises:
        BudgetExhausted: If the round would pass the budget.
    """
    training = prepared.run.training
    is_secret = prepared.gate.sampling is not None
    charges = prepared.gate.planned_round(
        [
            []
            if is_secret
            else [example.record for example in _ordered(prepared, client=client, round=round, step=step)]
            for step in range(training.local_steps)
        ],
        prepared.held_out.sequence_records,
        tokens=training.max_tokens,
        round=round,
    )
    ledger.check_budget(charges, f"Round {round}")


def train_locally(
    link: Link, prepared: Prepared, *, client: str, round: int, on_step: Callable[[int, float], None]
) -> LocalRound:
    """Run a round's local steps.

    Args:
        link: The client's link in this round.
        prepared: Trainer and examples.
        client: Name of the client, for its order of examples.
        round: The round, from 1.
        on_step: Called after each step with its number, from 0, and its loss.

    Raises:
        NonFiniteLoss: If a loss is NaN or infinite.
        LinkError: If the round is lost.
        BudgetExhausted: If a release would pass the budget.
    """
    training = prepared.run.training
    losses: list[float] = []
    loss_sum, label_tokens, sent_tokens = 0.0, 0, 0
    for step in range(training.local_steps):
        examples = _examples(prepared, client=client, round=round, step=step)
        result = prepared.trainer.step(link, examples, round=round, step=step)
        losses.append(result.loss)
        loss_sum += result.loss_sum
        label_tokens += result.label_tokens
        sent_tokens += result.sent_tokens
        on_step(step, result.loss)
    return LocalRound(losses, loss_sum / max(label_tokens, 1), sent_tokens)


def evaluate_locally(link: Link, prepared: Prepared, start: Mapping[str, Tensor], *, round: int) -> HeldOutLoss | None:
    """Measure this client's model on its held-out examples, at the end of its local training; None without any.

    With a personal top it is measured with the run's as well, on the same trunk outputs: nothing more leaves.

    Args:
        link: The client's link in this round.
        prepared: Trainer and examples.
        start: The run's adapters of bottom and top, as the round began.
        round: The round, from 1.
    """
    if not prepared.held_out:
        return None
    trainer, training = prepared.trainer, prepared.run.training
    of_top = adapter_parameters(trainer.top).keys() & prepared.personal
    return evaluate(
        link,
        trainer.bottom,
        trainer.top,
        trainer.releases,
        prepared.held_out,
        batch_size=training.micro_batch_size or training.batch_size,
        max_tokens=training.max_tokens,
        pad_token_id=trainer.pad_token_id,
        round=round,
        other_top={name: start[name] for name in of_top} if of_top else None,
    )


def _ordered(prepared: Prepared, *, client: str, round: int, step: int) -> list[Example]:
    """Give the examples of a local step that come in their order."""
    training = prepared.run.training
    chosen = step_examples(
        len(prepared.train),
        seed=prepared.run.run.seed,
        client=client,
        round=round,
        step=step,
        batch_size=training.batch_size,
        local_steps=training.local_steps,
    )
    return [prepared.train[index] for index in chosen]


def _examples(prepared: Prepared, *, client: str, round: int, step: int) -> Sequence[Example | None]:
    """Give what a local step trains on: examples in their order, or a secret sample of them."""
    sampling = prepared.gate.sampling
    if sampling is None:
        return _ordered(prepared, client=client, round=round, step=step)
    drawn = poisson_sample(
        len(prepared.train), sample_rate=sampling.sample_rate, capacity=prepared.run.training.batch_size
    )
    return [None if index is None else prepared.train[index] for index in drawn]
