"""A run's result as one standard PEFT adapter of the whole model."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from splitfed.models.lora import LoraSettings, adapter_shapes, peft_config
from splitfed.models.ranks import settings_of
from splitfed.models.shell import load_shell

_PREFIX = "base_model.model."  # peft's wrapping, as PeftModel saves it
_FILE = "adapter_model.safetensors"


def export_adapter(
    folder: Path, state: Mapping[str, Tensor], lora: LoraSettings, *, base_folder: Path, base_name: str
) -> None:
    """Write an adapter that ``PeftModel.from_pretrained(base, folder)`` loads.

    Layers whose rank is not the usual one are named in the configuration's ``rank_pattern`` and ``alpha_pattern``.

    Args:
        folder: Where to write; made if it is not there.
        state: The adapter of the whole model, by whole-model key; each layer may have a rank of its own.
        lora: Its place and its scale, alpha / rank.
        base_folder: Configuration of the base model.
        base_name: What the adapter's configuration calls the base model.

    Raises:
        ValueError: If ``state`` is not an adapter of that model with those settings.
        WeightsError: If the base model's configuration cannot be read.
    """
    shell = load_shell(base_folder)
    lora = settings_of(state, lora)
    check_adapter(state, adapter_shapes(shell, lora))
    config = peft_config(shell, lora)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {f"{_PREFIX}{key}": tensor.detach().contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / _FILE, metadata={"format": "pt"})


def check_adapter(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a state which does not consist of exactly the expected tensors.

    Args:
        state: Tensors by whole-model key.
        shapes: What is expected.

    Raises:
        ValueError: If a key is missing or not expected, or a tensor has another shape.
    """
    for key in sorted(shapes.keys() | state.keys()):
        if key not in state:
            raise ValueError(f"The adapter has no tensor {key!r}; give one for every adapted layer.")
        if key not in shapes:
            raise ValueError(f"The adapter has a tensor {key!r}, which no adapted layer takes; check rank and targets.")
        if tuple(state[key].shape) != tuple(shapes[key]):
            raise ValueError(
                f"The adapter's tensor {key!r} has shape {list(state[key].shape)}, not {list(shapes[key])}; "
                "use an adapter of the same base, rank and targets."
            )
