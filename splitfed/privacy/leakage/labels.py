"""Label recovery, row by row: which token the head was to predict, from the gradient that comes back from it.

Where the top is nothing but norm and head, a row of the output gradient is scale · Jᵀ Wᵀ (p - y): J is the norm's
Jacobian, W the head, p the model's own prediction and y the label. The server knows J, W and p, for it sent the row
itself and has the base model. So only as many rows are possible as there are tokens, and the label is the one whose row
fits best what was received.

Shapes: B sequences, T tokens, N rows, D hidden, V vocabulary, P probes, K candidates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.clip import Per
from splitfed.privacy.leakage.estimate import AttackResult
from splitfed.privacy.leakage.jacobian import Linearisation

NO_LABEL: Final = -100
"""Label of a row that carries no loss, as in torch's cross-entropy."""
ROUNDING: Final = 2.0**-6
"""Relative error of a row that no noise accounts for: what a codec, and float32, leave."""

_PROBES: Final = 64
_CANDIDATES: Final = 32
_ROWS_AT_ONCE: Final = 256
_TINY: Final = 1e-37


@dataclass(frozen=True)
class Sending:
    """What the server knows of how an output gradient was made, from the run's configuration.

    Attributes:
        scale: What the loss of each token is multiplied by: 1 ÷ divisor.
        clipping_norm: L2 norm that gradients are clipped to before the noise; infinite = they are not.
        per: What is clipped to that norm.
        noise_std: Standard deviation of the noise on each element.
    """

    scale: float
    clipping_norm: float = math.inf
    per: Per = "token"
    noise_std: float = 0.0


@dataclass(frozen=True)
class LabelGuess:
    """What rows of the output gradient say of their labels.

    Attributes:
        labels_N: The most likely label of each row, if it has one.
        evidence_N: Logarithm of how much more likely the row is if it carries loss than if it does not.
    """

    labels_N: Tensor
    evidence_N: Tensor


@torch.no_grad()
def recover_labels(
    gradient_ND: Tensor,
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    sending: Sending,
    *,
    log_prior_V: Tensor,
) -> LabelGuess:
    """Guess the labels of rows of the output gradient by their likelihood under Gaussian noise.

    A clip per sequence scales a row by a factor that the row alone does not show; the best fitting one is taken then.

    Args:
        gradient_ND: Rows as they were received, shape [N, D].
        hidden_ND: The rows of the trunk output that they belong to, shape [N, D].
        head: From rows of the trunk output to their logits, one by one: [N, D] to [N, V].
        sending: How the rows were made.
        log_prior_V: Logarithm of how often each token is a label, shape [V].

    Returns:
        The best guess of each row, and how sure it is that the row has a label at all.

    Guarantees:
        * Without noise the right label is found wherever no other token has nearly the same row.
        * With endless noise the guess is the prior's most likely label, and the evidence is 0.

    Source: The gradient of a softmax cross-entropy is p - y: Bishop, Pattern Recognition and Machine Learning (2006),
    section 4.3.4; labels read off it: Zhao, Mopuri & Bilen, iDLG: Improved deep leakage from gradients (2020). Squared
    norms from random signs: Hutchinson, A stochastic estimator of the trace of the influence matrix (1989).
    """
    chunks = [
        _recover(
            gradient_ND[start : start + _ROWS_AT_ONCE],
            hidden_ND[start : start + _ROWS_AT_ONCE],
            head,
            sending,
            log_prior_V,
        )
        for start in range(0, len(gradient_ND), _ROWS_AT_ONCE)
    ]
    return LabelGuess(
        torch.cat([chunk.labels_N for chunk in chunks]), torch.cat([chunk.evidence_N for chunk in chunks])
    )


def log_frequencies(labels: Tensor, vocabulary: int) -> Tensor:
    """Take the logarithm of how often each token is a label, with one more count for every token, shape [V].

    Args:
        labels: Public labels, any shape; -100 where there is none.
        vocabulary: V.
    """
    counts_V = torch.bincount(labels[labels != NO_LABEL], minlength=vocabulary) + 1.0
    return (counts_V / counts_V.sum()).log()


