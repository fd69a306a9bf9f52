"""A small world for attacks on tokens: a table of embeddings, text from a known chain, a clip and a noise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfed.privacy import clip
from splitfed.privacy.leakage import Texts, TokenKnowledge, gaussian_log_density
from splitfed.privacy.leakage.tokens_public import PublicReleases

CLIPPING_NORM = 2.0


@dataclass(frozen=True)
class World:
    knowledge: TokenKnowledge
    private: Texts
    smashed_BTD: Tensor
    table_VD: Tensor

    @property
    def public(self) -> PublicReleases:
        return PublicReleases(self.knowledge)


def draw_texts(count: int, tokens: int, vocabulary: int, seed: int) -> Texts:
    """One of two tokens follows each in four of five cases, small ids mostly; lengths differ, padding is 0."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(count, tokens, dtype=torch.int64)
    ids[:, 0] = torch.randint(vocabulary, (count,), generator=draw)
    for t in range(1, tokens):
        usual = (ids[:, t - 1] + vocabulary // 2 * torch.randint(2, (count,), generator=draw)) // 2
        other = torch.randint(vocabulary, (count,), generator=draw)
        ids[:, t] = usual.where(torch.rand(count, generator=draw) < 0.8, other)
    lengths = torch.randint(tokens // 2, tokens + 1, (count,), generator=draw)
    texts = Texts(ids, lengths)
    return Texts(ids.where(texts.is_real, 0), lengths)


def clipped(x_BTD: Tensor) -> Tensor:
    return clip(x_BTD, CLIPPING_NORM, per="token")


def mix(x_BTD: Tensor) -> Tensor:
    """Stands for blocks: each row gets something of those before it."""
    draw = torch.Generator().manual_seed(4)
    weights_DD = torch.randn(x_BTD.shape[-1], x_BTD.shape[-1], generator=draw) / x_BTD.shape[-1] ** 0.5
    before_BTD = torch.cat([torch.zeros_like(x_BTD[:, :1]), x_BTD[:, :-1]], 1)
    return x_BTD + torch.tanh(before_BTD @ weights_DD)


def make_world(
    std: float = 0.0,
    *,
    vocabulary: int = 20,
    tokens: int = 12,
    hidden: int = 8,
    blocks: Callable[[Tensor], Tensor] | None = None,
    places: float = 0.0,
    n_public: int = 300,
    n_private: int = 60,
) -> World:
    draw, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    table_VD = torch.randn(vocabulary, hidden, generator=draw)
    places_TD = places * torch.randn(tokens, hidden, generator=draw)

    def bottom(input_ids_BT: Tensor) -> Tensor:
        x_BTD = table_VD[input_ids_BT] + places_TD[: input_ids_BT.shape[1]]
        return x_BTD if blocks is None else blocks(x_BTD)

    def release(x_BTD: Tensor) -> Tensor:
        return clipped(x_BTD) + std * torch.randn(x_BTD.shape, generator=noise)

    knowledge = TokenKnowledge(
        bottom=bottom,
        release=release,
        clip=clipped,
        public=draw_texts(n_public, tokens, vocabulary, seed=10),
        vocabulary=vocabulary,
        log_density=gaussian_log_density(std) if std else None,
        is_row_by_row=blocks is None,
    )
    private = draw_texts(n_private, tokens, vocabulary, seed=11)
    return World(knowledge, private, release(bottom(private.input_ids_BT)), table_VD)
