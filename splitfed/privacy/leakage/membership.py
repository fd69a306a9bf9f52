"""Membership: was a given record among those that an agent trained on, from its round's update of bottom and top?

Shapes: N records, M public records, P adapter parameters, K directions.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.leakage.estimate import AttackResult

_DIRECTIONS: Final = 128
_FLOOR: Final = 1e-3
_TINY: Final = 1e-30


def alignment_scores(gradients_NP: Tensor, update_P: Tensor, public_MP: Tensor) -> Tensor:
    """Score records by how far the update goes down their own gradient, where other records' would not take it.

    Public gradients show what all records have in common: their mean, and the directions in which they vary most. Both
    are taken out of the record's gradient and of the update. They also show how large each parameter's gradient usually
    is, which an adaptive optimiser divides by.

    Args:
        gradients_NP: Gradient of each record's loss at the adapter before the round, shape [N, P].
        update_P: The adapter after the round less the one before, as it was received, shape [P].
        public_MP: Gradients of public records, at the same adapter, shape [M, P].

    Returns:
        Scores, shape [N]: the cosine of what is left of the two, negated, so that members score higher.

    Raises:
        ValueError: If there are fewer than three public records, or the shapes differ.

    Guarantees:
        * The scores do not change when the update or a record's gradient, less the public mean, is scaled.

    Source: Nasr, Shokri & Houmansadr, Comprehensive privacy analysis of deep learning (2019), for membership from
    gradients; the diagonal scaling is that of Kingma & Ba, Adam (2015), algorithm 1.
    """
    if len(public_MP) < 3 or gradients_NP.shape[1:] != update_P.shape or public_MP.shape[1:] != update_P.shape:
        raise ValueError(
            f"Gradients {list(gradients_NP.shape)} and {list(public_MP.shape)} and an update {list(update_P.shape)} "
            "must have the same parameters, and 3 public records or more."
        )
    usual_P = public_MP.square().mean(0).sqrt()
    weight_P = 1 / (usual_P + _FLOOR * usual_P.mean() + _TINY)
    mean_P = public_MP.mean(0)
    varied_MP = (public_MP - mean_P) * weight_P
    directions = torch.linalg.svd(varied_MP, full_matrices=False).Vh[: min(_DIRECTIONS, len(public_MP) // 2)]
    common_KP = torch.linalg.qr(torch.cat([directions, (mean_P * weight_P).unsqueeze(0)]).T).Q.T

    def left_over(x: Tensor) -> Tensor:
        return x - (x @ common_KP.T) @ common_KP

    own_NP = left_over((gradients_NP - mean_P) * weight_P)
    update_P = left_over(update_P)
    norms_N = own_NP.norm(dim=-1) * update_P.norm()
    return -(own_NP @ update_P) / norms_N.clamp_min(_TINY)


def stand_out(scores_N: Tensor) -> Tensor:
    """Compare the scores of records that are judged together, half of which are members, with their median.

    What moves all of them, such as text unlike the public one, then moves none.

    Args:
        scores_N: Scores, shape [N], N at least 1.
    """
    return scores_N - scores_N.median()


def best_threshold(members: Tensor, others: Tensor) -> float:
    """Find the score above which a record is best taken for a member, on records of which it is known.

    Args:
        members: Scores of records that were trained on, at least one.
        others: Scores of records that were not, at least one.

    Returns:
        A threshold halfway between two scores, with the highest mean of the two rates of right answers.

    Raises:
        ValueError: If either is empty.
    """
    if not len(members) or not len(others):
        raise ValueError("A threshold needs scores of members and of others; give at least one of each.")
    scores = torch.cat([members, others]).double().unique()
    middles = torch.cat([scores[:1] - 1, (scores[1:] + scores[:-1]) / 2, scores[-1:] + 1])
    found = (members[:, None] > middles).double().mean(0)
    left_alone = (others[:, None] <= middles).double().mean(0)
    balanced = found + left_alone
    best = (balanced == balanced.max()).nonzero().flatten()
    return float(middles[best[len(best) // 2]])


def membership_result(
    attack: str, members: Sequence[Tensor], others: Sequence[Tensor], thresholds: Sequence[float]
) -> AttackResult:
    """Count right answers over some rounds, in each of which as many records were trained on as were not.

    Args:
        attack: Name of the attack.
        members: Scores of the records trained on, of each round.
        others: Scores of as many records that were not.
        thresholds: The score above which a record is taken for a member, of each round.

    Returns:
        Balanced accuracy, whose chance is one half; the trials of a round are taken one by one.

    Raises:
        ValueError: If a round has not as many others as members.
    """
    if any(len(one) != len(other) for one, other in zip(members, others, strict=True)):
        sizes = [(len(one), len(other)) for one, other in zip(members, others, strict=True)]
        raise ValueError(f"Rounds have (members, others) {sizes}; balanced accuracy takes as many of each.")
    right = [
        int((one > threshold).sum()) + int((other <= threshold).sum())
        for one, other, threshold in zip(members, others, thresholds, strict=True)
    ]
    return AttackResult(attack, "membership", sum(right), 2 * sum(len(one) for one in members), 0.5)


def found_at(members: Tensor, others: Tensor, *, false_alarms: float = 0.05) -> float:
    """Say which share of members can be named while few others are named with them.

    Args:
        members: Scores of records that were trained on.
        others: Scores of records that were not, at least one.
        false_alarms: Largest share of others above the threshold, at least 0 and below 1.

    Returns:
        The true-positive rate at that false-positive rate.

    Raises:
        ValueError: If the share is outside its range, or there are no others.

    Source: Carlini, Chien, Nasr, Song, Terzis & Tramèr, Membership inference attacks from first principles (2022),
    section IV, for judging an attack by its few surest answers.
    """
    if not 0 <= false_alarms < 1 or not len(others):
        raise ValueError(f"A share of false alarms is at least 0 and below 1, not {false_alarms}, of 1 score or more.")
    threshold = others.sort(descending=True).values[int(false_alarms * len(others))]
    return float((members > threshold).double().mean())
