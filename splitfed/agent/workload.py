"""What an agent's data come to in a run: how often a record is released, which noise is calibrated to."""

from splitfed.config import AgentConfig, RunConfig
from splitfed.models import Bottom, Top, adapter_parameters
from splitfed.training.data import ExampleSet
from splitfed.training.protection import Workload


def workload_of(
    config: AgentConfig, run: RunConfig, train: ExampleSet, held_out: ExampleSet, bottom: Bottom, top: Top
) -> Workload:
    """Count what a whole run releases of an agent's records.

    Args:
        config: The agent's configuration.
        run: The run, as this agent takes part in it.
        train: What it trains on.
        held_out: What it evaluates on.
        bottom: The bottom, with its adapter.
        top: The top, with its adapter.
    """
    return Workload(
        run.training,
        train.sequence_records,
        held_out.sequence_records,
        most_of_a_row=train.most_of_a_row,
        bottom_trains=bool(adapter_parameters(bottom)),
        top_trains=bool(adapter_parameters(top)),
        client=config.agent.name,
        seed=run.run.seed,
    )
