"""Public text through the server's own copy of bottom and release: what attacks learn from, and are chosen by.

Shapes: B sequences, T tokens, D hidden, N rows, V vocabulary, W = V + 1 states (tokens and padding).
"""

from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.leakage.tokens_context import TextPrior
from splitfed.privacy.leakage.tokens_knowledge import TokenKnowledge

_HELD_OUT: Final = 0.1
_MOST_HELD_OUT: Final = 48
_SEQUENCES_AT_ONCE: Final = 32


class PublicReleases:
    """Public text with the smashed data that the server makes of it; a part is held out.

    Args:
        knowledge: What the server knows.
        seed: For the choice of what is held out: a tenth, at most 48 texts.

    Attributes:
        knowledge: As given.
        clipped_BTD: Hidden vectors of the texts to learn from, clipped and without noise, shape [B, T, D].
        states_BT: Their tokens, V for padding, shape [B, T].
        held_out_BTD: Smashed data of the texts held out, released once, shape [B, T, D].
        held_out_states_BT: Their tokens, V for padding, shape [B, T].
        prior: What the texts to learn from are like.

    Raises:
        ValueError: If there are fewer than 2 public texts.

    Guarantees:
        * No text is both held out and learned from.
        * Each batch is released afresh.
    """

    def __init__(self, knowledge: TokenKnowledge, *, seed: int = 0) -> None:
        n_texts = len(knowledge.public.input_ids_BT)
        if n_texts < 2:
            raise ValueError(f"An attack needs at least 2 public texts, one of them to try itself on, not {n_texts}.")
        n_held_out = min(max(1, int(_HELD_OUT * n_texts)), _MOST_HELD_OUT)
        order_B = torch.randperm(n_texts, generator=torch.Generator().manual_seed(seed))
        held_out_B, learned_B = order_B.to(knowledge.device).tensor_split([n_held_out])
        states_BT = knowledge.public.input_ids_BT.where(knowledge.public.is_real, knowledge.vocabulary)
        hidden_BTD = knowledge.hidden(knowledge.public.input_ids_BT)
        self.knowledge = knowledge
        self.states_BT, self.held_out_states_BT = states_BT[learned_B], states_BT[held_out_B]
        self._hidden_BTD = hidden_BTD[learned_B]
        self.clipped_BTD = knowledge.clip(self._hidden_BTD)
        self.held_out_BTD = self._released(hidden_BTD[held_out_B])
        self.prior = TextPrior(self.states_BT, knowledge.vocabulary + 1)

    @property
    def n_states(self) -> int:
        """W."""
        return self.knowledge.vocabulary + 1

    @property
    def tokens(self) -> int:
        """T, rows of a sequence."""
        return self.states_BT.shape[1]

    def batch(self, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw some texts to learn from and release them: smashed data [B, T, D] and states [B, T]."""
        chosen_B = torch.randint(len(self.states_BT), (size,), generator=draw).to(self.states_BT.device)
        return self._released(self._hidden_BTD[chosen_B]), self.states_BT[chosen_B]

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Measure how rows lie.

        Returns:
            The mean row of each state, without noise, shape [W, D]; the mean of all, shape [D]; the covariance of
            released rows about their state's mean, float64, shape [D, D].
        """
        rows_ND, states_N = self.clipped_BTD.flatten(0, 1), self.states_BT.flatten()
        middle_D = rows_ND.mean(0)
        sums_WD = middle_D.repeat(self.n_states, 1).index_add_(0, states_N, rows_ND)  # one more row, in the middle
        means_WD = sums_WD / (states_N.bincount(minlength=self.n_states)[:, None] + 1)
        within_DD = torch.zeros(len(middle_D), len(middle_D), dtype=torch.float64, device=rows_ND.device)
        for hidden_BTD, states_BT in zip(
            self._hidden_BTD.split(_SEQUENCES_AT_ONCE), self.states_BT.split(_SEQUENCES_AT_ONCE), strict=True
        ):
            spread_ND = (self._released(hidden_BTD) - means_WD[states_BT]).flatten(0, 1).double()
            within_DD += spread_ND.T @ spread_ND
        return means_WD, middle_D, within_DD / len(rows_ND)

    @torch.no_grad()
    def _released(self, hidden_BTD: Tensor) -> Tensor:
        return self.knowledge.release(hidden_BTD).detach().float()
