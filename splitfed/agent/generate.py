"""The command that generates: prompts in, text out, through the server's trunk."""

import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from types import FrameType

from torch import Tensor

from splitfed.agent.generate_calls import GenerateCalls, LastRound
from splitfed.agent.generate_setup import Generator, open_generator
from splitfed.agent.own_run import own_run
from splitfed.agent.state import PERSONAL, AgentState
from splitfed.config import AgentConfig, refuse_plain_text
from splitfed.errors import LinkError, NonFiniteLoss, PrivacyError, SplitFedError
from splitfed.privacy import UNIT, Ledger, witness_folder
from splitfed.privacy.row_by_row import RowByRowMechanism
from splitfed.training.decoding import Decoding, generate
from splitfed.training.generated_releases import GeneratedReleases
from splitfed.training.generation import GenerationLink
from splitfed.training.prompts import Prompt, PromptReader, Wanted, declared_length
from splitfed.training.runtime import prepare_process
from splitfed.training.text_pieces import TextPieces

_log = logging.getLogger(__name__)


class _Stopped(BaseException):
    """A signal asked to stop."""


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
    refuse_plain_text({"agent.server": config.agent.server}, has_tls=config.tls is not None, insecure=insecure)
    prepare_process(config.agent.threads)
    before = signal.signal(signal.SIGTERM, _stop)
    with ExitStack() as opened:
        opened.callback(signal.signal, signal.SIGTERM, before)
        opened.enter_context(suppress(_Stopped))  # what was charged was charged
        generate_here(config, wanted, write=write)
    return 0


def generate_here(config: AgentConfig, wanted: Wanted, *, write: Callable[[str], object]) -> list[list[int]]:
    """Generate with this process as it is; the arguments are those of `run_generate`.

    Returns:
        The tokens of each text.
    """
    with ExitStack() as opened:
        state = AgentState(config.agent.state_directory)
        opened.callback(state.close)
        ledger = opened.enter_context(Ledger(state.ledger_path, witnesses=witness_folder()))
        calls = GenerateCalls(config, state.agent_id)
        opened.callback(calls.close)
        run, folder = calls.base_folder(state.base_cache, own=lambda run: own_run(config.agent, run))
        generator = open_generator(config, run, folder, ledger)
        prompts = PromptReader(config.data, generator.tokenizer, ledger.record_hash).of(wanted)
        max_tokens = declared_length(
            prompts, wanted.max_tokens or generator.run.training.max_tokens, positions=generator.positions
        )
        last = calls.last_round(generator)
        generator.begin(last.state, _kept(state, generator, last))
        releases = GeneratedReleases(
            generator.privacy,
            ledger,
            generator.run_id,
            last.number,
            max_tokens,
            is_coupled=bool(generator.personal) and generator.privacy.adapter != "dp-sgd",
        )
        releases.check_budget([prompt.record for prompt in prompts])
        _log.info("generating with round %d of the run %s", last.number, generator.run_id)
        texts = _texts(calls, generator, releases, prompts, wanted, write)
        _say_what_it_cost(releases, ledger, len(prompts))
        return texts


def _texts(
    calls: GenerateCalls,
    generator: Generator,
    releases: GeneratedReleases,
    prompts: Sequence[Prompt],
    wanted: Wanted,
    write: Callable[[str], object],
) -> list[list[int]]:
    decoding = Decoding(temperature=wanted.temperature, top_p=wanted.top_p, seed=wanted.seed)
    texts, failure = list[list[int]](), None
    for index, prompt in enumerate(prompts):
        try:
            with calls.link(generator, releases.round, max_tokens=releases.max_tokens) as link:
                mechanism = releases.open(prompt.record, index)
                text = _text(link, generator, mechanism, prompt, decoding, write, max_tokens=releases.max_tokens)
                texts.append(text)
        except (LinkError, PrivacyError):
            raise
        except (OSError, SplitFedError) as error:  # with noise on how many texts are begun depends on none of them
            if not releases.is_noisy:
                raise
            failure = failure or error
    if failure is not None:
        raise failure
    return texts


def _text(
    link: GenerationLink,
    generator: Generator,
    mechanism: RowByRowMechanism | None,
    prompt: Prompt,
    decoding: Decoding,
    write: Callable[[str], object],
    *,
    max_tokens: int,
) -> list[int]:
    text = generate(
        link,
        generator.bottom,
        generator.top,
        prompt.input_ids,
        max_tokens=max_tokens,
        end_tokens=generator.end_tokens,
        decoding=decoding,
        release=None if mechanism is None else mechanism.release,
        filler=generator.filler,
        on_token=TextPieces(generator.tokenizer, write).take,
    )
    if mechanism is not None and not mechanism.was_finite:
        raise NonFiniteLoss("A row of smashed data was not finite and left as noise alone; train the adapter again.")
    return text


def _kept(state: AgentState, generator: Generator, last: LastRound) -> dict[str, Tensor]:
    """Give the tensors that this agent keeps to itself, as of its last round up to that one; none before its first."""
    rounds = [round for round in state.rounds_kept(generator.run_key) if round <= last.number]
    if not generator.personal or not rounds:
        return {}
    found = state.optimiser_after(generator.run_key, rounds[-1])
    if found is None:
        _log.warning("the personal adapter after round %d cannot be read; the run's is used", rounds[-1])
        return {}
    return {name: found[f"{PERSONAL}{name}"] for name in generator.personal if f"{PERSONAL}{name}" in found}


def _say_what_it_cost(releases: GeneratedReleases, ledger: Ledger, sequences: int) -> None:
    if not releases.is_noisy:
        _log.warning("noise was off: the prompts and the texts can be read from what left, and nothing is guaranteed")
        return
    _log.info(
        "charged: %d sequences of %d tokens with noise multiplier %g, unit %s, relation %s",
        sequences,
        releases.max_tokens,
        releases.privacy.noise_multiplier,
        UNIT,
        releases.privacy.relation,
    )
    _log.info("privacy in total: %s", ledger.total_statement())


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped
