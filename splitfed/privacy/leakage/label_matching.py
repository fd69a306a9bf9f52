"""Label recovery through blocks of the top: the labels whose gradient matches best the one that came back.

Through an attention block every label has a part in all earlier rows, so no row can be read alone. But the output
gradient is linear in the labels, through a map that the server can apply (`jacobian`): it looks for the labels that
explain the whole of it, by gradient descent on how likely each label is.

Shapes: B sequences, T tokens, D hidden, V vocabulary, L = V + 1 choices: no label, or one of V.
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.clip import clip
from splitfed.privacy.leakage.jacobian import Linearisation
from splitfed.privacy.leakage.labels import ROUNDING, Sending

_STEPS: Final = 50
_STEP_SIZE: Final = 0.5
_CHOICES_AT_ONCE: Final = 2**23
_LEAST_PROBABILITY: Final = 1e-4
_LEAST_VARIANCE: Final = 1e-30


def match_labels(
    gradient_BTD: Tensor,
    hidden_BTD: Tensor,
    top: Callable[[Tensor], Tensor],
    sending: Sending,
    *,
    log_prior_V: Tensor,
    carries_loss_BT: Tensor | None = None,
) -> Tensor:
    """Guess the labels of whole sequences by matching their output gradient.

    Args:
        gradient_BTD: Output gradient as it was received, shape [B, T, D].
        hidden_BTD: The trunk output, shape [B, T, D].
        top: From trunk output to logits, [B, T, D] to [B, T, V]; sequences do not mix in it.
        sending: How the output gradient was made.
        log_prior_V: Logarithm of how often each token is a label, shape [V].
        carries_loss_BT: How likely each row carries loss, as another attack has found it (`mask`), shape [B, T];
            left out = one half.

    Returns:
        The best guess for each row, if it has a label, shape [B, T].

    Guarantees:
        * With endless noise the guess is the prior's most likely label.

    Source: Zhu, Liu & Han, Deep leakage from gradients (2019), who match gradients by both inputs and labels; here the
    inputs are known. The penalty is that of variational inference with independent labels: Blei, Kucukelbir &
    McAuliffe, Variational inference: a review for statisticians (2017), section 2.
    """
    if carries_loss_BT is None:
        carries_loss_BT = torch.full(hidden_BTD.shape[:2], 0.5)
    sequences = max(1, _CHOICES_AT_ONCE // (hidden_BTD.shape[1] * len(log_prior_V)))
    parts = zip(*(x.split(sequences) for x in (gradient_BTD, hidden_BTD, carries_loss_BT)), strict=True)
    return torch.cat(
        [_match(gradient, hidden, carries, top, sending, log_prior_V) for gradient, hidden, carries in parts]
    )


def _match(
    gradient_BTD: Tensor,
    hidden_BTD: Tensor,
    carries_loss_BT: Tensor,
    top: Callable[[Tensor], Tensor],
    sending: Sending,
    log_prior_V: Tensor,
) -> Tensor:
    near = Linearisation(top, hidden_BTD)
    predicted_BTV = near.value.softmax(-1)
    carries_BT1 = carries_loss_BT.clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY).unsqueeze(-1)
    prior_BTL = torch.cat([(1 - carries_BT1).log(), carries_BT1.log() + log_prior_V], -1)
    variance = max(sending.noise_std**2 + ROUNDING**2 * gradient_BTD.square().mean().item(), _LEAST_VARIANCE)
    scores_BTL = prior_BTL.clone().requires_grad_()
    optimiser = torch.optim.Adam([scores_BTL], lr=_STEP_SIZE)
    for _ in range(_STEPS):
        log_chosen_BTL = scores_BTL.log_softmax(-1)
        chosen_BTL = log_chosen_BTL.exp()
        wrong_BTV = (1 - chosen_BTL[..., :1]) * predicted_BTV - chosen_BTL[..., 1:]  # p - y, 0 without a label
        explained_BTD = near.pull(wrong_BTV * sending.scale, differentiable=True)
        if sending.clipping_norm < math.inf:
            explained_BTD = clip(explained_BTD, sending.clipping_norm, per=sending.per)
        misfit = (gradient_BTD - explained_BTD).square().sum() / (2 * variance)
        surprise = (chosen_BTL * (log_chosen_BTL - prior_BTL)).sum()
        optimiser.zero_grad()
        (misfit + surprise).backward(inputs=[scores_BTL])
        optimiser.step()
    return scores_BTL.detach()[..., 1:].argmax(-1)
