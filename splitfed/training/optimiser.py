"""AdamW under one schedule that covers the whole run, with a state that is nothing but named tensors."""

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from splitfed.config import TrainingSection

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class StepOptimiser:
    """Optimiser of the adapters of a client's segments, or of the trunk's, over all rounds.

    The learning rate is a function of the step's index in the run, so rounds, restarts and machines agree on it.

    Args:
        segments: Each segment's trained parameters, by whole-model name. May be empty: then every call does nothing.
        training: Learning rate, weight decay, warm-up and schedule.
    """

    def __init__(self, *segments: Mapping[str, nn.Parameter], training: TrainingSection) -> None:
        self._segments = [list(segment.values()) for segment in segments]
        self._parameters = {name: parameter for segment in segments for name, parameter in segment.items()}
        self._learning_rate = training.learning_rate
        self._multiplier = _schedule(training)
        self._max_grad_norm = training.max_grad_norm
        self._proximal = training.proximal
        self._start: dict[str, Tensor] = {}
        self._adamw = (
            torch.optim.AdamW(self._parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay)
            if self._parameters
            else None
        )

    def step(self, step_in_run: int, *, rate: float = 1.0, squared_norm: float | None = None) -> None:
        """Apply the gradients at the schedule's rate for this step, then clear them.

        Args:
            step_in_run: Local steps before this one in all rounds, from 0.
            rate: The learning rate is multiplied by this.
            squared_norm: Squared norm that ``max_grad_norm`` bounds, of all segments together; left out = each
                segment's own.
        """
        if self._adamw is None:
            return
        if self._max_grad_norm is not None:
            for segment in self._segments:
                norm = math.sqrt(_squared_norm(segment) if squared_norm is None else squared_norm)
                nn.utils.clip_grads_with_norm_(segment, self._max_grad_norm, torch.tensor(norm), foreach=False)
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * self._multiplier(step_in_run) * rate
        self._adamw.step()
        self._adamw.zero_grad()

    def squared_norm(self) -> float:
        """Give the squared L2 norm of all gradients that were gathered."""
        return _squared_norm(self._parameters.values())

    def hold_to(self, start: Mapping[str, Tensor]) -> None:
        """Note what a round starts from, by whole-model name, for the proximal term."""
        if self._proximal:
            self._start = {name: start[name].detach().clone() for name in self._parameters}

    def pull_to_start(self) -> None:
        """Add the gradient of the proximal term, proximal / 2 · ‖w - start‖², to those that were gathered.

        Source: Li et al., Federated Optimization in Heterogeneous Networks (2020), equation 2.
        """
        for name, start in self._start.items():
            parameter = self._parameters[name]
            if parameter.requires_grad:
                pull = self._proximal * (parameter.detach() - start.to(parameter))
                parameter.grad = pull if parameter.grad is None else parameter.grad + pull

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put these in place of what autograd has gathered.

        Args:
            gradients: One for every trained parameter, by whole-model name, in its shape; any floating-point dtype.
        """
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name].to(parameter.dtype, copy=True) if parameter.requires_grad else None

    def gradients(self) -> dict[str, Tensor]:
        """Copy what was gathered, by whole-model name."""
        return {
            name: parameter.grad.detach().clone()
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }

    def clear_gradients(self) -> None:
        """Forget gradients that were gathered and not applied."""
        if self._adamw is not None:
            self._adamw.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Copy the moments: ``{whole-model name}/{moment}``; empty before the first step."""
        if self._adamw is None:
            return {}
        moments = self._adamw.state
        return {
            f"{name}/{moment}": moments[parameter][moment].detach().clone()
            for name, parameter in self._parameters.items()
            if parameter in moments
            for moment in _MOMENTS
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up moments that `state` gave; an empty mapping starts afresh.

        Raises:
            ValueError: If the state belongs to other parameters.
        """
        known = {key.rpartition("/")[0] for key in state}
        expected = {
            f"{name}/{moment}": torch.Size() if moment == "step" else parameter.shape
            for name, parameter in self._parameters.items()
            for moment in _MOMENTS
            if name in known  # a factor that was frozen so far has none
        }
        found = {key: tensor.shape for key, tensor in state.items()}
        foreign = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        if state and foreign:
            raise ValueError(
                f"The optimiser state belongs to another adapter: {min(foreign)!r} is on one side only or differs in "
                "shape; start the run afresh."
            )
        if self._adamw is None:
            return
        self._adamw.state.clear()
        if not state:
            return
        for name, parameter in self._parameters.items():
            if name not in known:
                continue
            self._adamw.state[parameter] = {moment: state[f"{name}/{moment}"].detach().clone() for moment in _MOMENTS}


def _schedule(training: TrainingSection):  # type: ignore[no-untyped-def]
    """Give the multiplier of the learning rate as a function of the step, as transformers' Trainer has it."""
    carrier = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        training.schedule,
        carrier,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=training.rounds * training.local_steps,
    )
    return scheduler.lr_lambdas[0]


def without(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Leave out the moments of some parameters.

    Args:
        state: What `StepOptimiser.state` gave.
        names: Whole-model names.
    """
    return {key: moment for key, moment in state.items() if key.rpartition("/")[0] not in names}


def _squared_norm(parameters: Iterable[nn.Parameter]) -> float:
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return sum(gradient.double().square().sum().item() for gradient in found)
