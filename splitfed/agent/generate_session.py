"""What commands share that send sequences through the server's trunk: opened, charged and sent one after the other."""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from splitfed.agent.generate_calls import GenerateCalls
from splitfed.agent.generate_setup import Generator, open_generator
from splitfed.agent.own_run import own_run
from splitfed.agent.state import PERSONAL, AgentState
from splitfed.config import AgentConfig, refuse_plain_text
from splitfed.errors import LinkError, NonFiniteLoss, PrivacyError, SplitFedError
from splitfed.models import adapter_parameters
from splitfed.privacy import Ledger, witness_folder
from splitfed.training.generated_releases import GeneratedReleases
from splitfed.training.generation import GenerationLink
from splitfed.training.runtime import prepare_process

_log = logging.getLogger(__name__)

R = TypeVar("R")

Release = Callable[[Tensor], Tensor]


class Charged(Protocol):
    """A sequence, as the ledger knows it."""

    @property
    def record(self) -> str:
        """Salted hash of what it was made of."""


S = TypeVar("S", bound=Charged)


class _Stopped(BaseException):
    """A signal asked to stop."""


@dataclass(frozen=True)
class TakenRound:
    """The round that bottom and top are at the end of.

    Attributes:
        number: The round.
        replaced_top: The run's adapter of the top, where this agent has its own in its place; None: nowhere.
    """

    number: int
    replaced_top: dict[str, Tensor] | None


@dataclass(frozen=True)
class Session:
    """An agent that has the server's run and its own side of the base model.

    Attributes:
        state: Its state directory.
        ledger: Its ledger.
        calls: Its calls to the server.
        generator: Its half of the model.
    """

    state: AgentState
    ledger: Ledger
    calls: GenerateCalls
    generator: Generator

    def take_last_round(self) -> TakenRound:
        """Put bottom and top at the end of the run's last whole round."""
        last = self.calls.last_round(self.generator)
        kept = self._kept(last.number)
        self.generator.begin(last.state, kept)
        of_top = adapter_parameters(self.generator.top).keys() & kept.keys()
        return TakenRound(last.number, {name: last.state[name] for name in of_top} or None)

    def releases(self, kind: Literal["generate", "evaluate"], round: int, max_tokens: int) -> GeneratedReleases:
        """Build the gate of some sequences.

        Args:
            kind: What they are for.
            round: The round whose adapter is used.
            max_tokens: Most tokens of each.
        """
        privacy = self.generator.privacy
        return GeneratedReleases(
            privacy,
            self.ledger,
            self.generator.run_id,
            round,
            max_tokens,
            is_coupled=bool(self.generator.personal) and privacy.adapter != "dp-sgd",
            kind=kind,
        )

    def one_by_one(
        self,
        releases: GeneratedReleases,
        sequences: Sequence[S],
        send: Callable[[GenerationLink, S, Release | None], R],
    ) -> list[R]:
        """Open a link for each sequence, charge it, and send it.

        With noise on, how many are begun depends on none of them: what fails is told of after the last.

        Args:
            releases: Their gate.
            sequences: The sequences.
            send: Sends one over its link, with what gives the form in which its rows leave; None = as they are.

        Returns:
            What came of each.

        Raises:
            SplitFedError: What went wrong first.
            OSError: If what comes of one cannot be written.
        """
        found, failure = list[R](), None
        for index, sequence in enumerate(sequences):
            try:
                with self.calls.link(self.generator, releases.round, max_tokens=releases.max_tokens) as link:
                    mechanism = releases.open(sequence.record, index)
                    found.append(send(link, sequence, None if mechanism is None else mechanism.release))
                if mechanism is not None and not mechanism.was_finite:
                    raise NonFiniteLoss(
                        "A row of smashed data was not finite and left as noise alone; train the adapter again."
                    )
            except (LinkError, PrivacyError):
                raise
            except (OSError, SplitFedError) as error:
                if not releases.is_noisy:
                    raise
                failure = failure or error
        if failure is not None:
            raise failure
        return found

    def _kept(self, round: int) -> dict[str, Tensor]:
        """Give the tensors that this agent keeps to itself, as of its last round up to that one; none before it."""
        generator = self.generator
        rounds = [each for each in self.state.rounds_kept(generator.run_key) if each <= round]
        if not generator.personal or not rounds:
            return {}
        found = self.state.optimiser_after(generator.run_key, rounds[-1])
        if found is None:
            _log.warning("the personal adapter after round %d cannot be read; the run's is used", rounds[-1])
            return {}
        return {name: found[f"{PERSONAL}{name}"] for name in generator.personal if f"{PERSONAL}{name}" in found}


@contextmanager
def open_session(config: AgentConfig) -> Iterator[Session]:
    """Open the state directory, ask about the run, and load this agent's half of the model.

    Args:
        config: The agent's configuration.

    Raises:
        SplitFedError: What keeps it from being opened.
    """
    with ExitStack() as opened:
        state = AgentState(config.agent.state_directory)
        opened.callback(state.close)
        ledger = opened.enter_context(Ledger(state.ledger_path, witnesses=witness_folder()))
        calls = GenerateCalls(config, state.agent_id)
        opened.callback(calls.close)
        run, folder = calls.base_folder(state.base_cache, own=lambda run: own_run(config.agent, run))
        yield Session(state, ledger, calls, open_generator(config, run, folder, ledger))


@contextmanager
def as_a_command(config: AgentConfig, *, insecure: bool = False) -> Iterator[None]:
    """Prepare this process, and let SIGTERM end what is within: what was charged was charged.

    Args:
        config: The agent's configuration.
        insecure: Allow plain text beyond this machine.

    Raises:
        ConfigError: If plain text would leave this machine.
    """
    refuse_plain_text({"agent.server": config.agent.server}, has_tls=config.tls is not None, insecure=insecure)
    prepare_process(config.agent.threads)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with suppress(_Stopped):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped
