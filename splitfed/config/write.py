"""From a configuration back to a TOML file, for the copy that a run directory keeps."""

import json
from pathlib import Path

from splitfed.config.section import Section


def to_toml(config: Section, *, with_defaults: bool = True) -> str:
    """Write a configuration as TOML that the loader reads back to an equal one, from whatever folder.

    Args:
        config: A whole file: ``ServerConfig`` or ``AgentConfig``.
        with_defaults: Spell out what was left out, save where to leave a key out means something else.

    Returns:
        A table for each section.
    """
    blocks = []
    for name, section in config:
        if isinstance(section, Section):
            keys = [
                f"{key} = {_literal(value)}"
                for key, value in section
                if value is not None
                and ((with_defaults and section.writes_defaults) or key in section.model_fields_set)
            ]
            if not keys and not with_defaults:
                continue
            blocks.append("\n".join([f"[{name}]", *keys]) + "\n")
    return "\n".join(blocks)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(_literal(item) for item in value)}]"
    assert isinstance(value, str | Path)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
