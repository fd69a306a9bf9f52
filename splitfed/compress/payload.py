"""Checks that every codec makes on shapes, payloads and values, before it allocates or trusts anything."""

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

Payload = bytes | bytearray | memoryview
"""What a codec decodes."""

MAX_DIMENSIONS: Final = 8
MAX_ELEMENTS: Final = 2**32

ITEM_BYTES: Final = MappingProxyType({torch.float64: 8, torch.float32: 4, torch.float16: 2, torch.bfloat16: 2})
"""Bytes of one element, for every dtype that may cross the wire."""


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Refuse a shape that no tensor on the wire has.

    Args:
        shape: A shape that may come from outside.

    Returns:
        The shape as a tuple.

    Raises:
        ValueError: If it has no dimension or more than 8, a dimension that is not a positive integer, or more than 2³²
            elements.
    """
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise ValueError(f"A tensor of {len(shape)} dimensions cannot be sent; it must have 1 to {MAX_DIMENSIONS}.")
    sizes = tuple(shape)
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"Shape {sizes} cannot be sent; every dimension must be a positive integer.")
    if math.prod(sizes) > MAX_ELEMENTS:
        raise ValueError(f"Shape {sizes} has more than {MAX_ELEMENTS} elements; send it in parts.")
    return sizes


def check_dtype(dtype: torch.dtype) -> int:
    """Give the bytes of one element.

    Raises:
        ValueError: If the dtype is not one of float64, float32, float16 and bfloat16.
    """
    if dtype not in ITEM_BYTES:
        raise ValueError(f"A tensor of {dtype} cannot be sent; convert it to float32, float16 or bfloat16.")
    return ITEM_BYTES[dtype]


def read_payload(payload: Payload, expected_bytes: int) -> bytearray:
    """Copy a payload whose length is as expected.

    Raises:
        ValueError: If it is longer or shorter.
    """
    length_bytes = memoryview(payload).nbytes
    if length_bytes != expected_bytes:
        raise ValueError(f"The payload has {length_bytes} bytes; its shape and codec ask for {expected_bytes}.")
    return bytearray(payload)


def source(tensor: Tensor) -> Tensor:
    """Give a tensor as codecs read it: checked, detached, on the CPU and contiguous.

    Raises:
        ValueError: If its shape or dtype cannot be sent.
    """
    check_shape(tensor.shape)
    check_dtype(tensor.dtype)
    return tensor.detach().cpu().contiguous()


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no element is NaN or infinite, without a temporary of the tensor's size."""
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse a tensor with a NaN or an infinity.

    Raises:
        ValueError: If there is one.
    """
    if not is_finite(tensor):
        raise ValueError(f"{what} holds a NaN or an infinite value; nothing that is not finite crosses the wire.")


def as_payload(codes: Tensor) -> memoryview:
    """View a contiguous tensor as the bytes of a payload, without a copy."""
    return codes.view(-1).view(torch.uint8).numpy().data
