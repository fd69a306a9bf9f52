"""What agent and server compare when they meet: the configuration, as far as it decides numbers, and the tensors."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from splitfed.models.checkpoint import Checkpoint, TensorIdentity
from splitfed.models.shell import load_config

# Entries that change no logit: where a model came from, how it is held and run, and what other tasks would ask of it.
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def canonical_config(folder: Path) -> str:
    """Hash a model's configuration; entries that change no logit, and entries at their default, do not count.

    Args:
        folder: Holds ``config.json``.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        WeightsError: If the configuration is missing or damaged.
    """
    entries = load_config(folder).to_diff_dict()
    counted = {name: value for name, value in entries.items() if name not in _WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()


def tensor_hashes(folder: Path, names: Iterable[str]) -> dict[str, TensorIdentity]:
    """Hash tensors of a checkpoint, whatever its sharding.

    Args:
        folder: The checkpoint.
        names: Which tensors, by their names in the checkpoint.

    Raises:
        WeightsError: If a tensor is not there, or a file is damaged.
    """
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.identity(name) for name in sorted(names)}
