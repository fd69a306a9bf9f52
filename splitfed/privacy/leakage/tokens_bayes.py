"""Attacks without training: the closest known row, and the most likely token given the noise and the language.

Shapes: B sequences, T tokens, D hidden, W = V + 1 states (tokens and padding).
"""

from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.leakage.tokens_context import TOKENS_BEFORE, TokensBefore
from splitfed.privacy.leakage.tokens_public import PublicReleases
from splitfed.privacy.leakage.tokens_rows import KnownRows

_SEQUENCES_AT_ONCE: Final = 16


class NearestNeighbour:
    """Takes the token of the known row that is closest. The noise need not be known.

    Args:
        rows: The known rows.
    """

    name = "nearest neighbour"

    def __init__(self, rows: KnownRows) -> None:
        self._rows = rows

    def recover(self, smashed_BTD: Tensor) -> Tensor:
        """Guess the token of every row, shape [B, T]."""
        parts = smashed_BTD.split(_SEQUENCES_AT_ONCE)
        return torch.cat([self._rows.score(part, torch.neg, is_sum=False)[..., :-1].argmax(-1) for part in parts])


class BayesAttack:
    """Takes the most likely token, given the density of the noise and what public text is like.

    Where a row depends on its own token and place alone, its likelihood is exact, and no attack with the same prior is
    expected to recover more: the yardstick for the others. Deeper, the public rows of a token stand in for all its rows
    (a kernel density estimate with the noise for its kernel).

    Attributes:
        name: What it is called in a table.
        tokens_before: How many tokens before a token the prior takes into account.

    Args:
        public: Public text; noise is on.
        rows: The known rows.
        tokens_before: As the attribute; None = what recovers most of held-out public text.

    Raises:
        ValueError: If noise is off: the nearest neighbour is the answer then.

    Guarantees:
        * With rows that stand alone, texts drawn from the prior, and the noise that is stated, the expected number of
          hits is the largest that any attack can have.
    """

    def __init__(self, public: PublicReleases, rows: KnownRows, *, tokens_before: TokensBefore | None = None) -> None:
        if public.knowledge.log_density is None:
            raise ValueError("With noise off every density is a point; take the nearest neighbour instead.")
        self._log_density = public.knowledge.log_density
        self._rows, self._prior = rows, public.prior
        self.name = "bayes" if tokens_before == 0 else "bayes in context"
        self.tokens_before = self._best(public) if tokens_before is None else tokens_before

    def recover(self, smashed_BTD: Tensor) -> Tensor:
        """Guess the token of every row, shape [B, T]."""
        parts = smashed_BTD.split(_SEQUENCES_AT_ONCE)
        return torch.cat([self._prior.guess(self._log_likelihood(part), self.tokens_before) for part in parts])

    def _best(self, public: PublicReleases) -> TokensBefore:
        parts = public.held_out_BTD.split(_SEQUENCES_AT_ONCE)
        log_likelihood_BTW = torch.cat([self._log_likelihood(part) for part in parts])
        hits = [self._prior.count_hits(log_likelihood_BTW, public.held_out_states_BT, n) for n in TOKENS_BEFORE]
        return TOKENS_BEFORE[hits.index(max(hits))]

    def _log_likelihood(self, smashed_BTD: Tensor) -> Tensor:
        return self._rows.score(smashed_BTD, self._log_density, is_sum=True)
