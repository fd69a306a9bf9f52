"""What a server knows that wants the tokens behind smashed data: everything but the private text.

Shapes: B sequences, T tokens, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

Rows = Callable[[Tensor], Tensor]
"""Hidden vectors [B, T, D] to hidden vectors of the same shape."""

_TOKENS_AT_ONCE: Final = 2048


@dataclass(frozen=True)
class Texts:
    """Sequences of tokens, padded on the right.

    Attributes:
        input_ids_BT: Token ids, int64, shape [B, T].
        lengths_B: Real tokens of each sequence, int64, shape [B], 1 to T.

    Raises:
        ValueError: If the shapes do not fit, or a length is outside its range.
    """

    input_ids_BT: Tensor
    lengths_B: Tensor

    def __post_init__(self) -> None:
        if self.input_ids_BT.dim() != 2 or self.lengths_B.shape != self.input_ids_BT.shape[:1]:
            raise ValueError(
                f"Texts are token ids [B, T] with lengths [B], not {tuple(self.input_ids_BT.shape)} with "
                f"{tuple(self.lengths_B.shape)}."
            )
        if not ((self.lengths_B >= 1) & (self.lengths_B <= self.input_ids_BT.shape[1])).all():
            raise ValueError(f"A text has from 1 to {self.input_ids_BT.shape[1]} real tokens; leave empty ones out.")

    @property
    def is_real(self) -> Tensor:
        """Whether a token is of the text and not of its padding, bool, shape [B, T]."""
        places_T = torch.arange(self.input_ids_BT.shape[1], device=self.lengths_B.device)
        return places_T < self.lengths_B[:, None]


@dataclass(frozen=True)
class TokenKnowledge:
    """Weights, mechanism and public text: what the server has before the first private sequence arrives.

    Attributes:
        bottom: Token ids [B, T] to hidden vectors [B, T, D], by the base weights; run without gradients.
        release: What the device makes of hidden vectors, with fresh noise in every call.
        clip: The same without the noise.
        public: Text like the private one, padded in the same way to the same T.
        vocabulary: Token ids there are, V.
        log_density: Log density of a row's noise, up to a constant, given the row's length; None with noise off.
        is_row_by_row: Whether a row depends on its own token and place alone: no block in the bottom, and a clip per
            token.
    """

    bottom: Callable[[Tensor], Tensor]
    release: Rows
    clip: Rows
    public: Texts
    vocabulary: int
    log_density: Callable[[Tensor], Tensor] | None = None
    is_row_by_row: bool = False

    @torch.no_grad()
    def hidden(self, input_ids_BT: Tensor) -> Tensor:
        """Run the bottom on text of the server's own, some sequences at a time."""
        sequences = max(1, _TOKENS_AT_ONCE // input_ids_BT.shape[1])
        parts = [self.bottom(part).detach().float() for part in input_ids_BT.split(sequences)]
        return torch.cat(parts)

    @property
    def device(self) -> torch.device:
        """Where the public text is, and everything that attacks compute."""
        return self.public.input_ids_BT.device


def gaussian_log_density(std: float) -> Callable[[Tensor], Tensor]:
    """Give the log density of Gaussian noise by a row's length, up to a constant.

    Args:
        std: Standard deviation of an element, above 0: z · 2·C·√T for a clip to C per token.

    Raises:
        ValueError: If the standard deviation is not above 0.
    """
    if not std > 0:
        raise ValueError(f"Noise has a standard deviation above 0, not {std}; with noise off leave the density out.")
    return lambda length: -length.square() / (2 * std**2)


def metric_log_density(eta: float) -> Callable[[Tensor], Tensor]:
    """Give the log density of noise ∝ exp(-eta · length) by a row's length, up to a constant.

    Args:
        eta: What the mechanism guarantees per distance, above 0.

    Raises:
        ValueError: If eta is not above 0.
    """
    if not eta > 0:
        raise ValueError(f"eta is above 0, not {eta}; with noise off leave the density out.")
    return lambda length: -eta * length
