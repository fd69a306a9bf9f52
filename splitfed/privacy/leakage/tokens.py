"""How many private tokens a server recovers from smashed data: all attacks on tokens, one after the other.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from torch import Tensor

from splitfed.privacy.leakage.estimate import AttackResult
from splitfed.privacy.leakage.tokens_bayes import BayesAttack, NearestNeighbour
from splitfed.privacy.leakage.tokens_descent import GradientDescent
from splitfed.privacy.leakage.tokens_inverter import Progress, learn_to_invert
from splitfed.privacy.leakage.tokens_knowledge import Rows, Texts, TokenKnowledge
from splitfed.privacy.leakage.tokens_public import PublicReleases
from splitfed.privacy.leakage.tokens_rows import KnownRows
from splitfed.privacy.leakage.tokens_score import score_tokens

_SEQUENCES_TO_SEARCH: Final = 16  # gradient descent works on every private sequence anew


@dataclass(frozen=True)
class Embedding:
    """The bottom in two parts, for the attack that differentiates it.

    Attributes:
        table_VD: Input embedding of each token, shape [V, D].
        blocks: Input embeddings [B, T, D], float32, to hidden vectors [B, T, D], differentiable.
    """

    table_VD: Tensor
    blocks: Rows


def attack_tokens(
    knowledge: TokenKnowledge,
    smashed_BTD: Tensor,
    private: Texts,
    *,
    embedding: Embedding | None = None,
    seed: int = 0,
    max_steps: int = 300,
    progress: Progress | None = None,
) -> Iterator[AttackResult]:
    """Try every attack on tokens, and count what each recovers.

    Args:
        knowledge: What the server knows.
        smashed_BTD: What it received, shape [B, T, D].
        private: The text behind it; used for counting only.
        embedding: The bottom in two parts; None leaves out gradient descent.
        seed: For all that the attacks draw, beside noise.
        max_steps: The most training steps of an attack that learns.
        progress: Told an attack's name and the part of its work that is done, from 0 to 1.

    Yields:
        One result an attack, as soon as it is there: nearest neighbour; with noise on, the most likely token on its own
        and in context; linear probe; transformer; gradient descent, on the first 16 sequences only.

    Raises:
        ValueError: If smashed data, text and public text differ in shape, or there are fewer than 2 public texts.
    """
    public = PublicReleases(knowledge, seed=seed)
    rows = KnownRows(public, seed=seed)
    yield score_tokens(NearestNeighbour(rows), smashed_BTD, private, knowledge)
    if knowledge.log_density is not None:
        yield score_tokens(BayesAttack(public, rows, tokens_before=0), smashed_BTD, private, knowledge)
        yield score_tokens(BayesAttack(public, rows), smashed_BTD, private, knowledge)
    for learned in learn_to_invert(public, seed=seed, max_steps=max_steps, progress=progress):
        yield score_tokens(learned, smashed_BTD, private, knowledge)
    if embedding is not None:
        tell = None if progress is None else partial(progress, GradientDescent.name)
        search = GradientDescent(embedding.table_VD, embedding.blocks, knowledge.clip, progress=tell)
        some = slice(_SEQUENCES_TO_SEARCH)
        few = Texts(private.input_ids_BT[some], private.lengths_B[some])
        yield score_tokens(search, smashed_BTD[some], few, knowledge)
