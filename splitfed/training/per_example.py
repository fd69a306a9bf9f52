"""Each example's own gradient of a segment's adapter, however many micro-batches are in flight.

opacus's grad samplers do the arithmetic. Its ``GradSampleModule`` does not fit around them here: it keeps the inputs of
a layer on a stack and takes the last one first, while a split client's first micro-batch comes back first. So an input
stays with the very output whose gradient it belongs to.

Shapes: B sequences, T tokens, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from splitfed.errors import PrivacyError
from splitfed.models import Segment, adapter_parameters
from splitfed.privacy import PerExampleMechanism, bounded_reply

_Sampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]

_FLATTENING: Final = frozenset({"opt"})
"""Families with layers that take [B·T, I], one sequence after another. Not just any such rows: an expert's are of
whatever tokens were sent to it, and may happen to be B·T."""


@dataclass(frozen=True)
class RecordedPass:
    """One forward of a segment; its backward gives each example's gradient instead of their sum.

    Attributes:
        gradients: After the backward, by whole-model name of the parameter, shape [B, ...]. A parameter that the
            output does not depend on is left out.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    _starts: list[Tensor] = field(default_factory=list)

    def backward(self, output: Tensor, gradient: Tensor | None = None, *, wrt: Tensor | None = None) -> Tensor | None:
        """Go back through the segment. No parameter's ``.grad`` is touched, nor is a gradient of the sum computed.

        Args:
            output: What the segment gave, or the sum of per-sequence losses of it.
            gradient: Gradient at the output, shape [B, T, D], as another party gave it; left out for a loss.
            wrt: An input of the segment that requires a gradient.

        Returns:
            The gradient at ``wrt``.

        Guarantees:
            * ``gradient`` is bounded first, so that a finite one overflows for no text, unless the weights themselves
              are made for it.
        """
        gradient = None if gradient is None else bounded_reply(gradient)
        targets = [*([] if wrt is None else [wrt]), *self._starts]
        self._starts.clear()
        found = torch.autograd.grad(output, targets, gradient, allow_unused=True) if targets else ()
        return None if wrt is None else found[0]


class PerExampleLayers:
    """The layers of a segment's adapter, which a forward can be recorded on.

    Args:
        segment: A segment with or without an adapter.

    Raises:
        PrivacyError: If a trained parameter belongs to no adapter, or to a layer that opacus has no sampler for.
    """

    def __init__(self, segment: Segment) -> None:
        names = {parameter: name for name, parameter in adapter_parameters(segment).items()}
        self._layers: list[tuple[nn.Module, str, _Sampler]] = []
        self._names = names
        self._flattens = segment.config.model_type in _FLATTENING
        for path, layer in segment.model.named_modules():
            trained = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
            if not trained:
                continue
            whole_path = segment.whole_model_name(path)
            if not names.keys() >= set(trained):
                raise PrivacyError(
                    f"Layer {whole_path!r} is trained without being an adapter's; freeze it, or train without DP-SGD."
                )
            self._layers.append((layer, whole_path, _sampler_of(layer, whole_path)))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every parameter that is trained now, by whole-model name."""
        return {name: parameter.shape for parameter, name in self._names.items() if parameter.requires_grad}

    @contextmanager
    def recording(self, input_ids_BT: Tensor) -> Iterator[RecordedPass]:
        """Record a forward that runs inside.

        Args:
            input_ids_BT: The micro-batch, shape [B, T].

        Yields:
            What to go back through; it may come any time later, after any number of other forwards.

        Raises:
            PrivacyError: From the forward, if a layer's input has no row for each token of each sequence.
        """
        recorded = RecordedPass()
        hooks = [
            layer.register_forward_hook(self._recorder(recorded, path, sampler, input_ids_BT.shape))
            for layer, path, sampler in self._layers
            if any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
        ]
        try:
            yield recorded
        finally:
            for hook in hooks:
                hook.remove()

    def _recorder(
        self, recorded: RecordedPass, path: str, sampler: _Sampler, shape_BT: torch.Size
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """Make a forward hook that ties a layer's input to its output's gradient.

        What autograd keeps refers to the gradients alone, not to the pass: the pass holds on to the graph.
        """
        gradients, starts, names = recorded.gradients, recorded._starts, self._names
        B, T = shape_BT

        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            taken = inputs[0].detach()
            is_flat = self._flattens and taken.shape[:-1] == (B * T,)
            if is_flat:
                taken = taken.unflatten(0, (B, T))
            if taken.shape[0] != B or T not in taken.shape[1:-1]:
                raise PrivacyError(
                    f"Layer {path!r} takes an input of shape {list(taken.shape)}, not one row for each token of each "
                    f"sequence, {list(shape_BT)}: the gradient of one example cannot be told there; leave it out of "
                    "the LoRA targets, or protect the adapter update as a whole."
                )

            def sample(output_gradient: Tensor) -> None:
                of_rows = output_gradient.unflatten(0, (B, T)) if is_flat else output_gradient
                for parameter, per_example in sampler(layer, [taken], of_rows).items():
                    name = names[parameter]
                    gradients[name] = gradients[name] + per_example if name in gradients else per_example

            output.register_hook(sample)
            if not inputs[0].requires_grad:  # nothing before it is trained: the way back ends here
                starts.append(output)

        return record


class GradientSum:
    """The sum of clipped per-example gradients over the micro-batches of a local step.

    Args:
        mechanism: What clips.
        shapes: Shape of every trained parameter, by whole-model name.
    """

    def __init__(self, mechanism: PerExampleMechanism, shapes: Mapping[str, torch.Size]) -> None:
        self._mechanism = mechanism
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def add(self, *passes: RecordedPass, is_real_B: Tensor | None = None) -> None:
        """Clip the examples of a micro-batch, once over all segments, and add them.

        Args:
            passes: The micro-batch's passes, after their backward.
            is_real_B: False for rows that hold no example, shape [B]; left out = all hold one.

        Raises:
            PrivacyError: If a row's gradient holds a NaN or an infinity, whether the row holds an example or not.

        Guarantees:
            * Every row is clipped, so that the work does not tell how many hold an example.
        """
        per_example = {name: gradients for each in passes for name, gradients in each.gradients.items()}
        for name, clipped in self._mechanism.clip(per_example, is_real_B=is_real_B).items():
            self.sums[name] += clipped


def _sampler_of(layer: nn.Module, path: str) -> _Sampler:
    from opacus.grad_sample import GradSampleModule  # takes a second; only DP-SGD needs it

    sampler: _Sampler | None = GradSampleModule.GRAD_SAMPLERS.get(type(layer))
    if sampler is None:
        raise PrivacyError(
            f"The gradient of one example is not known for layer {path!r}, a {type(layer).__name__}; "
            "adapt linear layers only, or protect the adapter update as a whole."
        )
    return sampler
