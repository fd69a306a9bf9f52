"""The codec that a run uses by default: one byte an element, and a scale for each block of 64."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from splitfed.compress.payload import (
    Payload,
    as_payload,
    check_dtype,
    check_shape,
    read_payload,
    require_finite,
    source,
)

BLOCK: Final = 64
"""Elements of the last dimension that share a scale; the last block is shorter where 64 does not divide it."""

_LEVELS: Final = 127
_SCALE_BYTES: Final = 4
_LARGEST_SCALE: Final = torch.finfo(torch.float32).max / 128
_SMALLEST_SCALE: Final = torch.finfo(torch.float32).tiny


class Int8Codec:
    """Quantizes to int8 with one float32 scale per block of 64 elements of the last dimension.

    The payload is the scales, float32 little-endian, one for each block, row after row; then the codes, one signed byte
    for each element. A block's scale is its largest magnitude ÷ 127. The shape legend of this file: N rows (all but the
    last dimension), D last dimension, K blocks of a row.

    Guarantees:
        * ``|x - decode(encode(x))| <= scale / 2`` for every element, with scale = largest magnitude of its block ÷ 127,
          up to float32 rounding (a relative 2⁻²¹ of the block's largest magnitude).
        * An all-zero block decodes to zeros, and so does one whose largest magnitude is under 127 · 2⁻¹²⁶ ≈ 1.5e-36.
        * Encoding what was decoded gives the same codes.
        * A payload with a NaN, infinite, negative or overflowing scale is refused.
    """

    name: str = "int8"

    def encode(self, tensor: Tensor) -> memoryview:
        """Give scales and codes.

        Args:
            tensor: Floating point and finite, magnitudes under 3.37e38.

        Raises:
            ValueError: If the tensor is not floating point, empty, not finite, or has a larger magnitude.
        """
        x_NKb = _in_blocks(source(tensor).to(torch.float32))
        scaled_NKb = x_NKb.abs()
        scale_NK1 = scaled_NKb.amax(-1, keepdim=True).div_(_LEVELS)
        largest = scale_NK1.max().item()
        if not largest <= _LARGEST_SCALE:  # a NaN fails every comparison
            require_finite(x_NKb, "The tensor")
            raise ValueError(f"The tensor holds {largest * _LEVELS:.6g}; int8 ends at {_LARGEST_SCALE * _LEVELS:.6g}.")
        scale_NK1.masked_fill_(scale_NK1 < _SMALLEST_SCALE, 0)
        torch.mul(x_NKb, scale_NK1.reciprocal().nan_to_num_(posinf=0), out=scaled_NKb)

        rows, columns, scale_bytes = _layout(tensor.shape)
        payload = torch.empty(scale_bytes + rows * columns, dtype=torch.uint8)
        payload[:scale_bytes].view(torch.float32).copy_(scale_NK1.view(-1))
        codes_ND = payload[scale_bytes:].view(torch.int8).view(rows, columns)
        codes_ND.copy_(scaled_NKb.round_().view(rows, -1)[:, :columns])
        return as_payload(payload)

    def decode(self, payload: Payload, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Give codes times scales.

        Raises:
            ValueError: If the length is not that of the shape, a scale is not one that ``encode`` can give, or a value
                is beyond the range of the dtype asked for.
        """
        content = read_payload(payload, self.encoded_bytes(shape, dtype))
        rows, columns, scale_bytes = _layout(shape)
        scale_NK1 = torch.frombuffer(content, dtype=torch.float32, count=scale_bytes // _SCALE_BYTES).view(rows, -1, 1)
        low, high = (bound.item() for bound in torch.aminmax(scale_NK1))
        if not (low >= 0 and high <= _LARGEST_SCALE):  # a NaN fails every comparison
            raise ValueError(f"The payload has scales from {low} to {high}; they must be in 0 to {_LARGEST_SCALE:.6g}.")
        codes_ND = torch.frombuffer(content, dtype=torch.int8, offset=scale_bytes).view(rows, columns)
        values = _in_blocks(codes_ND.to(torch.float32)).mul_(scale_NK1).view(rows, -1)[:, :columns]
        values = values.to(dtype).contiguous().view(tuple(shape))
        if dtype is torch.float16:  # the only one with a range smaller than float32's codes · scales
            require_finite(values, f"The payload, read as {dtype},")
        return values

    def encoded_bytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Give one byte an element and four a block.

        Raises:
            ValueError: If no tensor of this shape and dtype can be sent.
        """
        check_dtype(dtype)
        rows, columns, scale_bytes = _layout(check_shape(shape))
        return scale_bytes + rows * columns


def _layout(shape: Sequence[int]) -> tuple[int, int, int]:
    """Give rows, columns, and the bytes that the scales take."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return rows, columns, rows * math.ceil(columns / BLOCK) * _SCALE_BYTES


def _in_blocks(x: Tensor) -> Tensor:
    """View a tensor as [N, K, 64], with zeros after a last block that is shorter."""
    missing = -x.shape[-1] % BLOCK
    if missing:
        x = F.pad(x, (0, missing))
    return x.view(-1, x.shape[-1] // BLOCK, BLOCK)
