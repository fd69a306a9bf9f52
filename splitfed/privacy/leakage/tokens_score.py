"""Counting what an attack on tokens recovers, beside a guess without looking.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from typing import Final, Protocol

import torch
from torch import Tensor

from splitfed.privacy.leakage.estimate import AttackResult
from splitfed.privacy.leakage.tokens_knowledge import Texts, TokenKnowledge

_PLACES_TO_TRUST: Final = 20.0  # texts that must reach a place before its own most frequent token outweighs the usual


class TokenAttack(Protocol):
    """Guesses the tokens behind smashed data.

    Attributes:
        name: What it is called in a table.
    """

    name: str

    def recover(self, smashed_BTD: Tensor) -> Tensor:
        """Guess the token of every row, those of padding included; int64, shape [B, T]."""


def blind_guess(public: Texts, vocabulary: int) -> Tensor:
    """Guess tokens without looking: the most frequent one of each place in public text, shape [T].

    A place that few public texts reach gets the most frequent token of all places.

    Args:
        public: Public text.
        vocabulary: Token ids there are.
    """
    T = public.input_ids_BT.shape[1]
    places_BT = torch.arange(T, device=public.input_ids_BT.device).expand_as(public.input_ids_BT)
    is_real_BT = public.is_real
    flat = places_BT[is_real_BT] * vocabulary + public.input_ids_BT[is_real_BT]
    counts_TV = flat.bincount(minlength=T * vocabulary).view(T, vocabulary).double()
    usual_V = counts_TV.sum(0) / counts_TV.sum()
    return (counts_TV + _PLACES_TO_TRUST * usual_V).argmax(-1)


def score_tokens(attack: TokenAttack, smashed_BTD: Tensor, private: Texts, knowledge: TokenKnowledge) -> AttackResult:
    """Let an attack guess, and count its hits over real tokens: only who knows the text can.

    Args:
        attack: The attack.
        smashed_BTD: What the server received for the private text, shape [B, T, D].
        private: The private text.
        knowledge: What the attack knew, for the blind guess that it is compared with.

    Raises:
        ValueError: If smashed data, text and public text differ in shape.

    Guarantees:
        * Padding is no trial, whatever is guessed there.
        * Chance is the rate of ``blind_guess`` on the same tokens.
    """
    T = knowledge.public.input_ids_BT.shape[1]
    if smashed_BTD.shape[:2] != private.input_ids_BT.shape or smashed_BTD.shape[1] != T:
        raise ValueError(
            f"Smashed data {tuple(smashed_BTD.shape)} is not that of texts {tuple(private.input_ids_BT.shape)}, padded "
            f"to the {T} tokens of the public ones."
        )
    guess_T = blind_guess(knowledge.public, knowledge.vocabulary)
    is_real_BT, truth_BT = private.is_real, private.input_ids_BT
    blind = int((is_real_BT & (guess_T == truth_BT)).sum())
    hits_B = (is_real_BT & (attack.recover(smashed_BTD) == truth_BT)).sum(-1)
    return AttackResult.per_sequence(
        attack.name,
        "tokens",
        successes=hits_B.tolist(),
        trials=private.lengths_B.tolist(),
        chance=blind / int(private.lengths_B.sum()),
    )
