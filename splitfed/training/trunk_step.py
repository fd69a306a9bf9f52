"""The server's half of a local step: what is asked of the trunk for which client, and which step is applied."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from splitfed.config import TrainingSection
from splitfed.errors import ProtocolError
from splitfed.models import (
    Segment,
    Trunk,
    adapter_parameters,
    fitted_residual,
    own_names,
    residual_parameters,
    trunk_slice,
)
from splitfed.privacy.denoise import Denoiser
from splitfed.training.trunk_adapter import TrunkAdapter
from splitfed.training.trunk_pass import TrunkPasses, backward_pass
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
        self._residual: dict[str, Tensor] = {}
        self._local_names: dict[Segment, dict[str, str]] = {}
        self._slices: dict[range, Trunk] = {}
        self._slots: dict[str, Slot] = {}
        self._shared: dict[str, _Shared] = {}
        self._parameter = next(trunk.parameters())
        self._passes = TrunkPasses(self._names, self._parameter, seed=seed)

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
        """Set the frozen adapter under the trained ones, for the rounds that are opened after it.

        A client that is late goes on with the one that its round began with; the trunk's own is left as it is.

        Args:
            residual: By whole-model name; keys of other segments are left aside.
        """
        self._residual = fitted_residual(self._trunk, residual)

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
            residual=self._placed_residual(trunk),
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
        passes: dict[tuple[object, ...], list[tuple[int, Slot]]] = {}
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
            passes.setdefault(key, []).append((index, slot))
        for together in passes.values():
            found = self._passes.forward([(calls[index], slot) for index, slot in together])
            outputs.update(zip((index for index, _ in together), found, strict=True))
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
            found = backward_pass(asked, self._slot(asked[0][0].slot).gradients)
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

    def _placed_residual(self, trunk: Segment) -> dict[str, Tensor]:
        """Give the residual by a trunk's own names; empty before there is one."""
        if not self._residual:
            return {}
        return {own: self._residual[name] for name, own in own_names(trunk, residual_parameters(trunk)).items()}

    def _names(self, trunk: Segment) -> dict[str, str]:
        """Map whole-model names of a trunk's adapter to those of its own parameters."""
        if trunk not in self._local_names:
            self._local_names[trunk] = own_names(trunk, adapter_parameters(trunk))
        return self._local_names[trunk]

    def _slot(self, slot: str) -> Slot:
        if slot not in self._slots:
            raise ProtocolError("This round has not been opened, or was opened again elsewhere.")
        return self._slots[slot]


def _taken(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take what was gathered out of where it was gathered."""
    taken = dict(gradients)
    gradients.clear()
    return taken
