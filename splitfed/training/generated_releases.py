"""What may leave of a sequence that goes forward only, and what it costs: one release, charged before its first row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from splitfed.config import PrivacySection
from splitfed.privacy import UNIT, Charge, Ledger
from splitfed.privacy.row_by_row import RowByRowMechanism

_PURPOSE: Final = {"generate": "generated", "evaluate": "measured on"}


@dataclass
class GeneratedReleases:
    """The gate of sequences that are generated, or measured on: charge, then clip and noise for each row.

    The unit is the sequence whatever the run protects in training, since what is generated depends on all of the
    prompt: even with no block in the bottom a token touches other rows than its own.

    Attributes:
        privacy: What holds on the device, settled for generation: with a clip per token.
        ledger: Where each sequence is charged.
        run: Name of the run, for the ledger.
        round: The round whose adapter is used.
        max_tokens: Most tokens of a sequence, T.
        is_coupled: The device's own adapters were trained on raw records, so that rows may depend on each of them.
        kind: What the sequences are for.
        sequences: How many have been opened.

    Guarantees:
        * A sequence's charge is on disk before a row of it is given out, and is made once.
        * Without noise, one charge says that nothing is guaranteed, for all sequences of one object.
    """

    privacy: PrivacySection
    ledger: Ledger
    run: str
    round: int
    max_tokens: int
    is_coupled: bool = False
    kind: Literal["generate", "evaluate"] = "generate"
    sequences: int = 0

    @property
    def is_noisy(self) -> bool:
        """Noise is on: shapes must then say nothing about the text either."""
        return self.privacy.is_on

    def check_budget(self, records: Sequence[str]) -> None:
        """Refuse what the budget does not allow to the end, before anything of it leaves.

        Args:
            records: The record of each sequence.

        Raises:
            BudgetExhausted: If they would pass the budget together.
        """
        self.ledger.check_budget(self.planned(records), f"What is to be {_PURPOSE[self.kind]}")

    def planned(self, records: Sequence[str]) -> list[Charge]:
        """Give what sequences would cost, of these records."""
        return [self._charge(record, index) for index, record in enumerate(records)]

    def open(self, record: str, index: int) -> RowByRowMechanism | None:
        """Charge a sequence, and give what clips and noises its rows.

        Args:
            record: The record of its prompt.
            index: Its place among those that are generated together.

        Returns:
            The mechanism, for this sequence alone; None: its rows leave as they are.

        Raises:
            BudgetExhausted: If the sequence would pass the budget; nothing is written.
            LedgerError: If the charge cannot be written.
        """
        if self.is_noisy or not self.sequences:
            self.ledger.charge_all([self._charge(record, index)])
        self.sequences += 1
        if not self.is_noisy:
            return None
        norm, noise_multiplier = self.privacy.clipping_norm_smashed, self.privacy.noise_multiplier
        assert norm is not None
        assert noise_multiplier is not None
        return RowByRowMechanism(norm, noise_multiplier, tokens=self.max_tokens)

    def charged(self) -> dict[str, float]:
        """Give what was charged: sequences, the tokens of each, and the noise multiplier."""
        noise_multiplier = self.privacy.noise_multiplier or 0.0
        return {"sequences": self.sequences, "tokens": self.max_tokens, "noise_multiplier": noise_multiplier}

    def summary(self) -> list[str]:
        """Say what was charged, and what is guaranteed after it."""
        if not self.is_noisy:
            return ["noise was off: all text can be read from what left, and nothing is guaranteed"]
        return [
            f"charged: {self.sequences} sequences of {self.max_tokens} tokens with noise multiplier "
            f"{self.privacy.noise_multiplier:g}, unit {UNIT}, relation {self.privacy.relation}",
            f"privacy in total: {self.ledger.total_statement()}",
        ]

    def _charge(self, record: str, index: int) -> Charge:
        return Charge(
            channel="smashed",
            noise_multiplier=self.privacy.noise_multiplier or 0.0,
            records=(record,),
            sequences=1,
            run=self.run,
            round=self.round,
            step=index,
            kind=self.kind,
            coupled=self.is_coupled,
        )
