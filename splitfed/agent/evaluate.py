"""The command that measures: this device's text through the server's trunk, forward only; labels and loss stay here."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count

from torch import Tensor

from splitfed.agent.generate import texts_after
from splitfed.agent.generate_session import Release, Session, as_a_command, open_session
from splitfed.config import AgentConfig, DataSection
from splitfed.errors import ConfigError
from splitfed.training.data import Example, ExampleSet, load_examples
from splitfed.training.decoding import Decoding
from splitfed.training.evaluation import HeldOutLoss
from splitfed.training.generated_releases import GeneratedReleases
from splitfed.training.generation import GenerationLink
from splitfed.training.generation_loss import sequence_loss
from splitfed.training.likeness import Asked, Likeness, likeness, read_asked
from splitfed.training.measured import Ground, Measured, about_texts, headings
from splitfed.training.prompts import declared_length

_log = logging.getLogger(__name__)

OnStage = Callable[[str, float], None]


@dataclass(frozen=True)
class ServedEvaluation:
    """What an evaluation through a server found.

    Attributes:
        run: The run.
        round: The round whose adapters took part.
        ground: What was measured on.
        figures: The split model's; with what this agent keeps to itself, if it does.
        merged: The same with the run's adapter in the top, where the agent has its own.
        charges: What was charged, by what it was for: sequences, their length, and the noise multiplier.
        costs: The same in words, and what is guaranteed after it.
        texts: Texts that it has written.
    """

    run: str
    round: int
    ground: Ground
    figures: Measured
    charges: dict[str, dict[str, float]]
    costs: list[str]
    texts: int = 0
    merged: Measured | None = None

    @property
    def signature(self) -> str:
        """How BLEU was computed; empty where it was not."""
        return "" if self.figures.texts is None else self.figures.texts.signature

    def as_json(self) -> str:
        """Give everything as one JSON object."""
        figures = {
            "run": self.run,
            "round": self.round,
            **asdict(self.ground),
            "adapted": self.figures.as_row(),
            "adapted_merged": None if self.merged is None else self.merged.as_row(),
            "texts": self.texts,
            "signature": self.signature,
            "charged": self.charges,
            "privacy": self.costs,
        }
        return json.dumps(figures, ensure_ascii=False)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Give headings and rows for a terminal."""
        name = f"split model after round {self.round}"
        if self.merged is None:
            return headings(has_texts=bool(self.texts)), [[name, *self.figures.cells()]]
        no_texts = ["", ""] if self.texts else []
        return headings(has_texts=bool(self.texts)), [
            [f"{name}, own top", *self.figures.cells()],
            [f"{name}, the run's top", *self.merged.cells(), *no_texts],
        ]

    def summary(self) -> list[str]:
        """Give the sentences below the table."""
        costs = [f"{cost[0].upper()}{cost[1:]}." for cost in self.costs]
        return [*self.ground.summary(), *about_texts(self.texts, self.signature), *costs]


def run_evaluate(
    config: AgentConfig,
    data: DataSection,
    *,
    writes_texts: bool = False,
    max_tokens: int | None = None,
    on_stage: OnStage = lambda what, part: None,
    insecure: bool = False,
) -> ServedEvaluation | None:
    """Measure the split model on a data file of this device.

    Args:
        config: The agent's configuration.
        data: The file, its columns, and how many rows of it to read.
        writes_texts: Let it write completions, and compare these with those of the file.
        max_tokens: Most tokens of prompt and text together; None = those of the run's training.
        on_stage: Told what is being done, and the part of it that is done, from 0 to 1.
        insecure: Allow plain text beyond this machine.

    Returns:
        What was found; None if a signal came.

    Raises:
        SplitFedError: What keeps it from being measured.
    """
    found = None
    with as_a_command(config, insecure=insecure):
        found = evaluate_here(config, data, writes_texts=writes_texts, max_tokens=max_tokens, on_stage=on_stage)
    return found  # noqa: RET504 - a signal ends the block before it is found


