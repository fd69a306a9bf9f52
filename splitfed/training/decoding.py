"""Text from the split model: the device's half, with caches of its own, one sequence after the other.

Shapes: T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from inspect import signature
from typing import cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from splitfed.errors import NonFiniteLoss, SplitFedError
from splitfed.models import Bottom, Top
from splitfed.privacy import bounded_reply
from splitfed.training.generation import GenerationLink


class Decoding:
    """Chooses the next token, as transformers does: the most likely one, or one that is drawn.

    Args:
        temperature: Logits are divided by it before a token is drawn; 0 = the most likely one; None = 1 where
            ``top_p`` is given, else 0.
        top_p: Draw among the most likely tokens that have so much probability together; None = among all.
        seed: Seed of the draws; None = from the operating system.

    Guarantees:
        * What is chosen is what ``generate`` of transformers chooses, drawn tokens after ``torch.manual_seed(seed)``
          included.
    """

    def __init__(
        self, *, temperature: float | None = None, top_p: float | None = None, seed: int | None = None
    ) -> None:
        temperature = float(top_p is not None) if temperature is None else temperature
        self._draws = torch.Generator()
        self._draws.seed() if seed is None else self._draws.manual_seed(seed)
        self._is_greedy = temperature == 0
        self._processors = LogitsProcessorList()
        if temperature not in (0.0, 1.0):
            self._processors.append(TemperatureLogitsWarper(temperature))
        if top_p is not None and top_p < 1 and not self._is_greedy:
            self._processors.append(TopPLogitsWarper(top_p))

    def choose(self, ids_1T: Tensor, logits_1V: Tensor) -> int:
        """Choose a token.

        Args:
            ids_1T: The tokens before it, shape [1, T].
            logits_1V: The logits after the last of them, finite, shape [1, V].
        """
        scores_1V: Tensor = self._processors(cast(LongTensor, ids_1T), cast(FloatTensor, logits_1V))
        if self._is_greedy:
            return int(scores_1V.argmax(dim=-1))
        return int(torch.multinomial(scores_1V.softmax(dim=-1), num_samples=1, generator=self._draws))


@torch.no_grad()
def generate(
    link: GenerationLink,
    bottom: Bottom,
    top: Top,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    end_tokens: Collection[int],
    decoding: Decoding,
    release: Callable[[Tensor], Tensor] | None = None,
    filler: int = 0,
    on_token: Callable[[int | None], None] = lambda token: None,
) -> list[int]:
    """Generate one sequence over a link.

    Args:
        link: The sequence's link.
        bottom: The bottom, with the adapter of the round that the link is of.
        top: The top, likewise.
        prompt: Token ids, 1 to ``max_tokens - 1`` of them.
        max_tokens: Most tokens of prompt and text together, T.
        end_tokens: Tokens that end the text.
        decoding: Chooses tokens.
        release: Gives the form in which rows leave, noise and all; None = they leave as they are.
        filler: Token id that stands after the text's end where rows still leave.
        on_token: Called with each token of the text, and with None once it is over, while the server works on the next
            row; in this thread.

    Returns:
        The text's tokens, with the one that ended it.

    Raises:
        NonFiniteLoss: If the model's numbers are not finite.
        OSError: What ``on_token`` raises, as well as a `SplitFedError`.
        LinkError: If the sequence is lost.

    Guarantees:
        * The tokens are those of the unsplit model, up to float32 rounding of its logits.
        * Without ``release`` no row leaves that is not needed, and the prompt leaves in one piece.
        * With ``release`` exactly T − 1 rows leave, one at a time, each after the answer to the one before, and the
          same operations are made for each: neither the prompt's length nor the text's shows. What is not finite, or
          cannot be written, ends nothing before the last row.
    """
    bottom.eval()
    top.eval()
    is_hidden = release is not None
    caches = bottom.new_cache(), top.new_cache()
    options = {"logits_to_keep": 1} if "logits_to_keep" in signature(top.model.forward).parameters else {}
    tokens, text, sent = list(prompt), list[int](), 0
    waiting: list[int | None] = []
    is_over, was_finite, failure = False, True, None

    def tell() -> Exception | None:
        try:
            for each in waiting if failure is None else ():
                on_token(each)
        except (OSError, SplitFedError) as error:  # a reader who has seen enough would tell how long the text is
            if not is_hidden:
                raise
            return error
        finally:
            waiting.clear()
        return failure

    while sent < max_tokens - 1 and (is_hidden or not is_over):
        piece = tokens[sent : sent + 1] if is_hidden else tokens[sent:]
        smashed_1TD = bottom(torch.tensor([piece]), past_key_values=caches[0])
        if not (is_hidden or torch.isfinite(smashed_1TD).all()):
            raise NonFiniteLoss("The bottom's output is not finite, so it was not sent; train the adapter again.")
        answer = link.forward(smashed_1TD if release is None else release(smashed_1TD))
        failure = tell()
        output_1TD = bounded_reply(answer.result())
        logits_1V = top(output_1TD, past_key_values=caches[1], **options).logits[:, -1].float()
        sent += len(piece)
        is_finite = bool(torch.isfinite(logits_1V).all())
        was_finite = was_finite and is_finite
        if not (was_finite or is_hidden):
            break
        token = decoding.choose(torch.tensor([tokens[:sent]]), logits_1V.nan_to_num())
        if sent == len(tokens):
            tokens.append(filler if is_over else token)
            if not is_over:
                text.append(token)
                is_over = token in end_tokens or len(tokens) == max_tokens
                waiting += [token, None] if is_over else [token]
    failure = tell()
    if failure is not None:
        raise failure
    if not was_finite:
        raise NonFiniteLoss("The model's logits are not finite, so what it wrote means nothing; train it again.")
    return text
