"""The device's account of what its releases have cost: written before a release leaves, and never taken back."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from splitfed.errors import BudgetExhausted, PrivacyError
from splitfed.privacy.figures import format_epsilon
from splitfed.privacy.ledger_file import LedgerFile
from splitfed.privacy.mechanisms import RELATION, RELATIONS, UNIT, Unit
from splitfed.privacy.salt import record_hash
from splitfed.privacy.spending import Channel, Charge, Spending


class Ledger:
    """Keeps account of every release on this device, over steps, rounds, restarts and runs.

    One process at a time holds a ledger; any number may read its file with ``read_ledger``.

    Args:
        path: The file, usually ``ledger.jsonl``; made if it is not there, with its salt beside it as ``ledger.salt``.
        clock: Seconds since 1970, for the rows.
        witnesses: Folder that knows how far ledgers have come; None = an older copy goes unnoticed.

    Raises:
        LedgerError: If the file cannot be opened, is held by another process, is damaged, is an older copy, or its salt
            is not the right one.

    Guarantees:
        * When ``charge`` returns, the charge is on disk: a process that is killed at any instant and opens the ledger
          again has spent at least what has left.
        * ``spent`` never falls, over restarts too.
        * A charge that would pass the budget is refused before it is written.
        * A file that was cut in its last line opens; one that is damaged anywhere else does not.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, witnesses: Path | None = None) -> None:
        self._file = LedgerFile(path, clock=clock, witnesses=witnesses)
        self._lock = threading.Lock()
        self._delta = 1e-5
        self._relation: str = RELATION
        self._epsilon_budget = math.inf
        self._spending = Spending()
        self._raw_runs: set[str] = set()
        for row in self._file.take_rows():
            self._add(row)

    @property
    def path(self) -> Path:
        """The ledger's file."""
        return self._file.path

    def set_policy(self, *, delta: float = 1e-5, epsilon_budget: float | None = None, relation: str = RELATION) -> None:
        """Set where later charges stop, and how figures are stated.

        Args:
            delta: The delta at which epsilon is meant, between 0 and 1.
            epsilon_budget: The largest epsilon that a record may reach, over all channels, steps, rounds and runs;
                None = no limit. With one, nothing unprotected may leave.
            relation: The neighbouring relation: "replace-one" or "zero-out".

        Raises:
            ValueError: If an argument is outside its range.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta must be between 0 and 1, both excluded, not {delta}.")
        if epsilon_budget is not None and not epsilon_budget > 0:
            raise ValueError(f"An epsilon budget must be above 0, not {epsilon_budget}; leave it out for no limit.")
        if relation not in RELATIONS:
            raise ValueError(f"A relation is one of {', '.join(RELATIONS)}, not {relation!r}.")
        with self._lock:
            self._delta, self._relation = delta, relation
            self._epsilon_budget = math.inf if epsilon_budget is None else epsilon_budget

    def record_hash(self, content: bytes) -> str:
        """Name a record by its content, so that the ledger knows it again in another run."""
        return record_hash(self._file.salt, content)

    def charge(
        self,
        channel: str,
        *,
        noise_multiplier: float,
        records: Sequence[str],
        sequences: int,
        run: str,
        round: int,
        step: int,
        kind: str = "train",
        **mechanism: object,
    ) -> None:
        """Put a charge on disk; the release may leave when this has returned.

        Args:
            channel: What leaves: "smashed", "output_gradient", "adapter", "loss", or "step" for all of a step.
            noise_multiplier: Standard deviation of its noise ÷ sensitivity; 0 = unprotected.
            records: The record of each sequence.
            sequences: Releases: each sequence is one. An adapter update is one.
            run: Name of the run.
            round: The round.
            step: The local step in the round.
            kind: What it is for: "train", "evaluate" or "generate".
            **mechanism: Further fields of a `Charge`: whom the noise protects, and whether the release is coupled.

        Raises:
            BudgetExhausted: If this would pass the budget; nothing is written.
            LedgerError: If the charge cannot be put on disk; the release must not leave.
            ValueError: If an argument is outside its range.
        """
        charge = {
            "channel": channel,
            "noise_multiplier": noise_multiplier,
            "records": tuple(records),
            "sequences": sequences,
            "run": run,
            "round": round,
            "step": step,
            "kind": kind,
            **mechanism,
        }
        self.charge_all([Charge.model_validate(charge)])

    def charge_all(self, charges: Sequence[Charge]) -> None:
        """Put several charges on disk for the price of one: all of them, or none if they pass the budget together.

        Raises:
            BudgetExhausted: If they would pass the budget; nothing is written.
            LedgerError: If they cannot be put on disk; the releases must not leave.
            PrivacyError: If an example is said to be drawn in secret in a run that has trained on raw records.
        """
        with self._lock:
            charges = [self._coupled_if_raw(charge) for charge in charges]
            self._check_budget(charges, "The next release")
            self._file.append(charges)
            for charge in charges:
                self._add(charge)

    def check_budget(self, charges: Sequence[Charge], what: str) -> None:
        """Check that the budget allows something before it is begun; nothing is written.

        Args:
            charges: What it would cost.
            what: Its name, for the message.

        Raises:
            BudgetExhausted: If it would pass the budget.
        """
        with self._lock:
            self._check_budget([self._coupled_if_raw(charge) for charge in charges], what)

    def spent(self, channel: str | None, delta: float | None = None, *, unit: Unit = UNIT) -> float | None:
        """Give what all releases of a channel have cost the record that is worst off.

        Args:
            channel: The channel; None = all together.
            delta: The delta to state epsilon at; left out = the policy's.
            unit: Whose epsilon: a sequence's, or that of one of its tokens.

        Returns:
            Epsilon under the policy's relation; 0 before the first release; None if nothing is guaranteed.

        Raises:
            ValueError: If there is no such channel, or delta is not between 0 and 1.
        """
        with self._lock:
            delta = self._delta if delta is None else delta
            return self._spending.epsilon(channel, delta, unit=unit, relation=self._relation)

    def eta(self, channel: Channel) -> float | None:
        """Give a channel's metric guarantee so far, to be multiplied by a distance; None without one."""
        with self._lock:
            return self._spending.eta(channel)

    def total_statement(self) -> str:
        """Say what is guaranteed over all channels together."""
        with self._lock:
            return self._spending.total_statement(self._delta, relation=self._relation)

    def close(self) -> None:
        """Let another process have the ledger; charges are refused from now on."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, charge: Charge) -> None:
        self._spending.add(charge)
        if charge.channel == "adapter" and (charge.unit == "client" or charge.noise_multiplier == 0):
            self._raw_runs.add(charge.run)

    def _coupled_if_raw(self, charge: Charge) -> Charge:
        """Once a run's adapters were trained on raw records, nothing that it releases depends on its own records only.

        Raises:
            PrivacyError: If the charge says that its examples were drawn in secret: then that buys nothing.
        """
        if charge.coupled or charge.run not in self._raw_runs:
            return charge
        if charge.channel == "step":
            raise PrivacyError(
                f"The run {charge.run!r} has trained this device's adapters on raw records before, so that a secret "
                "sample no longer hides a record; leave sample_rate out, or start another run."
            )
        return charge.model_copy(update={"coupled": True})

    def _check_budget(self, charges: Sequence[Charge], what: str) -> None:
        """Refuse charges after which a record would have cost more than the budget."""
        if math.isinf(self._epsilon_budget):
            return
        after = self._spending.epsilon_after(charges, None, self._delta, relation=self._relation)
        if after is not None and after <= self._epsilon_budget:
            return
        channels = ", ".join(sorted({charge.channel for charge in charges}))
        open_channels = sorted({charge.channel for charge in charges if charge.noise_multiplier == 0})
        if open_channels:
            raise BudgetExhausted(
                f"{what} has no noise on the channel {open_channels[0]}, so the epsilon budget of "
                f"{self._epsilon_budget:g} cannot be kept, and it was not made; protect that channel, or leave "
                "epsilon_budget out."
            )
        spent = self._spending.epsilon(None, self._delta, relation=self._relation)
        raise BudgetExhausted(
            f"{what} ({channels}) would pass the epsilon budget of {self._epsilon_budget:g} at delta {self._delta:g}, "
            f"of which {'all' if spent is None else format_epsilon(spent)} is spent, so it was not made; raise "
            "epsilon_budget if the owner of the data agrees."
        )