def evaluate_here(
    config: AgentConfig,
    data: DataSection,
    *,
    writes_texts: bool = False,
    max_tokens: int | None = None,
    on_stage: OnStage = lambda what, part: None,
) -> ServedEvaluation:
    """Measure with this process as it is; the arguments are those of `run_evaluate`.

    Guarantees:
        * The loss is that of the unsplit model with the run's adapter, where noise is off and nothing is compressed.
        * What the budget does not allow to the end is refused before a row leaves.
        * Neither a label nor a loss leaves.
    """
    with open_session(config) as session:
        generator, length = session.generator, session.generator.run.training.max_tokens
        hash_of = session.ledger.record_hash
        examples, _ = load_examples(data, generator.tokenizer, max_tokens=length, record_hash=hash_of)
        asked = read_asked(data, generator.tokenizer, hash_of) if writes_texts else []
        most = declared_length(asked, max_tokens or length, positions=generator.positions) if asked else length
        taken = session.take_last_round()
        round = taken.number
        declared = length if generator.privacy.is_on else max(len(example.input_ids) for example in examples)
        measured, written = session.releases("evaluate", round, declared), session.releases("generate", round, most)
        planned = measured.planned(examples.sequence_records) + written.planned([one.record for one in asked])
        session.ledger.check_budget(planned, "What is to be measured")
        _log.info("measuring round %d of the run %s", round, generator.run_id)
        ground = Ground.of(data.path, examples, length)
        losses = _losses(session, measured, examples, taken.replaced_top, on_stage)
        texts = _likeness(session, written, asked, on_stage) if asked else None
        used = [measured, *([written] if asked else [])]
        return ServedEvaluation(
            run=generator.run_id,
            round=round,
            ground=ground,
            figures=Measured(sum(each.own for each in losses) / ground.tokens, texts),
            merged=None
            if taken.replaced_top is None
            else Measured(sum(each.merged or 0.0 for each in losses) / ground.tokens),
            charges={each.kind: each.charged() for each in used},
            costs=list(dict.fromkeys(sentence for each in used for sentence in each.summary())),
            texts=len(asked),
        )


def held_out(config: AgentConfig) -> DataSection:
    """Describe the file that the agent's configuration holds out.

    Raises:
        ConfigError: If there is none.
    """
    if config.data.held_out_path is None:
        raise ConfigError("there is nothing to measure on; give --data FILE, or set held_out_path in [data]")
    return config.data.model_copy(update={"path": config.data.held_out_path, "held_out_path": None})


def on_file(config: AgentConfig, file: str) -> DataSection:
    """Describe another file with the columns of the agent's configuration."""
    own = {"format": "auto", "path": file, "held_out_path": None, "held_out_fraction": 0.0, "max_rows": None}
    return config.data.model_copy(update=own)


def _losses(
    session: Session,
    releases: GeneratedReleases,
    examples: ExampleSet,
    other_top: Mapping[str, Tensor] | None,
    on_stage: OnStage,
) -> list[HeldOutLoss]:
    """Give the sums of the tokens' losses, sequence by sequence."""
    generator, done = session.generator, count(1)

    def loss_of(link: GenerationLink, example: Example, release: Release | None) -> HeldOutLoss:
        loss = sequence_loss(
            link,
            generator.bottom,
            generator.top,
            example,
            max_tokens=releases.max_tokens,
            release=release,
            filler=generator.filler,
            other_top=other_top,
        )
        on_stage("loss", next(done) / len(examples))
        return loss

    return session.one_by_one(releases, examples, loss_of)


def _likeness(session: Session, releases: GeneratedReleases, asked: Sequence[Asked], on_stage: OnStage) -> Likeness:
    """Write a completion of each prompt, and compare it with the file's."""
    generator, done = session.generator, count(1)

    def write(piece: str) -> None:
        if piece.endswith("\n"):
            on_stage("texts", min(next(done) / len(asked), 1.0))

    tokens = texts_after(session, releases, asked, Decoding(), write=write)
    return likeness([generator.text(each) for each in tokens], asked)
