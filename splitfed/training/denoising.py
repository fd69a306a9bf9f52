"""Fitting denoisers: to the base model alone, and to public text where there is some; never to private text.

A fitted denoiser tells of what it was fitted to, and no ledger counts that. Two sources cost nothing: random tokens,
which show the bottom its whole vocabulary, and text that the base model itself makes up.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from splitfed.config import PrivacySection
from splitfed.models import Partition, Segment, load_adapter_state
from splitfed.models.families import family_of
from splitfed.privacy.clip import Per, clip
from splitfed.privacy.denoise import Denoiser, Table
from splitfed.privacy.mechanisms import GaussianMechanism
from splitfed.privacy.metric import MetricMechanism
from splitfed.privacy.mixture import Mixture, fit_mixture
from splitfed.privacy.output_denoise import OutputDenoiser, fit_output_denoiser
from splitfed.training.data import Example
from splitfed.training.protection import settle_clip, smashed_mechanism, with_default_noise

ROWS_A_TOKEN = 32
"""Random rows of each token that a fit takes: twice as many were worth 0.01 nats, half as many cost 0.03."""
MADE_UP_SEQUENCES = 128
"""Sequences of made-up text that say enough about how frequent tokens are."""

_AT_ONCE = 16
_UNSEEN = 0.5  # added to each token's count, so that none is impossible


FitDenoiser = Callable[[Mapping[str, Tensor]], Denoiser]
"""From the adapters of bottom and top, by whole-model name, to what fits the smashed data that they make."""


def entrance_of_run(parts: Partition, privacy: PrivacySection, *, max_tokens: int) -> FitDenoiser:
    """Prepare what a run's trunk takes noise away with, from the base model alone.

    Args:
        parts: The segments as they start; the bottom is kept, and changed with every fit.
        privacy: The run's section, with noise on and a noise multiplier.
        max_tokens: The run's T.

    Returns:
        A function to call at a round's start; the same adapters give the same denoiser.
    """
    settled = settle_clip(with_default_noise(privacy), parts.bottom)
    mechanism, bottom = smashed_mechanism(settled), parts.bottom
    made_up_BT = made_up_tokens(parts, tokens=max_tokens)
    is_metric = isinstance(mechanism, MetricMechanism)
    clipping_norm = None if is_metric else settled.clipping_norm_smashed

    def fit(ends: Mapping[str, Tensor]) -> Denoiser:
        load_adapter_state(bottom, ends)
        known = fit_smashed(
            bottom, clipping_norm=clipping_norm, max_tokens=max_tokens, per=settled.clip, public_BT=made_up_BT
        )
        if isinstance(mechanism, MetricMechanism):
            assert isinstance(known, Table)
            return known.denoiser(eta=mechanism.eta)
        assert isinstance(mechanism, GaussianMechanism)
        return known.denoiser(std=mechanism.noise_std(max_tokens))

    return fit


def fit_smashed(
    bottom: Segment,
    *,
    clipping_norm: float | None,
    max_tokens: int,
    per: Per = "token",
    public_BT: Tensor | None = None,
    rows_a_token: int = ROWS_A_TOKEN,
    seed: int = 0,
) -> Table | Mixture:
    """Learn what clean smashed data looks like; ``denoiser(std=...)`` of the result is for any amount of noise.

    The rows of a bottom without blocks are a table, exactly. Those of any other are fitted, to random tokens and to
    public text. What the fit has not seen is taken for noise: once an adapter in the bottom has changed, fit again.

    Args:
        bottom: The bottom as the devices hold it, its adapter included.
        clipping_norm: What the devices clip smashed data to; none: they do not.
        max_tokens: The run's T.
        per: What is clipped.
        public_BT: Tokens of public text, shape [B, T], from ``pack`` or ``made_up_tokens``; they also say how frequent
            each token is. None: all are as likely.
        rows_a_token: How often each token is to be among the random ones.
        seed: Seed of the random tokens.

    Returns:
        A table for a bottom without blocks that is clipped per token or not at all, else a mixture.

    Raises:
        ValueError: If the public sequences do not have T tokens.
    """
    if public_BT is not None and public_BT.shape[1] != max_tokens:
        raise ValueError(f"Public sequences have {public_BT.shape[1]} tokens and the run {max_tokens}; pack them anew.")
    embeddings_VE = _embeddings(bottom)
    log_prior_V = _log_prior(public_BT, len(embeddings_VE)).to(embeddings_VE.device)
    if len(bottom.blocks) == 0 and (per == "token" or clipping_norm is None):
        rows_VD, positions_TD = token_rows(bottom, max_tokens=max_tokens)
        return Table(rows_VD, log_prior_V, positions_TD, clipping_norm)
    sequences = math.ceil(rows_a_token * len(embeddings_VE) / max_tokens)
    input_ids_BT = random_tokens(bottom, sequences=sequences, tokens=max_tokens, seed=seed)
    if public_BT is not None:
        input_ids_BT = torch.cat([input_ids_BT, public_BT.to(input_ids_BT.device)])
    with _evaluating(bottom):
        return fit_mixture(
            lambda: _clean(bottom, input_ids_BT, clipping_norm, per),
            embeddings_VE,
            log_prior_V=log_prior_V,
            has_positions=_has_positions(bottom),
        )


def fit_output(
    parts: Partition,
    input_ids_BT: Tensor,
    *,
    clipping_norm: float,
    std: float,
    per: Per = "token",
    denoiser: Denoiser | None = None,
    seed: int = 0,
) -> OutputDenoiser:
    """Learn what the noise does to the trunk output, for a device to take it away.

    Args:
        parts: The segments, their adapters included.
        input_ids_BT: Tokens of public text, shape [B, T].
        clipping_norm: What the devices clip smashed data to.
        std: Standard deviation of the noise on each element.
        per: What is clipped.
        denoiser: What the trunk's entrance takes away first; none: nothing.
        seed: Seed of the noise, which here hides nothing.
    """
    draw = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        for _, x_BTD in _clean(parts.bottom, input_ids_BT, clipping_norm, per):
            noise_BTD = std * torch.randn(x_BTD.shape, generator=draw).to(x_BTD)
            y_BTD = x_BTD + noise_BTD
            output_BTD = parts.trunk(y_BTD if denoiser is None else denoiser(y_BTD))
            yield output_BTD, x_BTD, noise_BTD, parts.trunk(x_BTD)

    with _evaluating(parts.bottom, parts.trunk):
        return fit_output_denoiser(batches())


def token_rows(bottom: Segment, *, max_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Read from a bottom without blocks what it sends for each token.

    Args:
        bottom: The bottom.
        max_tokens: The run's T.

    Returns:
        ``(rows_VD, positions_TD)``: a token's row is ``rows[v] + positions[t]``; None: the same at every position.
    """
    every_token_V = torch.arange(len(_embeddings(bottom)), device=_embeddings(bottom).device)
    with _evaluating(bottom):
        rows_VD = torch.cat([bottom(tokens_N[:, None])[:, 0].float() for tokens_N in every_token_V.split(4096)])
        if not _has_positions(bottom):
            return rows_VD, None
        return rows_VD, bottom(every_token_V[:1].expand(1, max_tokens))[0].float() - rows_VD[0]


