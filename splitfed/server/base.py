"""The server's copy of the base model, as agents ask about it: identities, and the files they may fetch."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from splitfed.errors import FingerprintMismatch, ProtocolError
from splitfed.models import Checkpoint, TensorIdentity, canonical_config, load_config, segment_tensor_names
from splitfed.transport.tensors import CHUNK_BYTES

_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass
class BaseFolder:
    """A base model's folder.

    Attributes:
        folder: Configuration, tokenizer and safetensors.
        n_blocks: Blocks of the model.
    """

    folder: Path
    _identities: dict[str, TensorIdentity] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.n_blocks = int(load_config(self.folder).get_text_config().num_hidden_layers)
        self._listed: set[str] = set()
        self._checkpoint = Checkpoint(self.folder)
        self.config_sha256 = canonical_config(self.folder)

    def list_tensors(self, bottom_blocks: int, top_blocks: int) -> list[str]:
        """Name the tensors of bottom and top at a split point; from now on agents may fetch them."""
        names = segment_tensor_names(self.folder, bottom_blocks=bottom_blocks, top_blocks=top_blocks)
        found = names["bottom"] | names["top"]
        with self._lock:
            self._listed |= found
        return sorted(found)

    def identity(self, name: str) -> TensorIdentity:
        """Give a tensor's identity; each is hashed once."""
        with self._lock:
            if name not in self._identities:
                self._identities[name] = self._checkpoint.identity(name)
            return self._identities[name]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the tensors that agents have compared, by name."""
        with self._lock:
            return {name: identity.sha256 for name, identity in self._identities.items()}

    def check(self, config_sha256: str, tensors: dict[str, TensorIdentity]) -> None:
        """Compare an agent's fingerprint with this one, over the tensors that both sides hold.

        Raises:
            FingerprintMismatch: If they differ; the sentence names the first difference.
        """
        if config_sha256 != self.config_sha256:
            raise FingerprintMismatch(
                "The agent's base model has another configuration than the server's; point [agent] base at the same "
                "model and revision, or leave it out to fetch the segments from the server."
            )
        for name in sorted(set(tensors) & self._checkpoint.names):
            if tensors[name] != self.identity(name):
                raise FingerprintMismatch(
                    f"The agent's base model differs from the server's in the tensor {name!r}; point [agent] base at "
                    "the same model and revision, or leave it out to fetch the segments from the server."
                )

    def files(self) -> dict[str, tuple[int, bytes]]:
        """List the small files that an agent may fetch: size and SHA-256 by name."""
        found = {}
        for name in _FILES:
            file = self.folder / name
            if file.is_file():
                content = file.read_bytes()
                found[name] = (len(content), hashlib.sha256(content).digest())
        return found

    def read_file(self, name: str) -> Iterator[bytes]:
        """Read a small file in chunks.

        Raises:
            ProtocolError: If it is not one that agents may fetch.
        """
        if name not in _FILES or not (self.folder / name).is_file():
            raise ProtocolError(f"{name[:100]!r} is not a file that agents can fetch.")
        content = (self.folder / name).read_bytes()
        for at in range(0, len(content), CHUNK_BYTES):
            yield content[at : at + CHUNK_BYTES]

    def read_tensor(self, name: str) -> Iterator[bytes]:
        """Read a tensor's bytes in chunks, row-major, little-endian.

        Raises:
            ProtocolError: If it is not a tensor of the agent's segments.
        """
        if name not in self._listed:
            raise ProtocolError(f"{name[:200]!r} is not a tensor of a bottom or top that was listed.")
        content = self._checkpoint.read(name).contiguous().flatten().view(torch.uint8).numpy().data
        for at in range(0, len(content), CHUNK_BYTES):
            yield bytes(content[at : at + CHUNK_BYTES])
