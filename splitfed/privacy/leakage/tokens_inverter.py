"""Attacks that learn to read tokens from smashed data: a linear probe, and a small transformer on top of it.

Shapes: B sequences, T tokens, D hidden, W = V + 1 states (tokens and padding), H width of the transformer.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from splitfed.privacy.leakage.tokens_context import TOKENS_BEFORE
from splitfed.privacy.leakage.tokens_public import PublicReleases
from splitfed.privacy.leakage.tokens_training import train

Progress = Callable[[str, float], None]
"""Told an attack's name and the largest part of its work that is done, from 0 to 1."""

_PROBE_RATE: Final = 5e-2
_TRANSFORMER_RATE: Final = 3e-3
_SEQUENCES_AT_ONCE: Final = 16
_RIDGE: Final = 1e-3  # of the rows' variance: what is left between rows of one token with noise off


class LinearProbe(nn.Module):
    """Reads each row on its own, by a linear map to the logits of all states.

    It starts as Fisher's linear discriminant: rows are whitened by their covariance within a token, and the weights are
    the tokens' mean rows. Under Gaussian noise on rows of a known table that is the optimal reader of a single row.

    Args:
        public: Public text.

    Source: Fisher, The use of multiple measurements in taxonomic problems (1936); in this form Hastie, Tibshirani and
    Friedman, The Elements of Statistical Learning (2009), section 4.3.
    """

    middle_D: Tensor
    whitening_DD: Tensor

    def __init__(self, public: PublicReleases) -> None:
        super().__init__()
        means_WD, middle_D, within_DD = public.moments()
        variance = float((public.clipped_BTD - middle_D).square().mean())
        ridge_DD = (_RIDGE * variance or 1.0) * torch.eye(len(within_DD), dtype=torch.float64, device=within_DD.device)
        inverse_DD = torch.linalg.inv(torch.linalg.cholesky(within_DD + ridge_DD))
        self.register_buffer("middle_D", middle_D)
        self.register_buffer("whitening_DD", inverse_DD.T.float().contiguous())
        self.weight_WD = nn.Parameter((means_WD - middle_D) @ self.whitening_DD)
        self.bias_W = nn.Parameter(public.prior.log_share - self.weight_WD.detach().square().sum(-1) / 2)

    def whiten(self, smashed_BTD: Tensor) -> Tensor:
        """Shift and turn rows so that those of one token spread by 1 in every direction."""
        return (smashed_BTD - self.middle_D) @ self.whitening_DD

    def forward(self, smashed_BTD: Tensor) -> Tensor:
        """Give logits of all states, shape [B, T, W]."""
        return nn.functional.linear(self.whiten(smashed_BTD), self.weight_WD, self.bias_W)


class TransformerReader(nn.Module):
    """Reads all rows of a sequence together: a trained probe, corrected by a small bidirectional transformer.

    The correction is zero at first, so that it never starts below the probe.

    Args:
        probe: The trained probe; it is trained on.
        tokens: T, rows of a sequence.
        width: H, a multiple of 16.
        layers: Layers of the transformer.
    """

    def __init__(self, probe: LinearProbe, *, tokens: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        W, D = probe.weight_WD.shape
        self.probe = probe
        self.enter = nn.Linear(D, width)
        self.places_TH = nn.Parameter(0.02 * torch.randn(tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 16, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, W)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, smashed_BTD: Tensor) -> Tensor:
        """Give logits of all states, shape [B, T, W]."""
        whitened_BTD = self.probe.whiten(smashed_BTD)
        scale = whitened_BTD.square().mean((1, 2), keepdim=True).sqrt()
        inner_BTH = self.layers(self.enter(whitened_BTD / scale) + self.places_TH[: smashed_BTD.shape[1]])
        return self.probe(smashed_BTD) + self.leave(inner_BTH)


class LearnedAttack:
    """Reads tokens with a trained network, in the context of the tokens around them where that helps.

    The network's probability of a token, divided by how frequent the token is, stands for the likelihood of its row.
    How far the prior looks back, and whether a reader's correction of its probe is used, is what recovers most of
    held-out public text.

    Args:
        name: What it is called in a table.
        network: The trained network.
        public: Public text.
        steps: Training steps that were taken.

    Attributes:
        name: As given.
        tokens_before: How many tokens before a token the prior takes into account.
        steps: As given.
    """

    def __init__(self, name: str, network: nn.Module, public: PublicReleases, steps: int) -> None:
        self.name = name
        self.steps = steps
        self._prior = public.prior
        networks = [network, network.probe] if isinstance(network, TransformerReader) else [network]
        tried = []
        for self._network in networks:
            log_likelihood_BTW = self._log_likelihood(public.held_out_BTD)
            for n in TOKENS_BEFORE:
                hits = self._prior.count_hits(log_likelihood_BTW, public.held_out_states_BT, n)
                tried.append((hits, n, self._network))
        _, self.tokens_before, self._network = max(tried, key=lambda each: each[0])

    def recover(self, smashed_BTD: Tensor) -> Tensor:
        """Guess the token of every row, shape [B, T]."""
        parts = smashed_BTD.float().split(_SEQUENCES_AT_ONCE)
        return torch.cat([self._prior.guess(self._log_likelihood(part), self.tokens_before) for part in parts])

    @torch.no_grad()
    def _log_likelihood(self, smashed_BTD: Tensor) -> Tensor:
        return self._network(smashed_BTD).log_softmax(-1) - self._prior.log_share


def learn_to_invert(
    public: PublicReleases,
    *,
    seed: int = 0,
    max_steps: int = 300,
    batch_size: int = 32,
    width: int = 64,
    layers: int = 2,
    progress: Progress | None = None,
) -> Iterator[LearnedAttack]:
    """Train a linear probe and a transformer on public text, through the same bottom and the same release.

    Every batch is released afresh, so that the noise in it was never seen before.

    Args:
        public: Public text.
        seed: For weights and batches.
        max_steps: The most steps that each of them takes; they stop earlier where held-out public text shows no gain.
        batch_size: Sequences in a step.
        width: H of the transformer, a multiple of 16.
        layers: Layers of the transformer.
        progress: Told how far each of them is.

    Yields:
        The linear probe, then the transformer.

    Raises:
        ValueError: If a count is below 1, or the width no multiple of 16.

    Guarantees:
        * Equal knowledge, seeds and releases give equal attacks; torch's own generators are left as they were.
    """
    if min(max_steps, batch_size, layers, width) < 1 or width % 16:
        raise ValueError(
            f"Training takes at least 1 step, sequence and layer, not {max_steps}, {batch_size} and {layers}, and a "
            f"width that is a multiple of 16, not {width}."
        )

    def learned(name: str, network: nn.Module, rate: float) -> LearnedAttack:
        tell = None if progress is None else partial(progress, name)
        sizes = {"max_steps": max_steps, "batch_size": batch_size}
        steps = train(network, public, rate=rate, seed=seed, progress=tell, **sizes)
        return LearnedAttack(name, network.eval(), public, steps)

    probe = LinearProbe(public)
    yield learned("linear probe", probe, _PROBE_RATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = TransformerReader(deepcopy(probe), tokens=public.tokens, width=width, layers=layers)
    yield learned("transformer", reader.to(public.knowledge.device), _TRANSFORMER_RATE)
