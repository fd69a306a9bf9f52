"""The run as this device takes part in it: with the split point and the rank that its owner chose."""

import hashlib

from splitfed.config import AgentSection, RunConfig
from splitfed.errors import JoinRefused


def own_run(agent: AgentSection, run: RunConfig) -> RunConfig:
    """Put the owner's split point and rank in place of the run's.

    Args:
        agent: The agent's section.
        run: What the server says about the run.

    Returns:
        The run's configuration, for this device; alpha / rank stays what it is.

    Raises:
        JoinRefused: If the run has no such rank, or merges bottom and top at every step.
    """
    cut = {name: getattr(agent, name) for name in ("bottom_blocks", "top_blocks") if getattr(agent, name) is not None}
    rank = run.lora.rank if agent.rank is None else agent.rank
    run.check_rank(rank)
    if run.federation.merge_ends == "step" and (agent.personal or cut):
        raise JoinRefused(
            f"The run {run.run.name!r} merges bottom and top at every step, which needs agents that hold the same; "
            "leave [agent] bottom_blocks, top_blocks and personal out."
        )
    lora = run.lora.model_copy(update={"rank": rank, "alpha": run.lora.alpha * rank / run.lora.rank})
    return run.model_copy(update={"model": run.model.model_copy(update=cut), "lora": lora})


def run_key(run: RunConfig) -> str:
    """Name this run and no other, for files that outlive it: its id, and a hash of its configuration.

    Args:
        run: The run as this device takes part in it.
    """
    return f"{run.run.name}-{hashlib.sha256(run.model_dump_json().encode()).hexdigest()[:12]}"
