import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import splitfed
from splitfed.config import CodecSection
from splitfed.errors import NonFiniteLoss, OutputError
from splitfed.models import Partition
from splitfed.training.decoding import Decoding, generate
from splitfed.training.generation import InProcessGenerationLink, TrunkSequence
from splitfed.training.link import Traffic, link_codecs
from tests.equivalence.tiny_models import VOCABULARY, tiny_model

OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")
PROMPT = [5, 17, 3, 60, 22]
T = 16
END = 2


@dataclass
class Heard:
    """A link that remembers what a server sees."""

    link: InProcessGenerationLink
    change: Callable[[Tensor], Tensor] = lambda output_1TD: output_1TD
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    @property
    def traffic(self) -> Traffic:
        return self.link.traffic

    def forward(self, smashed_1TD: Tensor) -> Future[Tensor]:
        self.shapes.append(tuple(smashed_1TD.shape))
        self.rows.append(smashed_1TD)
        answer: Future[Tensor] = Future()
        answer.set_result(self.change(self.link.forward(smashed_1TD).result()))
        return answer


@dataclass
class Split:
    """A tiny model, whole and in parts."""

    whole: PreTrainedModel
    parts: Partition

    def link(self, **own: Any) -> Heard:
        sequence = TrunkSequence(self.parts.trunk, {}, {}, max_tokens=T)
        return Heard(InProcessGenerationLink(sequence, link_codecs(OPEN)), **own)

    def text(self, link: Heard | None = None, *, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
        given = {"max_tokens": T, "end_tokens": {END}, "decoding": Decoding(), **options}
        return generate(link or self.link(), self.parts.bottom, self.parts.top, prompt, **given)

    def stock(self, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
        ids = torch.tensor([prompt])
        given = {"max_length": T, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        return self.whole.generate(ids, **{**given, **options})[0, len(prompt) :].tolist()


def split(family: str = "llama", bottom_blocks: int = 1, top_blocks: int = 1) -> Split:
    whole = tiny_model(family)
    return Split(whole, splitfed.partition(whole, bottom_blocks=bottom_blocks, top_blocks=top_blocks))


@pytest.fixture(scope="module")
def llama() -> Split:
    return split()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom"])
@pytest.mark.parametrize("cut", [(0, 0), (1, 2)])
def test_the_most_likely_text_is_that_of_the_unsplit_model(family: str, cut: tuple[int, int]) -> None:
    found = split(family, *cut)
    for prompt in (PROMPT, [7], [9, 9, 31, 4, 11, 50, 8, 2, 90]):
        assert found.text(prompt=prompt) == found.stock(prompt)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 1.5, "top_p": 0.5}],
    ids=str,
)
def test_drawn_text_is_that_of_transformers_under_the_same_seed(llama: Split, options: dict[str, float]) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        wanted = llama.stock(do_sample=True, top_k=0, **options)
        assert llama.text(decoding=Decoding(**options, seed=seed)) == wanted


def test_draws_without_a_seed_differ(llama: Split) -> None:
    assert len({tuple(llama.text(decoding=Decoding(temperature=2.0))) for _ in range(4)}) > 1
    assert llama.text(decoding=Decoding(temperature=0.0, top_p=0.5)) == llama.text()


def test_a_token_that_ends_the_text_is_the_last(llama: Split) -> None:
    whole = llama.text()
    end = next(token for token in whole[3:] if token not in whole[:3])
    wanted = llama.stock(eos_token_id=end)
    assert wanted == whole[: whole.index(end) + 1]
    link = llama.link()
    assert llama.text(link, end_tokens={end, VOCABULARY + 1}) == wanted
    assert sum(rows for _, rows, _ in link.shapes) == len(PROMPT) + len(wanted) - 1


def test_without_noise_the_prompt_leaves_in_one_piece_and_no_row_too_many(llama: Split) -> None:
    link = llama.link()
    text = llama.text(link)
    assert [rows for _, rows, _ in link.shapes] == [len(PROMPT)] + [1] * (T - len(PROMPT) - 1)
    assert len(text) == T - len(PROMPT)


