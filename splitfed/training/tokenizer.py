"""The base model's tokenizer, from a folder that a server may have filled."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from splitfed.errors import WeightsError


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer beside a base model; code that the folder names is never run, nor asked about.

    Args:
        folder: The base model's folder.

    Raises:
        WeightsError: If there is none, it is damaged, or it needs code of its own.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises a bare one for a damaged file
        reason = str(error).strip().partition("\n")[0][:200]
        raise WeightsError(
            f"The tokenizer in {folder} cannot be used ({type(error).__name__}: {reason}); give a base model with a "
            "tokenizer that transformers can open without code of its own."
        ) from error
    return tokenizer
