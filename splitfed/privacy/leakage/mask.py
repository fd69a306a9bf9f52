"""The loss mask: which rows carry loss, hence where a prompt ends and where padding starts.

Rows without loss are exactly zero in the output gradient of a top without blocks, and short ones otherwise. Noise hides
a single row, but a mask has few changes along a sequence, so the rows speak for each other.

Shapes: B sequences, T tokens, M public sequences, S = 2 states (carries no loss, carries loss).
"""

from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.leakage.estimate import AttackResult

_BINS: Final = 24
_SMOOTHING: Final = 1.0
_POOLED_WEIGHT: Final = 4.0


class MaskAttack:
    """Tells which rows carry loss from one figure of each, such as its norm, after seeing public ones.

    What a figure says is the ratio of how often public rows with loss and without have one like it; what the rows
    beside it say comes in through a Markov chain over the sequence, with the public masks' changes at each place.

    Args:
        statistic_MT: A figure of every row of the public output gradients, as they would be received, shape [M, T].
        carries_loss_MT: Which of those rows carry loss, shape [M, T].

    Raises:
        ValueError: If the shapes differ, or public rows all carry loss, or none does.

    Guarantees:
        * Where the figure tells nothing, what is left is how often each place carries loss in public.

    Source: Rabiner, A tutorial on hidden Markov models (1989), section III, for the forward-backward procedure.
    """

    def __init__(self, statistic_MT: Tensor, carries_loss_MT: Tensor) -> None:
        if statistic_MT.shape != carries_loss_MT.shape:
            raise ValueError(
                f"Figures of shape {list(statistic_MT.shape)} do not belong to a mask of shape "
                f"{list(carries_loss_MT.shape)}."
            )
        if carries_loss_MT.all() or not carries_loss_MT.any():
            raise ValueError("All public rows carry loss, or none does: there is nothing to tell apart.")
        with_loss, without_loss = statistic_MT[carries_loss_MT], statistic_MT[~carries_loss_MT]
        self._edges = torch.cat([_quantiles(with_loss), _quantiles(without_loss)]).unique()
        self._log_ratio = self._log_shares(with_loss) - self._log_shares(without_loss)
        self._log_start_S, self._log_change_TSS = _changes(carries_loss_MT.long())

    def probability(self, statistic_BT: Tensor | None, *, sequences: int = 1) -> Tensor:
        """Say how likely each row carries loss, shape [B, T].

        Args:
            statistic_BT: The figure of every row, shape [B, T]; None = what is known without looking.
            sequences: B, where nothing is looked at.
        """
        T = len(self._log_change_TSS) + 1
        if statistic_BT is None:
            log_ratio_BT = torch.zeros(sequences, T)
        else:
            log_ratio_BT = self._log_ratio[torch.bucketize(statistic_BT, self._edges)]
        seen_BTS = torch.stack([torch.zeros_like(log_ratio_BT), log_ratio_BT], -1)
        before_BS = self._log_start_S + seen_BTS[:, 0]
        before = [before_BS]
        for at, log_change_SS in enumerate(self._log_change_TSS, start=1):
            before_BS = (before_BS.unsqueeze(2) + log_change_SS).logsumexp(1) + seen_BTS[:, at]
            before.append(before_BS)
        after_BS = torch.zeros_like(before_BS)
        after = [after_BS]
        for at in range(T - 1, 0, -1):
            after_BS = (self._log_change_TSS[at - 1] + (seen_BTS[:, at] + after_BS).unsqueeze(1)).logsumexp(2)
            after.append(after_BS)
        both_BTS = torch.stack(before, 1) + torch.stack(after[::-1], 1)
        return both_BTS.softmax(-1)[..., 1]

    def result(self, attack: str, probability_BT: Tensor, carries_loss_BT: Tensor) -> AttackResult:
        """Count the rows that an attack told right.

        Args:
            attack: Its name.
            probability_BT: How likely each row carries loss, as `probability` gives it.
            carries_loss_BT: The truth, shape [B, T].

        Returns:
            Successes per sequence. Chance is the better of two guesses without looking: what the public records say of
            each place, and the same bit for every row, whichever is more frequent.
        """
        blind_BT = self.probability(None, sequences=len(carries_loss_BT)) > 0.5
        share = carries_loss_BT.float().mean().item()
        chance = max((blind_BT == carries_loss_BT).float().mean().item(), share, 1 - share)
        right_BT = (probability_BT > 0.5) == carries_loss_BT
        B, T = right_BT.shape
        return AttackResult.per_sequence(
            attack, "mask", successes=right_BT.sum(1).tolist(), trials=[T] * B, chance=chance
        )

    def _log_shares(self, figures: Tensor) -> Tensor:
        """Logarithm of the share of figures in each bin."""
        counts = torch.bucketize(figures, self._edges).bincount(minlength=len(self._edges) + 1) + _SMOOTHING / 2
        return (counts / counts.sum()).log()


def _quantiles(figures: Tensor) -> Tensor:
    ordered = figures.sort().values
    return ordered[torch.linspace(0, len(ordered) - 1, _BINS // 2).round().long()]


def _changes(carries_loss_MT: Tensor) -> tuple[Tensor, Tensor]:
    """Count how masks start, and how they go on at each place; few sequences lean on all places together."""
    ones = carries_loss_MT[:, 0].sum()
    start_S = torch.stack([len(carries_loss_MT) - ones, ones]) + _SMOOTHING
    change_MTS = carries_loss_MT[:, :-1] * 2 + carries_loss_MT[:, 1:]
    counts_TSS = torch.stack([(change_MTS == change).sum(0) for change in range(4)], -1).view(-1, 2, 2) + 0.0
    pooled_SS = counts_TSS.sum(0) + _SMOOTHING
    counts_TSS += _POOLED_WEIGHT * pooled_SS / pooled_SS.sum(-1, keepdim=True)
    return (start_S / start_S.sum()).log(), (counts_TSS / counts_TSS.sum(-1, keepdim=True)).log()
