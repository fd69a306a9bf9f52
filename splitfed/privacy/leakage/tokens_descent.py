"""An attack that needs no public text and no known noise: search by gradient for inputs with the same smashed data.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.leakage.tokens_knowledge import Rows

_RATE: Final = 0.4  # of the table's standard deviation: how far Adam's first step of a round goes
_PULL: Final = 0.5  # of the way to the closest token, at a round's end
_SEQUENCES_AT_ONCE: Final = 16


class GradientDescent:
    """Searches for input embeddings whose smashed data match what was received, then takes the closest tokens.

    In rounds: Adam moves the embeddings towards a match, then each is pulled half way to its closest token. What is
    minimised is the sum over rows of the distance, not its square: rows that match already do not give way to others.

    Args:
        table_VD: Input embedding of each token, shape [V, D].
        blocks: Input embeddings [B, T, D] to hidden vectors [B, T, D], differentiable: the bottom behind its table.
        clip: The release without its noise, differentiable.
        steps: Gradient steps of a sequence.
        rounds: Rounds that they are divided into.
        progress: Told the part of the steps that is done, from 0 to 1, of everything that ``recover`` was given.

    Raises:
        ValueError: If there is no round, or fewer steps than rounds.

    Guarantees:
        * The result depends on the smashed data only: nothing is drawn, and no gradient is left on any parameter.

    Source: Fredrikson, Jha and Ristenpart, Model inversion attacks that exploit confidence information and basic
    countermeasures (2015), for the search by gradient; Kingma and Ba, Adam (2015).
    """

    name = "gradient descent"

    def __init__(
        self,
        table_VD: Tensor,
        blocks: Rows,
        clip: Rows,
        *,
        steps: int = 240,
        rounds: int = 8,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        if rounds < 1 or steps < rounds:
            raise ValueError(f"{steps} steps do not make {rounds} rounds; take at least one round of one step.")
        self._table_VD = table_VD.detach().float()
        self._blocks, self._clip = blocks, clip
        self._rounds, self._steps = rounds, steps // rounds
        self._progress = progress

    def recover(self, smashed_BTD: Tensor) -> Tensor:
        """Guess the token of every row, shape [B, T]."""
        parts, found = smashed_BTD.float().split(_SEQUENCES_AT_ONCE), []
        for number, part_BTD in enumerate(parts):
            found.append(self._recover(part_BTD, number / len(parts), 1 / len(parts)))
        return torch.cat(found)

    def _recover(self, smashed_BTD: Tensor, done: float, share: float) -> Tensor:
        guess_BTD = self._table_VD.mean(0).expand_as(smashed_BTD).clone()
        for round_number in range(self._rounds):
            guess_BTD = self._approach(guess_BTD, smashed_BTD)
            tokens_BT = self._closest(guess_BTD)
            guess_BTD = torch.lerp(guess_BTD, self._table_VD[tokens_BT], _PULL)
            if self._progress is not None:
                self._progress(done + share * (round_number + 1) / self._rounds)
        return tokens_BT

    def _approach(self, guess_BTD: Tensor, smashed_BTD: Tensor) -> Tensor:
        """Take one round's steps."""
        guess_BTD = guess_BTD.detach().requires_grad_()
        optimiser = torch.optim.Adam([guess_BTD], lr=_RATE * float(self._table_VD.std()))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self._steps)
        for _ in range(self._steps):
            with torch.enable_grad():
                distance = (self._clip(self._blocks(guess_BTD)) - smashed_BTD).norm(dim=-1).sum()
            (guess_BTD.grad,) = torch.autograd.grad(distance, guess_BTD)
            optimiser.step()
            schedule.step()
        return guess_BTD.detach()

    def _closest(self, guess_BTD: Tensor) -> Tensor:
        return torch.stack([torch.cdist(guess_TD, self._table_VD).argmin(-1) for guess_TD in guess_BTD])
