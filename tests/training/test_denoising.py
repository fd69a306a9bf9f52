"""Denoisers are fitted to the model and to public text, and take the trunk nearer to clean smashed data."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitfed
from splitfed.models import LoraSettings, Partition, Segment, adapter_parameters, add_adapter, partition
from splitfed.privacy.clip import Per, clip
from splitfed.privacy.denoise import Table
from splitfed.privacy.mixture import Mixture
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.denoising import (
    fit_output,
    fit_smashed,
    made_up_tokens,
    pack,
    random_tokens,
    token_rows,
)
from splitfed.training.simulate import examples_of
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import VOCABULARY, tiny_model
from tests.training.split_client import examples

T = 12
C = 1.5
POSITIONED = ["biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"]
SCALED = ["bloom", "gemma", "granite"]


def parts_of(family: str = "llama", *, bottom_blocks: int = 0, top_blocks: int = 1) -> Partition:
    return partition(tiny_model(family), bottom_blocks=bottom_blocks, top_blocks=top_blocks)


def tokens(sequences: int, length: int = T, *, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def noise_like(x_BTD: Tensor, std: float, *, seed: int = 1) -> Tensor:
    return std * torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def smashed(bottom: Segment, input_ids_BT: Tensor, *, per: Per = "token", clipping_norm: float = C) -> Tensor:
    return clip(bottom.eval()(input_ids_BT), clipping_norm, per=per)


def error(estimate_BTD: Tensor, x_BTD: Tensor) -> float:
    return (estimate_BTD - x_BTD).pow(2).mean().item()


# What a bottom without blocks sends


@pytest.mark.parametrize("family", ["llama", *POSITIONED, *SCALED])
def test_a_bottom_without_blocks_sends_a_row_for_each_token_plus_its_position(family: str) -> None:
    bottom = parts_of(family).bottom
    rows_VD, positions_TD = token_rows(bottom, max_tokens=T)
    assert (positions_TD is not None) == (family in POSITIONED)
    input_ids_BT = tokens(4)
    wanted_BTD = rows_VD[input_ids_BT] + (0 if positions_TD is None else positions_TD)
    with torch.no_grad():
        assert_equal_to_rounding(bottom.eval()(input_ids_BT), wanted_BTD, "smashed data")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_little_noise_is_taken_away_to_the_last_bit_that_matters(family: str) -> None:
    bottom = parts_of(family).bottom
    found = fit_smashed(bottom, clipping_norm=C, max_tokens=T)
    assert isinstance(found, Table)
    x_BTD = smashed(bottom, tokens(4))
    y_BTD = x_BTD + noise_like(x_BTD, 0.05)
    assert error(y_BTD, x_BTD) > 1e-3
    torch.testing.assert_close(found.denoiser(std=0.05)(y_BTD), x_BTD, rtol=1e-3, atol=1e-3)


def test_what_is_not_clipped_is_a_table_too() -> None:
    bottom = parts_of().bottom
    with torch.no_grad():
        x_BTD = bottom(tokens(4))
    found = fit_smashed(bottom, clipping_norm=None, max_tokens=T)
    assert isinstance(found, Table)
    torch.testing.assert_close(found.denoiser(eta=400.0)(x_BTD + noise_like(x_BTD, 0.01)), x_BTD, rtol=0.01, atol=0.01)


def test_public_text_says_how_frequent_a_token_is() -> None:
    bottom = parts_of().bottom
    public_BT = tokens(64) % 7 + 3
    told, untold = (
        fit_smashed(bottom, clipping_norm=C, max_tokens=T, public_BT=public) for public in (public_BT, None)
    )
    counts_V = torch.bincount(public_BT.flatten(), minlength=VOCABULARY) + 0.5
    torch.testing.assert_close(told.log_prior_V.exp(), counts_V / counts_V.sum())
    assert untold.log_prior_V.std() == 0
    x_BTD = smashed(bottom, tokens(64, seed=5) % 7 + 3)
    y_BTD = x_BTD + noise_like(x_BTD, 0.5)
    assert error(told.denoiser(std=0.5)(y_BTD), x_BTD) < 0.7 * error(untold.denoiser(std=0.5)(y_BTD), x_BTD)


# What deeper bottoms send


@pytest.mark.parametrize(("bottom_blocks", "per"), [(1, "token"), (2, "token"), (1, "sequence"), (0, "sequence")])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fit_takes_away_more_noise_than_a_wiener_filter(family: str, bottom_blocks: int, per: Per) -> None:
    """On tokens that the fit has not seen in this order."""
    bottom = parts_of(family, bottom_blocks=bottom_blocks).bottom
    clipping_norm = C if per == "token" else C * math.sqrt(T)
    found = fit_smashed(bottom, clipping_norm=clipping_norm, max_tokens=T, per=per)
    assert isinstance(found, Mixture)
    public_BT, private_BT = (random_tokens(bottom, sequences=n, tokens=T, seed=n) for n in (256, 50))
    public_BTD = smashed(bottom, public_BT, per=per, clipping_norm=clipping_norm).flatten(0, 1)
    wiener = Mixture(public_BTD.mean(0)[None], torch.zeros(1), public_BTD.T.cov())
    x_BTD = smashed(bottom, private_BT, per=per, clipping_norm=clipping_norm)
    y_BTD = x_BTD + noise_like(x_BTD, 0.2)
    left = error(found.denoiser(std=0.2)(y_BTD), x_BTD)
    assert left < 0.97 * error(wiener.denoiser(std=0.2)(y_BTD), x_BTD) < 0.5 * error(y_BTD, x_BTD)


def test_learned_positions_are_told_from_tokens_at_deeper_cuts() -> None:
    bottom = parts_of("gpt2", bottom_blocks=1).bottom
    found = fit_smashed(bottom, clipping_norm=C, max_tokens=T)
    assert isinstance(found, Mixture)
    assert found.offsets_TD is not None
    assert found.offsets_TD.shape == (T, bottom.hidden_size)
    assert found.offsets_TD.std(dim=0).mean() > 0.05
    rotary = fit_smashed(parts_of(bottom_blocks=1).bottom, clipping_norm=C, max_tokens=T, rows_a_token=3)
    assert isinstance(rotary, Mixture)
    assert rotary.offsets_TD is None


def test_an_adapter_in_the_bottom_is_part_of_what_is_fitted() -> None:
    bottom = parts_of(bottom_blocks=1).bottom
    before = fit_smashed(bottom, clipping_norm=C, max_tokens=T)
    add_adapter(bottom, LoraSettings(rank=2, alpha=4.0), seed=0)
    for parameter in adapter_parameters(bottom).values():
        with torch.no_grad():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    after = fit_smashed(bottom, clipping_norm=C, max_tokens=T)
    x_BTD = smashed(bottom, tokens(50, seed=8))
    y_BTD = x_BTD + noise_like(x_BTD, 0.1)
    assert error(after.denoiser(std=0.1)(y_BTD), x_BTD) < 0.9 * error(before.denoiser(std=0.1)(y_BTD), x_BTD)


def test_a_fit_is_repeatable_reads_no_generator_and_leaves_the_segments_as_they_were() -> None:
    parts = partition(tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3), bottom_blocks=1, top_blocks=1)
    parts.bottom.train()
    parts.trunk.eval()
    before = torch.get_rng_state()
    first, second = (
        fit_smashed(parts.bottom, clipping_norm=C, max_tokens=T, public_BT=tokens(5), rows_a_token=3) for _ in range(2)
    )
    outputs = [fit_output(parts, tokens(20), clipping_norm=C, std=0.1).state() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(first, Mixture)
    assert isinstance(second, Mixture)
    for one, other in ((first.state(), second.state()), outputs):
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
        assert not any(tensor.requires_grad for tensor in one.values())
    assert parts.bottom.training
    assert not parts.trunk.training
    assert torch.is_grad_enabled()


def test_public_sequences_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="have 11 tokens and the run 12"):
        fit_smashed(parts_of().bottom, clipping_norm=C, max_tokens=T, public_BT=tokens(5, 11))


# Public text


def test_random_tokens_cover_the_vocabulary_after_the_models_first() -> None:
    bottom = parts_of().bottom
    drawn_BT = random_tokens(bottom, sequences=100, tokens=T, seed=0)
    assert drawn_BT.shape == (100, T)
    assert drawn_BT[:, 0].tolist() == [bottom.config.bos_token_id] * 100
    assert drawn_BT[:, 1:].unique().tolist() == list(range(VOCABULARY))
    assert not torch.equal(drawn_BT, random_tokens(bottom, sequences=100, tokens=T, seed=1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_made_up_text_is_drawn_from_the_models_own_distribution(family: str) -> None:
    """Frequencies of the second token against the whole model's probabilities; and a sure model leaves no choice."""
    model = tiny_model(family)
    n = 4000
    parts = partition(model, bottom_blocks=1, top_blocks=1)
    first_BT = torch.full((n, 1), model.config.bos_token_id)
    drawn_BT = made_up_tokens(parts, sequences=n, tokens=2, seed=0)
    assert torch.equal(drawn_BT[:, :1], first_BT)
    with torch.no_grad():
        expected_V = n * model.eval()(first_BT[:1]).logits[0, -1].softmax(-1)
        counts_V = torch.bincount(drawn_BT[:, 1], minlength=VOCABULARY)
        squares = ((counts_V - expected_V) ** 2 / expected_V).sum().item()
        assert squares < VOCABULARY - 1 + 5 * math.sqrt(2 * (VOCABULARY - 1))  # chi-squared
        model.get_output_embeddings().weight *= 1e4
    drawn_BT = made_up_tokens(parts, sequences=2, tokens=T, seed=0)
    greedy_BT = model.generate(
        first_BT[:2], attention_mask=first_BT[:2] * 0 + 1, max_length=T, do_sample=False, eos_token_id=None
    )
    assert torch.equal(drawn_BT, greedy_BT)


