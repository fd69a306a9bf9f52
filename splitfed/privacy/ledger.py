"""The device's account of what its releases have cost: written before a release leaves, and never taken back."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from splitfed.errors import BudgetExhausted
from splitfed.privacy.ledger_file import LedgerFile
from splitfed.privacy.salt import record_hash
from splitfed.privacy.spending import Charge, Spending, total_statement


class Ledger:
    """Keeps account of every release on this device, over steps, rounds, restarts and runs.

    One process at a time holds a ledger; any number may read its file with ``read_ledger``.

    Args:
        path: The file, usually ``ledger.jsonl``; made if it is not there, with its salt beside it as ``ledger.salt``.
        clock: Seconds since 1970, for the rows.

    Raises:
        LedgerError: If the file cannot be opened, is held by another process, is damaged, or its salt is not the right
            one.

    Guarantees:
        * When ``charge`` returns, the charge is on disk: a process that is killed at any instant and opens the ledger
          again has spent at least what has left.
        * ``spent`` never falls, over restarts too.
        * A charge that would pass the budget is refused before it is written.
        * A file that was cut in its last line opens; one that is damaged anywhere else does not.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._file = LedgerFile(path, clock=clock)
        self._lock = threading.Lock()
        self._coupled = True
        self._delta = 1e-5
        self._epsilon_budget = math.inf
        self._spending = Spending()
        for row in self._file.take_rows():
            self._spending.add(row)

    @property
    def path(self) -> Path:
        """The ledger's file."""
        return self._file.path

    def set_policy(self, *, coupled: bool = True, delta: float = 1e-5, epsilon_budget: float | None = None) -> None:
        """Set how later charges count, and where they stop.

        Args:
            coupled: Whether what is released may depend on every record: true as soon as this device's adapters are, or
                were, trained on raw records.
            delta: The delta at which the budget is meant, between 0 and 1.
            epsilon_budget: The largest epsilon that smashed data, and that output gradients, may reach; None = no
                limit.

        Raises:
            ValueError: If delta or the budget is outside its range.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta must be between 0 and 1, both excluded, not {delta}.")
        if epsilon_budget is not None and not epsilon_budget > 0:
            raise ValueError(f"An epsilon budget must be above 0, not {epsilon_budget}; leave it out for no limit.")
        with self._lock:
            self._coupled, self._delta = coupled, delta
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
    ) -> None:
        """Put a charge on disk; the release may leave when this has returned.

        Args:
            channel: What leaves: "smashed", "output_gradient", "adapter" or "loss".
            noise_multiplier: Standard deviation of its noise ÷ sensitivity; 0 = unprotected.
            records: The record of each sequence.
            sequences: Releases: each sequence is one. An adapter update is one.
            run: Name of the run.
            round: The round.
            step: The local step in the round.
            kind: What it is for: "train", "evaluate" or "generate".

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
            "coupled": self._coupled,
        }
        self.charge_all([Charge.model_validate(charge)])

    def charge_all(self, charges: Sequence[Charge]) -> None:
        """Put several charges on disk for the price of one: all of them, or none if they pass the budget together.

        Raises:
            BudgetExhausted: If they would pass the budget; nothing is written.
            LedgerError: If they cannot be put on disk; the releases must not leave.
        """
        with self._lock:
            self._check_budget(charges)
            self._file.append(charges)
            for charge in charges:
                self._spending.add(charge)

    def would_exceed(self, charges: Sequence[Charge]) -> bool:
        """Tell whether the budget would refuse these charges together."""
        try:
            with self._lock:
                self._check_budget(charges)
        except BudgetExhausted:
            return True
        return False

    def spent(self, channel: str, delta: float | None = None) -> float | None:
        """Give what all releases of a channel have cost the record that is worst off.

        Args:
            channel: The channel.
            delta: The delta to state epsilon at; left out = the policy's.

        Returns:
            Epsilon for one sequence of that record under replace-one; 0 before the first release; None if nothing is
            guaranteed.

        Raises:
            ValueError: If there is no such channel, or delta is not between 0 and 1.
        """
        with self._lock:
            return self._spending.epsilon(channel, self._delta if delta is None else delta)

    def total_statement(self) -> str:
        """Say what is guaranteed over all channels together."""
        with self._lock:
            return total_statement(self._spending.unprotected())

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

    def _check_budget(self, charges: Sequence[Charge]) -> None:
        """Refuse charges that pass the budget of a channel that has a mechanism."""
        if math.isinf(self._epsilon_budget):
            return
        for channel in ("smashed", "output_gradient"):
            if not any(charge.channel == channel for charge in charges):
                continue
            after = self._spending.epsilon_after(charges, channel, self._delta)
            if after is None or after > self._epsilon_budget:
                spent = self._spending.epsilon(channel, self._delta)
                raise BudgetExhausted(
                    f"The next release on the channel {channel} would pass the epsilon budget of "
                    f"{self._epsilon_budget:g} at delta {self._delta:g}, of which "
                    f"{'all' if spent is None else format(spent, '.4g')} is spent, so it was not made; "
                    "raise epsilon_budget if the owner of the data agrees."
                )
