"""What a run has come to, for use without splitfed: its adapter, or a checkpoint that the adapter is merged into."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from peft import PeftModel
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from splitfed.errors import ConfigError, OutputError, WeightsError
from splitfed.study.run_folder import RunFolder
from splitfed.study.whole_model import open_whole_model, without_progress_bars
from splitfed.training.runtime import prepare_process
from splitfed.training.setup import DTYPES
from splitfed.training.tokenizer import open_tokenizer

_ROOM_BYTES: Final = 32 * 2**20
"""For the files beside the weights, the largest of which is a tokenizer."""
_GENERATION: Final = "generation_config.json"


def export_run(
    run: RunFolder,
    output: Path,
    *,
    merge: bool = False,
    base: str | None = None,
    dtype: str | None = None,
    on_stage: Callable[[str, float], None] = lambda what, part: None,
) -> None:
    """Write a round's adapter as a standard PEFT adapter, or merged into the base model as a standard checkpoint.

    Args:
        run: The round.
        output: The folder to write; it may exist if it is empty.
        merge: Write a whole checkpoint: weights, tokenizer and generation configuration.
        base: Where the base model is, if not where the run's configuration says.
        dtype: Element type of a merged checkpoint; None = what the run computes in.
        on_stage: Told what is being done, and the part of the whole that is done, from 0 to 1.

    Raises:
        OutputError: If the folder holds something, or cannot be written.
        ConfigError: If there is a ``dtype`` but nothing to merge, or the adapter does not fit the base model.
        FingerprintMismatch: If the base model is not the run's.
        WeightsError: If the base model cannot be used.
        RunDirectoryError: If the adapter cannot be read.

    Guarantees:
        * The folder is whole, or as it was.
        * The merged checkpoint's logits are those of base model and adapter, to the rounding of its element type.
    """
    if dtype is not None and not merge:
        raise ConfigError("--dtype says how a merged checkpoint is written; give --merge, too, or leave it out")
    _refuse_what_is_there(output)
    on_stage("the run's adapter", 0.0)
    adapter = run.adapter()
    if not merge:
        with _written(output, sum(tensor.nbytes for tensor in adapter.values())) as draft:
            shutil.copytree(run.adapter_folder, draft, dirs_exist_ok=True)
        on_stage("done", 1.0)
        return
    prepare_process(run.config.server.threads)
    on_stage("the base model's fingerprint", 0.1)
    folder = run.base_folder(base)
    tokenizer = open_tokenizer(folder)
    on_stage("the base model", 0.3)
    model = open_whole_model(folder, dtype=DTYPES[dtype or run.config.model.dtype])
    on_stage("merging", 0.5)
    merged = _merged(model, run)
    on_stage("writing", 0.6)
    with _written(output, sum(parameter.nbytes for parameter in merged.parameters())) as draft:
        own = folder / _GENERATION
        if own.is_file():
            merged.generation_config = GenerationConfig()  # the base model's goes along as it is
        with without_progress_bars():
            merged.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        if own.is_file():
            shutil.copyfile(own, draft / _GENERATION)
    on_stage("done", 1.0)


def with_adapter(model: PreTrainedModel, run: RunFolder) -> Any:
    """Put a round's adapter on its base model.

    Args:
        model: The base model, which is changed.
        run: The round.

    Returns:
        The ``PeftModel``.

    Raises:
        ConfigError: If the adapter does not fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
            return PeftModel.from_pretrained(model, str(run.adapter_folder)).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the adapter of round {run.round} does not fit the base model ({reason}); give --base the run's"
        ) from error


def _merged(model: PreTrainedModel, run: RunFolder) -> PreTrainedModel:
    try:
        merged: PreTrainedModel = with_adapter(model, run).merge_and_unload(safe_merge=True)
    except ValueError as error:  # a weight that is not finite
        raise WeightsError(
            f"The adapter of round {run.round} cannot be merged ({error}); give --round one before it."
        ) from error
    return merged


def _refuse_what_is_there(output: Path) -> None:
    try:
        if output.is_dir() and not any(output.iterdir()):
            return
    except OSError as error:
        raise OutputError(f"{output}: cannot be read ({error.strerror}); give another folder.") from error
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output}: is there already; give an empty or a new folder.")


@contextmanager
def _written(output: Path, weight_bytes: int) -> Iterator[Path]:
    """Give a folder beside the one to write, which takes its place once it is whole."""
    draft = output.absolute().with_name(f".{output.absolute().name}.draft")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)  # of an export that was killed
        free_bytes, needed_bytes = shutil.disk_usage(draft.parent).free, weight_bytes + _ROOM_BYTES
        if free_bytes < needed_bytes:
            raise OutputError(
                f"{output}: needs {needed_bytes / 1e6:,.0f} MB, and {free_bytes / 1e6:,.0f} MB are free there; make "
                "room, or give another folder."
            )
        draft.mkdir()
        yield draft
        draft.replace(output.absolute())
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{output}: cannot be written ({_reason(error)}); give a folder with room.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _reason(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    return said or " ".join(str(error).split())[:200]
