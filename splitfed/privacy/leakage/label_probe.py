"""A learned label attack: a small network that has seen public labels beside their output gradients.

It needs to know nothing of how the gradients were clipped and noised, and goes through any top: the server makes
public examples with the same top and the same release, and learns what a row says of its label.

Shapes: N rows, D hidden, V vocabulary, H width.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDTH: Final = 256
_ROWS_AT_ONCE: Final = 256
_PASSES: Final = 12
_LEARNING_RATE: Final = 4e-3
_WEIGHT_DECAY: Final = 0.05
_HELD_OUT: Final = 0.2
_TINY: Final = 1e-20


class LabelProbe:
    """Guesses labels from rows of the output gradient, after learning from public ones.

    Its last layer is the model's own head, so that it knows which tokens are alike and can name one that it never saw.

    Args:
        gradient_ND: Public rows as they would be received, shape [N, D]; each carries loss.
        labels_N: Their labels.
        head_VD: Weight of the head.
        log_prior_V: Logarithm of how often each token is a label.
        seed: Seed of its initial weights and of the order of rows; no other random generator is advanced.

    Raises:
        ValueError: If there are fewer than two rows.

    Guarantees:
        * It is never worse, on the public rows that it keeps aside, than the prior's most likely label.
        * The same arguments give the same guesses on the same machine.
    """

    def __init__(
        self, gradient_ND: Tensor, labels_N: Tensor, *, head_VD: Tensor, log_prior_V: Tensor, seed: int = 0
    ) -> None:
        if len(gradient_ND) < 2:
            raise ValueError(f"A label probe learns from 2 rows or more, not {len(gradient_ND)}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network: nn.Module | None = None
            self._prior = int(log_prior_V.argmax())
            self._fit(_directions(gradient_ND), labels_N, head_VD, log_prior_V)

    @torch.no_grad()
    def guess(self, gradient_ND: Tensor) -> Tensor:
        """Guess the label of each row, shape [N].

        Args:
            gradient_ND: Rows as they were received, shape [N, D].
        """
        if self._network is None:
            return torch.full((len(gradient_ND),), self._prior)
        return torch.cat([self._network(rows).argmax(-1) for rows in _directions(gradient_ND).split(4 * _ROWS_AT_ONCE)])

    def _fit(self, rows_ND: Tensor, labels_N: Tensor, head_VD: Tensor, log_prior_V: Tensor) -> None:
        order = torch.randperm(len(rows_ND))
        held_out, learned = order.split([n := max(1, round(_HELD_OUT * len(order))), len(order) - n])
        network = _Network(head_VD, log_prior_V)
        optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        steps = _PASSES * len(learned.split(_ROWS_AT_ONCE))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=max(steps, 2))
        best = int((labels_N[held_out] == self._prior).sum())
        for _ in range(_PASSES):
            for chosen in learned[torch.randperm(len(learned))].split(_ROWS_AT_ONCE):
                optimiser.zero_grad()
                F.cross_entropy(network(rows_ND[chosen]), labels_N[chosen]).backward()
                optimiser.step()
                schedule.step()
        with torch.no_grad():
            if int((network(rows_ND[held_out]).argmax(-1) == labels_N[held_out]).sum()) > best:
                self._network = network


class _Network(nn.Module):
    """One hidden layer beside a linear map, then the model's head."""

    def __init__(self, head_VD: Tensor, log_prior_V: Tensor) -> None:
        super().__init__()
        D = head_VD.shape[1]
        self.widen = nn.Linear(D, _WIDTH)
        self.narrow = nn.Linear(_WIDTH, D)
        self.skip = nn.Linear(D, D, bias=False)
        self.bias = nn.Parameter(log_prior_V.clone())
        head_VD = head_VD.detach().float()
        self.register_buffer("head_VD", head_VD / (head_VD.std() * D**0.5))

    def forward(self, rows_ND: Tensor) -> Tensor:
        seen_ND = self.narrow(self.widen(rows_ND).relu()) + self.skip(rows_ND)
        return seen_ND @ self.get_buffer("head_VD").T + self.bias


def _directions(gradient_ND: Tensor) -> Tensor:
    """Scale rows to norm √D: a clip and a divisor change how long they are, never where they point."""
    norms_N1 = gradient_ND.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    return gradient_ND / norms_N1 * gradient_ND.shape[-1] ** 0.5
