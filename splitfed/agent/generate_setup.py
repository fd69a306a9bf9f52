"""What an agent sets up to generate: its segments with the adapters of the last whole round, and what may leave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from splitfed.agent.own_run import own_run, run_key
from splitfed.agent.policy import agree, refuse_weak_noise
from splitfed.agent.workload import workload_of
from splitfed.config import AgentConfig, PrivacySection, RunConfig
from splitfed.models import (
    Bottom,
    TensorIdentity,
    Top,
    adapter_parameters,
    canonical_config,
    load_adapter_state,
    load_residual,
    residual_parameters,
    segment_tensor_names,
    tensor_hashes,
)
from splitfed.privacy import Ledger
from splitfed.training.data import load_examples
from splitfed.training.prompts import end_tokens, positions_of
from splitfed.training.protection import settle_clip, settle_noise, with_default_noise
from splitfed.training.setup import open_bottom_and_top
from splitfed.training.tokenizer import open_tokenizer
from splitfed.transport.adapters import RESIDUAL


@dataclass(frozen=True)
class Generator:
    """A device's half of the model, for text.

    Attributes:
        run: The run, with this device's split point.
        run_key: Name of the run for files of the state directory, as its training has it.
        bottom: The bottom.
        top: The top.
        tokenizer: The base model's tokenizer.
        end_tokens: Tokens that end a text.
        privacy: What holds on this device, settled for generation.
        config_sha256: Hash of the base model's configuration.
        tensors: Identity of each tensor of the agent's segments.
        personal: Names of its adapter's tensors that it keeps to itself.
        positions: Most tokens that the base model can count; None: any number.
    """

    run: RunConfig
    run_key: str
    bottom: Bottom
    top: Top
    tokenizer: PreTrainedTokenizerBase
    end_tokens: frozenset[int]
    privacy: PrivacySection
    config_sha256: str
    tensors: dict[str, TensorIdentity]
    personal: frozenset[str]
    positions: int | None

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.run.run.name

    @property
    def blocks(self) -> range:
        """Blocks of the trunk."""
        return range(self.bottom.blocks.stop, self.top.blocks.start)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of everything that comes from the server."""
        found: dict[str, tuple[int, ...]] = {}
        for segment in (self.bottom, self.top):
            found |= {name: tuple(tensor.shape) for name, tensor in adapter_parameters(segment).items()}
            found |= {f"{RESIDUAL}{name}": tuple(t.shape) for name, t in residual_parameters(segment).items()}
        return found

    @property
    def filler(self) -> int:
        """A token to stand where there is none."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        return 0

    def text(self, tokens: Sequence[int]) -> str:
        """Give the text of tokens, without what ended it."""
        stop = next((at for at, token in enumerate(tokens) if token in self.end_tokens), len(tokens))
        return str(self.tokenizer.decode(list(tokens[:stop]), skip_special_tokens=True))

    def begin(self, state: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        """Put bottom and top at a round's end.

        Args:
            state: What came from the server.
            kept: This agent's own tensors.
        """
        residual = {name.removeprefix(RESIDUAL): tensor for name, tensor in state.items() if name.startswith(RESIDUAL)}
        for segment in (self.bottom, self.top):
            load_adapter_state(segment, {**state, **kept})
            if residual:
                load_residual(segment, residual)


def open_generator(config: AgentConfig, run: RunConfig, folder: Path, ledger: Ledger) -> Generator:
    """Load segments and settle what holds, and set the ledger's policy.

    The owner's policy is applied as in training; what is generated is protected by a clip per token whatever the run
    clips in training, and by noise for a sequence whatever unit it protects there.

    Args:
        config: The agent's configuration.
        run: What the server says about the run.
        folder: The base model, or this agent's side of it.
        ledger: Where sequences will be charged.

    Raises:
        JoinRefused: If the run is weaker than the owner allows.
        ConfigError: If the two do not go together.
        WeightsError: If the base model cannot be loaded.
        DataError: If noise is to be calibrated to the agent's data, and these cannot be read.
    """
    trained = own_run(config.agent, run)
    agreed = agree(config.privacy, trained)
    run = trained if config.agent.personal else own_run(config.agent.model_copy(update={"rank": None}), run)
    bottom, top = open_bottom_and_top(folder, run.model, run.lora, seed=run.run.seed, residual_rank=run.residual_rank)
    tokenizer = open_tokenizer(folder)
    of_tokens = {} if agreed.clip == "token" else {"clip": "token", "clipping_norm_smashed": None}
    privacy = settle_clip(agreed.model_copy(update=of_tokens), bottom)
    privacy = _with_the_noise_of_training(privacy, config, run, bottom, top, tokenizer, ledger)
    refuse_weak_noise(config.privacy, privacy, run)
    ledger.set_policy(delta=privacy.delta, epsilon_budget=config.privacy.epsilon_budget, relation=privacy.relation)
    names = segment_tensor_names(folder, bottom_blocks=run.model.bottom_blocks, top_blocks=run.model.top_blocks)
    return Generator(
        run=run,
        run_key=run_key(trained),
        bottom=bottom,
        top=top,
        tokenizer=tokenizer,
        end_tokens=end_tokens(folder, tokenizer),
        privacy=privacy,
        config_sha256=canonical_config(folder),
        tensors=tensor_hashes(folder, names["bottom"] | names["top"]),
        personal=frozenset(
            name
            for segment in (bottom, top)
            if segment.kind in config.agent.personal
            for name in adapter_parameters(segment)
        ),
        positions=positions_of(bottom.config),
    )


def _with_the_noise_of_training(
    privacy: PrivacySection,
    config: AgentConfig,
    run: RunConfig,
    bottom: Bottom,
    top: Top,
    tokenizer: PreTrainedTokenizerBase,
    ledger: Ledger,
) -> PrivacySection:
    """Settle the noise multiplier; one that is calibrated to the data of training needs these."""
    if privacy.epsilon is None:
        return with_default_noise(privacy)
    train, held_out = load_examples(
        config.data, tokenizer, max_tokens=run.training.max_tokens, record_hash=ledger.record_hash
    )
    return settle_noise(privacy, workload_of(config, run, train, held_out, bottom, top))
