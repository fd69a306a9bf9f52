"""The attack of an audit on the adapter update: which records an agent trained on in its first round.

A game is played: an agent trains on half of some records, and the server, which knows the adapters before and after,
says of each record whether it was among them. Its threshold comes from a game that it plays by itself, with public
records and the same protection.

Shapes: N records, P adapter parameters.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from splitfed.models import Partition, adapter_parameters, add_adapter, initial_adapter, load_adapter_state
from splitfed.privacy import Ledger
from splitfed.privacy.leakage import (
    AttackResult,
    alignment_scores,
    best_threshold,
    found_at,
    membership_result,
    stand_out,
)
from splitfed.study.audit_setting import AuditSetting
from splitfed.study.audit_view import NOTHING, Guarantee, gaussian_guarantee
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.data import Example, collate
from splitfed.training.objective import IGNORED_LABEL
from splitfed.training.per_example import PerExampleLayers
from splitfed.training.protection import Workload, open_gate
from splitfed.training.setup import lora_settings
from splitfed.training.simulate import simulate

OnProgress = Callable[[float], None]

LEAST_MEMBERS: Final = 4
FALSE_ALARMS: Final = 0.05
_MOST_MEMBERS: Final = 64
_MOST_REFERENCES: Final = 256
_MOST_PARAMETERS: Final = 2**19  # the rest adds little: 2 MiB for each record
_SEQUENCES_AT_ONCE: Final = 8
_CLIENT: Final = "audited"


@dataclass(frozen=True)
class MembershipOutcome:
    """How a membership attack did, and how sure its surest answers were.

    Attributes:
        result: Right answers.
        found: Share of members that can be named with few false alarms.
    """

    result: AttackResult
    found: float


class MembershipGames:
    """Plays rounds with known members.

    Args:
        setting: The run.
        on_progress: Told the part of the preparation that is done.

    Attributes:
        members: Records that an agent trains on in a game; as many others are judged with them.
    """

    def __init__(self, setting: AuditSetting, *, on_progress: OnProgress) -> None:
        self._setting = setting
        self.members = count_members(setting)
        n_references = min(_MOST_REFERENCES, len(setting.public) - 2 * self.members)
        self._references = setting.public[:n_references]
        self._shadow = setting.public[n_references : n_references + 2 * self.members]
        self._private = setting.records[: 2 * self.members]
        self._before = initial_adapter(setting.model, lora_settings(setting.config.lora), seed=setting.config.run.seed)
        self._parts = setting.parts()
        for segment in self._parts:
            add_adapter(segment, lora_settings(setting.config.lora), seed=setting.config.run.seed)
        self._names = [name for part in (self._parts.bottom, self._parts.top) for name in adapter_parameters(part)]
        size = sum(self._before[name].numel() for name in self._names)
        draw = torch.Generator().manual_seed(0)
        self._kept_P = torch.randperm(size, generator=draw)[:_MOST_PARAMETERS].sort().values
        everyone = [*self._references, *self._shadow, *self._private]
        gradients_NP, self._losses_N = self._measure(everyone, on_progress)
        self._gradients = gradients_NP.split([n_references, 2 * self.members, 2 * self.members])

    def play(self, *, is_protected: bool, on_progress: OnProgress) -> list[MembershipOutcome]:
        """Play one game with public records, then two with private ones, each of which is a member once.

        Args:
            is_protected: Whether the run's protection is on.
            on_progress: Told the part that is done.
        """
        half = self.members
        first, second = slice(half), slice(half, None)
        games = [(self._shadow, 0, first, second), (self._private, 1, first, second), (self._private, 1, second, first)]
        scores: dict[str, list[tuple[Tensor, Tensor]]] = {"gradient alignment": [], "loss difference": []}
        for number, (records, group, members, others) in enumerate(games):
            after = self._train(records[members], is_protected=is_protected)
            on_progress((number + 0.8) / len(games))
            for name, scores_N in self._scores(records, group, after).items():
                judged_N = stand_out(scores_N)
                scores[name].append((judged_N[members], judged_N[others]))
            on_progress((number + 1) / len(games))
        return [_outcome(name, *played) for name, played in scores.items()]

    def _train(self, members: Sequence[Example], *, is_protected: bool) -> dict[str, Tensor]:
        """Train one round on the members, and give the adapters of bottom and top as the server gets them."""
        setting, config = self._setting, self._setting.config
        training = config.training.model_copy(update={"rounds": 1})
        if config.training.rounds > 1:  # the run's schedule hardly falls in its first round
            training = training.model_copy(update={"schedule": "constant_with_warmup"})
        parts = setting.parts()
        with tempfile.TemporaryDirectory(prefix="splitfed-audit-") as folder, Ledger(Path(folder) / "ledger") as ledger:
            workload = Workload(training, [example.record for example in members])
            result = simulate(
                parts,
                setting.tokenizer,
                {_CLIENT: members},
                training=training,
                lora=config.lora,
                codecs=config.codecs,
                seed=config.run.seed,
                releases=(
                    lambda client: open_gate(
                        setting.privacy, ledger, config.run.name, bottom=parts.bottom, top=parts.top, workload=workload
                    )
                )
                if is_protected
                else None,
            )
        return {name: result.adapter[name] for name in self._names}

    def _scores(self, records: Sequence[Example], group: int, after: Mapping[str, Tensor]) -> dict[str, Tensor]:
        update_P = self._flat({name: after[name] - self._before[name] for name in self._names})
        start = len(self._references) + (2 * self.members if group == 1 else 0)
        losses_N = self._losses_N[start : start + len(records)]
        return {
            "gradient alignment": alignment_scores(self._gradients[1 + group], update_P, self._gradients[0]),
            "loss difference": losses_N - self._losses(records, after),
        }

    def _measure(self, examples: Sequence[Example], on_progress: OnProgress) -> tuple[Tensor, Tensor]:
        """Take each record's gradient and loss at the adapters before the round."""
        parts = self._parts
        layers = {part.kind: PerExampleLayers(part) for part in (parts.bottom, parts.top)}
        gradients, losses = [], []
        for start in range(0, len(examples), _SEQUENCES_AT_ONCE):
            few = examples[start : start + _SEQUENCES_AT_ONCE]
            batch = collate(few, pad_token_id=self._setting.pad_token_id)
            with layers["bottom"].recording(batch.input_ids_BT) as bottom_pass:
                smashed_BTD = parts.bottom(batch.input_ids_BT)
            entering_BTD = smashed_BTD.detach().requires_grad_()
            output_BTD = parts.trunk(entering_BTD)
            leaving_BTD = output_BTD.detach().requires_grad_()
            with layers["top"].recording(batch.input_ids_BT) as top_pass:
                logits_BTV = parts.top(leaving_BTD).logits
            losses.append(_losses(logits_BTV, batch.labels_BT))
            gradient_BTD = top_pass.backward(causal_lm_loss(logits_BTV, batch.labels_BT, 1.0), wrt=leaving_BTD)
            if smashed_BTD.requires_grad:
                (smashed_gradient_BTD,) = torch.autograd.grad(output_BTD, entering_BTD, gradient_BTD)
                bottom_pass.backward(smashed_BTD, smashed_gradient_BTD)
            found = {**bottom_pass.gradients, **top_pass.gradients}
            gradients += [self._flat({name: found[name][row] for name in self._names}) for row in range(len(few))]
            on_progress(min(1.0, (start + len(few)) / len(examples)))
        return torch.stack(gradients), torch.cat(losses)

    @torch.no_grad()
    def _losses(self, examples: Sequence[Example], adapter: Mapping[str, Tensor]) -> Tensor:
        """Take each record's loss with other adapters on bottom and top."""
        parts: Partition = self._parts
        own = (parts.bottom, parts.top)
        for part in own:
            load_adapter_state(part, adapter)
        losses = []
        for start in range(0, len(examples), _SEQUENCES_AT_ONCE):
            batch = collate(examples[start : start + _SEQUENCES_AT_ONCE], pad_token_id=self._setting.pad_token_id)
            logits_BTV = parts.top(parts.trunk(parts.bottom(batch.input_ids_BT))).logits
            losses.append(_losses(logits_BTV, batch.labels_BT))
        for part in own:
            load_adapter_state(part, self._before)
        return torch.cat(losses)

    def _flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Put the tensors of bottom and top into one vector, shape [P]."""
        return torch.cat([tensors[name].detach().flatten().float() for name in self._names])[self._kept_P]


def count_members(setting: AuditSetting) -> int:
    """Say how many members a game can have: as many others are needed, both in private and in public."""
    return min(_MOST_MEMBERS, len(setting.records) // 2, len(setting.public) // 3)


def update_guarantee(setting: AuditSetting, *, is_protected: bool) -> Guarantee:
    """Say what one release of the device's own adapters is guaranteed: a step's gradient, or the update as a whole."""
    privacy = setting.privacy
    if not is_protected or privacy.adapter == "none":
        return NOTHING
    unit = "client" if privacy.adapter == "update" else "sequence"
    noise_multiplier = privacy.noise_multiplier_adapter or privacy.noise_multiplier or 0.0
    return gaussian_guarantee(noise_multiplier, unit, privacy.delta, privacy.relation)


def why_no_membership(setting: AuditSetting) -> str | None:
    """Say why there can be no game, or None."""
    if not setting.adapts:
        return "Membership is left out: at this split point a device has nothing to train, so no update leaves it."
    if count_members(setting) < LEAST_MEMBERS:
        return (
            f"Membership is left out: it needs {2 * LEAST_MEMBERS} private records and {3 * LEAST_MEMBERS} public "
            f"sequences, and there are {len(setting.records)} and {len(setting.public)}."
        )
    return None


def _outcome(name: str, shadow: tuple[Tensor, Tensor], *played: tuple[Tensor, Tensor]) -> MembershipOutcome:
    members, others = zip(*played, strict=True)
    thresholds = [best_threshold(*shadow)] * len(played)
    found = [found_at(one, other, false_alarms=FALSE_ALARMS) for one, other in played]
    return MembershipOutcome(membership_result(name, members, others, thresholds), sum(found) / len(found))


def _losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean loss per token of each sequence, shape [B]."""
    targets_BT = labels_BT[:, 1:]
    losses_BT = F.cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2).float(), targets_BT, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return (losses_BT.sum(1) / (targets_BT != IGNORED_LABEL).sum(1).clamp_min(1)).detach()
