"""The server's half of a local step: forward, backward and update of the trunk, one adapter copy per client."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from splitfed.config import TrainingSection
from splitfed.errors import ProtocolError
from splitfed.models import Segment, adapter_parameters
from splitfed.privacy.denoise import Denoiser
from splitfed.training.optimiser import StepOptimiser
from splitfed.training.seeds import derive_seed


@dataclass
class _Pending:
    """A forward that waits for its backward."""

    version: int
    smashed_BTD: Tensor
    output_BTD: Tensor


@dataclass
class _Slot:
    """One client's copy of the trunk adapter, with its optimiser."""

    client: str
    round: int
    parameters: dict[str, nn.Parameter]
    optimiser: StepOptimiser
    denoiser: Denoiser | None
    version: int = 0
    steps: int = 0
    pending: dict[tuple[int, int], _Pending] = field(default_factory=dict)


class TrunkTrainer:
    """Owner of the trunk: the frozen base once, and for each client an adapter copy with its optimiser state.

    Not thread-safe: one worker owns it.

    Args:
        trunk: The trunk, with its adapter.
        training: Optimiser settings, local steps and the bound on micro-batches in flight.
        seed: The run's seed, for dropout.
        denoiser: Takes smashed data nearer to what it was before its noise, on its way into the trunk, in training and
            evaluation alike; none: the trunk takes it as it comes. Smashed gradients are those of what came.

    Attributes:
        denoiser: The same; another one holds for the rounds that are opened after it.
    """

    def __init__(
        self, trunk: Segment, training: TrainingSection, *, seed: int, denoiser: Denoiser | None = None
    ) -> None:
        self._trunk = trunk
        self.denoiser = denoiser
        self._training = training
        self._seed = seed
        named = adapter_parameters(trunk)
        local_names = {id(parameter): name for name, parameter in trunk.named_parameters()}
        self._local_names = {name: local_names[id(parameter)] for name, parameter in named.items()}
        self._slots: dict[str, _Slot] = {}
        self._parameter = next(trunk.parameters())

    @property
    def hidden_size(self) -> int:
        """Hidden size D of everything that crosses the link."""
        return self._trunk.hidden_size

    @property
    def blocks(self) -> range:
        """Blocks of the whole model that the trunk runs."""
        return self._trunk.blocks

    def open_round(
        self,
        slot: str,
        round: int,
        adapter: Mapping[str, Tensor],
        optimiser: Mapping[str, Tensor],
        *,
        client: str | None = None,
        denoiser: Denoiser | None = None,
    ) -> None:
        """Fill a slot with a client at the start of a round, whatever was in it before.

        Args:
            slot: Name of the slot; what is asked of another slot never touches this one.
            round: The round, from 1.
            adapter: Trunk adapter that the round starts from, by whole-model name.
            optimiser: The client's optimiser state after its last round; empty for none.
            client: Name of the client, for its random streams; none: the slot's.
            denoiser: One for the noise that this client adds; none: the trainer's.
        """
        parameters = {
            name: nn.Parameter(adapter[name].detach().clone().to(self._parameter.device)) for name in self._local_names
        }
        optimiser_of_slot = StepOptimiser(parameters, self._training)
        filled = _Slot(client or slot, round, parameters, optimiser_of_slot, denoiser or self.denoiser)
        filled.optimiser.load(optimiser)
        self._slots[slot] = filled

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
        """Run the trunk on smashed data.

        Args:
            slot: Name of the slot.
            step: Local step, from 0.
            micro_batch: Index in the step, from 0.
            smashed_BTD: Smashed data, shape [B, T, D].
            attention_mask_BT: 1 for real positions, shape [B, T]; none: all are.
            position_ids_BT: Positions, shape [B, T]; none: counted from 0.
            trains: A backward is to follow.
            wants_smashed_gradient: The backward is to return the smashed gradient.

        Returns:
            The trunk output, shape [B, T, D].

        Raises:
            ProtocolError: If the step is not the slot's next one, the micro-batch is already in flight, or too many
                are.
        """
        state = self._slot(slot)
        smashed_BTD = smashed_BTD.detach().to(self._parameter.device, self._parameter.dtype)
        if trains:
            self._check_next(state, step, micro_batch)
        smashed_BTD.requires_grad_(trains and wants_smashed_gradient)
        self._trunk.train(trains)
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(trains):
            torch.manual_seed(derive_seed(self._seed, "trunk", state.round, state.client, step, micro_batch))
            entering_BTD = smashed_BTD if state.denoiser is None else state.denoiser(smashed_BTD)
            output_BTD: Tensor = functional_call(
                self._trunk,
                {self._local_names[name]: parameter for name, parameter in state.parameters.items()},
                (entering_BTD,),
                {"attention_mask": attention_mask_BT, "position_ids": position_ids_BT},
            )
        if trains:
            state.pending[step, micro_batch] = _Pending(state.version, smashed_BTD, output_BTD)
        return output_BTD.detach()

    def backward(self, slot: str, step: int, micro_batch: int, output_gradient_BTD: Tensor) -> Tensor | None:
        """Run the trunk's backward and gather the adapter's gradients.

        Args:
            slot: Name of the slot.
            step: Local step of the forward.
            micro_batch: Micro-batch of the forward.
            output_gradient_BTD: Gradient of the step's loss at the trunk output, shape [B, T, D].

        Returns:
            The smashed gradient, shape [B, T, D], if the forward asked for it.

        Raises:
            ProtocolError: If there is no such forward, its shape differs, or the adapter has changed since.
        """
        state = self._slot(slot)
        pending = state.pending.pop((step, micro_batch), None)
        if pending is None:
            raise ProtocolError(
                f"A backward of step {step}, micro-batch {micro_batch}, came from {state.client!r} without its forward."
            )
        if pending.version != state.version:
            raise ProtocolError(
                f"The trunk adapter of {state.client!r} went from version {pending.version} to {state.version} between "
                f"the forward and the backward of step {step}; start the round again."
            )
        if output_gradient_BTD.shape != pending.output_BTD.shape:
            raise ProtocolError(
                f"The output gradient has shape {list(output_gradient_BTD.shape)}, the trunk output "
                f"{list(pending.output_BTD.shape)}."
            )
        wanted = list(state.parameters.values())
        if pending.smashed_BTD.requires_grad:
            wanted.append(pending.smashed_BTD)  # type: ignore[arg-type]
        if wanted:
            torch.autograd.backward([pending.output_BTD], [output_gradient_BTD.to(pending.output_BTD)], inputs=wanted)
        return pending.smashed_BTD.grad

    def step(self, slot: str, step: int) -> int:
        """Apply the gradients of a local step.

        Returns:
            The slot's new adapter version.

        Raises:
            ProtocolError: If it is not the next step, or forwards wait for their backwards.
        """
        state = self._slot(slot)
        if step != state.steps or state.pending:
            raise ProtocolError(
                f"{state.client!r} asked to apply step {step}; the next is {state.steps}, with {len(state.pending)} "
                "micro-batches still waiting for their backward."
            )
        state.optimiser.step((state.round - 1) * self._training.local_steps + step)
        state.steps += 1
        state.version += 1
        return state.version

    def steps_done(self, slot: str) -> int:
        """Count the local steps that were applied for a client in this round; 0 if it has no slot."""
        state = self._slots.get(slot)
        return state.steps if state else 0

    def result(self, slot: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy a client's trunk adapter and its optimiser state.

        Returns:
            ``(adapter, optimiser)``, both on the CPU.
        """
        state = self._slot(slot)
        adapter = {name: parameter.detach().cpu().clone() for name, parameter in state.parameters.items()}
        return adapter, {name: tensor.cpu() for name, tensor in state.optimiser.state().items()}

    def _slot(self, slot: str) -> _Slot:
        if slot not in self._slots:
            raise ProtocolError("This round has not been opened, or was opened again elsewhere.")
        return self._slots[slot]

    def _check_next(self, state: _Slot, step: int, micro_batch: int) -> None:
        if step != state.steps:
            raise ProtocolError(f"Client {state.client!r} sent step {step}; the next one is {state.steps}.")
        if step >= self._training.local_steps:
            raise ProtocolError(
                f"Client {state.client!r} sent step {step} of a round of {self._training.local_steps} steps."
            )
        if (step, micro_batch) in state.pending:
            raise ProtocolError(f"Client {state.client!r} sent micro-batch {micro_batch} of step {step} twice.")
        if len(state.pending) >= self._training.max_in_flight:
            raise ProtocolError(
                f"Client {state.client!r} has {len(state.pending)} micro-batches in flight; the run allows "
                f"{self._training.max_in_flight}."
            )
