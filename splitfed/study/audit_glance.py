"""The cheapest attacks of an audit alone: in seconds, what a whole one finds in minutes and better."""

from pathlib import Path

from splitfed.config import DataSection, ServerConfig
from splitfed.study.audit_attacks import gradient_results, token_results
from splitfed.study.audit_rows import AuditRow
from splitfed.study.audit_setting import open_setting
from splitfed.study.audit_view import protections, view


def glance(
    config: ServerConfig, public_data: Path | str, private_data: Path | str, *, examples: int = 8
) -> list[AuditRow]:
    """Make the first attack on tokens, and the one on labels where the top holds no block.

    Args:
        config: The server's configuration.
        public_data: Text that everybody has.
        private_data: Text to attack.
        examples: Private sequences to attack, at least 2.

    Returns:
        A row an attack with noise off, then with the run's protection if it has any; the rows are those that an audit
        has of these attacks.

    Raises:
        SplitFedError: If the base model, the data or the configuration cannot be used.
    """
    setting = open_setting(
        config,
        public=DataSection(path=str(public_data)),
        private=DataSection(path=str(private_data)),
        examples=examples,
    )
    rows = []
    for protection in protections(setting):
        private, public = (view(setting, protection, each) for each in (setting.private, setting.public))
        tokens = token_results(setting, protection, public, private, on_progress=lambda part: None)
        found = [(next(tokens), protection.smashed)]
        if config.model.top_blocks == 0:
            *_, labels = gradient_results(setting, protection, public, private, on_progress=lambda part: None)
            found.append((labels, protection.output_gradient))
        for result, mechanism in found:
            stated = protection.guarantee(mechanism)
            rows.append(AuditRow(result, protection.is_on, stated.epsilon, stated.unit, stated.text))
    return rows
