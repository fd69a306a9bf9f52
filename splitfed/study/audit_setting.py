"""What an audit works on: the run's base model and split point, its protection, public and private examples."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from splitfed.config import DataSection, PrivacySection, ServerConfig
from splitfed.errors import ConfigError, DataError
from splitfed.models import Partition, adapter_shapes, partition, resolve_base
from splitfed.privacy.leakage import Texts
from splitfed.study.whole_model import open_whole_model
from splitfed.training.data import Example, ExampleSet, collate, load_examples
from splitfed.training.objective import IGNORED_LABEL
from splitfed.training.protection import Workload, settle_clip, settle_noise
from splitfed.training.setup import lora_settings
from splitfed.training.tokenizer import open_tokenizer

LEAST_PUBLIC: Final = 8
LEAST_PRIVATE: Final = 2
_MOST_PUBLIC: Final = 512
_MOST_PUBLIC_ROWS: Final = 4096
_MOST_PRIVATE_ROWS: Final = 16384
_PRIVATE_FOR_MEMBERSHIP: Final = 4


@dataclass(frozen=True)
class LabelledTexts(Texts):
    """Texts with what each row of the output gradient is to predict.

    Attributes:
        targets_BT: The token that the logits of each row are compared with, shape [B, T]; -100 where there is no loss.
    """

    targets_BT: Tensor

    @property
    def carries_loss(self) -> Tensor:
        """Which rows carry loss, shape [B, T]."""
        return self.targets_BT != IGNORED_LABEL


@dataclass(frozen=True)
class AuditSetting:
    """A run as its server knows it, and the examples that the audit is made with.

    Attributes:
        config: The server's configuration.
        model: The whole base model, in float32: the server has it.
        tokenizer: Its tokenizer.
        privacy: What the run asks for, with every figure filled in.
        public: Examples that everybody has, none of which is private.
        private: Examples to attack.
        records: One example of each private record, for membership; those to attack come first.
        file_records: Records of the whole private file.
        adapts: Bottom or top have something to train.
    """

    config: ServerConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    privacy: PrivacySection
    public: list[Example]
    private: list[Example]
    records: list[Example]
    file_records: int
    adapts: bool

    @property
    def max_tokens(self) -> int:
        """The run's T."""
        return self.config.training.max_tokens

    @property
    def pad_token_id(self) -> int:
        """Token that fills sequences up, as an agent chooses it."""
        found = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        return found or 0

    def parts(self, *, bottom_blocks: int | None = None, top_blocks: int | None = None) -> Partition:
        """Cut the model at the run's split point, or at another; each call gives modules of its own."""
        model = self.config.model
        return partition(
            self.model,
            bottom_blocks=model.bottom_blocks if bottom_blocks is None else bottom_blocks,
            top_blocks=model.top_blocks if top_blocks is None else top_blocks,
        )

    def texts(self, examples: Sequence[Example]) -> LabelledTexts:
        """Pad examples to the run's T."""
        batch = collate(examples, pad_token_id=self.pad_token_id, length=self.max_tokens)
        targets_BT = torch.full_like(batch.labels_BT, IGNORED_LABEL)
        targets_BT[:, :-1] = batch.labels_BT[:, 1:]
        lengths_B = torch.tensor([len(example.input_ids) for example in examples])
        return LabelledTexts(batch.input_ids_BT, lengths_B, targets_BT)


def open_setting(config: ServerConfig, *, public: DataSection, private: DataSection, examples: int) -> AuditSetting:
    """Load what an audit needs.

    Args:
        config: The server's configuration.
        public: Where the public text is, and in which columns.
        private: Where the private text is.
        examples: Private sequences to attack.

    Raises:
        WeightsError: If the base model or its tokenizer cannot be loaded.
        SplitPointError: If the split point is outside the model.
        UnsupportedFamily: If the family is not proven to split.
        DataError: If a file cannot be used, or has too few sequences.
        ConfigError: If the run's adapter or privacy settings do not go together.
    """
    folder = resolve_base(config.model.base, config.model.revision)
    model, tokenizer = open_whole_model(folder), open_tokenizer(folder)
    cut = config.model
    parts = partition(model, bottom_blocks=cut.bottom_blocks, top_blocks=cut.top_blocks)
    lora = lora_settings(config.lora)
    try:
        bottom_trains, top_trains = (bool(adapter_shapes(part, lora)) for part in (parts.bottom, parts.top))
    except ValueError as error:
        raise ConfigError(f"[lora] targets: {error}") from error
    most_private_rows = None if config.privacy.epsilon is not None else _MOST_PRIVATE_ROWS  # its noise needs a count
    private_set = _read(private, tokenizer, config, least=LEAST_PRIVATE, most_rows=most_private_rows)
    public_set = _read(public, tokenizer, config, least=LEAST_PUBLIC, most_rows=_MOST_PUBLIC_ROWS)
    secret = set(private_set.records)
    free = [example for example in public_set if example.record not in secret]
    if len(free) < LEAST_PUBLIC:
        raise DataError(
            f"{public.path}: only {len(free)} of its {len(public_set)} sequences are not in {private.path} too; give "
            "public text that is not the private one"
        )
    draw = random.Random(config.run.seed)
    chosen = draw.sample(range(len(private_set)), min(examples, len(private_set)))
    to_attack = [private_set[at] for at in chosen]
    workload = Workload(
        config.training,
        private_set.sequence_records,
        most_of_a_row=private_set.most_of_a_row,
        bottom_trains=bottom_trains,
        top_trains=top_trains,
    )
    return AuditSetting(
        config=config,
        model=model,
        tokenizer=tokenizer,
        privacy=settle_noise(settle_clip(config.privacy, parts.bottom), workload),
        public=draw.sample(free, min(len(free), _MOST_PUBLIC)),
        private=to_attack,
        records=_one_of_each(to_attack, private_set, draw, _PRIVATE_FOR_MEMBERSHIP * examples),
        file_records=len(secret),
        adapts=bottom_trains or top_trains,
    )


def _one_of_each(first: Sequence[Example], everything: ExampleSet, draw: random.Random, most: int) -> list[Example]:
    """Take examples of different records, those given first."""
    found = {example.record: example for example in reversed(first)}
    for at in draw.sample(range(len(everything)), len(everything)):
        if len(found) >= most:
            break
        example = everything[at]
        found.setdefault(example.record, example)
    return list(found.values())[:most]


def _read(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, config: ServerConfig, *, least: int, most_rows: int | None
) -> ExampleSet:
    found, _ = load_examples(
        data if data.max_rows is not None else data.model_copy(update={"max_rows": most_rows}),
        tokenizer,
        max_tokens=config.training.max_tokens,
        record_hash=lambda content: hashlib.sha256(content).hexdigest(),
    )
    if len(found) < least:
        raise DataError(
            f"{data.path}: has {len(found)} {'sequence' if len(found) == 1 else 'sequences'}, but an audit needs "
            f"{least} or more there; give more rows"
        )
    return found
