"""Sums of products of LoRA factors, and their best approximations, without a dense matrix.

A sum of weighted products B A is one product of stacked factors, [w₁ B₁ w₂ B₂ …] by [A₁; A₂; …]. Its singular value
decomposition comes from two QR decompositions of the stacks and the SVD of a core of at most K by K.

Shapes: R rank, I input features, O output features, K sum of the ranks.
"""

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

A: Final = ".lora_A.weight"
B: Final = ".lora_B.weight"


def layers(adapter: Mapping[str, Tensor]) -> list[str]:
    """List the layers of an adapter, sorted.

    Raises:
        ValueError: If a tensor is not a LoRA factor, a layer has one factor only, or its two have not one rank.
    """
    names = sorted({key.removesuffix(A).removesuffix(B) for key in adapter})
    for name in names:
        if name in adapter or name + A not in adapter or name + B not in adapter:
            raise ValueError(f"{name!r} has not both LoRA factors, and products are averaged; give lora_A and lora_B.")
        a, b = adapter[name + A], adapter[name + B]
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise ValueError(
                f"The LoRA factors of {name!r} are {list(b.shape)} by {list(a.shape)}, which is no product."
            )
    return names


def stacked(products: Iterable[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Write a weighted sum of products as one product, exactly.

    Args:
        products: Weight, B [O, r] and A [r, I] of each; r may differ.

    Returns:
        Left factor [O, K] and right factor [K, I], float64.
    """
    terms = list(products)
    left_OK = torch.cat([weight * b_OR.double() for weight, b_OR, _ in terms], dim=1)
    return left_OK, torch.cat([a_RI.double() for _, _, a_RI in terms])


def truncated(left_OK: Tensor, right_KI: Tensor, rank: int, *, spare_A: Tensor) -> tuple[Tensor, Tensor, float]:
    """Give the best product of a rank, with its singular values in B.

    The rows of A are orthonormal, hence as alive as LoRA's initial A even where B has a zero column: what is not needed
    now can still be trained. In each the element of largest magnitude is positive, so that it is one and the same
    decomposition whatever the library's choice of signs.

    Args:
        left_OK: Left factor.
        right_KI: Right factor.
        rank: R of the result, 1 or more.
        spare_A: Rows for A beyond the stacks' rank, [R or more, I]: B is zero there.

    Returns:
        B [O, R], A [R, I], both float32, and the Frobenius norm of what is left out.

    Source: Eckart & Young 1936: no matrix of the rank is nearer in the Frobenius norm.
    """
    q_OK, core_left = torch.linalg.qr(left_OK.double())
    q_IK, core_right = torch.linalg.qr(right_KI.double().T)
    u, values, v = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    kept = min(rank, len(values))
    b_OR, a_RI = q_OK @ (u[:, :kept] * values[:kept]), v[:kept] @ q_IK.T
    signs = torch.sign(a_RI.gather(1, a_RI.abs().argmax(dim=1, keepdim=True)))
    b_OR, a_RI = b_OR * signs.T, a_RI * signs
    b_OR = torch.nn.functional.pad(b_OR, (0, rank - kept))
    a_RI = torch.cat([a_RI, spare_A[kept:rank].double()])
    return b_OR.float(), a_RI.float(), float(values[kept:].norm())


def at_rank(adapter: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Give an agent of smaller rank what is nearest to an adapter, layer by layer.

    Args:
        adapter: LoRA factors by whole-model key.
        rank: The agent's rank, 1 or more; layers of no larger rank stay as they are.

    Returns:
        Factors of that rank, float32 where they are new.

    Raises:
        ValueError: If the rank is below 1, or the adapter does not consist of pairs of factors.

    Guarantees:
        * The products are the best of the rank in the Frobenius norm, up to rounding.
        * Where a slice of the factors loses nothing it is the slice: an initial adapter gives the initial one of the
          smaller rank, to the bit.
    """
    if rank < 1:
        raise ValueError(f"An adapter of rank {rank} has nothing to train; choose 1 or more.")
    result = dict(adapter)
    for name in layers(adapter):
        a_RI, b_OR = adapter[name + A], adapter[name + B]
        if len(a_RI) <= rank:
            continue
        if b_OR[:, rank:].any():
            b_OR, a_RI, _ = truncated(b_OR, a_RI, rank, spare_A=a_RI)
        result[name + A], result[name + B] = a_RI[:rank].contiguous(), b_OR[:, :rank].contiguous()
    return result
