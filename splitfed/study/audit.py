"""An audit: what a server that follows the protocol recovers from a run's split point, with noise off and on.

The server knows the base model, the run's configuration and public text. Every attack is made at the run's start, where
the adapters are known to everybody.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from splitfed.config import DataSection, ServerConfig
from splitfed.errors import ConfigError
from splitfed.privacy.leakage import AttackResult
from splitfed.study.audit_attacks import gradient_results, token_results
from splitfed.study.audit_membership import FALSE_ALARMS, MembershipGames, update_guarantee, why_no_membership
from splitfed.study.audit_plot import draw
from splitfed.study.audit_rows import READS, Audit, AuditRow, AuditTerms
from splitfed.study.audit_setting import LEAST_PRIVATE, AuditSetting, open_setting
from splitfed.study.audit_view import Guarantee, Protection, protections, view

__all__ = ["Audit", "AuditRow", "AuditTerms", "audit", "check_folder", "write_audit"]

OnStage = Callable[[str, float], None]
"""Told what is being done, and the part of the whole audit that is done, from 0 to 1."""

_SEE, _TOKENS, _GRADIENTS, _PREPARE, _PLAY = 1.0, 10.0, 6.0, 2.0, 5.0
"""Rough shares of the time."""
_FILES: Final = ("audit.json", "audit.csv", "audit.png")


def audit(
    config: ServerConfig,
    public_data: DataSection | Path | str,
    private_data: DataSection | Path | str,
    *,
    examples: int = 32,
    on_stage: OnStage = lambda what, part: None,
) -> Audit:
    """Attack a run's split point, and count what is recovered.

    Args:
        config: The server's configuration.
        public_data: Text that everybody has, like the private one; a path, or a section that names the columns too.
        private_data: Text to attack, of which the audit knows the truth.
        examples: Private sequences to attack, at least 2.
        on_stage: Told how far the audit is.

    Returns:
        A row for every attack with noise off, and for every attack with the run's protection if it has any.

    Raises:
        ValueError: If fewer than 2 sequences are to be attacked.
        SplitFedError: If the base model, the data or the configuration cannot be used.
    """
    if examples < LEAST_PRIVATE:
        raise ValueError(f"An audit attacks {LEAST_PRIVATE} sequences or more, not {examples}.")
    started_s = time.monotonic()
    on_stage("loading", 0.0)
    setting = open_setting(config, public=_section(public_data), private=_section(private_data), examples=examples)
    compared = protections(setting)
    no_membership = why_no_membership(setting)
    progress = _Progress(on_stage, len(compared), with_membership=no_membership is None)
    rows: list[AuditRow] = []
    for protection in compared:
        rows += _attack_what_crosses(setting, protection, progress)
    if no_membership is None:
        rows += _attack_the_update(setting, compared, progress)
    on_stage("done", 1.0)
    return Audit(
        _terms(setting, compared), tuple(rows), tuple(filter(None, [no_membership])), time.monotonic() - started_s
    )


def check_folder(folder: Path) -> None:
    """Make a folder for an audit's files, before any work is done.

    Raises:
        ConfigError: If it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written to ({error.strerror}); give --output a folder of this user's"
        ) from error


def write_audit(found: Audit, folder: Path) -> list[Path]:
    """Write an audit as JSON, CSV and PNG; each file is whole or not there, and replaces that of an earlier audit.

    Args:
        found: The audit.
        folder: Where to; made if it does not exist.

    Returns:
        The files.

    Raises:
        ConfigError: If the folder cannot be written to.
    """
    check_folder(folder)
    contents = (found.as_json().encode(), found.as_csv().encode(), draw(found))
    drafts = [folder / f".{name}.{os.getpid()}" for name in _FILES]
    try:
        for draft, content in zip(drafts, contents, strict=True):
            draft.write_bytes(content)
        for draft, name in zip(drafts, _FILES, strict=True):
            draft.replace(folder / name)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written to ({error.strerror}); give --output a folder with room of this user's"
        ) from error
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    return [folder / name for name in _FILES]


