"""What all sections of a configuration file share: strictness, and values that depend on where the file lies."""

import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from splitfed.config.address import parse_address

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DEMO_BASE = "demo"


class Section(BaseModel):
    """A table of a configuration file: unknown keys are refused, types are not converted, values do not change."""

    writes_defaults: ClassVar[bool] = True
    """Whether a copy of the file spells out what was left out."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def beside_file(value: str | Path, info: ValidationInfo) -> Path:
    """Resolve a path against the folder of the configuration file, which the loader passes as context."""
    folder = (info.context or {}).get("folder")
    path = Path(value).expanduser()
    return path if folder is None else (folder / path).resolve()


def base_beside_file(value: str, info: ValidationInfo) -> str:
    """Resolve a base model that is a folder; keep a hub id, and the name of the embedded model, as they are."""
    if info.context is None or value == DEMO_BASE:
        return value
    folder = beside_file(value, info)
    if folder.is_dir():
        return str(folder)
    if HUB_ID.fullmatch(value):
        return value
    raise ValueError(f"is {value!r}, neither a folder ({folder} does not exist) nor a hub id; correct the path")


def listening_address(value: str) -> str:
    """Check an address to listen on; port 0 lets the operating system choose."""
    parse_address(value)
    return value


def server_address(value: str) -> str:
    """Check an address to connect to."""
    if parse_address(value)[1] == 0:
        raise ValueError(f"is {value!r}, but a server cannot be reached at port 0; give the port that it listens on")
    return value


NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"
"""A name that is also a file name on every system."""

Name = Annotated[str, Field(pattern=NAME)]
LocalPath = Annotated[Path, Field(strict=False), AfterValidator(beside_file)]
Base = Annotated[str, Field(min_length=1), AfterValidator(base_beside_file)]
ListeningAddress = Annotated[str, AfterValidator(listening_address)]
ServerAddress = Annotated[str, AfterValidator(server_address)]
Threads = Annotated[int | None, Field(ge=1)]


class TlsSection(Section):
    """Certificates for mutual TLS: each side shows its own and checks the other's. All are PEM files."""

    certificate: LocalPath
    """This daemon's certificate, with the intermediate ones after it."""
    key: LocalPath
    """The private key of the certificate."""
    authority: LocalPath
    """The certificate authority that signed the other side's certificate."""
