"""One pass through the trunk: the rows of one client or of several are joined, run, and given back to each."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from splitfed.errors import ProtocolError
from splitfed.models import Segment
from splitfed.training.seeds import derive_seed
from splitfed.training.trunk_slot import Pending, Slot, TrunkBackward, TrunkForward


class TrunkPasses:
    """Runs forwards of one adapter, trunk and shape in one pass, and numbers the passes that are to go back.

    Args:
        names: Maps whole-model names of a trunk's adapter to those of its own parameters.
        parameter: One of the trunk's, for device and number format.
        seed: The run's seed, for dropout.
    """

    def __init__(self, names: Callable[[Segment], Mapping[str, str]], parameter: Tensor, *, seed: int) -> None:
        self._names = names
        self._parameter = parameter
        self._seed = seed
        self._passes = 0

    def forward(self, together: Sequence[tuple[TrunkForward, Slot]]) -> list[Tensor | ProtocolError]:
        """Run calls in one pass; dropout follows the first one's random stream.

        What is not finite in one's rows would be in everyone's gradients: the pass is run again without that one.

        Args:
            together: Each call with its slot, at least one; the slots have the adapter and the trunk in common, the
                calls all but the number of sequences.

        Returns:
            For each call its trunk output, shape [B, T, D], or why it was refused.
        """
        calls, slots = [call for call, _ in together], [slot for _, slot in together]
        call, slot = together[0]
        smashed = [each.smashed_BTD.detach().to(self._parameter.device, self._parameter.dtype) for each in calls]
        for smashed_BTD, each in zip(smashed, calls, strict=True):
            smashed_BTD.requires_grad_(each.trains and each.wants_smashed_gradient)
        tensors = slot.adapter.current()
        slot.trunk.train(call.trains)
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(call.trains):
            torch.manual_seed(derive_seed(self._seed, "trunk", slot.round, slot.client, call.step, call.micro_batch))
            entering = [
                smashed_BTD if each.denoiser is None else each.denoiser(smashed_BTD)
                for smashed_BTD, each in zip(smashed, slots, strict=True)
            ]
            output_NTD: Tensor = functional_call(
                slot.trunk,
                {**slot.residual, **{local: tensors[name] for name, local in self._names(slot.trunk).items()}},
                (_joined(entering),),
                {
                    "attention_mask": _joined([each.attention_mask_BT for each in calls]),
                    "position_ids": _joined([each.position_ids_BT for each in calls]),
                },
            )
            outputs = output_NTD.split([len(each) for each in smashed]) if len(calls) > 1 else [output_NTD]
        if len(calls) > 1 and call.trains and not torch.isfinite(output_NTD.detach()).all():
            return self._forward_of_finite(together, [bool(torch.isfinite(each).all()) for each in outputs])
        if call.trains:
            self._passes += 1
            for each, state, smashed_BTD, output_BTD in zip(calls, slots, smashed, outputs, strict=True):
                if not state.is_amid_step:
                    state.version = state.adapter.version
                state.pending[each.step, each.micro_batch] = Pending(tensors, smashed_BTD, output_BTD, self._passes)
        return [output_BTD.detach() for output_BTD in outputs]

    def _forward_of_finite(
        self, together: Sequence[tuple[TrunkForward, Slot]], is_finite: Sequence[bool]
    ) -> list[Tensor | ProtocolError]:
        """Run the calls whose output is finite, and refuse the others."""
        kept = [each for each, is_kept in zip(together, is_finite, strict=True) if is_kept]
        outputs = iter(self.forward(kept) if kept else [])
        return [
            next(outputs)
            if is_kept
            else ProtocolError(
                f"The trunk output of {slot.client!r} in step {call.step} is not finite; lower the learning rate."
            )
            for (call, slot), is_kept in zip(together, is_finite, strict=True)
        ]


def backward_pass(
    together: Sequence[tuple[TrunkBackward, Pending]], gathered: dict[str, Tensor]
) -> list[Tensor | None]:
    """Go back through forwards of one pass.

    Args:
        together: Each call with its forward, at least one.
        gathered: Where the adapter's gradients are added up, by whole-model name.

    Returns:
        For each call the smashed gradient, shape [B, T, D], if its forward asked for it.
    """
    given = [_scaled(call.output_gradient_BTD.to(pending.output_BTD), call.share) for call, pending in together]
    tensors = {name: tensor for name, tensor in together[0][1].tensors.items() if tensor.requires_grad}
    entries = [pending.smashed_BTD for _, pending in together if pending.smashed_BTD.requires_grad]
    wanted = [*tensors.values(), *entries]
    outputs = [pending.output_BTD for _, pending in together]
    found = torch.autograd.grad(outputs, wanted, given, allow_unused=True) if wanted else ()
    for name, gradient in zip(tensors, found, strict=False):
        if gradient is not None:
            gathered[name] = gathered[name] + gradient if name in gathered else gradient
    at_entry = iter(found[len(tensors) :])
    smashed: list[Tensor | None] = []
    for call, pending in together:
        at_smashed = next(at_entry) if pending.smashed_BTD.requires_grad else None
        smashed.append(None if at_smashed is None else _scaled(at_smashed, 1 / call.share))
    return smashed


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join along the sequences; a single part is given as it is, and so is nothing."""
    given = [part for part in parts if part is not None]
    if len(given) < 2:
        return given[0] if given else None
    return torch.cat(given)
