"""The agent's configuration file."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from splitfed.config.section import (
    Base,
    LocalPath,
    Name,
    Section,
    ServerAddress,
    Threads,
    TlsSection,
    beside_file,
)

ClippingNorm = Annotated[float, Field(ge=1e-20, le=1e20)]


class AgentSection(Section):
    """Who the agent is and whom it serves."""

    name: Name
    """Name of the agent, unique in the run."""
    server: ServerAddress = "127.0.0.1:50151"
    """Address of the server."""
    fed_server: ServerAddress | None = None
    """Address of the fed server; left out = the same as server."""
    state_directory: LocalPath
    """Folder for the ledger, metrics and everything else that survives a restart."""
    base: Base | None = None
    """Folder or hub id of the base model; left out = download the agent's segments from the server."""
    threads: Threads = None
    """CPU threads for arithmetic; left out = the library's choice."""
    share_loss: bool = False
    """Whether the server is told the loss, which says something about the data."""
    retry_for_s: Annotated[float, Field(ge=0)] = 60
    """Seconds to keep trying when the server cannot be reached."""


class DataSection(Section):
    """The agent's own data, which never leaves the device."""

    format: Literal["auto", "jsonl", "csv", "parquet", "text", "hub"] = "auto"
    """Kind of the data; "auto" goes by the file's extension, "hub" asks the Hugging Face hub."""
    path: Annotated[str, Field(min_length=1)]
    """A file, or the id of a data set on the hub."""
    split: str = "train"
    """Split of a data set of the hub."""
    text_column: str = "text"
    """Column of plain text."""
    prompt_column: str = "prompt"
    """Column of prompts, which carry no loss."""
    completion_column: str = "completion"
    """Column of completions, which carry the loss."""
    messages_column: str = "messages"
    """Column of conversations: lists of {role, content}."""
    objective: Literal["auto", "text", "completion", "messages"] = "auto"
    """What to learn; "auto" goes by the columns that exist."""
    held_out_path: str | None = None
    """A file to evaluate on, never trained on."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the records to evaluate on instead of training on them."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows to read at most, of each file."""

    @field_validator("held_out_path")
    @classmethod
    def _resolve_file(cls, value: str | None, info: ValidationInfo) -> str | None:
        return value if value is None or info.context is None else str(beside_file(value, info))

    @field_validator("path")
    @classmethod
    def _resolve_file_or_keep_id(cls, value: str, info: ValidationInfo) -> str:
        data_format = info.data.get("format")
        if info.context is None or data_format == "hub":
            return value
        return str(beside_file(value, info))

    @field_validator("held_out_fraction")
    @classmethod
    def _one_source_of_held_out_rows(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("held_out_path") is not None:
            raise ValueError(f"is {value} although held_out_path is set; keep one of the two")
        return value


class PrivacySection(Section):
    """The agent's own policy, which outranks the run's. Noise is on unless it is set to 0."""

    noise_multiplier: Annotated[float, Field(ge=0)] = 0.002
    """Standard deviation of the noise ÷ sensitivity, for each release; 0 = nothing is guaranteed."""
    clipping_norm_smashed: ClippingNorm | None = None
    """Largest L2 norm of a token's smashed data; longer ones are scaled down; left out = what is usual in the model."""
    clipping_norm_output_gradient: ClippingNorm = 0.01
    """Largest L2 norm of one token's output gradient; longer ones are scaled down."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """The delta at which epsilon is stated."""
    epsilon_budget: Annotated[float, Field(gt=0)] | None = None
    """Stop before either channel's epsilon passes this; left out = report only."""
    aggregation_weight: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Weight of this agent's adapter in the average; left out = 1 with noise on, the number of examples without."""

    @field_validator("epsilon_budget")
    @classmethod
    def _budget_needs_noise(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("noise_multiplier") == 0:
            raise ValueError(f"is {value}, but without noise no budget can be kept; set noise_multiplier above 0")
        return value


class AgentConfig(Section):
    """Everything in an agent's file."""

    agent: AgentSection
    data: DataSection
    privacy: PrivacySection = PrivacySection()
    tls: TlsSection | None = None
