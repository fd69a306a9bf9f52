"""The agent's configuration file."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from splitfed.config.privacy import AgentPrivacySection
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
    bottom_blocks: Annotated[int, Field(ge=0)] | None = None
    """Transformer blocks that this agent holds after the embeddings; left out = as the run says."""
    top_blocks: Annotated[int, Field(ge=0)] | None = None
    """Transformer blocks that this agent holds before the head; left out = as the run says."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of this agent's own adapter; left out = as the run says."""
    personal: list[Literal["bottom", "top"]] = Field(default_factory=list)
    """Segments whose adapter stays on this agent and is never merged with those of others; what every agent keeps
    is not trained in the run's own adapter."""
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
    """Rows to read at most, of each file; left out = all."""

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


class AgentConfig(Section):
    """Everything in an agent's file."""

    agent: AgentSection
    data: DataSection
    privacy: AgentPrivacySection = AgentPrivacySection()
    tls: TlsSection | None = None

    @field_validator("privacy")
    @classmethod
    def _budget_pays_for_no_loss(cls, value: AgentPrivacySection, info: ValidationInfo) -> AgentPrivacySection:
        agent = info.data.get("agent")
        if value.epsilon_budget is not None and agent is not None and agent.share_loss:
            raise ValueError(
                f"epsilon_budget is {value.epsilon_budget:g}, but a loss that is shared has no noise and passes every "
                "budget; set agent.share_loss = false, or leave epsilon_budget out"
            )
        return value

    @field_validator("privacy")
    @classmethod
    def _allows_the_own_split_point(cls, value: AgentPrivacySection, info: ValidationInfo) -> AgentPrivacySection:
        for name in ("bottom_blocks", "top_blocks"):
            own, limit = getattr(info.data.get("agent"), name, None), getattr(value, f"most_{name}")
            if own is not None and limit is not None and own > limit:
                raise ValueError(
                    f"most_{name} is {limit}, but agent.{name} = {own} asks for more; raise the one, or lower the other"
                )
        return value
