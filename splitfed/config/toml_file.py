"""From a TOML file to a checked section, or to one sentence that says what is wrong with it."""

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from splitfed.config.explain import explain
from splitfed.config.section import Section
from splitfed.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)


def read_toml(path: Path | str, section: type[SectionT], *, if_missing: str, **others: type[Section]) -> SectionT:
    """Read a file; relative paths in it start at its own folder.

    Args:
        path: The file.
        section: What it is to hold.
        if_missing: What to do where there is no such file, for the error.
        others: Sections that it may have been mistaken for, by name.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or has a key or a value that is not allowed.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; {if_missing}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a readable TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (at byte {error.start}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}; correct it there") from error
    try:
        return section.model_validate(content, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, section, **others)}") from error
