"""AdamW under one schedule that covers the whole run, with a state that is nothing but named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from splitfed.config import TrainingSection

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class StepOptimiser:
    """Optimiser of one segment's adapter, for one client, over all rounds.

    The learning rate is a function of the step's index in the run, so rounds, restarts and machines agree on it.

    Args:
        parameters: Trained parameters by whole-model name. May be empty: then every call does nothing.
        training: Learning rate, weight decay, warm-up and schedule.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], training: TrainingSection) -> None:
        self._parameters = dict(parameters)
        self._learning_rate = training.learning_rate
        self._multiplier = _schedule(training)
        self._adamw = (
            torch.optim.AdamW(self._parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay)
            if self._parameters
            else None
        )

    def step(self, step_in_run: int) -> None:
        """Apply the gradients at the schedule's rate for this step, then clear them.

        Args:
            step_in_run: Local steps before this one in all rounds, from 0.
        """
        if self._adamw is None:
            return
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * self._multiplier(step_in_run)
        self._adamw.step()
        self._adamw.zero_grad()

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put these in place of what autograd has gathered.

        Args:
            gradients: One for every trained parameter, by whole-model name, in its shape; any floating-point dtype.
        """
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name].to(parameter.dtype)

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
        expected = {
            f"{name}/{moment}": torch.Size() if moment == "step" else parameter.shape
            for name, parameter in self._parameters.items()
            for moment in _MOMENTS
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
