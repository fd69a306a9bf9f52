"""The interface of a codec and the table of those that a run can choose from.

A codec is a pure function on one tensor: it keeps no state, does not know which sample it encodes, and its payload's
size follows from shape and dtype alone. Lossy codecs run after the noise, where they are post-processing.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Final, Protocol

import torch
from torch import Tensor

from splitfed.compress.float_codec import FloatCodec, RawCodec
from splitfed.compress.int8_codec import Int8Codec
from splitfed.compress.payload import Payload


class Codec(Protocol):
    """Encode and decode of one tensor.

    Guarantees:
        * ``len(encode(x)) == encoded_bytes(x.shape, x.dtype)`` for every tensor that is not refused.
        * ``decode`` checks shape and length before it allocates, and returns finite values or raises ``ValueError``.
        * A payload shares no memory with the tensor that it was made of, nor with the one that is made of it.
        * The same tensor gives the same bytes.
    """

    @property
    def name(self) -> str:
        """The name under which a run chooses this codec."""

    def encode(self, tensor: Tensor) -> memoryview:
        """Give the tensor's payload.

        Args:
            tensor: Floating point, finite, at least one element and one dimension; any device and memory layout.

        Raises:
            ValueError: If the tensor is not of this kind, or holds a value that the codec cannot carry.
        """

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Give the tensor of a payload, on the CPU, contiguous.

        Args:
            payload: What ``encode`` gave, from a sender that is not trusted.
            shape: The tensor's shape, from the same sender.
            dtype: The dtype to give; for the codec ``none`` also the dtype that was sent.

        Raises:
            ValueError: If shape, length and content do not fit together, or a value is not finite.
        """

    def encoded_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Give the exact size of the payload of such a tensor, in bytes, allocating nothing.

        Raises:
            ValueError: If no tensor of this shape and dtype can be sent.
        """


CODECS: Final = MappingProxyType[str, Codec](
    {
        "none": RawCodec(),
        "bf16": FloatCodec("bf16", torch.bfloat16),
        "fp16": FloatCodec("fp16", torch.float16),
        "int8": Int8Codec(),
    }
)
"""Every codec by its name."""


def get_codec(name: str) -> Codec:
    """Look a codec up by its name.

    Raises:
        ValueError: If there is no codec of this name.
    """
    try:
        return CODECS[name]
    except KeyError as error:
        raise ValueError(f"There is no codec {name!r}; choose one of {', '.join(CODECS)}.") from error