def test_tokens_are_given_while_the_server_works_and_end_with_a_word(llama: Split) -> None:
    link, given = llama.link(), list[int | None]()
    rows_before = []
    text = llama.text(link, on_token=lambda token: (given.append(token), rows_before.append(len(link.rows))))
    assert given == [*text, None]
    assert rows_before[:3] == [2, 3, 4]


@pytest.mark.parametrize("prompt", [[7], PROMPT, PROMPT * 2, list(range(3, 3 + T - 1))], ids=len)
@pytest.mark.parametrize("ends_after", [1, 3, None])
def test_with_noise_neither_the_prompts_length_nor_the_texts_shows(
    llama: Split, prompt: list[int], ends_after: int | None
) -> None:
    plain = llama.text(prompt=prompt)
    ends = set(plain[ends_after - 1 : ends_after]) if ends_after else set()
    calls, link = list[tuple[str, int]](), llama.link()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append((name, len(link.rows))))
        for name, module in (("bottom", llama.parts.bottom), ("top", llama.parts.top))
    ]
    decoding = Decoding()
    choose, chosen = decoding.choose, list[int]()
    decoding.choose = lambda *given: (chosen.append(len(link.rows)), choose(*given))[1]  # type: ignore[method-assign]
    text = llama.text(link, prompt=prompt, end_tokens=ends, release=lambda rows_1TD: rows_1TD + 0.0, decoding=decoding)
    for handle in handles:
        handle.remove()
    assert [shape[1] for shape in link.shapes] == [1] * (T - 1)
    assert calls == [(name, at + (name == "top")) for at in range(T - 1) for name in ("bottom", "top")]
    assert chosen == list(range(1, T))
    assert text == llama.stock(prompt, eos_token_id=list(ends) or None)


def test_what_leaves_is_what_was_released(llama: Split) -> None:
    released = list[Tensor]()

    def release(rows_1TD: Tensor) -> Tensor:
        released.append(rows_1TD + torch.randn(rows_1TD.shape))
        return released[-1]

    link = llama.link()
    llama.text(link, release=release)
    assert all(sent is given for sent, given in zip(link.rows, released, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_answers_that_are_not_finite_end_the_text_and_with_noise_only_after_the_last_row(
    llama: Split, value: float
) -> None:
    plain, hidden = (llama.link(change=lambda output_1TD: output_1TD * value) for _ in range(2))
    with pytest.raises(NonFiniteLoss, match="logits are not finite"):
        llama.text(plain)
    assert len(plain.rows) == 1
    with pytest.raises(NonFiniteLoss, match="logits are not finite"):
        llama.text(hidden, release=lambda rows_1TD: rows_1TD, decoding=Decoding(temperature=1.0))
    assert len(hidden.rows) == T - 1


def test_answers_beyond_all_bounds_are_scaled_down_and_stop_nothing(llama: Split) -> None:
    link = llama.link(change=lambda output_1TD: output_1TD * 1e30)
    assert len(llama.text(link, release=lambda rows_1TD: rows_1TD)) == T - len(PROMPT)


@pytest.mark.parametrize("error", [BrokenPipeError(), OutputError("full")], ids=["broken pipe", "full disk"])
def test_a_reader_who_goes_ends_the_text_and_with_noise_only_after_the_last_row(llama: Split, error: Exception) -> None:
    told = list[int | None]()

    def on_token(token: int | None) -> None:
        told.append(token)
        if len(told) == 2:
            raise error

    plain, hidden = llama.link(), llama.link()
    with pytest.raises(type(error)):
        llama.text(plain, on_token=on_token)
    assert len(plain.rows) == 3
    told.clear()
    with pytest.raises(type(error)):
        llama.text(hidden, on_token=on_token, release=lambda rows_1TD: rows_1TD)
    assert (len(hidden.rows), len(told)) == (T - 1, 2)


def test_what_the_bottom_makes_that_is_not_finite_is_not_sent(llama: Split) -> None:
    link = llama.link()
    handle = llama.parts.bottom.register_forward_hook(lambda module, given, output: output * math.nan)
    with pytest.raises(NonFiniteLoss, match="bottom's output is not finite, so it was not sent"):
        llama.text(link)
    handle.remove()
    assert link.rows == []
