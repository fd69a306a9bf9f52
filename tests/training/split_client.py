"""One client on a tiny split model, over a link that keeps what leaves the device."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfed.compress import get_codec
from splitfed.config import TrainingSection
from splitfed.models import LoraSettings, Partition, adapter_parameters, adapter_state, add_adapter, partition
from splitfed.privacy import GaussianSequenceMechanism, Ledger, NoiseStream
from splitfed.training.client_step import ClientTrainer, Loss, causal_lm_loss
from splitfed.training.data import Example
from splitfed.training.link import InProcessLink, Link, LinkCodecs, Place, Traffic
from splitfed.training.objective import IGNORED_LABEL
from splitfed.training.releases import LedgeredReleases, OpenReleases, Releases
from splitfed.training.together import OwnCalls, at_once
from splitfed.training.trunk_step import TrunkTrainer
from tests.equivalence.tiny_models import VOCABULARY, tiny_model

D = 32
"""Hidden size of the tiny models."""
TRAINING = TrainingSection(rounds=2, local_steps=2, batch_size=4, max_tokens=12, learning_rate=1e-2)
B, T = TRAINING.batch_size, TRAINING.max_tokens
PAD = 0


@dataclass(frozen=True)
class Sent:
    """A tensor that left the device."""

    call: str
    place: Place
    tensor_BTD: Tensor
    attention_mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    wants_smashed_gradient: bool | None = None


class RecordingLink:
    """Keeps what another link has taken; `before` sees each tensor while it is still on the device."""

    def __init__(self, inner: Link, before: Callable[[str, Tensor], None] = lambda call, tensor_BTD: None) -> None:
        self.inner = inner
        self.before = before
        self.sent: list[Sent] = []
        self.calls: list[str] = []

    @property
    def traffic(self) -> Traffic:
        return self.inner.traffic

    def of(self, call: str) -> list[Tensor]:
        """The tensors that left by one call, in their order."""
        return [sent.tensor_BTD for sent in self.sent if sent.call == call]

    def forward(
        self,
        place: Place,
        smashed_BTD: Tensor,
        *,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        wants_smashed_gradient: bool = False,
        step_tokens: int = 0,
    ) -> Future[Tensor]:
        self.before("forward", smashed_BTD)
        copy_BTD = smashed_BTD.detach().clone()
        output = self.inner.forward(
            place,
            smashed_BTD,
            attention_mask_BT=attention_mask_BT,
            position_ids_BT=position_ids_BT,
            wants_smashed_gradient=wants_smashed_gradient,
            step_tokens=step_tokens,
        )
        self.calls.append("forward")
        self.sent.append(Sent("forward", place, copy_BTD, attention_mask_BT, position_ids_BT, wants_smashed_gradient))
        return output

    def backward(self, place: Place, output_gradient_BTD: Tensor) -> Future[Tensor | None]:
        self.before("backward", output_gradient_BTD)
        copy_BTD = output_gradient_BTD.detach().clone()
        gradient = self.inner.backward(place, output_gradient_BTD)
        self.calls.append("backward")
        self.sent.append(Sent("backward", place, copy_BTD))
        return gradient

    def step(self, step: int, *, squared_norm: float | None = None) -> Future[float]:
        applied = self.inner.step(step, squared_norm=squared_norm)
        self.calls.append("step")
        return applied

    def mean_gradient(self, step: int, gradients: Mapping[str, Tensor], *, tokens: int) -> Future[dict[str, Tensor]]:
        self.calls.append("mean_gradient")
        return self.inner.mean_gradient(step, gradients, tokens=tokens)


class ScriptedNoise(NoiseStream):
    """Noise of which every sample is `value` standard deviations; keeps the standard deviations."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.stds: list[float] = []

    def gaussian(self, shape: Sequence[int], std: float = 1.0) -> Tensor:
        self.stds.append(std)
        return torch.full(tuple(shape), self.value * std)


@dataclass
class SplitClient:
    """A client at the start of round 1."""

    parts: Partition
    trainer: ClientTrainer
    trunk: TrunkTrainer
    link: RecordingLink

    def adapters(self) -> dict[str, Tensor]:
        """Every segment's adapter as it is now; the trunk's is the client's copy."""
        trunk, _ = self.trunk.result("a")
        return {**adapter_state(self.parts.bottom), **trunk, **adapter_state(self.parts.top)}


def tiny_parts(
    family: str = "llama", *, bottom_blocks: int = 1, top_blocks: int = 1, dropout: float = 0.0, seed: int = 0
) -> Partition:
    """Split a tiny model; no factor of its adapters is zero, so each of them matters."""
    parts = partition(tiny_model(family), bottom_blocks=bottom_blocks, top_blocks=top_blocks)
    generator = torch.Generator().manual_seed(seed)
    for segment in parts:
        add_adapter(segment, LoraSettings(rank=2, alpha=4.0, dropout=dropout), seed=seed)
        for parameter in adapter_parameters(segment).values():
            with torch.no_grad():
                parameter.normal_(std=0.1, generator=generator)
    return parts


def split_client(
    releases: Releases | None = None,
    *,
    training: TrainingSection = TRAINING,
    codec: str = "none",
    loss: Loss = causal_lm_loss,
    parts: Partition | None = None,
) -> SplitClient:
    """Put a client on a tiny split model."""
    parts = parts or tiny_parts()
    trunk = TrunkTrainer(parts.trunk, training, seed=3)
    trunk.open_round("a", 1, adapter_state(parts.trunk), {})
    trainer = ClientTrainer(
        parts.bottom,
        parts.top,
        training,
        releases or OpenReleases(),
        client="a",
        seed=3,
        pad_token_id=PAD,
        loss=loss,
    )
    return SplitClient(
        parts,
        trainer,
        trunk,
        RecordingLink(InProcessLink(OwnCalls(at_once(trunk)), "a", LinkCodecs(*[get_codec(codec)] * 4))),
    )


def noisy(
    ledger: Ledger,
    *,
    noise_multiplier: float = 0.5,
    clipping_norms: tuple[float, float] = (1.0, 0.01),
    streams: tuple[NoiseStream | None, NoiseStream | None] = (None, None),
) -> LedgeredReleases:
    """A gate with noise on; pairs are for smashed data and for output gradients."""
    smashed, output_gradient = (
        GaussianSequenceMechanism(norm, noise_multiplier, "token", stream)
        for norm, stream in zip(clipping_norms, streams, strict=True)
    )
    return LedgeredReleases(smashed, output_gradient, ledger, run="r")


def example(record: str, tokens: int, *, prompt: int = 0, seed: int = 0) -> Example:
    """A random text, of which the first tokens may be a prompt without loss."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()
    return Example(input_ids, [IGNORED_LABEL] * prompt + input_ids[prompt:], record)


def examples(*lengths: int, prompt: int = 0, seed: int = 0) -> list[Example]:
    """Texts of these lengths, each a record."""
    return [example(f"r{i}", tokens, prompt=prompt, seed=seed + i) for i, tokens in enumerate(lengths)]
