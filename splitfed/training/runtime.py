"""How a daemon uses its machine: threads for arithmetic, and the allocator's manners with large short-lived tensors."""

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 1 << 30
_MMAP_ABOVE_BYTES = 1 << 30


def prepare_process(threads: int | None) -> None:
    """Set a daemon's threads and allocator, before its first tensor.

    glibc returns every block above 128 KiB to the kernel when it is freed, and activations are such blocks: each step
    would pay for the same pages again. Here they stay with the process, up to 1 GiB.

    Args:
        threads: CPU threads for arithmetic; none: torch's choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_ABOVE_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
