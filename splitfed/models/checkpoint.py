"""A folder of safetensors, one file or sharded: which tensors it holds, and one tensor at a time.

A tensor is read in pieces, and the file is closed after each: an open file is mapped, and its pages count as memory.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitfed.errors import WeightsError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class TensorIdentity:
    """What two sides compare of a tensor, whatever file it is in.

    Attributes:
        dtype: As safetensors spells it, such as ``F32``.
        shape: Its shape.
        sha256: Hash of its bytes, row-major and little-endian, in hexadecimal.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class Checkpoint:
    """Tensors of a checkpoint folder by name.

    Args:
        folder: Holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards it names.

    Raises:
        WeightsError: If there is no such file, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _files(folder)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """Copy one tensor into memory.

        Args:
            name: Its name in the checkpoint.
            dtype: Wanted element type; the checkpoint's where absent.

        Raises:
            WeightsError: If the tensor is not there, or its file is damaged.
        """
        tensor: Tensor | None = None
        first_row = 0
        for shape, piece in self._pieces(name):
            if tensor is None:
                tensor = torch.empty(shape, dtype=dtype or piece.dtype)
            if not shape:
                return tensor.copy_(piece)
            tensor[first_row : first_row + len(piece)].copy_(piece)
            first_row += len(piece)
        assert tensor is not None
        return tensor

    def identity(self, name: str) -> TensorIdentity:
        """Hash one tensor.

        Args:
            name: Its name in the checkpoint.

        Raises:
            WeightsError: If the tensor is not there, or its file is damaged.
        """
        digest = hashlib.sha256()
        for _, piece in self._pieces(name):
            digest.update(piece.contiguous().flatten().view(torch.uint8).numpy().data)
        with self._open(name) as file:
            view = file.get_slice(name)
            return TensorIdentity(dtype=view.get_dtype(), shape=tuple(view.get_shape()), sha256=digest.hexdigest())

    def _pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield the shape and some rows, until all rows were seen; a piece is valid until the next one."""
        with self._open(name) as file:
            shape = tuple(file.get_slice(name).get_shape())
            if not shape or 0 in shape:
                yield shape, file.get_tensor(name)
                return
            element_bytes = file.get_slice(name)[:1].element_size()
        row_bytes = element_bytes * int(torch.Size(shape[1:]).numel())
        step = max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, shape[0], step):
            with self._open(name) as file:
                yield shape, file.get_slice(name)[start : start + step]

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self._file_of.get(name)
        if path is None:
            raise WeightsError(f"The checkpoint in {self.folder} has no tensor {name!r}; fetch it again.")
        with _opened(path) as file:
            yield file


def _files(folder: Path) -> dict[str, Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            return {str(name): _shard(folder, str(file)) for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"The index {index} is not one of safetensors shards; fetch it again.") from error
    single = folder / SINGLE_FILE
    if not single.is_file():
        raise WeightsError(
            f"There is no {SINGLE_FILE} and no {INDEX_FILE} in {folder}; give a folder with safetensors weights."
        )
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def _shard(folder: Path, file: str) -> Path:
    if Path(file).name != file:
        raise WeightsError(f"The index in {folder} names a shard outside the folder, {file!r}; fetch it again.")
    return folder / file


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise WeightsError(f"The weights file {path} is missing; fetch the checkpoint again.") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"The weights file {path} cannot be read ({error}); fetch it again.") from error
