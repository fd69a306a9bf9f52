"""What public text says about private text: which token follows which two.

Shapes: B sequences, T tokens, W = V + 1 states (the tokens, and padding), K candidates of a row.
"""

from typing import Final, Literal

import torch
from torch import Tensor

from splitfed.privacy.leakage.tokens_chain import ChainPrior

TokensBefore = Literal[0, 1, 2]
"""How far back a prior looks."""

TOKENS_BEFORE: Final[tuple[TokensBefore, ...]] = (0, 1, 2)

_CANDIDATES: Final = 24
_FOLLOWERS_TO_TRUST: Final = 3.0  # occurrences of two tokens before what followed them outweighs the shorter context
_ELEMENTS_AT_ONCE: Final = 2**24


class TextPrior:
    """How likely a text is before a row is seen, by the tokens before each token: none, one or two of them.

    With none, a token is as likely as it is frequent. With one, texts are a Markov chain (``ChainPrior``), solved
    exactly. With two, they are a chain of second order, solved exactly among the 24 states of each row that are most
    likely by the chain of first order. Its probabilities are the shares after the same two states, mixed with the
    probability after the last one by ``(count + 3 · probability) / (total + 3)``.

    An attacker with a good language model of such text recovers more.

    Args:
        states_BT: Public text with the id W - 1 for padding, int64, shape [B, T].
        n_states: W, at most two million.

    Guarantees:
        * ``guess`` gives the most likely token given all rows of its sequence, if texts are drawn from the prior with
          so many tokens before and rows are independent given their states: with one of them or none for any W, with
          two for up to 24 states.
    """

    def __init__(self, states_BT: Tensor, n_states: int) -> None:
        self._chain = ChainPrior(states_BT, n_states)
        self._n_states = n_states
        before, last, now = states_BT[:, :-2], states_BT[:, 1:-1], states_BT[:, 2:]
        self._triples = _Counts(self._key(before, last, now))
        self._pairs = _Counts(self._key(before, last))

    @property
    def log_share(self) -> Tensor:
        """Log of how frequent each state is, shape [W]."""
        return self._chain.log_share

    def guess(self, log_likelihood_BTW: Tensor, tokens_before: TokensBefore) -> Tensor:
        """Give the most likely token of each row given all rows, never padding.

        Args:
            log_likelihood_BTW: Log likelihood of each row given each state, up to a constant a row; shape [B, T, W].
            tokens_before: How many tokens before a token say something about it.

        Returns:
            Token ids, shape [B, T].
        """
        if tokens_before == 0:
            return (log_likelihood_BTW + self.log_share)[..., :-1].argmax(-1)
        T, W = log_likelihood_BTW.shape[1:]
        if tokens_before == 1 or T < 2:
            return self._chain.most_likely(log_likelihood_BTW)
        K = min(_CANDIDATES, W)
        parts = log_likelihood_BTW.split(max(1, _ELEMENTS_AT_ONCE // (T * max(K**3, W))))
        return torch.cat([self._most_likely(part, K) for part in parts])

    def count_hits(self, log_likelihood_BTW: Tensor, states_BT: Tensor, tokens_before: TokensBefore) -> int:
        """Count the tokens that are guessed right in text whose states are known; padding does not count."""
        is_hit_BT = self.guess(log_likelihood_BTW, tokens_before) == states_BT
        return int(is_hit_BT.sum())  # a guess is never padding

    def _most_likely(self, log_likelihood_BTW: Tensor, K: int) -> Tensor:
        states_BTK = self._chain.posterior(log_likelihood_BTW).topk(K, dim=-1).indices
        evidence_BTK = log_likelihood_BTW.gather(-1, states_BTK)
        evidence_BTK = (evidence_BTK - evidence_BTK.amax(-1, keepdim=True)).exp()
        weights_BTK = self._posterior(states_BTK, evidence_BTK)
        is_padding_BTK = states_BTK == self._n_states - 1
        best_BT1 = weights_BTK.masked_fill(is_padding_BTK, -1.0).argmax(-1, keepdim=True)
        return states_BTK.gather(-1, best_BT1).squeeze(-1)

    def _posterior(self, states_BTK: Tensor, evidence_BTK: Tensor) -> Tensor:
        """Run forward and backward over pairs of neighbouring candidates; give weights [B, T, K]."""
        T = states_BTK.shape[1]
        follows = [self._chain.follow(states_BTK[:, t - 1], states_BTK[:, t]) for t in range(1, T)]
        first_BK1 = (self._chain.first(states_BTK[:, 0]) * evidence_BTK[:, 0]).unsqueeze(-1)
        forward = [_normalised(first_BK1 * follows[0] * evidence_BTK[:, 1].unsqueeze(1))]
        moves = []
        for t in range(2, T):
            moves.append(self._follow_two(states_BTK[:, t - 2 : t + 1], follows[t - 1]))
            forward.append(
                _normalised(torch.einsum("bij,bijk->bjk", forward[-1], moves[-1]) * evidence_BTK[:, t].unsqueeze(1))
            )
        weights, backward_BKK = [forward[-1].sum(1)], torch.ones_like(forward[-1])
        for t in reversed(range(1, T)):
            if t < T - 1:
                ahead_BKK = backward_BKK * evidence_BTK[:, t + 1].unsqueeze(1)
                backward_BKK = _normalised(torch.einsum("bijk,bjk->bij", moves[t - 1], ahead_BKK))
            weights.append((forward[t - 1] * backward_BKK).sum(2))
        return torch.stack(weights[::-1], dim=1)

    def _follow_two(self, states_B3K: Tensor, follow_BKK: Tensor) -> Tensor:
        """Give the probability of each third candidate after each two, shape [B, K, K, K]."""
        before_BK, last_BK, now_BK = states_B3K.unbind(1)
        pairs_BKK1 = self._pairs.of(self._key(before_BK[:, :, None], last_BK[:, None, :])).unsqueeze(-1)
        triples_BKKK = self._triples.of(
            self._key(before_BK[:, :, None, None], last_BK[:, None, :, None], now_BK[:, None, None, :])
        )
        return (triples_BKKK + _FOLLOWERS_TO_TRUST * follow_BKK.unsqueeze(1)) / (pairs_BKK1 + _FOLLOWERS_TO_TRUST)

    def _key(self, *states: Tensor) -> Tensor:
        """Number neighbouring states, one number for each combination."""
        key = states[0]
        for state in states[1:]:
            key = key * self._n_states + state
        return key


class _Counts:
    """Tells how often each key occurred."""

    def __init__(self, keys: Tensor) -> None:
        self._keys, self._counts = keys.flatten().unique(return_counts=True)

    def of(self, keys: Tensor) -> Tensor:
        if len(self._keys) == 0:
            return torch.zeros_like(keys, dtype=torch.float32)
        place = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        return self._counts[place].where(self._keys[place] == keys, 0).float()


def _normalised(weights_BKK: Tensor) -> Tensor:
    return weights_BKK / weights_BKK.sum((1, 2), keepdim=True)
