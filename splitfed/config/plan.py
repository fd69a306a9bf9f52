"""What is asked of the planner on the command line, checked before anything heavy is imported."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import Field, TypeAdapter, ValidationError

from splitfed.config.address import parse_address
from splitfed.config.device import LinkSection, parse_link
from splitfed.config.load import load_server_config
from splitfed.config.privacy import NoiseMultiplier
from splitfed.config.quantities import parse_size, parse_time
from splitfed.config.run import CodecName
from splitfed.config.section import server_address
from splitfed.config.server import ServerConfig
from splitfed.errors import ConfigError

Aim = Literal["loss", "leakage", "step", "bytes", "memory"]
AIMS: Final[tuple[Aim, ...]] = get_args(Aim)
"""What a choice may look at first; the others follow in this order."""
Value = TypeVar("Value")
_LOOPBACK, _WILDCARDS = ("127.0.0.1", "localhost", "::1"), ("0.0.0.0", "::")


@dataclass(frozen=True)
class Limits:
    """What plans have to keep; None = no limit.

    Attributes:
        memory_bytes: Most memory of an agent.
        step_s: Longest local step.
        step_bytes: Most bytes of a step, both ways.
        loss_nats: Most loss above the best that was measured without noise.
        leakage: Most that attacks recover, as a share.
        epsilon: Most that the whole run may cost a record.
    """

    memory_bytes: int | None = None
    step_s: float | None = None
    step_bytes: int | None = None
    loss_nats: float | None = None
    leakage: float | None = None
    epsilon: float | None = None


@dataclass(frozen=True)
class PlanOptions:
    """The options of ``splitfed plan``.

    Attributes:
        config: The run that is planned for, with the model in it.
        devices: Profiles or device classes.
        measure: This machine is a device, too.
        server: Profile or class of the server's machine.
        link: The link of every device; None: that of its profile.
        limits: What plans have to keep.
        ranks: Ranks to choose among.
        codecs: Codecs to choose among.
        noise: Noise multipliers to choose among; empty: the run's.
        most_blocks: Most blocks at each end.
        examples: Rows of a device.
        aim: What counts most.
        sweeps: Sweeps to go by.
        audits: Audits to go by.
        address: Where agents reach the server; None: where it listens.
        data: The agents' data.
        output: Where to write configuration; None: nowhere.
        show: Plans to show for each device.
    """

    config: ServerConfig
    devices: Sequence[str]
    measure: bool
    server: str
    link: LinkSection | None
    limits: Limits
    ranks: Sequence[int]
    codecs: Sequence[CodecName]
    noise: Sequence[float]
    most_blocks: int
    examples: int
    aim: Aim
    sweeps: Sequence[Path]
    audits: Sequence[Path]
    address: str | None
    data: str
    output: Path | None
    show: int

    @property
    def agents(self) -> int:
        """Agents of the run: what it says, else as many as there are devices."""
        federation, devices = self.config.federation, len(self.devices) + self.measure
        return max(federation.agents, devices) if "agents" in federation.model_fields_set else devices

    @property
    def in_a_round(self) -> int:
        """Agents of a round."""
        return self.config.federation.cohort or self.agents

    def addresses(self) -> tuple[str, str]:
        """Give where the server listens, and where agents reach it.

        Raises:
            ConfigError: If nothing says where they reach it.
        """
        listening = self.config.server.address
        host, port = parse_address(self.address or listening)
        if self.address is not None and "address" not in self.config.server.model_fields_set:
            return (self.address if host in _LOOPBACK else f"0.0.0.0:{port}"), self.address
        if self.address is None and (host in _WILDCARDS or port == 0):
            raise ConfigError(
                f"the server listens on {listening}, which says nothing of where agents reach it; add --address, such "
                "as server.example.org:50151"
            )
        return listening, self.address or listening

    @classmethod
    def read(cls, given: dict[str, Any]) -> "PlanOptions":
        """Check the options.

        Args:
            given: By name, as the command line has them.

        Raises:
            ConfigError: If one of them is not allowed, or the run's configuration is not.
        """
        if not given["devices"] and not given["measure"]:
            raise ConfigError("no device is given; add --device with a profile or a device class, or --measure")
        config = _run(given["model"], given["config"], given["dtype"], given["agents"])
        limits = Limits(
            memory_bytes=_parsed("--max-memory", parse_size, given["max_memory"]),
            step_s=_parsed("--max-step", parse_time, given["max_step"]),
            step_bytes=_parsed("--max-bytes", parse_size, given["max_bytes"]),
            loss_nats=_limit("--max-loss-cost", given["max_loss_cost"], math.inf),
            leakage=_limit("--max-leakage", given["max_leakage"], 1.0),
            epsilon=_limit("--epsilon", given["epsilon"], math.inf),
        )
        link = given["link"]
        address = given["address"]
        if address is not None:
            _parsed("--address", server_address, address)
        options = cls(
            config=config,
            devices=given["devices"] or [],
            measure=given["measure"],
            server=given["server"],
            link=None if link is None else parse_link(link),
            limits=limits,
            ranks=_several("--ranks", given["ranks"], Annotated[int, Field(ge=1, le=4096)]),
            codecs=_several("--codecs", given["codecs"], CodecName),
            noise=[] if given["noise"] is None else _several("--noise", given["noise"], NoiseMultiplier),
            most_blocks=_at_least("--most-blocks", given["most_blocks"], 0),
            examples=_at_least("--examples", given["examples"], 1),
            aim=_several("--prefer", given["prefer"], Aim)[0],
            sweeps=given["sweeps"] or [],
            audits=given["audits"] or [],
            address=address,
            data=given["data"],
            output=given["output"],
            show=_at_least("--show", given["show"], 1),
        )
        if options.output is not None:
            options.addresses()
        return options


def _run(model: str | None, file: Path | None, dtype: str | None, agents: int | None) -> ServerConfig:
    """Give the run that is planned for: a file's, or one of defaults, with the model and the agents of the options."""
    if file is None and model is None:
        raise ConfigError("no model is given; add --model with a folder or a hub id, or --config with a server's file")
    sections: dict[str, Any] = {"run": {"directory": "run"}}
    if file is not None:
        sections = {
            name: section.model_dump(exclude_unset=True)
            for name, section in load_server_config(file)
            if section is not None
        }
    if model is not None:
        base = str(Path(model).resolve()) if Path(model).is_dir() else model
        sections["model"] = {**sections.get("model", {}), "base": base}
    if dtype is not None:
        sections["model"]["dtype"] = _several("--dtype", dtype, Literal["float32", "bfloat16", "float16"])[0]
    if agents is not None:
        federation = sections.get("federation", {})
        sections["federation"] = {**federation, "agents": _at_least("--agents", agents, 1)}
    try:
        return ServerConfig.model_validate(sections)
    except ValidationError as error:
        raise ConfigError(f"the run cannot be planned: {error.errors()[0]['msg']}") from error


def _parsed(option: str, parse: Callable[[str], Value], text: str | None) -> Value | None:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise ConfigError(f"{option} {error}") from error


def _limit(option: str, value: float | None, most: float) -> float | None:
    if value is not None and not 0 < value <= most:
        allowed = f"above 0 and at most {most:g}" if math.isfinite(most) else "above 0"
        raise ConfigError(f"{option} is {value:g}; give a number {allowed}")
    return value


def _at_least(option: str, value: int, least: int) -> int:
    if value < least:
        raise ConfigError(f"{option} is {value}; give {least} or more")
    return value


def _several(option: str, text: str, kind: Any) -> list[Any]:
    """Read values with commas between them, each once."""
    found = []
    for part in text.split(","):
        try:
            value = TypeAdapter(kind).validate_strings(part.strip())
        except ValidationError as error:
            problem = error.errors()[0]
            reason = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{option} has {part.strip()!r}: {reason[0].lower()}{reason[1:]}") from error
        if value not in found:
            found.append(value)
    return found
