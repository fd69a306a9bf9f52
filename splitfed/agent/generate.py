"""The command that generates: prompts in, text out, through the server's trunk."""

import logging
from collections.abc import Callable, Sequence

from splitfed.agent.generate_session import Release, Session, as_a_command, open_session
from splitfed.config import AgentConfig
from splitfed.training.decoding import Decoding, generate
from splitfed.training.generated_releases import GeneratedReleases
from splitfed.training.generation import GenerationLink
from splitfed.training.prompts import Prompt, PromptReader, Wanted, declared_length
from splitfed.training.text_pieces import TextPieces

_log = logging.getLogger(__name__)


def run_generate(config: AgentConfig, wanted: Wanted, *, write: Callable[[str], object], insecure: bool = False) -> int:
    """Generate text for each prompt, one after the other.

    Args:
        config: The agent's configuration.
        wanted: What is to be generated.
        write: Takes the text, piece by piece; each text ends with the end of a line.
        insecure: Allow plain text beyond this machine.

    Returns:
        The exit status: 0 when all is written, or a signal came.

    Raises:
        SplitFedError: What keeps it from being generated.
    """
    with as_a_command(config, insecure=insecure):
        generate_here(config, wanted, write=write)
    return 0


def generate_here(config: AgentConfig, wanted: Wanted, *, write: Callable[[str], object]) -> list[list[int]]:
    """Generate with this process as it is; the arguments are those of `run_generate`.

    Returns:
        The tokens of each text.
    """
    with open_session(config) as session:
        generator = session.generator
        prompts = PromptReader(config.data, generator.tokenizer, session.ledger.record_hash).of(wanted)
        max_tokens = declared_length(
            prompts, wanted.max_tokens or generator.run.training.max_tokens, positions=generator.positions
        )
        releases = session.releases("generate", session.take_last_round().number, max_tokens)
        releases.check_budget([prompt.record for prompt in prompts])
        _log.info("generating with round %d of the run %s", releases.round, generator.run_id)
        decoding = Decoding(temperature=wanted.temperature, top_p=wanted.top_p, seed=wanted.seed)
        texts = texts_after(session, releases, prompts, decoding, write=write)
        for sentence in releases.summary():
            _log.log(logging.INFO if releases.is_noisy else logging.WARNING, sentence)
        return texts


def texts_after(
    session: Session,
    releases: GeneratedReleases,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    write: Callable[[str], object],
) -> list[list[int]]:
    """Write a text after each prompt.

    Args:
        session: The agent, at the end of the round that ``releases`` is of.
        releases: What may leave.
        prompts: The prompts.
        decoding: Chooses tokens.
        write: Takes the text, piece by piece; each text ends with the end of a line.

    Returns:
        The tokens of each text, with the one that ended it.
    """
    generator = session.generator

    def text_after(link: GenerationLink, prompt: Prompt, release: Release | None) -> list[int]:
        return generate(
            link,
            generator.bottom,
            generator.top,
            prompt.input_ids,
            max_tokens=releases.max_tokens,
            end_tokens=generator.end_tokens,
            decoding=decoding,
            release=release,
            filler=generator.filler,
            on_token=TextPieces(generator.tokenizer, write).take,
        )

    return session.one_by_one(releases, prompts, text_after)