def random_tokens(bottom: Segment, *, sequences: int, tokens: int, seed: int) -> Tensor:
    """Draw tokens of which each is as likely, shape [B, T]; the first of a sequence is the model's, if it has one."""
    embeddings_VE = _embeddings(bottom)
    draw = torch.Generator().manual_seed(seed)
    input_ids_BT = torch.randint(len(embeddings_VE), (sequences, tokens), generator=draw)
    if bottom.config.bos_token_id is not None:
        input_ids_BT[:, 0] = bottom.config.bos_token_id
    return input_ids_BT.to(embeddings_VE.device)


def made_up_tokens(parts: Partition, *, tokens: int, sequences: int = MADE_UP_SEQUENCES, seed: int = 0) -> Tensor:
    """Let the model make up text: nobody's, and as frequent in its tokens as what it was trained on.

    Args:
        parts: The segments.
        tokens: Tokens of each sequence, T.
        sequences: Sequences, B.
        seed: Seed of the draw.

    Returns:
        Tokens, shape [B, T], each drawn from the model's own distribution after those before it.
    """
    draw = torch.Generator().manual_seed(seed)
    input_ids_BT = random_tokens(parts.bottom, sequences=sequences, tokens=1, seed=seed)
    caches = [segment.new_cache() for segment in parts]
    with _evaluating(*parts):
        while input_ids_BT.shape[1] < tokens:
            hidden_B1D = parts.bottom(input_ids_BT[:, -1:], past_key_values=caches[0])
            hidden_B1D = parts.trunk(hidden_B1D, past_key_values=caches[1])
            logits_BV = parts.top(hidden_B1D, past_key_values=caches[2]).logits[:, -1].float().cpu()
            next_B1 = torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=draw)
            input_ids_BT = torch.cat([input_ids_BT, next_B1.to(input_ids_BT.device)], dim=1)
    return input_ids_BT


def pack(examples: Sequence[Example], *, tokens: int) -> Tensor:
    """Lay public examples end to end and cut them into sequences of T tokens, shape [B, T]; the rest is left out.

    Raises:
        ValueError: If there are fewer than T tokens in all.
    """
    stream = torch.tensor([token for example in examples for token in example.input_ids])
    if len(stream) < tokens:
        raise ValueError(f"The public text has {len(stream)} tokens; give {tokens} or more.")
    return stream[: len(stream) // tokens * tokens].view(-1, tokens)


def _clean(
    bottom: Segment, input_ids_BT: Tensor, clipping_norm: float | None, per: Per
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give tokens, shape [B, T], and their clipped smashed data, shape [B, T, D], some sequences at a time."""
    for piece_BT in input_ids_BT.split(_AT_ONCE):
        x_BTD = bottom(piece_BT).float()
        yield piece_BT, x_BTD if clipping_norm is None else clip(x_BTD, clipping_norm, per=per)


def _log_prior(public_BT: Tensor | None, vocabulary: int) -> Tensor:
    if public_BT is None:
        return torch.zeros(vocabulary)
    counts_V = torch.bincount(public_BT.flatten().cpu(), minlength=vocabulary) + _UNSEEN
    return (counts_V / counts_V.sum()).log()


def _embeddings(bottom: Segment) -> Tensor:
    return cast(Tensor, bottom.model.get_input_embeddings().weight).detach()


def _has_positions(bottom: Segment) -> bool:
    return family_of(bottom.config.model_type).positions is not None


@contextmanager
def _evaluating(*segments: Segment) -> Iterator[None]:
    """Run segments without dropout and without gradients, and leave them as they were."""
    were_training = [segment.training for segment in segments]
    for segment in segments:
        segment.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for segment, was_training in zip(segments, were_training, strict=True):
            segment.train(was_training)