def label_result(attack: str, guessed_BT: Tensor, labels_BT: Tensor) -> AttackResult:
    """Count the labels that an attack got right.

    Args:
        attack: Its name.
        guessed_BT: Its guesses, shape [B, T].
        labels_BT: The token that each row is to predict, shape [B, T]; -100 where there is none.

    Returns:
        Successes per sequence; chance is the most frequent label.

    Raises:
        ValueError: If no row has a label.
    """
    has_label_BT = labels_BT != NO_LABEL
    counts = torch.bincount(labels_BT[has_label_BT])
    chance = counts.max().item() / counts.sum().item() if len(counts) else 0.0
    right_BT = has_label_BT & (guessed_BT == labels_BT)
    return AttackResult.per_sequence(
        attack, "labels", successes=right_BT.sum(1).tolist(), trials=has_label_BT.sum(1).tolist(), chance=chance
    )


def _recover(
    gradient_ND: Tensor, hidden_ND: Tensor, head: Callable[[Tensor], Tensor], sending: Sending, log_prior_V: Tensor
) -> LabelGuess:
    near = Linearisation(head, hidden_ND)
    mean_ND = near.pull(near.value.softmax(-1))  # Jᵀ Wᵀ p: a candidate is this less Jᵀ Wᵀ y
    along_NV = (gradient_ND * mean_ND).sum(-1, keepdim=True) - near.push(gradient_ND)
    squared_NV = mean_ND.square().sum(-1, keepdim=True) - 2 * near.push(mean_ND) + _squared_rows(near, hidden_ND)
    variance_N1 = sending.noise_std**2 + ROUNDING**2 * gradient_ND.square().mean(-1, keepdim=True)
    score_NV = _log_ratio(along_NV, squared_NV, variance_N1, sending) + log_prior_V
    best_NK = score_NV.topk(min(_CANDIDATES, score_NV.shape[-1])).indices
    for chosen_N1 in best_NK.split(1, dim=1):
        one_hot_NV = torch.zeros_like(near.value).scatter_(1, chosen_N1, 1.0)
        candidate_ND = mean_ND - near.pull(one_hot_NV)
        along_N1 = (gradient_ND * candidate_ND).sum(-1, keepdim=True)
        exact_N1 = _log_ratio(along_N1, candidate_ND.square().sum(-1, keepdim=True), variance_N1, sending)
        score_NV.scatter_(1, chosen_N1, exact_N1 + log_prior_V[chosen_N1])
    chosen_NK = score_NV.gather(1, best_NK)
    return LabelGuess(best_NK.gather(1, chosen_NK.argmax(1, keepdim=True)).squeeze(1), score_NV.logsumexp(-1))


def _log_ratio(along: Tensor, squared: Tensor, variance_N1: Tensor, sending: Sending) -> Tensor:
    """Compare candidates with a row of noise alone, from inner products with the row and from squared norms."""
    squared = squared.clamp_min(_TINY)
    if sending.per == "sequence" and sending.clipping_norm < math.inf:
        factor = (along / squared).clamp(0, sending.scale)
    else:
        factor = (sending.clipping_norm / squared.sqrt()).clamp_max(sending.scale)
    return factor * (along - factor * squared / 2) / variance_N1.clamp_min(_TINY)


def _squared_rows(near: Linearisation, hidden_ND: Tensor) -> Tensor:
    """Squared norm of Jᵀ W_v of every token, shape [N, V]: exact in few dimensions, estimated in many."""
    D = hidden_ND.shape[-1]
    if D <= _PROBES:
        probes_PD, weight = torch.eye(D), 1.0
    else:
        draw = torch.Generator().manual_seed(0)
        probes_PD, weight = torch.randint(0, 2, (_PROBES, D), generator=draw) * 2.0 - 1, 1 / _PROBES
    total_NV = torch.zeros_like(near.value)
    for probe_D in probes_PD.to(hidden_ND):
        total_NV += weight * near.push(probe_D.expand_as(hidden_ND)).square()
    return total_NV
