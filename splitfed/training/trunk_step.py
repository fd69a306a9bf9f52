"""The server's half of a local step: forward, backward and update of the trunk, for clients alone or together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from splitfed.config import TrainingSection
from splitfed.errors import ProtocolError
from splitfed.models import Segment, Trunk, adapter_parameters, load_residual, trunk_slice
from splitfed.privacy.denoise import Denoiser
from splitfed.training.seeds import derive_seed
from splitfed.training.trunk_adapter import TrunkAdapter
from splitfed.training.trunk_slot import Pending, Slot, TrunkBackward, TrunkForward


@dataclass(frozen=True)
class Applied:
    """What a step on the trunk came to.

    Attributes:
        version: The adapter's from now on.
        squared_norm: Squared L2 norm of the step's gradients, with that of the clients' own segments if it was given.
    """

    version: int
    squared_norm: float


@dataclass
class _Shared:
    """An adapter that several slots train, and what their joint steps have gathered."""

    adapter: TrunkAdapter
    gradients: dict[str, Tensor] = field(default_factory=dict)


class TrunkTrainer:
    """Owner of the trunk: the frozen base once, and adapters with their optimiser, each client's own or shared.

    Not thread-safe: one worker owns it.

    Args:
        trunk: The trunk, with its adapter.
        training: Optimiser settings, local steps and the bound on micro-batches in flight.
        seed: The run's seed, for dropout.
        denoiser: Takes smashed data nearer to what it was before its noise, on its way into the trunk, in training and
            evaluation alike; none: the trunk takes it as it comes. Smashed gradients are those of what came.

    Attributes:
        denoiser: The same; another one holds for the rounds that are opened after it.

    Guarantees:
        * A backward is that of its own forward, whatever was applied in between.
    """

    def __init__(self, trunk: Trunk, training: TrainingSection, *, seed: int, denoiser: Denoiser | None = None) -> None:
        self._trunk = trunk
        self.denoiser = denoiser
        self._training = training
        self._seed = seed
        self._local_names: dict[Segment, dict[str, str]] = {}
        self._slices: dict[range, Trunk] = {}
        self._slots: dict[str, Slot] = {}
        self._shared: dict[str, _Shared] = {}
        self._parameter = next(trunk.parameters())
        self._passes = 0

    @property
    def hidden_size(self) -> int:
        """Hidden size D of everything that crosses the link."""
        return self._trunk.hidden_size

    @property
    def blocks(self) -> range:
        """Blocks of the whole model that the trunk runs."""
        return self._trunk.blocks

    def trunk_over(self, blocks: range | None) -> Trunk:
        """Give the trunk over some of its blocks, in the thread that owns it; each slice is cut once.

        Args:
            blocks: Indices in the whole model; None: all of the trunk's.

        Raises:
            SplitPointError: If they are no slice of the trunk.
        """
        if blocks is None or blocks == self._trunk.blocks:
            return self._trunk
        if blocks not in self._slices:
            self._slices[blocks] = trunk_slice(self._trunk, blocks)
        return self._slices[blocks]

    def load_residual(self, residual: Mapping[str, Tensor]) -> None:
        """Set the frozen adapter under the trained ones, for every client and slice of the trunk.

        Args:
            residual: By whole-model name; keys of other segments are left aside.
        """
        load_residual(self._trunk, residual)

    def open_shared(
        self,
        name: str,
        adapter: Mapping[str, Tensor],
        optimiser: Mapping[str, Tensor],
        *,
        trained: frozenset[str] | None = None,
    ) -> None:
        """Put an adapter that slots are to share at a round's start, whatever was there before.

        Args:
            name: What slots call it.
            adapter: What the round starts from, by whole-model name.
            optimiser: The optimiser's state after the last round; empty for none.
            trained: Names that are trained in this round; none: all.
        """
        self._shared[name] = _Shared(self._new_adapter(self._trunk, adapter, optimiser, trained))

    def open_round(
        self,
        slot: str,
        round: int,
        adapter: Mapping[str, Tensor] | None = None,
        optimiser: Mapping[str, Tensor] | None = None,
        *,
        client: str | None = None,
        denoiser: Denoiser | None = None,
        blocks: range | None = None,
        shared: str | None = None,
        joint: bool = False,
        trained: frozenset[str] | None = None,
    ) -> None:
        """Fill a slot with a client at the start of a round, whatever was in it before.

        Args:
            slot: Name of the slot; what is asked of another slot never touches this one.
            round: The round, from 1.
            adapter: Trunk adapter that the round starts from, by whole-model name; left out where one is shared.
            optimiser: The client's optimiser state after its last round; empty for none; left out as above.
            client: Name of the client, for its random streams; none: the slot's.
            denoiser: One for the noise that this client adds; none: the trainer's.
            blocks: Blocks of the trunk, for a client that holds more than others; none: all.
            shared: The adapter that this slot trains together with others; none: one of its own.
            joint: Gradients are gathered with those of the others that share it, for steps that are applied at once.
            trained: Names that are trained in this round, in an adapter of its own; none: all.
        """
        trunk = self.trunk_over(blocks)
        common = None if shared is None else self._shared[shared]
        self._slots[slot] = Slot(
            client or slot,
            round,
            trunk,
            self._new_adapter(trunk, adapter or {}, optimiser or {}, trained) if common is None else common.adapter,
            common.gradients if common is not None and joint else {},
            local_steps=self._training.local_steps,
            max_in_flight=self._training.max_in_flight,
            denoiser=denoiser or self.denoiser,
        )

    def close(self, slot: str) -> None:
        """Empty a slot, if there is something in it."""
        self._slots.pop(slot, None)

    def forward(
        self,
        slot: str,
        step: int,
        micro_batch: int,
        smashed_BTD: Tensor,
        *,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        trains: bool = True,
        wants_smashed_gradient: bool = False,
    ) -> Tensor:
        """Run the trunk on one client's smashed data; the arguments are those of `TrunkForward`.

        Returns:
            The trunk output, shape [B, T, D].

        Raises:
            ProtocolError: If the step is not the slot's next one, the micro-batch is already in flight, or too many
                are.
        """
        call = TrunkForward(
            slot, step, micro_batch, smashed_BTD, attention_mask_BT, position_ids_BT, trains, wants_smashed_gradient
        )
        (output_BTD,) = self.forward_together([call])
        if isinstance(output_BTD, ProtocolError):
            raise output_BTD
        return output_BTD

    def forward_together(self, calls: Sequence[TrunkForward]) -> list[Tensor | ProtocolError]:
        """Run the trunk for several clients, in one pass where adapter, blocks and shape are the same.

        Args:
            calls: One of each client, in an order that does not depend on who came first.

        Returns:
            For each call a trunk output, shape [B, T, D], or why this call was refused: then it was not run, and the
            others were run without it.
        """
        passes: dict[tuple[object, ...], list[int]] = {}
        outputs: dict[int, Tensor | ProtocolError] = {}
        for index, call in enumerate(calls):
            try:
                slot = self._slot(call.slot)
                if call.trains:
                    slot.check_forward(call)
            except ProtocolError as error:
                outputs[index] = error
                continue
            parts = call.attention_mask_BT is None, call.position_ids_BT is None, call.trains
            key = (id(slot.trunk), id(slot.adapter), *call.smashed_BTD.shape[1:], *parts)
            passes.setdefault(key, []).append(index)
        for together in passes.values():
            outputs.update(zip(together, self._forward_pass([calls[index] for index in together]), strict=True))
        return [outputs[index] for index in range(len(calls))]

    def backward(self, slot: str, step: int, micro_batch: int, output_gradient_BTD: Tensor) -> Tensor | None:
        """Run the trunk's backward for one client; the arguments are those of `TrunkBackward`.

        Returns:
            The smashed gradient, shape [B, T, D], if the forward asked for it.

        Raises:
            ProtocolError: If there is no such forward, or its shape differs.
        """
        (gradient_BTD,) = self.backward_together([TrunkBackward(slot, step, micro_batch, output_gradient_BTD)])
        if isinstance(gradient_BTD, ProtocolError):
            raise gradient_BTD
        return gradient_BTD

    def backward_together(self, calls: Sequence[TrunkBackward]) -> list[Tensor | ProtocolError | None]:
        """Run the trunk's backward and gather the adapter's gradients, in one pass for forwards that were in one.

        Args:
            calls: One of each client, in an order that does not depend on who came first.

        Returns:
            For each call the smashed gradient, shape [B, T, D], if the forward asked for it, or why this call was
            refused: then it was not run, and the others were run without it.
        """
        passes: dict[int, list[tuple[int, Pending]]] = {}
        gradients: dict[int, Tensor | ProtocolError | None] = {}
        for index, call in enumerate(calls):
            try:
                slot = self._slot(call.slot)
                slot.check_backward(call)
            except ProtocolError as error:
                gradients[index] = error
                continue
            pending = slot.pending.pop((call.step, call.micro_batch))
            passes.setdefault(pending.together, []).append((index, pending))
        for together in passes.values():
            asked = [(calls[index], pending) for index, pending in together]
            found = self._backward_pass(asked)
            gradients.update(zip((index for index, _ in together), found, strict=True))
        return [gradients[index] for index in range(len(calls))]

    def step(
        self, slot: str, step: int, *, rate: Callable[[int], float] | None = None, others: float | None = None
    ) -> Applied:
        """Apply the gradients that one client's local step has gathered.

        Args:
            slot: Name of the slot.
            step: The local step.
            rate: What the learning rate is multiplied by, given how many versions older than the adapter's the one of
                the step's first forward is; none: by 1.
            others: Squared norm of the gradients of the client's own segments, where one norm is taken over all.

        Raises:
            ProtocolError: If it is not the next step, forwards wait for their backwards, or the gradients are not
                finite: then they are forgotten.
        """
        state = self._slot(slot)
        state.check_step(step)
        factor = 1.0 if rate is None else rate(state.adapter.version - state.version)
        gradients = _taken(state.gradients)
        squared_norm = state.adapter.apply(gradients, state.step_in_run, rate=factor, others=others)
        state.steps += 1
        return Applied(state.adapter.version, squared_norm)

    def step_together(self, slots: Sequence[str], step: int, *, others: float | None = None) -> Applied:
        """Apply the gradients that a joint local step has gathered, once.

        Args:
            slots: Those that take part in the step, at least one; they share an adapter, jointly.
            step: The local step.
            others: Squared norm of the gradients of the clients' own segments, where one norm is taken over all.

        Raises:
            ProtocolError: If it is not the next step of one of them, a forward waits for its backward, or the gradients
                are not finite: then they are forgotten.
        """
        states = [self._slot(slot) for slot in slots]
        for state in states:
            state.check_step(step)
        first = states[0]
        squared_norm = first.adapter.apply(_taken(first.gradients), first.step_in_run, others=others)
        for state in states:
            state.steps += 1
        return Applied(first.adapter.version, squared_norm)

    def steps_done(self, slot: str) -> int:
        """Count the local steps that were applied for a client in this round; 0 if it has no slot."""
        state = self._slots.get(slot)
        return state.steps if state else 0

    def result(self, slot: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy the trunk adapter that a slot trains, and its optimiser state.

        Returns:
            ``(adapter, optimiser)``, both on the CPU.
        """
        return self._slot(slot).adapter.result()

    def shared_result(self, shared: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy an adapter that slots share, and its optimiser state, both to the CPU."""
        return self._shared[shared].adapter.result()

    def _new_adapter(
        self,
        trunk: Segment,
        adapter: Mapping[str, Tensor],
        optimiser: Mapping[str, Tensor],
        trained: frozenset[str] | None,
    ) -> TrunkAdapter:
        state = {name: adapter[name] for name in self._names(trunk)}
        if trunk is not self._trunk:  # moments that go from client to client are of all blocks
            optimiser = {key: moment for key, moment in optimiser.items() if key.rpartition("/")[0] in state}
        return TrunkAdapter(state, optimiser, self._training, device=self._parameter.device, trained=trained)

    def _names(self, trunk: Segment) -> dict[str, str]:
        """Map whole-model names of a trunk's adapter to those of its own parameters."""
        if trunk not in self._local_names:
            local_names = {id(parameter): name for name, parameter in trunk.named_parameters()}
            self._local_names[trunk] = {
                name: local_names[id(parameter)] for name, parameter in adapter_parameters(trunk).items()
            }
        return self._local_names[trunk]

    def _forward_pass(self, calls: Sequence[TrunkForward]) -> list[Tensor | ProtocolError]:
        """Run calls of one adapter, trunk and shape; dropout follows the first one's random stream.

        What is not finite in one's rows would be in everyone's gradients: the pass is run again without that one.
        """
        slots = [self._slot(call.slot) for call in calls]
        call, slot = calls[0], slots[0]
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
                {local: tensors[name] for name, local in self._names(slot.trunk).items()},
                (_joined(entering),),
                {
                    "attention_mask": _joined([each.attention_mask_BT for each in calls]),
                    "position_ids": _joined([each.position_ids_BT for each in calls]),
                },
            )
            outputs = output_NTD.split([len(each) for each in smashed]) if len(calls) > 1 else [output_NTD]
        if len(calls) > 1 and call.trains and not torch.isfinite(output_NTD.detach()).all():
            return self._forward_pass_of_finite(calls, [bool(torch.isfinite(each).all()) for each in outputs])
        if call.trains:
            self._passes += 1
            for each, state, smashed_BTD, output_BTD in zip(calls, slots, smashed, outputs, strict=True):
                if not state.is_amid_step:
                    state.version = state.adapter.version
                state.pending[each.step, each.micro_batch] = Pending(tensors, smashed_BTD, output_BTD, self._passes)
        return [output_BTD.detach() for output_BTD in outputs]

    def _forward_pass_of_finite(
        self, calls: Sequence[TrunkForward], is_finite: Sequence[bool]
    ) -> list[Tensor | ProtocolError]:
        """Run the calls whose output is finite, and refuse the others."""
        kept = [call for call, is_kept in zip(calls, is_finite, strict=True) if is_kept]
        outputs = iter(self._forward_pass(kept) if kept else [])
        return [
            next(outputs)
            if is_kept
            else ProtocolError(
                f"The trunk output of {self._slot(call.slot).client!r} in step {call.step} is not finite; lower the "
                "learning rate."
            )
            for call, is_kept in zip(calls, is_finite, strict=True)
        ]

    def _backward_pass(self, together: Sequence[tuple[TrunkBackward, Pending]]) -> list[Tensor | None]:
        """Go back through forwards of one pass; gather the adapter's gradients, give the smashed ones."""
        given = [_scaled(call.output_gradient_BTD.to(pending.output_BTD), call.share) for call, pending in together]
        tensors = {name: tensor for name, tensor in together[0][1].tensors.items() if tensor.requires_grad}
        entries = [pending.smashed_BTD for _, pending in together if pending.smashed_BTD.requires_grad]
        wanted = [*tensors.values(), *entries]
        outputs = [pending.output_BTD for _, pending in together]
        found = torch.autograd.grad(outputs, wanted, given, allow_unused=True) if wanted else ()
        gathered = self._slot(together[0][0].slot).gradients
        for name, gradient in zip(tensors, found, strict=False):
            if gradient is not None:
                gathered[name] = gathered[name] + gradient if name in gathered else gradient
        at_entry = iter(found[len(tensors) :])
        smashed: list[Tensor | None] = []
        for call, pending in together:
            at_smashed = next(at_entry) if pending.smashed_BTD.requires_grad else None
            smashed.append(None if at_smashed is None else _scaled(at_smashed, 1 / call.share))
        return smashed

    def _slot(self, slot: str) -> Slot:
        if slot not in self._slots:
            raise ProtocolError("This round has not been opened, or was opened again elsewhere.")
        return self._slots[slot]


def _taken(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take what was gathered out of where it was gathered."""
    taken = dict(gradients)
    gradients.clear()
    return taken


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join along the sequences; a single part is given as it is, and so is nothing."""
    given = [part for part in parts if part is not None]
    if len(given) < 2:
        return given[0] if given else None
    return torch.cat(given)
