"""What a computation asks of a machine, read off tensors that hold nothing: FLOPs, traffic, calls, memory.

The computation itself runs, on the ``meta`` device; so every supported family is measured by its own code.

Shapes: B sequences, T tokens, H heads.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, _with_heads_of(query, key), _with_heads_of(query, value)))


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, _with_heads_of(query, key), _with_heads_of(query, value)))


def _with_heads_of(query: torch.Size, other: torch.Size) -> torch.Size:
    """Count a key that several heads share as often as it is used."""
    return torch.Size((*other[:1], query[1], *other[2:]))


def _grouped_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Every row meets one expert's matrix, whichever it is."""
    return 2 * math.prod(a) * int(b[-1])


FLOPS_BESIDE_TORCH: Final[Mapping[Any, Callable[..., int]]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    _aten._grouped_mm: _grouped_flops,
}
"""Formulas that torch's own counter lacks, as its ``custom_mapping`` takes them."""


_ATTENTION: Final = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    }
)


class Matmul(NamedTuple):
    """One size of matrix product, or of a fused attention.

    Attributes:
        dtype: Element type, such as "float32".
        flops: Of one call.
        traffic_bytes: What one call reads and writes.
        head_size: Elements of an attention's head; 0 for a plain product.
    """

    dtype: str
    flops: int
    traffic_bytes: int
    head_size: int = 0


@dataclass
class Work:
    """What a computation consists of.

    Attributes:
        matmuls: Calls by size.
        traffic_bytes: What all other operations read and write.
        operations: Calls of any kind.
    """

    matmuls: Counter[Matmul] = field(default_factory=Counter)
    traffic_bytes: int = 0
    operations: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of all matrix products."""
        return sum(each.flops * calls for each, calls in self.matmuls.items())

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.matmuls + other.matmuls,
            self.traffic_bytes + other.traffic_bytes,
            self.operations + other.operations,
        )

    def without(self, other: "Work") -> "Work":
        """Give what is left of this once the other is taken off."""
        return Work(
            self.matmuls - other.matmuls,
            max(self.traffic_bytes - other.traffic_bytes, 0),
            max(self.operations - other.operations, 0),
        )

    def __mul__(self, times: int) -> "Work":
        matmuls = Counter({each: calls * times for each, calls in self.matmuls.items() if times})
        return Work(matmuls, self.traffic_bytes * times, self.operations * times)


class Meter(TorchDispatchMode):
    """Counts what is computed inside, and the memory that is alive.

    Tensors on ``meta`` hold no values. Where a model looks at one to choose its way (is this mask all ones, is this
    norm too large), the answer is that of ordinary rows: True for a boolean, 1 for a number.

    Attributes:
        work: What was computed so far.
        live_bytes: Memory of tensors made inside that are alive.
        peak_bytes: The largest ``live_bytes`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype is torch.bool else 1
        before = [tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        if func is _aten._grouped_mm.default and args[0].is_meta:
            out = _grouped_on_meta(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        else:
            out = func(*args, **kwargs)
        self._note_call(func, args, kwargs, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note_storage(tensor.untyped_storage(), before)
        return out

    def _note_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.work.operations += 1
        if func.is_view:
            return
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        traffic_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        packet = func._overloadpacket
        if packet in FLOPS_BESIDE_TORCH:
            shapes = (each.shape if isinstance(each, Tensor) else each for each in args)
            flops = FLOPS_BESIDE_TORCH[packet](*shapes)
        elif packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
        else:
            self.work.traffic_bytes += traffic_bytes
            return
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        head_size = tensors[0].shape[-1] if packet in _ATTENTION else 0
        self.work.matmuls[Matmul(dtype, flops, traffic_bytes, head_size)] += 1

    def _note_storage(self, storage: torch.UntypedStorage, before: list[torch.UntypedStorage]) -> None:
        if storage in self._known or any(storage is each for each in before):
            return
        self._known.add(storage)
        size_bytes = storage.nbytes()
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, size_bytes)

    def _forget(self, size_bytes: int) -> None:
        self.live_bytes -= size_bytes


class AttentionOfDaemons(TorchFunctionMode):
    """Takes the attention kernel that daemons take, where ``meta`` would take one that keeps all scores.

    It is the fused one of the CPU; those of accelerators keep the same: queries, keys, values, output and one number a
    row. Head sizes that differ, dropout and masks that are trained have no such kernel.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        mask = kwargs.get("attn_mask")
        is_fused = len({query.shape[-1], key.shape[-1], value.shape[-1]}) == 1 and not kwargs.get("dropout_p")
        if not is_fused or (mask is not None and mask.requires_grad):
            return func(*args, **kwargs)
        if mask is not None and mask.dtype is torch.bool:
            mask = torch.empty_like(mask, dtype=query.dtype)  # as torch makes of it
        output, _ = _aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            key,
            value,
            0.0,
            bool(kwargs.get("is_causal", False)),
            attn_mask=mask,
            scale=kwargs.get("scale"),
        )
        return output


def _grouped_on_meta(a: Tensor, b: Tensor, offsets: Tensor | None) -> Tensor:
    """Give what torch gives on other devices, where its ``meta`` kernel takes bfloat16 only; rows start at 16 bytes."""
    groups = () if a.ndim + b.ndim == 5 else (b.shape[0] if offsets is None else len(offsets),)
    rows, columns = a.shape[-2], b.shape[-1]
    row = columns + -columns % max(16 // a.element_size(), 1)
    strides = (row, 1) if not groups else (rows * row, row, 1)
    return a.new_empty_strided((*groups, rows, columns), strides)


@dataclass
class Kept:
    """Memory that autograd keeps between a forward and its backward, each storage once.

    Attributes:
        sizes: Bytes by storage.
    """

    sizes: dict[int, int] = field(default_factory=dict)
    _alive: list[torch.UntypedStorage] = field(default_factory=list)  # so that no address comes twice

    def bytes_without(self, others: set[int]) -> int:
        """Add up, leaving some storages aside."""
        return sum(size for address, size in self.sizes.items() if address not in others)


@contextmanager
def keeping(module: torch.nn.Module) -> Iterator[Kept]:
    """Note what autograd keeps of a forward inside, parameters and buffers of the module left aside."""
    kept = Kept()
    own = {storage_of(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept._alive.append(storage)
            kept.sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def storage_of(tensor: Tensor) -> int:
    """Give what tells a tensor's storage from others."""
    return int(tensor.untyped_storage()._cdata)
