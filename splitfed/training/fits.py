"""Whether a run fits its base model: what only the model can tell, before anything is allocated."""

from pathlib import Path

from splitfed.config import LoraSection, ModelSection
from splitfed.errors import ConfigError
from splitfed.models import adapter_shapes, load_shell
from splitfed.models.cut import block_list_name
from splitfed.models.partition import check_split_point
from splitfed.training.setup import lora_settings


def check_fit(folder: Path, model: ModelSection, lora: LoraSection, *, residual_rank: int = 0) -> None:
    """Refuse a run that its base model has no blocks for, or whose adapter is larger than what it adapts.

    Args:
        folder: The base model.
        model: Where it is cut for an agent that says nothing.
        lora: Size and place of the adapter.
        residual_rank: Rank of the frozen adapter under it; 0 for none.

    Raises:
        SplitPointError: If the split point leaves the trunk without a block, whatever other agents may choose.
        ConfigError: If no layer is called as one of the targets, or a rank is above what any layer can have.
    """
    shell = load_shell(folder)
    n_blocks = len(list(shell.get_submodule(block_list_name(shell)).children()))
    check_split_point(n_blocks, bottom_blocks=model.bottom_blocks, top_blocks=model.top_blocks)
    try:
        shapes = adapter_shapes(shell, lora_settings(lora))
    except ValueError as error:
        raise ConfigError(f"[lora] targets: {error}") from error
    most = max(
        min(shape[1], shapes[name.replace("lora_A", "lora_B")][0])
        for name, shape in shapes.items()
        if name.endswith("lora_A.weight")
    )
    for key, rank in {"[lora] rank": lora.rank, "[aggregation] flora_rank": residual_rank}.items():
        if rank > most:
            raise ConfigError(
                f"{key} is {rank}, but an adapted layer of this base model has {most} inputs or outputs at most, "
                "beyond which a rank gains nothing; lower it"
            )
