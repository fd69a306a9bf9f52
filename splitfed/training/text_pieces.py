"""Text out of tokens as they come."""

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer


class TextPieces(TextStreamer):
    """Gives text away as soon as its words are certain.

    Args:
        tokenizer: Turns tokens into text; special ones are left out.
        write: Takes the text, piece by piece; it ends with the end of a line.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._write = write

    def take(self, token: int | None) -> None:
        """Take the next token; None: the text is over."""
        if token is None:
            self.end()
        else:
            self.put(torch.tensor([token]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Give it away, with the end of the line after the last."""
        self._write(text + "\n" * stream_end)