def test_examples_are_packed_end_to_end() -> None:
    public = examples(5, 9, 7)
    packed_BT = pack(public, tokens=6)
    assert packed_BT.shape == (3, 6)
    stream = [token for example in public for token in example.input_ids]
    assert packed_BT.flatten().tolist() == stream[:18]
    with pytest.raises(ValueError, match="has 21 tokens; give 22 or more"):
        pack(public, tokens=22)


# What it is worth


def test_a_device_takes_away_more_than_the_trunk_alone() -> None:
    parts = parts_of(bottom_blocks=1)
    found = fit_output(parts, tokens(300), clipping_norm=C, std=0.3)
    x_BTD = smashed(parts.bottom, tokens(50, seed=8))
    noise_BTD = noise_like(x_BTD, 0.3)
    with torch.no_grad():
        clean_BTD, noisy_BTD = parts.trunk.eval()(x_BTD), parts.trunk(x_BTD + noise_BTD)
    assert error(found(noisy_BTD, x_BTD, noise_BTD), clean_BTD) < 0.7 * error(noisy_BTD, clean_BTD)


def test_a_device_learns_what_is_left_after_the_trunks_own_denoiser() -> None:
    parts = parts_of(bottom_blocks=1)
    denoiser = fit_smashed(parts.bottom, clipping_norm=C, max_tokens=T).denoiser(std=0.3)
    x_BTD = smashed(parts.bottom, tokens(50, seed=8))
    noise_BTD = noise_like(x_BTD, 0.3)
    with torch.no_grad():
        clean_BTD = parts.trunk.eval()(x_BTD)
        noisy_BTD = parts.trunk(denoiser(x_BTD + noise_BTD))
    matched, unmatched = (
        fit_output(parts, tokens(300), clipping_norm=C, std=0.3, denoiser=used) for used in (denoiser, None)
    )
    errors = [error(found(noisy_BTD, x_BTD, noise_BTD), clean_BTD) for found in (matched, unmatched)]
    assert errors[0] < errors[1]
    assert errors[0] < error(noisy_BTD, clean_BTD)


