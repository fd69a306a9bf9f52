from splitfed.proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("protocol_version", "client")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    client: str
    def __init__(self, protocol_version: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol_version", "run_id", "run_config")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_CONFIG_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_id: str
    run_config: str
    def __init__(self, protocol_version: _Optional[int] = ..., run_id: _Optional[str] = ..., run_config: _Optional[str] = ...) -> None: ...

class ListSegmentsRequest(_message.Message):
    __slots__ = ("run_id", "bottom_blocks", "top_blocks")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOP_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    bottom_blocks: int
    top_blocks: int
    def __init__(self, run_id: _Optional[str] = ..., bottom_blocks: _Optional[int] = ..., top_blocks: _Optional[int] = ...) -> None: ...

class TensorIdentity(_message.Message):
    __slots__ = ("name", "dtype", "shape", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class ListSegmentsReply(_message.Message):
    __slots__ = ("config_sha256", "tensors", "files")
    CONFIG_SHA256_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    config_sha256: bytes
    tensors: _containers.RepeatedCompositeFieldContainer[TensorIdentity]
    files: _containers.RepeatedCompositeFieldContainer[FileIdentity]
    def __init__(self, config_sha256: _Optional[bytes] = ..., tensors: _Optional[_Iterable[_Union[TensorIdentity, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[FileIdentity, _Mapping]]] = ...) -> None: ...

class FileIdentity(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class FetchSegmentsRequest(_message.Message):
    __slots__ = ("run_id", "file", "tensor")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    file: str
    tensor: str
    def __init__(self, run_id: _Optional[str] = ..., file: _Optional[str] = ..., tensor: _Optional[str] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("protocol_version", "run_id", "client", "agent_id", "config_sha256", "tensors", "codecs", "weight", "bottom_blocks", "top_blocks", "rank", "personal")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_SHA256_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOP_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_id: str
    client: str
    agent_id: bytes
    config_sha256: bytes
    tensors: _containers.RepeatedCompositeFieldContainer[TensorIdentity]
    codecs: _containers.RepeatedScalarFieldContainer[_tensor_pb2.Codec]
    weight: int
    bottom_blocks: int
    top_blocks: int
    rank: int
    personal: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol_version: _Optional[int] = ..., run_id: _Optional[str] = ..., client: _Optional[str] = ..., agent_id: _Optional[bytes] = ..., config_sha256: _Optional[bytes] = ..., tensors: _Optional[_Iterable[_Union[TensorIdentity, _Mapping]]] = ..., codecs: _Optional[_Iterable[_Union[_tensor_pb2.Codec, str]]] = ..., weight: _Optional[int] = ..., bottom_blocks: _Optional[int] = ..., top_blocks: _Optional[int] = ..., rank: _Optional[int] = ..., personal: _Optional[_Iterable[str]] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("agents", "joined")
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    agents: int
    joined: int
    def __init__(self, agents: _Optional[int] = ..., joined: _Optional[int] = ...) -> None: ...