@dataclass
class _Progress:
    """Adds the parts of an audit up to a whole."""

    on_stage: OnStage
    protections: int
    with_membership: bool
    _done: float = field(default=0.0)

    @property
    def _whole(self) -> float:
        each = _SEE + _TOKENS + _GRADIENTS + (_PLAY if self.with_membership else 0.0)
        return self.protections * each + (_PREPARE if self.with_membership else 0.0)

    def of(self, what: str, share: float) -> Callable[[float], None]:
        """Start a part of the work, and give what takes its own progress."""
        start = self._done
        self._done += share
        self.on_stage(what, start / self._whole)
        return lambda part: self.on_stage(what, (start + share * part) / self._whole)


def _attack_what_crosses(setting: AuditSetting, protection: Protection, progress: _Progress) -> Iterator[AuditRow]:
    noise = "as configured" if protection.is_on else "noise off"
    see = progress.of(f"what crosses, {noise}", _SEE)
    private = view(setting, protection, setting.private)
    public = view(setting, protection, setting.public, on_progress=see)
    smashed = protection.guarantee(protection.smashed)
    for result in token_results(
        setting, protection, public, private, on_progress=progress.of(f"tokens, {noise}", _TOKENS)
    ):
        yield _row(result, protection.is_on, smashed)
    gradient = protection.guarantee(protection.output_gradient)
    for result in gradient_results(
        setting, protection, public, private, on_progress=progress.of(f"labels, {noise}", _GRADIENTS)
    ):
        yield _row(result, protection.is_on, gradient)


def _attack_the_update(setting: AuditSetting, compared: list[Protection], progress: _Progress) -> Iterator[AuditRow]:
    games = MembershipGames(setting, on_progress=progress.of("membership, gradients", _PREPARE))
    for protection in compared:
        noise = "as configured" if protection.is_on else "noise off"
        guarantee = update_guarantee(setting, is_protected=protection.is_on)
        tell = progress.of(f"membership, {noise}", _PLAY)
        steps = f"a round of {setting.config.training.local_steps} steps"
        if protection.is_on and setting.privacy.adapter == "dp-sgd":
            steps += ", each of which is a release"
        for outcome in games.play(is_protected=protection.is_on, on_progress=tell):
            note = f"names {100 * outcome.found:.0f} % of {false_alarms(games.members)}, after {steps}"
            yield _row(outcome.result, protection.is_on, guarantee, note)


def false_alarms(members: int) -> str:
    """Say among how many members and others a few are named: a twentieth of the others may be taken for members."""
    most = int(FALSE_ALARMS * members)
    alarms = "no false alarm" if most == 0 else "1 false alarm at most" if most == 1 else f"{most} false alarms at most"
    return f"{members} members with {alarms} among {members} others"


def _row(result: AttackResult, is_protected: bool, guarantee: Guarantee, note: str = "") -> AuditRow:
    assert result.target in READS
    return AuditRow(result, is_protected, guarantee.epsilon, guarantee.unit, guarantee.text, note)


def _terms(setting: AuditSetting, compared: list[Protection]) -> AuditTerms:
    config = setting.config
    shared = config.shared()
    return AuditTerms(
        run=config.run.name,
        base=shared.model.base,
        n_blocks=setting.model.config.num_hidden_layers,
        hidden_size=setting.model.config.hidden_size,
        bottom_blocks=config.model.bottom_blocks,
        top_blocks=config.model.top_blocks,
        max_tokens=setting.max_tokens,
        private_sequences=len(setting.private),
        public_sequences=len(setting.public),
        delta=setting.privacy.delta,
        relation=setting.privacy.relation,
        is_protected=len(compared) > 1,
        configured=configured_noise(setting) if len(compared) > 1 else "",
        noise_multiplier=setting.privacy.noise_multiplier or 0.0,
    )


def configured_noise(setting: AuditSetting) -> str:
    """Say which noise a run has."""
    privacy = setting.privacy
    noise = f"noise multiplier {privacy.noise_multiplier:g}"
    if privacy.smashed == "metric":
        noise = f"metric privacy of eta {privacy.eta:g} on smashed data, {noise} elsewhere"
    if not setting.adapts:
        return noise
    if privacy.adapter == "none":
        return f"{noise}, none on the adapter update"
    own = "" if privacy.noise_multiplier_adapter is None else f" of {privacy.noise_multiplier_adapter:g}"
    return f"{noise}, {privacy.adapter}{own} on the adapter update"


def _section(data: DataSection | Path | str) -> DataSection:
    return data if isinstance(data, DataSection) else DataSection(path=str(data))