@pytest.fixture(scope="module")
def base() -> tuple[Any, Tensor]:
    """The shipped model, and tokens of text that it was not trained on."""
    from splitfed.demo.shards import passages

    folder = splitfed.base_model_folder()
    text = examples_of(passages()[:60], AutoTokenizer.from_pretrained(folder), max_tokens=64)
    input_ids_BT = torch.tensor([found.input_ids for found in text if len(found.input_ids) == 64][:24])
    return AutoModelForCausalLM.from_pretrained(folder).eval(), input_ids_BT


@pytest.mark.parametrize("bottom_blocks", [0, 1])
def test_a_real_models_loss_under_noise_comes_most_of_the_way_back(base: Any, bottom_blocks: int) -> None:
    """With the sequence mechanism's noise at z = 0.005, from the model alone: random tokens, no text."""
    model, input_ids_BT = base
    parts = partition(model, bottom_blocks=bottom_blocks, top_blocks=1)
    with torch.no_grad():
        clipping_norm = parts.bottom(input_ids_BT).norm(dim=-1).median().item()
    std = 0.005 * 2 * clipping_norm * math.sqrt(64)
    found = fit_smashed(parts.bottom, clipping_norm=clipping_norm, max_tokens=64)
    x_BTD = smashed(parts.bottom, input_ids_BT, clipping_norm=clipping_norm)
    y_BTD = x_BTD + noise_like(x_BTD, std)

    @torch.no_grad()
    def loss(entering_BTD: Tensor) -> float:
        return causal_lm_loss(parts.top(parts.trunk(entering_BTD)).logits, input_ids_BT, input_ids_BT.numel()).item()

    clean, noisy, denoised = loss(x_BTD), loss(y_BTD), loss(found.denoiser(std=std)(y_BTD))
    assert noisy - clean > 0.5
    assert denoised - clean < 0.3 * (noisy - clean)
