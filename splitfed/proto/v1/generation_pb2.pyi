from splitfed.proto.v1 import federation_pb2 as _federation_pb2
from splitfed.proto.v1 import joining_pb2 as _joining_pb2
from splitfed.proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchLastRoundRequest(_message.Message):
    __slots__ = ("run_id", "client", "agent_id", "bottom_blocks", "top_blocks", "rank", "config_sha256", "tensors")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOP_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    CONFIG_SHA256_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    client: str
    agent_id: bytes
    bottom_blocks: int
    top_blocks: int
    rank: int
    config_sha256: bytes
    tensors: _containers.RepeatedCompositeFieldContainer[_joining_pb2.TensorIdentity]
    def __init__(self, run_id: _Optional[str] = ..., client: _Optional[str] = ..., agent_id: _Optional[bytes] = ..., bottom_blocks: _Optional[int] = ..., top_blocks: _Optional[int] = ..., rank: _Optional[int] = ..., config_sha256: _Optional[bytes] = ..., tensors: _Optional[_Iterable[_Union[_joining_pb2.TensorIdentity, _Mapping]]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("open", "smashed", "chunk")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SMASHED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    open: OpenSequence
    smashed: _tensor_pb2.Tensor
    chunk: bytes
    def __init__(self, open: _Optional[_Union[OpenSequence, _Mapping]] = ..., smashed: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class OpenSequence(_message.Message):
    __slots__ = ("run_id", "client", "agent_id", "round", "first_block", "end_block", "max_tokens", "answered")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    client: str
    agent_id: bytes
    round: int
    first_block: int
    end_block: int
    max_tokens: int
    answered: int
    def __init__(self, run_id: _Optional[str] = ..., client: _Optional[str] = ..., agent_id: _Optional[bytes] = ..., round: _Optional[int] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ..., max_tokens: _Optional[int] = ..., answered: _Optional[int] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("opened", "trunk_output", "chunk")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    TRUNK_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    opened: SequenceOpened
    trunk_output: _tensor_pb2.Tensor
    chunk: bytes
    def __init__(self, opened: _Optional[_Union[SequenceOpened, _Mapping]] = ..., trunk_output: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SequenceOpened(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
