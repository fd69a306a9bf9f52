"""What crosses the cut in a step, and what a codec makes of it.

Shapes: B sequences, T tokens, D hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from splitfed.compress import get_codec
from splitfed.models import Partition
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.data import Batch
from splitfed.training.link import cross


def crossing_tensors(parts: Partition, batch: Batch) -> dict[str, Tensor]:
    """Go through a step, and keep the four tensors that cross the cut in it.

    Args:
        parts: The segments, without adapters or with them.
        batch: The sequences.

    Returns:
        "smashed", "trunk_output", "output_gradient" and "smashed_gradient", each of shape [B, T, D]; gradients are
        those of the mean loss over rows.
    """
    smashed_BTD = parts.bottom(batch.input_ids_BT).detach().requires_grad_()
    trunk_BTD = parts.trunk(smashed_BTD)
    output_BTD = trunk_BTD.detach().requires_grad_()
    causal_lm_loss(parts.top(output_BTD).logits, batch.labels_BT, float(batch.labels_BT.numel())).backward()
    assert output_BTD.grad is not None
    trunk_BTD.backward(output_BTD.grad)
    assert smashed_BTD.grad is not None
    return {
        "smashed": smashed_BTD.detach(),
        "trunk_output": output_BTD.detach(),
        "output_gradient": output_BTD.grad,
        "smashed_gradient": smashed_BTD.grad,
    }


@dataclass(frozen=True)
class Coded:
    """What became of a tensor on its way.

    Attributes:
        payload_bytes: Bytes that crossed.
        bytes_per_element: The same for each element.
        relative_error: L2 norm of the difference ÷ L2 norm of the tensor.
    """

    payload_bytes: int
    bytes_per_element: float
    relative_error: float


def coded(tensor: Tensor, codec: str) -> Coded:
    """Send a tensor through a codec.

    Args:
        tensor: The tensor, not all zeros.
        codec: The codec's name.

    Raises:
        ValueError: If there is no such codec, or it cannot carry the tensor.
    """
    arrived, payload_bytes = cross(tensor, get_codec(codec))
    return Coded(payload_bytes, payload_bytes / tensor.numel(), distance(arrived, tensor))


def distance(arrived: Tensor, sent: Tensor) -> float:
    """Give the L2 norm of the difference ÷ the L2 norm of what was sent."""
    return float((arrived - sent).norm() / sent.norm())
