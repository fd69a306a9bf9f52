"""Rows of smashed data beside rows whose token the server knows.

Shapes: B sequences, T tokens, D hidden, V vocabulary, W = V + 1 states, R known rows, P places that differ.
"""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.leakage.tokens_knowledge import TokenKnowledge
from splitfed.privacy.leakage.tokens_public import PublicReleases

_ELEMENTS_AT_ONCE: Final = 2**24
_TOKENS_TO_COMPARE: Final = 8


class KnownRows:
    """Gives how well each row fits each token.

    Where a row depends on its own token and place alone, the rows of all tokens are known exactly: the bottom is run on
    every one of them, at every place where places make a difference. Otherwise the rows of the public text stand in,
    and those of one text in which every token of the vocabulary occurs, in an order without sense.

    Args:
        public: Public text and what the server knows; what is held out is not compared with.
        max_public_rows: Rows of public text to compare with, where they are needed.
        seed: For the choice of those rows.
    """

    def __init__(self, public: PublicReleases, *, max_public_rows: int = 30_000, seed: int = 0) -> None:
        self._knowledge = knowledge = public.knowledge
        self._T = public.tokens
        self._pad_id = _padding_of(knowledge)
        if knowledge.is_row_by_row:
            self._has_places = self._places_differ()
            self._table_PVD = None if self._has_places else self._rows_of(torch.arange(knowledge.vocabulary), 1)
        else:
            self._rows_RD, self._states_R = self._public_rows(public, max_public_rows, seed)

    def score(self, smashed_BTD: Tensor, of_distance: Callable[[Tensor], Tensor], *, is_sum: bool) -> Tensor:
        """Score every state for every row.

        Args:
            smashed_BTD: Smashed data, shape [B, T, D].
            of_distance: Turns distances to known rows into scores; the shorter, the larger.
            is_sum: What several known rows of one token make: the log of the mean of ``exp(score)``, or else the best
                score.

        Returns:
            Scores, shape [B, T, W]; padding is the last state, and -inf where none is known.
        """
        if not self._knowledge.is_row_by_row:
            rows = smashed_BTD.flatten(0, 1).float().split(max(1, _ELEMENTS_AT_ONCE // len(self._rows_RD)))
            scores_W = torch.cat([self._score_by_public_rows(part, of_distance, is_sum) for part in rows])
            return scores_W.view(*smashed_BTD.shape[:2], -1)
        scores_BTV = torch.cat([of_distance(part) for part in self._table_distances(smashed_BTD.float())], -1)
        if self._pad_id is None:
            padding_BT1 = torch.full_like(scores_BTV[..., :1], -torch.inf)
        else:
            padding_BT1 = scores_BTV[..., self._pad_id, None]
        return torch.cat([scores_BTV, padding_BT1], -1)

    def _table_distances(self, smashed_BTD: Tensor) -> Iterator[Tensor]:
        """Yield distances [B, T, v] to the rows of some tokens v after the other."""
        B, T, D = smashed_BTD.shape
        if self._table_PVD is not None:
            for rows_1vD in self._table_PVD.split(max(1, _ELEMENTS_AT_ONCE // (B * T)), dim=1):
                yield torch.cdist(smashed_BTD.reshape(1, B * T, D), rows_1vD).view(B, T, -1)
            return
        tokens_V = torch.arange(self._knowledge.vocabulary)
        for tokens_v in tokens_V.split(max(1, _ELEMENTS_AT_ONCE // (T * D))):
            yield torch.cdist(smashed_BTD.transpose(0, 1), self._rows_of(tokens_v, T)).transpose(0, 1)

    def _score_by_public_rows(
        self, smashed_ND: Tensor, of_distance: Callable[[Tensor], Tensor], is_sum: bool
    ) -> Tensor:
        scores_NR = of_distance(torch.cdist(smashed_ND, self._rows_RD))
        W = self._knowledge.vocabulary + 1
        states_NR = self._states_R.expand_as(scores_NR)
        if not is_sum:
            return scores_NR.new_full((len(smashed_ND), W), -torch.inf).scatter_reduce_(1, states_NR, scores_NR, "amax")
        best_N1 = scores_NR.amax(-1, keepdim=True)
        sums_NW = scores_NR.new_zeros(len(smashed_ND), W).index_add_(1, self._states_R, (scores_NR - best_N1).exp())
        return (sums_NW / self._states_R.bincount(minlength=W).clamp(min=1)).log() + best_N1

    def _rows_of(self, tokens_v: Tensor, places: int) -> Tensor:
        """Give the clipped rows of tokens, each at every place, shape [places, v, D]."""
        repeated = tokens_v.to(self._knowledge.device)[:, None].repeat(1, places)
        return self._knowledge.clip(self._knowledge.hidden(repeated)).transpose(0, 1).contiguous()

    def _places_differ(self) -> bool:
        rows_TvD = self._rows_of(torch.arange(min(_TOKENS_TO_COMPARE, self._knowledge.vocabulary)), self._T)
        return not torch.allclose(rows_TvD, rows_TvD[:1].expand_as(rows_TvD))

    def _public_rows(self, public: PublicReleases, most: int, seed: int) -> tuple[Tensor, Tensor]:
        """Give known rows [R, D] and their states [R]."""
        draw, device = torch.Generator().manual_seed(seed), self._knowledge.device
        chosen_R = torch.randperm(public.states_BT.numel(), generator=draw)[:most].to(device)
        every_BT = _every_token(self._knowledge.vocabulary, self._T, draw).to(device)
        every_BTD = self._knowledge.clip(self._knowledge.hidden(every_BT))
        rows_RD = torch.cat([public.clipped_BTD.flatten(0, 1)[chosen_R], every_BTD.flatten(0, 1)])
        return rows_RD, torch.cat([public.states_BT.flatten()[chosen_R], every_BT.flatten()])


def _padding_of(knowledge: TokenKnowledge) -> int | None:
    """Give the token that the public text is padded with, or None where nothing is padded."""
    padding = knowledge.public.input_ids_BT[~knowledge.public.is_real]
    return int(padding[0]) if len(padding) else None


def _every_token(vocabulary: int, T: int, draw: torch.Generator) -> Tensor:
    """Make sequences of T tokens in which each token occurs, in random order; shape [B, T]."""
    n_rows = -(-vocabulary // T)
    order = torch.randperm(vocabulary, generator=draw)
    filling = torch.randint(vocabulary, (n_rows * T - vocabulary,), generator=draw)
    return torch.cat([order, filling]).view(n_rows, T)
