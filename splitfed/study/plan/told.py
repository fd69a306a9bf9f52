"""A plan as it is told: a table of what is worth looking at, the choice, and what it rests on."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfed.privacy import format_epsilon
from splitfed.study.plan.plans import Plan
from splitfed.study.plan.request import Answer, Request, Seat
from splitfed.study.plan.writing import bytes_text, nats, percent, seconds

_HEADINGS = (
    "",
    "bottom",
    "top",
    "rank",
    "codec",
    "noise",
    "memory",
    "a step",
    "bytes a step",
    "loss cost",
    "tokens",
    "labels",
    "epsilon",
)


@dataclass(frozen=True)
class Made:
    """A plan that was made, and how it is told.

    Attributes:
        request: What was asked.
        answer: What was found; there is a choice.
        show: Plans to show for each device.
        written: Configuration files.
    """

    request: Request
    answer: Answer
    show: int
    written: Sequence[Path] = ()

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Give headings and rows for a terminal: the choice, marked, and the plans that it was chosen from."""
        lines: list[list[str]] = []
        several = len(self.answer.frontier) > 1
        for name, plans in self.answer.frontier.items():
            chosen = self.answer.chosen[name]
            others = [each for each in plans if each != chosen][: self.show - 1]
            for each in (chosen, *others):
                line = ["→" if each == chosen else "", *_line(each)]
                lines.append([name, *line] if several else line)
        return (["device", *_HEADINGS] if several else list(_HEADINGS)), lines

    def sentences(self) -> list[str]:
        """Give what there is to say below the table."""
        chosen, several = self.answer.chosen, len(self.answer.chosen) > 1
        found = [f"→ {f'{name}: ' if several else ''}{each}: {expected(each)}." for name, each in chosen.items()]
        left = {name: len(plans) - self.show for name, plans in self.answer.frontier.items()}
        if more := [f"{count} of {name}" if several else str(count) for name, count in left.items() if count > 0]:
            found.append(f"Not shown: {', '.join(more)} more that no other plan beats; --show and --json have them.")
        found += [*self.answer.sentences, *_warnings(chosen), *_assumptions(self.request)]
        if self.written:
            files = ", ".join(map(str, self.written))
            found.append(
                f"Written: {files}. Check data.path, and certificates where there are any, in each agent's file; then "
                "start splitfed server."
            )
        return found

    def as_json(self) -> str:
        """Give everything as one JSON object; a figure that is not finite is null."""
        content = {
            "model_blocks": self.request.shape.n_blocks,
            "dtype": self.request.shape.dtype,
            "chosen": {name: _fields(each) for name, each in self.answer.chosen.items()},
            "frontier": {name: [_fields(each) for each in plans] for name, plans in self.answer.frontier.items()},
            "constraints": list(self.answer.sentences),
            "assumptions": _assumptions(self.request),
            "written": [str(file) for file in self.written],
        }
        return json.dumps(content, ensure_ascii=False, indent=1)


def expected(chosen: Plan) -> str:
    """Say what a plan is expected to take."""
    step = chosen.step
    shared = ", for each agent in turn" if chosen.step_s > step.step_s else ""
    return (
        f"{bytes_text(chosen.memory_bytes)} of memory and {seconds(chosen.step_s)} a step (which overlap: agent "
        f"{seconds(step.agent_s)}, link {seconds(step.link_s)}, server {seconds(step.server_s)}{shared}), "
        f"{bytes_text(chosen.up_bytes)} up and {bytes_text(chosen.down_bytes)} down; the server "
        f"{bytes_text(chosen.server_memory_bytes)} of memory; without a base model of its own the agent first fetches "
        f"{bytes_text(chosen.weight_bytes)}, in {seconds(chosen.fetch_s)}"
    )


def _line(each: Plan) -> list[str]:
    share = "" if math.isnan(each.loss.share) else f" ({percent(max(each.loss.share, 0.0))})"
    return [
        str(each.split_point.bottom_blocks),
        str(each.split_point.top_blocks),
        str(each.rank),
        each.codec,
        f"{each.noise_multiplier:g}",
        bytes_text(each.memory_bytes),
        seconds(each.step_s),
        bytes_text(each.step_bytes),
        f"{'≥ ' if each.loss.is_beyond else ''}{nats(each.loss.nats)}{share}",
        percent(each.leakage.tokens),
        percent(each.leakage.labels),
        format_epsilon(each.epsilon) if math.isfinite(each.epsilon) else "none",
    ]


def _warnings(chosen: Mapping[str, Plan]) -> Iterable[str]:
    if any(each.loss.share >= 1 for each in chosen.values()):
        yield "Where it was measured, so much noise left nothing to learn: no loss fell below the base model's."
    if any(each.noise_multiplier == 0 for each in chosen.values()):
        yield "Without noise nothing is guaranteed: the server can recover what the columns tokens and labels say."


def _assumptions(request: Request) -> list[str]:
    privacy, training, server = request.run.privacy, request.run.training, request.server.device
    devices = "; ".join(map(_described, request.seats))
    agents = f"{request.agents} {'agent' if request.agents == 1 else 'agents'} a round"
    losses, leaks = request.evidence.loss_of, request.evidence.leakage_of
    where = "there" if leaks == losses else f"on {leaks}"
    return [
        f"Steps of {training.batch_size} sequences of {training.max_tokens} tokens in {request.shape.dtype}, {agents}; "
        f"{devices}; server: {server.name} ({server.source}). Times and memory are estimates; with measured profiles "
        "they were within 25 % of what runs took, so leave room.",
        "Loss cost is held-out loss above the best without noise, and its share of what training gained, as measured "
        f"on {losses}. Tokens and labels are what the strongest attacks recovered {where}: "
        "lower bounds on what leaks, never guarantees. They carry over to other models by noise ÷ signal and relative "
        "depth; splitfed sweep and splitfed audit measure yours (--sweep, --audit).",
        f"Epsilon is what {training.rounds} rounds of {training.local_steps} steps cost the record that is worst off "
        f"of {request.examples} of one sequence each, at delta {privacy.delta:g}, unit sequence, relation "
        f"{privacy.relation}.",
    ]


def _described(seat: Seat) -> str:
    device, link = seat.device.device, seat.link
    rates = f"{link.up_bits_per_s / 1e6:.4g}/{link.down_bits_per_s / 1e6:.4g} Mbit/s"
    return f"{seat.name} ({device.source}) over {rates} with {seconds(link.latency_s)} of round trip"


def _fields(each: Plan) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "bottom_blocks": each.split_point.bottom_blocks,
        "top_blocks": each.split_point.top_blocks,
        "rank": each.rank,
        "codec": each.codec,
        "noise_multiplier": each.noise_multiplier,
        "memory_bytes": each.memory_bytes,
        "server_memory_bytes": each.server_memory_bytes,
        "step_s": each.step_s,
        "agent_s": each.step.agent_s,
        "link_s": each.step.link_s,
        "server_s": each.step.server_s,
        "up_bytes": each.up_bytes,
        "down_bytes": each.down_bytes,
        "weight_bytes": each.weight_bytes,
        "fetch_s": each.fetch_s,
        "loss_cost_nats": each.loss.nats,
        "loss_cost_share": each.loss.share,
        "loss_spread_nats": each.loss.spread,
        "loss_is_lower_bound": each.loss.is_beyond,
        "leakage_tokens": each.leakage.tokens,
        "leakage_labels": each.leakage.labels,
        "epsilon": each.epsilon,
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }
