"""Text from a run directory, with no daemons: the split model in one process, for whoever holds base and run."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from splitfed.config import DataSection, ServerConfig
from splitfed.errors import ConfigError
from splitfed.models import (
    Segment,
    add_adapter,
    load_adapter_state,
    load_bottom_and_top,
    load_trunk,
    settings_of,
)
from splitfed.study.run_folder import open_run
from splitfed.training.decoding import Decoding, generate
from splitfed.training.generation import InProcessGenerationLink, TrunkSequence
from splitfed.training.link import link_codecs
from splitfed.training.prompts import PromptReader, Wanted, declared_length, end_tokens, positions_of
from splitfed.training.runtime import prepare_process
from splitfed.training.setup import DTYPES, lora_settings
from splitfed.training.text_pieces import TextPieces
from splitfed.training.tokenizer import open_tokenizer


def generate_from_run(
    directory: Path,
    wanted: Wanted,
    *,
    write: Callable[[str], object],
    base: str | None = None,
    round: int | None = None,
    with_adapter: bool = True,
) -> list[list[int]]:
    """Generate with the adapter of a run's whole round: what daemons would write for an agent cut as the run is.

    Codecs are the run's; nothing leaves this process, so there is no noise, and nothing is charged.

    Args:
        directory: The run directory.
        wanted: What is to be generated.
        write: Takes the text, piece by piece; each text ends with the end of a line.
        base: Where the base model is, if not where the run's configuration says.
        round: The round, from 1; None = the last whole one.
        with_adapter: False: what the base model writes alone, to compare.

    Returns:
        The tokens of each text.

    Raises:
        RunDirectoryError: If the directory holds no run with a whole round.
        ConfigError: If a prompt does not fit, or there is no such round.
        DataError: If a prompt cannot be read.
        WeightsError: If the base model cannot be loaded.
    """
    run = open_run(directory, round=round)
    config = run.config
    prepare_process(config.server.threads)
    folder, cut = run.base_folder(base), config.model
    tokenizer = open_tokenizer(folder)
    prompts = PromptReader(DataSection(path="none"), tokenizer, lambda content: "not charged").of(wanted)
    blocks = {"bottom_blocks": cut.bottom_blocks, "top_blocks": cut.top_blocks}
    bottom, top = load_bottom_and_top(folder, **blocks, dtype=DTYPES[cut.dtype])
    max_tokens = declared_length(
        prompts, wanted.max_tokens or config.training.max_tokens, positions=positions_of(bottom.config)
    )
    trunk = load_trunk(folder, **blocks, dtype=DTYPES[cut.dtype])
    adapter = run.adapter() if with_adapter else {}
    for segment in (bottom, trunk, top) if with_adapter else ():
        _adapt(segment, config, adapter)
    decoding = Decoding(temperature=wanted.temperature, top_p=wanted.top_p, seed=wanted.seed)
    return [
        generate(
            InProcessGenerationLink(
                TrunkSequence(trunk, adapter, {}, max_tokens=max_tokens), link_codecs(config.codecs)
            ),
            bottom,
            top,
            prompt.input_ids,
            max_tokens=max_tokens,
            end_tokens=end_tokens(folder, tokenizer),
            decoding=decoding,
            on_token=TextPieces(tokenizer, write).take,
        )
        for prompt in prompts
    ]


def _adapt(segment: Segment, config: ServerConfig, adapter: dict[str, Tensor]) -> None:
    try:
        add_adapter(segment, settings_of(adapter, lora_settings(config.lora)), seed=config.run.seed)
        load_adapter_state(segment, adapter)
    except ValueError as error:
        raise ConfigError(f"The run's adapter does not fit its base model ({error}); check [model] base.") from error
