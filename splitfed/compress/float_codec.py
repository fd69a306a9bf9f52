"""Codecs that send every element as a floating-point number: as it is, or as a narrower one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfed.compress.payload import (
    Payload,
    as_payload,
    check_dtype,
    check_shape,
    is_finite,
    read_payload,
    require_finite,
    source,
)


@dataclass(frozen=True)
class RawCodec:
    """Sends the elements as they are: little-endian, in the tensor's own dtype.

    Guarantees:
        * Decoding with the dtype that was sent gives every element back to the bit.
    """

    name: str = "none"

    def encode(self, tensor: Tensor) -> memoryview:
        """Give the tensor's bytes.

        Raises:
            ValueError: If the tensor is not floating point, empty, or holds a NaN or an infinity.
        """
        values = source(tensor)
        require_finite(values, "The tensor")
        is_shared = values.data_ptr() == tensor.data_ptr()
        return as_payload(values.clone() if is_shared else values)

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Give the tensor back.

        Raises:
            ValueError: If the length is not that of the shape in this dtype, or a value is not finite.
        """
        content = read_payload(payload, self.encoded_bytes(shape, dtype))
        values = torch.frombuffer(content, dtype=dtype)
        require_finite(values, "The payload")
        return values.view(tuple(shape))

    def encoded_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Give elements times bytes of one element.

        Raises:
            ValueError: If no tensor of this shape and dtype can be sent.
        """
        return torch.Size(check_shape(shape)).numel() * check_dtype(dtype)


@dataclass(frozen=True)
class FloatCodec:
    """Sends the elements as 16-bit floating-point numbers, little-endian, rounded to nearest even.

    A value too large for the wire's dtype is refused, not saturated: it would otherwise be wrong by an unbounded amount
    with nobody told. float16 ends at 65,504, which the outlier channels of some models pass; bfloat16 does not.

    Attributes:
        name: Name of the codec.
        wire_dtype: ``torch.float16`` or ``torch.bfloat16``.

    Guarantees:
        * fp16: ``|x - decode(encode(x))| <= max(2**-11 * |x|, 2**-25)`` for every element.
        * bf16: ``|x - decode(encode(x))| <= max(2**-8 * |x|, 2**-134)`` for every element.
        * A value beyond the range of the wire's dtype is refused with the range.
    """

    name: str
    wire_dtype: torch.dtype

    def encode(self, tensor: Tensor) -> memoryview:
        """Give the elements in the wire's dtype.

        Raises:
            ValueError: If the tensor is not floating point, empty, not finite, or has a value beyond the range.
        """
        values = source(tensor)
        codes = values.to(self.wire_dtype)
        if not is_finite(codes):
            require_finite(values, "The tensor")
            raise ValueError(
                f"The tensor holds {values.abs().max().item():.6g}, and {self.name} ends at "
                f"{torch.finfo(self.wire_dtype).max:.6g}; choose bf16, int8 or none for this direction."
            )
        is_shared = codes.data_ptr() == tensor.data_ptr()
        return as_payload(codes.clone() if is_shared else codes)

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Give the elements in the dtype asked for.

        Raises:
            ValueError: If the length is not that of the shape, or a value is not finite in this dtype.
        """
        content = read_payload(payload, self.encoded_bytes(shape, dtype))
        values = torch.frombuffer(content, dtype=self.wire_dtype).to(dtype)
        require_finite(values, f"The payload, read as {dtype},")
        return values.view(tuple(shape))

    def encoded_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Give two bytes an element.

        Raises:
            ValueError: If no tensor of this shape and dtype can be sent.
        """
        check_dtype(dtype)
        return 2 * torch.Size(check_shape(shape)).numel()
