"""What a person sees of an agent: a progress bar at a terminal, plain log lines otherwise."""

import logging
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from splitfed.config import PrivacySection
from splitfed.privacy import format_epsilon

_log = logging.getLogger(__name__)

_LINES_A_ROUND = 5
_MEGABYTE = 1e6
_CHANNELS = {"smashed": "smashed data", "output_gradient": "output gradients", "adapter": "adapter update"}


class Progress:
    """Reports an agent's work.

    Args:
        console: Where a bar is drawn if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._fetched_tenths = 0
        self._leaving: set[str] = set()
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )

    def policy(self, privacy: PrivacySection, *, is_training: bool) -> None:
        """Say what the device's gate does."""
        self._leaving = {channel for channel in _CHANNELS if channel != "adapter" or is_training}
        if not privacy.is_on:
            _log.warning("noise is off (noise_multiplier = 0): nothing is guaranteed about what leaves this device")
            return
        _log.info("noise is on; every epsilon is for delta %g and the relation %s", privacy.delta, privacy.relation)
        if privacy.sample_rate is not None:
            buys = "lowers epsilon" if privacy.relation == "zero-out" else f"lowers no epsilon under {privacy.relation}"
            how = "each step draws each example with probability %g, in secret, which %s"
            _log.info(how, privacy.sample_rate, buys)
        smashed = f"unit {privacy.smashed}, noise multiplier {privacy.noise_multiplier:g}"
        if privacy.smashed == "metric":
            smashed = f"metric privacy, eta {privacy.eta:g}, and no epsilon"
        else:
            smashed += f", clip {privacy.clipping_norm_smashed:g}"
        _log.info("privacy of the smashed data: %s", smashed)
        _log.info(
            "privacy of the output gradients: unit %s, noise multiplier %g, clip %g",
            privacy.output_gradient,
            privacy.noise_multiplier,
            privacy.clipping_norm_output_gradient,
        )
        if not is_training:
            _log.info("nothing is trained on this device, so no adapter update leaves it")
        elif privacy.adapter == "none":
            _log.warning('the adapter update leaves unprotected (adapter = "none")')
        else:
            _log.info(
                "privacy of the adapter update: %s, noise multiplier %g, clip %g",
                privacy.adapter,
                privacy.noise_multiplier_adapter or privacy.noise_multiplier,
                privacy.clipping_norm_adapter,
            )

    def fetched(self, done_bytes: int, total_bytes: int) -> None:
        """Report the fetching of the base model."""
        tenths = 10 * done_bytes // max(total_bytes, 1)
        if tenths > self._fetched_tenths:
            self._fetched_tenths = tenths
            _log.info("base model: %.1f of %.1f MB fetched", done_bytes / _MEGABYTE, total_bytes / _MEGABYTE)

    def step_is_over(self, round: int, rounds: int, step: int, steps: int, loss: float) -> None:
        """Report a local step."""
        if self._bar is not None:
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task("", total=rounds * steps, loss="")
            done = (round - 1) * steps + step + 1
            self._bar.update(self._task, description=f"round {round} of {rounds}", completed=done, loss=f"{loss:.3f}")
        elif (step + 1) % max(steps // _LINES_A_ROUND, 1) == 0:
            _log.info("round %d of %d, step %d of %d: loss %.3f", round, rounds, step + 1, steps, loss)

    def round_is_over(self, line: Mapping[str, Any], rounds: int) -> None:
        """Report a round: loss, traffic, and what it has cost in privacy so far.

        What is charged to a channel is no guarantee by itself: an adapter that learned from a record, which is charged
        to the adapter, takes part in what the other channels release of other records. What holds is the total.
        """
        held_out = "" if line["held_out_loss"] is None else f", held out {line['held_out_loss']:.3f}"
        if line.get("held_out_loss_merged") is not None:
            held_out += f" ({line['held_out_loss_merged']:.3f} with the run's top)"
        _log.info(
            "round %d of %d is over: loss %.3f%s, %.1f MB up, %.1f MB down, %.1f s",
            line["round"],
            rounds,
            line["training_loss"],
            held_out,
            line["bytes_up"] / _MEGABYTE,
            line["bytes_down"] / _MEGABYTE,
            line["seconds"],
        )
        terms = f"delta {line['delta']:g}, unit {line['unit']}, relation {line['relation']}"
        for channel, epsilon in line["epsilon"].items():
            if epsilon != 0 or channel in self._leaving:
                cost = "no epsilon" if epsilon is None else f"epsilon {format_epsilon(epsilon)}, {terms}"
                _log.info("charged to the %s so far: %s", _CHANNELS[channel], cost)
        _log.info("privacy in total: %s", line["total"])

    def finish(self, run_id: str) -> None:
        """Report the run's end."""
        self.close()
        _log.info("the run %s is over", run_id)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None and self._task is not None:
            self._bar.stop()
            self._task = None
