from splitfed.proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("run_id", "client", "agent_id")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    client: str
    agent_id: bytes
    def __init__(self, run_id: _Optional[str] = ..., client: _Optional[str] = ..., agent_id: _Optional[bytes] = ...) -> None: ...

class RoundEvent(_message.Message):
    __slots__ = ("waiting", "round_opened", "run_finished", "draining")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    ROUND_OPENED_FIELD_NUMBER: _ClassVar[int]
    RUN_FINISHED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    waiting: Waiting
    round_opened: RoundOpened
    run_finished: RunFinished
    draining: Draining
    def __init__(self, waiting: _Optional[_Union[Waiting, _Mapping]] = ..., round_opened: _Optional[_Union[RoundOpened, _Mapping]] = ..., run_finished: _Optional[_Union[RunFinished, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("agents", "joined")
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    agents: int
    joined: int
    def __init__(self, agents: _Optional[int] = ..., joined: _Optional[int] = ...) -> None: ...

class RoundOpened(_message.Message):
    __slots__ = ("round", "rounds", "is_submitted", "is_selected", "last_counted")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    IS_SUBMITTED_FIELD_NUMBER: _ClassVar[int]
    IS_SELECTED_FIELD_NUMBER: _ClassVar[int]
    LAST_COUNTED_FIELD_NUMBER: _ClassVar[int]
    round: int
    rounds: int
    is_submitted: bool
    is_selected: bool
    last_counted: int
    def __init__(self, round: _Optional[int] = ..., rounds: _Optional[int] = ..., is_submitted: _Optional[bool] = ..., is_selected: _Optional[bool] = ..., last_counted: _Optional[int] = ...) -> None: ...

class RunFinished(_message.Message):
    __slots__ = ("rounds",)
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    rounds: int
    def __init__(self, rounds: _Optional[int] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchAdapterRequest(_message.Message):
    __slots__ = ("run_id", "client", "agent_id", "round")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    client: str
    agent_id: bytes
    round: int
    def __init__(self, run_id: _Optional[str] = ..., client: _Optional[str] = ..., agent_id: _Optional[bytes] = ..., round: _Optional[int] = ...) -> None: ...

class AdapterHeader(_message.Message):
    __slots__ = ("run_id", "client", "agent_id", "round", "tensors", "tokens", "training_loss", "held_out_loss", "step")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_LOSS_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_LOSS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    client: str
    agent_id: bytes
    round: int
    tensors: int
    tokens: int
    training_loss: float
    held_out_loss: float
    step: int
    def __init__(self, run_id: _Optional[str] = ..., client: _Optional[str] = ..., agent_id: _Optional[bytes] = ..., round: _Optional[int] = ..., tensors: _Optional[int] = ..., tokens: _Optional[int] = ..., training_loss: _Optional[float] = ..., held_out_loss: _Optional[float] = ..., step: _Optional[int] = ...) -> None: ...

class AdapterChunk(_message.Message):
    __slots__ = ("header", "tensor", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: AdapterHeader
    tensor: _tensor_pb2.NamedTensor
    chunk: bytes
    def __init__(self, header: _Optional[_Union[AdapterHeader, _Mapping]] = ..., tensor: _Optional[_Union[_tensor_pb2.NamedTensor, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("is_new", "refused")
    IS_NEW_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    is_new: bool
    refused: str
    def __init__(self, is_new: _Optional[bool] = ..., refused: _Optional[str] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("run_id", "client", "agent_id", "for_good")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    FOR_GOOD_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    client: str
    agent_id: bytes
    for_good: bool
    def __init__(self, run_id: _Optional[str] = ..., client: _Optional[str] = ..., agent_id: _Optional[bytes] = ..., for_good: _Optional[bool] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
