"""A known function at a known point: how small changes go through it, forwards and backwards.

The server knows the frozen weights of the top and the trunk output that it sent there itself. What the top does to a
gradient on its way back is therefore a linear map that the server can apply as well as the agent can.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class Linearisation:
    """A function near a point, as the linear map between small changes of its input and of its output.

    Args:
        function: Differentiable twice; gets a tensor shaped as ``x``.
        x: The point, floating point.

    Attributes:
        value: The function at the point.

    Guarantees:
        * ``push`` is the derivative along a change, and ``pull`` its transpose, up to float32 rounding.
        * No parameter of the function gets a gradient.

    Source: Pearlmutter, Fast exact multiplication by the Hessian (1994), for derivatives along a direction; here as the
    derivative of a backward pass by what is passed back, in which it is linear.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            self._x = x.detach().clone().requires_grad_()
            self._y = function(self._x)
            self._cotangent = torch.zeros_like(self._y, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(self._y, self._x, self._cotangent, create_graph=True)
        self.value = self._y.detach()

    def pull(self, gradient: Tensor, *, differentiable: bool = False) -> Tensor:
        """Turn a gradient at the output into the gradient at the input.

        Args:
            gradient: Shaped as the function's value.
            differentiable: Whether gradients are to flow from the result back to ``gradient``.
        """
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            (pulled,) = torch.autograd.grad(self._y, self._x, gradient, retain_graph=True, create_graph=differentiable)
        return pulled

    def push(self, change: Tensor) -> Tensor:
        """Turn a change of the input into the change of the output, to first order.

        Args:
            change: Shaped as the input.
        """
        with sdpa_kernel(SDPBackend.MATH):
            (pushed,) = torch.autograd.grad(self._pulled, self._cotangent, change, retain_graph=True)
        return pushed
