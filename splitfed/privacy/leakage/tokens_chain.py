"""What public text says about private text before a row is seen: which token follows which.

Shapes: B sequences, T tokens, V vocabulary, W = V + 1 states: the tokens, and padding.
"""

from typing import Final

import torch
from torch import Tensor

_PSEUDO_COUNT: Final = 0.1  # of every state, so that none is impossible
_FOLLOWERS_TO_TRUST: Final = 5.0  # occurrences of a token before what followed it outweighs what is usual


class ChainPrior:
    """A Markov chain over tokens, estimated on public text: how likely a text is, one token after the other.

    A follower's probability is its share after the same token, mixed with its share of all states by
    ``(count + 5 · share) / (total + 5)``. Kept sparse: memory goes with the public text, not with V².

    Args:
        states_BT: Public text with the id W - 1 for padding, int64, shape [B, T].
        n_states: W.

    Guarantees:
        * ``posterior`` is the exact posterior of each state, given all rows of its sequence, if texts are drawn from
          the chain and rows are independent given their states.
        * Its most likely token is therefore the guess with the most hits to be expected.

    Source: Rabiner, A tutorial on hidden Markov models and selected applications in speech recognition (1989),
    section III.A and III.B (forward-backward).
    """

    def __init__(self, states_BT: Tensor, n_states: int) -> None:
        W = n_states
        share_W = states_BT.flatten().bincount(minlength=W).float() + _PSEUDO_COUNT
        self._share_W = share_W / share_W.sum()
        first_W = states_BT[:, 0].bincount(minlength=W).float()
        self._first_W = (first_W + _PSEUDO_COUNT * self._share_W) / (len(states_BT) + _PSEUDO_COUNT)
        pairs = torch.stack([states_BT[:, :-1].flatten(), states_BT[:, 1:].flatten()])
        counts = torch.sparse_coo_tensor(
            pairs, torch.ones_like(pairs[0], dtype=torch.float32), (W, W), check_invariants=True
        ).coalesce()
        totals_W = torch.zeros_like(share_W).index_add_(0, pairs[0], torch.ones_like(pairs[0], dtype=torch.float32))
        before, after = counts.indices()
        shares = counts.values() / (totals_W[before] + _FOLLOWERS_TO_TRUST)
        self._seen_WW = torch.sparse_coo_tensor(
            torch.stack([before, after]), shares, (W, W), check_invariants=True
        ).coalesce()
        self._seen_keys = before * W + after  # sorted, as coalesced indices are
        self._seen_transposed_WW = self._seen_WW.t().coalesce()
        self._usual_W = _FOLLOWERS_TO_TRUST / (totals_W + _FOLLOWERS_TO_TRUST)  # what is left for the usual share

    @property
    def log_share(self) -> Tensor:
        """Log of how frequent each state is, shape [W]."""
        return self._share_W.log()

    def first(self, states: Tensor) -> Tensor:
        """Give the probability that a text begins with each of some states."""
        return self._first_W[states]

    def follow(self, before_BK: Tensor, after_BK: Tensor) -> Tensor:
        """Give the probability of each state of one list after each of another, shape [B, K, K]."""
        keys_BKK = before_BK[:, :, None] * len(self._share_W) + after_BK[:, None, :]
        place_BKK = torch.searchsorted(self._seen_keys, keys_BKK).clamp_(max=len(self._seen_keys) - 1)
        is_seen_BKK = self._seen_keys[place_BKK] == keys_BKK
        seen_BKK = self._seen_WW.values()[place_BKK].where(is_seen_BKK, 0)
        return seen_BKK + self._usual_W[before_BK][:, :, None] * self._share_W[after_BK][:, None, :]

    def posterior(self, log_likelihood_BTW: Tensor) -> Tensor:
        """Weigh what the rows say with what text is like.

        Args:
            log_likelihood_BTW: Log likelihood of each row given each state, up to a constant a row; shape [B, T, W].

        Returns:
            Probability of each state given all rows, shape [B, T, W].
        """
        evidence_TWB = (log_likelihood_BTW - log_likelihood_BTW.amax(-1, keepdim=True)).exp().permute(1, 2, 0)
        forward_TWB = [_normalised(self._first_W[:, None] * evidence_TWB[0])]
        for evidence_WB in evidence_TWB[1:]:
            forward_TWB.append(_normalised(self._next(forward_TWB[-1]) * evidence_WB))
        backward_WB = torch.ones_like(forward_TWB[-1])
        for t in reversed(range(len(forward_TWB) - 1)):
            backward_WB = _normalised(self._previous(backward_WB * evidence_TWB[t + 1]))
            forward_TWB[t] = _normalised(forward_TWB[t] * backward_WB)
        return torch.stack(forward_TWB).permute(2, 0, 1)

    def most_likely(self, log_likelihood_BTW: Tensor) -> Tensor:
        """Give the most likely token of each row given all rows, never padding; shape [B, T]."""
        return self.posterior(log_likelihood_BTW)[..., :-1].argmax(-1)

    def _next(self, now_WB: Tensor) -> Tensor:
        """Move probabilities one place on."""
        return torch.sparse.mm(self._seen_transposed_WW, now_WB) + self._share_W[:, None] * (self._usual_W @ now_WB)

    def _previous(self, then_WB: Tensor) -> Tensor:
        """Move likelihoods one place back."""
        return torch.sparse.mm(self._seen_WW, then_WB) + self._usual_W[:, None] * (self._share_W @ then_WB)


def _normalised(weights_WB: Tensor) -> Tensor:
    return weights_WB / weights_WB.sum(0, keepdim=True)
