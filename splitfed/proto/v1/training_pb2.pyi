from splitfed.proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_TRAIN: _ClassVar[Kind]
    KIND_EVALUATE: _ClassVar[Kind]
    KIND_GENERATE: _ClassVar[Kind]
KIND_UNSPECIFIED: Kind
KIND_TRAIN: Kind
KIND_EVALUATE: Kind
KIND_GENERATE: Kind

class TrainRequest(_message.Message):
    __slots__ = ("number", "open", "forward", "backward", "step", "chunk", "received_below")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BELOW_FIELD_NUMBER: _ClassVar[int]
    number: int
    open: OpenRound
    forward: Forward
    backward: Backward
    step: Step
    chunk: bytes
    received_below: int
    def __init__(self, number: _Optional[int] = ..., open: _Optional[_Union[OpenRound, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., chunk: _Optional[bytes] = ..., received_below: _Optional[int] = ...) -> None: ...

class OpenRound(_message.Message):
    __slots__ = ("run_id", "client", "agent_id", "round", "session", "first_block", "end_block")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    client: str
    agent_id: bytes
    round: int
    session: bytes
    first_block: int
    end_block: int
    def __init__(self, run_id: _Optional[str] = ..., client: _Optional[str] = ..., agent_id: _Optional[bytes] = ..., round: _Optional[int] = ..., session: _Optional[bytes] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("kind", "step", "micro_batch", "smashed", "attention_mask", "position_ids", "wants_smashed_gradient", "step_tokens")
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    SMASHED_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    WANTS_SMASHED_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    kind: Kind
    step: int
    micro_batch: int
    smashed: _tensor_pb2.Tensor
    attention_mask: bytes
    position_ids: _containers.RepeatedScalarFieldContainer[int]
    wants_smashed_gradient: bool
    step_tokens: int
    def __init__(self, kind: _Optional[_Union[Kind, str]] = ..., step: _Optional[int] = ..., micro_batch: _Optional[int] = ..., smashed: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., attention_mask: _Optional[bytes] = ..., position_ids: _Optional[_Iterable[int]] = ..., wants_smashed_gradient: _Optional[bool] = ..., step_tokens: _Optional[int] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("step", "micro_batch", "output_gradient")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro_batch: int
    output_gradient: _tensor_pb2.Tensor
    def __init__(self, step: _Optional[int] = ..., micro_batch: _Optional[int] = ..., output_gradient: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "squared_norm")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SQUARED_NORM_FIELD_NUMBER: _ClassVar[int]
    step: int
    squared_norm: float
    def __init__(self, step: _Optional[int] = ..., squared_norm: _Optional[float] = ...) -> None: ...

class TrainReply(_message.Message):
    __slots__ = ("number", "opened", "trunk_output", "smashed_gradient", "stepped", "chunk")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    TRUNK_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SMASHED_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    STEPPED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    number: int
    opened: Opened
    trunk_output: TrunkOutput
    smashed_gradient: SmashedGradient
    stepped: Stepped
    chunk: bytes
    def __init__(self, number: _Optional[int] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., trunk_output: _Optional[_Union[TrunkOutput, _Mapping]] = ..., smashed_gradient: _Optional[_Union[SmashedGradient, _Mapping]] = ..., stepped: _Optional[_Union[Stepped, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("session", "next_number")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_NUMBER_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    next_number: int
    def __init__(self, session: _Optional[bytes] = ..., next_number: _Optional[int] = ...) -> None: ...

class TrunkOutput(_message.Message):
    __slots__ = ("trunk_output",)
    TRUNK_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    trunk_output: _tensor_pb2.Tensor
    def __init__(self, trunk_output: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class SmashedGradient(_message.Message):
    __slots__ = ("smashed_gradient",)
    SMASHED_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    smashed_gradient: _tensor_pb2.Tensor
    def __init__(self, smashed_gradient: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Stepped(_message.Message):
    __slots__ = ("adapter_version", "squared_norm")
    ADAPTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    SQUARED_NORM_FIELD_NUMBER: _ClassVar[int]
    adapter_version: int
    squared_norm: float
    def __init__(self, adapter_version: _Optional[int] = ..., squared_norm: _Optional[float] = ...) -> None: ...
