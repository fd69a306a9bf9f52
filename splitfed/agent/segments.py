"""Fetching the agent's segments from the server, kept by the hash of their content."""

import hashlib
import json
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from splitfed.config import ModelSection
from splitfed.errors import WeightsError
from splitfed.proto.v1 import joining_pb2
from splitfed.proto.v1.joining_pb2_grpc import JoiningStub

_INDEX = "model.safetensors.index.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FILE_SUFFIXES = (".json", ".model", ".txt", ".jinja")
_MOST_FILE_BYTES = 256 << 20
_MEGABYTE = 1e6


def fetch_segments(
    stub: JoiningStub,
    run_id: str,
    cut: ModelSection,
    cache: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fetch configuration, tokenizer and the tensors of bottom and top; what is there already is not fetched again.

    Args:
        stub: The joining service.
        run_id: The run.
        cut: Blocks of bottom and top.
        cache: Folder for what was fetched, one subfolder per content.
        on_progress: Called with bytes done and bytes in all.

    Returns:
        A folder that holds one side of the checkpoint, a file per tensor.

    Raises:
        WeightsError: If the server lists what cannot be a checkpoint, or more than the disk holds, or what came has
            another hash.
    """
    listing = stub.ListSegments(
        joining_pb2.ListSegmentsRequest(run_id=run_id, bottom_blocks=cut.bottom_blocks, top_blocks=cut.top_blocks)
    )
    _check(listing)
    folder = cache / hashlib.sha256(listing.SerializeToString(deterministic=True)).hexdigest()[:32]
    if (folder / _INDEX).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {tensor.name: _tensor_bytes(tensor) for tensor in listing.tensors}
    total_bytes = sum(sizes.values()) + sum(file.size_bytes for file in listing.files)
    there_bytes = sum(size for name, size in sizes.items() if (folder / f"{name}.safetensors").is_file())
    _check_room(total_bytes - there_bytes, folder)
    done_bytes = 0
    for file in listing.files:
        request = joining_pb2.FetchSegmentsRequest(run_id=run_id, file=file.name)
        _store(stub.FetchSegments(request), folder / file.name, b"", file.size_bytes, file.sha256)
        done_bytes += file.size_bytes
    for tensor in listing.tensors:
        target = folder / f"{tensor.name}.safetensors"
        if not target.is_file():
            request = joining_pb2.FetchSegmentsRequest(run_id=run_id, tensor=tensor.name)
            header = _safetensors_header(tensor, sizes[tensor.name])
            _store(stub.FetchSegments(request), target, header, sizes[tensor.name], tensor.sha256)
        done_bytes += sizes[tensor.name]
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
    weight_map = {tensor.name: f"{tensor.name}.safetensors" for tensor in listing.tensors}
    draft = folder / f".{_INDEX}"
    draft.write_text(json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}))
    draft.rename(folder / _INDEX)
    return folder


def _check(listing: joining_pb2.ListSegmentsReply) -> None:
    """Names become file names here: only plain ones may, and each once."""
    for names in ([tensor.name for tensor in listing.tensors], [file.name for file in listing.files]):
        for name, times in Counter(names).items():
            if not _NAME.fullmatch(name) or name == _INDEX:
                raise WeightsError(f"The server lists {name[:100]!r}, which cannot be the name of a tensor or a file.")
            if times > 1:
                raise WeightsError(f"The server lists {name!r} twice.")
    for file in listing.files:
        if file.size_bytes > _MOST_FILE_BYTES or not file.name.endswith(_FILE_SUFFIXES):
            raise WeightsError(
                f"The server lists the file {file.name!r} of {file.size_bytes} bytes, which is not expected."
            )
    for tensor in listing.tensors:
        if tensor.dtype not in _DTYPE_BYTES:
            raise WeightsError(f"The server lists the tensor {tensor.name!r} with the unknown dtype {tensor.dtype!r}.")


def _check_room(missing_bytes: int, folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if missing_bytes > free_bytes:
        raise WeightsError(
            f"What the server lists needs {missing_bytes / _MEGABYTE:.1f} MB, but only {free_bytes / _MEGABYTE:.1f} MB "
            f"are free in {folder}; make room, or give [agent] state_directory another disk."
        )


def _tensor_bytes(tensor: joining_pb2.TensorIdentity) -> int:
    size = _DTYPE_BYTES[tensor.dtype]
    for dimension in tensor.shape:
        size *= dimension
    return size


def _safetensors_header(tensor: joining_pb2.TensorIdentity, size_bytes: int) -> bytes:
    facts = {tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [0, size_bytes]}}
    text = json.dumps(facts).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _store(
    pieces: Iterator[joining_pb2.FileChunk], target: Path, header: bytes, size_bytes: int, sha256: bytes
) -> None:
    digest = hashlib.sha256()
    left_bytes = size_bytes
    draft = target.with_name(f".{target.name}.part")
    with draft.open("wb") as file:
        file.write(header)
        for piece in pieces:
            left_bytes -= len(piece.data)
            if left_bytes < 0:
                raise WeightsError(f"{target.name!r} from the server is longer than it said; nothing of it was kept.")
            digest.update(piece.data)
            file.write(piece.data)
    if left_bytes or digest.digest() != sha256:
        raise WeightsError(
            f"{target.name!r} from the server is not what it listed (hash or length); start the agent again."
        )
    draft.rename(target)
