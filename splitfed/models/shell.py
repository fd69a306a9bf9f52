"""A whole model without its weights: names and shapes on the ``meta`` device."""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from splitfed.errors import WeightsError
from splitfed.models.families import family_of


def load_shell(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the whole model on the ``meta`` device.

    Args:
        folder: Holds ``config.json``.
        dtype: Element type of its parameters.

    Raises:
        WeightsError: If the configuration is missing or damaged, or that of a quantised model.
        UnsupportedFamily: If the family is not proven to split.
    """
    config = load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise WeightsError(f"The weights in {folder} are quantised; give a checkpoint in floating point.")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval()


def load_config(folder: Path) -> PreTrainedConfig:
    """Read a model's configuration.

    Args:
        folder: Holds ``config.json``.

    Raises:
        WeightsError: If the configuration is missing or damaged.
        UnsupportedFamily: If the family is not proven to split.
    """
    if not (folder / "config.json").is_file():
        raise WeightsError(f"There is no config.json in {folder}; give the folder of a causal language model.")
    try:
        family_of(str(json.loads((folder / "config.json").read_bytes())["model_type"]))
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"The configuration in {folder} cannot be read ({reason}); fetch it again.") from error
    return config
