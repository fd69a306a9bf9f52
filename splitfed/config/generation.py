"""Whether a server generates text for the agents of its run, and how much of it at a time."""

from typing import Annotated

from pydantic import Field

from splitfed.config.section import Section


class GenerationSection(Section):
    """Text from the split model, for the agents of the run: `splitfed generate`."""

    enabled: bool = False
    """Whether agents of the run may generate text with its last whole round; the server then stays when the run is
    over, until it is stopped."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longest sequence, prompt and text together, in tokens; left out = training.max_tokens."""
    max_streams: Annotated[int, Field(ge=1, le=1024)] = 4
    """Sequences at the same time, one an agent; each takes a cache of as many tokens as it has."""
    idle_timeout_s: Annotated[float, Field(gt=0)] = 60
    """Seconds without a row after which a sequence's cache is given up."""
