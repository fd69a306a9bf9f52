"""Where the base model is: a folder, the model that comes with splitfed, or a hub id."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from splitfed.assets import base_model_folder
from splitfed.errors import WeightsError

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_base(base: str, revision: str | None = None) -> Path:
    """Find a base model's folder, fetching it from the hub where it is not on this machine.

    Args:
        base: A folder, "demo", or a hub id such as ``org/name``.
        revision: Branch, tag or commit on the hub.

    Raises:
        WeightsError: If ``base`` is neither a folder nor an id that the hub, or its cache, can give.
    """
    if base == "demo":
        return base_model_folder()
    if base and Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(
            f"The base model {base!r} is neither a folder nor available from the hub "
            f"({type(error).__name__}); check its name and the connection."
        ) from error
