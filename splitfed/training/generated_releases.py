"""What may leave of a sequence that is generated, and what it costs: one release, charged before its first row."""

from collections.abc import Sequence
from dataclasses import dataclass

from splitfed.config import PrivacySection
from splitfed.privacy import Charge, Ledger
from splitfed.privacy.row_by_row import RowByRowMechanism


@dataclass
class GeneratedReleases:
    """The gate of generated sequences: charge, then clip and noise for each row.

    The unit is the sequence whatever the run protects in training, since what is generated depends on all of the
    prompt: even with no block in the bottom a token touches other rows than its own.

    Attributes:
        privacy: What holds on the device, settled for generation: with a clip per token.
        ledger: Where each sequence is charged.
        run: Name of the run, for the ledger.
        round: The round whose adapter is used.
        max_tokens: Most tokens of a sequence, T.
        is_coupled: The device's own adapters were trained on raw records, so that rows may depend on each of them.

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
    _is_charged: bool = False

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
        planned = [self._charge(record, index) for index, record in enumerate(records)]
        self.ledger.check_budget(planned, "What is to be generated")

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
        if self.is_noisy or not self._is_charged:
            self.ledger.charge_all([self._charge(record, index)])
            self._is_charged = True
        if not self.is_noisy:
            return None
        norm, noise_multiplier = self.privacy.clipping_norm_smashed, self.privacy.noise_multiplier
        assert norm is not None
        assert noise_multiplier is not None
        return RowByRowMechanism(norm, noise_multiplier, tokens=self.max_tokens)

    def _charge(self, record: str, index: int) -> Charge:
        return Charge(
            channel="smashed",
            noise_multiplier=self.privacy.noise_multiplier or 0.0,
            records=(record,),
            sequences=1,
            run=self.run,
            round=self.round,
            step=index,
            kind="generate",
            coupled=self.is_coupled,
        )
