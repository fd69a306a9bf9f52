"""What each agent holds: its blocks, its rank, and hence which tensors of the run's adapter are its to train."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from splitfed.config import RunConfig
from splitfed.errors import JoinRefused

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Device:
    """One agent's part of the model.

    Attributes:
        blocks: Blocks that the trunk runs on its behalf; None: all of the trunk's.
        rank: Rank of its own adapter.
        own: Shape of each tensor of bottom and top that it trains, by whole-model name.
        personal: Those that it keeps to itself.
    """

    blocks: range | None
    rank: int
    own: dict[str, tuple[int, ...]]
    personal: frozenset[str] = frozenset()

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor that its updates hold."""
        return {name: shape for name, shape in self.own.items() if name not in self.personal}


class Devices:
    """The devices of a run.

    Args:
        run: The run's configuration, whose split point and rank hold where an agent says nothing.
        ends: Shapes of the adapters of bottom and top where the trunk is widest.
        blocks: Shapes of each of the trunk's blocks' adapters, by block; empty: every agent is cut as the run is.
    """

    def __init__(self, run: RunConfig, ends: Shapes, blocks: Mapping[int, Shapes]) -> None:
        self._run = run
        self._ends = dict(ends)
        self._blocks = {block: dict(shapes) for block, shapes in blocks.items()}
        self._devices: dict[str, Device] = {}

    def __getitem__(self, client: str) -> Device:
        """Give what an agent holds; what the run says, for one that has not joined since the server started."""
        return self._devices.get(client) or self.device()

    def __contains__(self, client: str) -> bool:
        """Say whether an agent has joined since the server started."""
        return client in self._devices

    def put(self, client: str, device: Device) -> None:
        """Note what an agent holds."""
        self._devices[client] = device

    @property
    def allows_own_cuts(self) -> bool:
        """An agent may be cut otherwise than the run is."""
        return bool(self._blocks)

    @property
    def contested(self) -> frozenset[str]:
        """Names that some agent trains itself for the run. May be asked in any thread: agents join meanwhile."""
        devices = list(self._devices.values()) or [self.device()]
        return frozenset(name for device in devices for name in device.shared)

    def device(
        self,
        *,
        bottom_blocks: int | None = None,
        top_blocks: int | None = None,
        rank: int | None = None,
        personal: Collection[str] = (),
    ) -> Device:
        """Work out what an agent holds.

        Args:
            bottom_blocks: Blocks of its bottom; None: the run's.
            top_blocks: Blocks of its top; None: the run's.
            rank: Rank of its adapter; None: the run's.
            personal: Names of the tensors that it keeps to itself.

        Raises:
            JoinRefused: If the run does not allow it.
        """
        model = self._run.model
        bottom = model.bottom_blocks if bottom_blocks is None else bottom_blocks
        top = model.top_blocks if top_blocks is None else top_blocks
        rank = self._run.lora.rank if rank is None else rank
        self._run.check_rank(rank)
        has_own_cut = (bottom, top) != (model.bottom_blocks, model.top_blocks)
        if has_own_cut and self._run.privacy.denoise:
            raise JoinRefused(
                "This run takes noise away at one split point (privacy.denoise); leave [agent] bottom_blocks and "
                "top_blocks out."
            )
        blocks = self._trunk_of(bottom, top, has_own_cut=has_own_cut)
        beside = [shapes for block, shapes in self._blocks.items() if blocks is not None and block not in blocks]
        own = {name: _at_rank(name, shape, rank) for shapes in (self._ends, *beside) for name, shape in shapes.items()}
        if foreign := set(personal) - own.keys():
            raise JoinRefused(
                f"{min(foreign)[:200]!r} is no tensor of this agent's bottom or top; check its base model."
            )
        return Device(blocks, rank, own, frozenset(personal))

    def _trunk_of(self, bottom: int, top: int, *, has_own_cut: bool) -> range | None:
        if not self._blocks:
            if has_own_cut:
                raise JoinRefused("Every agent of this run is cut as the run is; leave [agent] bottom_blocks out.")
            return None
        n_blocks = max(self._blocks) + 1 + self._run.model.widest.top_blocks
        blocks = range(bottom, n_blocks - top)
        if not blocks:
            raise JoinRefused(
                f"A bottom of {bottom} and a top of {top} blocks do not fit this run, whose model has {n_blocks}: the "
                "trunk keeps one at least; hold fewer ([agent] bottom_blocks, top_blocks)."
            )
        if not set(blocks) <= self._blocks.keys():
            raise JoinRefused(
                f"A bottom of {bottom} and a top of {top} blocks do not fit this run, whose server runs blocks "
                f"{min(self._blocks)} to {max(self._blocks)} of {n_blocks}; hold others ([agent] bottom_blocks, "
                "top_blocks), or lower [model] least_bottom_blocks and least_top_blocks in the run."
            )
        return blocks


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Give the shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _at_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (rank, shape[1]) if name.endswith("lora_A.weight") else (shape[0], rank)
