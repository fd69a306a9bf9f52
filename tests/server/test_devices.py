"""What each agent holds of the model, and what a run does not allow."""

import pytest

from splitfed.config import LoraSection, ModelSection, RunConfig, RunIdentity
from splitfed.errors import JoinRefused
from splitfed.server.devices import Device, Devices

BOTTOM_A, BOTTOM_B = "model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_B.weight"
TRUNK_B = "model.layers.1.q.lora_B.weight"
RUN = RunConfig(
    run=RunIdentity(name="small"),
    model=ModelSection(base="demo", bottom_blocks=2, top_blocks=1, least_bottom_blocks=1),
    lora=LoraSection(rank=4, least_rank=2),
)


@pytest.fixture
def devices() -> Devices:
    """Four blocks, the first and the last always an agent's; every agent trains a layer of its first block."""
    blocks = {block: {f"model.layers.{block}.q.lora_B.weight": (6, 4)} for block in (1, 2)}
    return Devices(RUN, {BOTTOM_A: (4, 6), BOTTOM_B: (6, 4)}, blocks)


def test_an_agent_that_says_nothing_holds_what_the_run_says(devices: Devices) -> None:
    device = devices["a"]
    assert (device.blocks, device.rank) == (range(2, 3), 4)
    assert device.own == {BOTTOM_A: (4, 6), BOTTOM_B: (6, 4), TRUNK_B: (6, 4)}


def test_an_adapter_of_another_rank_has_the_shapes_of_that_rank(devices: Devices) -> None:
    devices.put("a", devices.device(bottom_blocks=1, rank=2))
    assert devices["a"].own == {BOTTOM_A: (2, 6), BOTTOM_B: (6, 2)}


def test_what_one_agent_trains_and_does_not_keep_is_contested(devices: Devices) -> None:
    devices.put("a", devices.device(bottom_blocks=1, personal=[BOTTOM_A]))
    assert devices.contested == {BOTTOM_B}
    devices.put("b", devices.device())
    assert devices.contested == {BOTTOM_A, BOTTOM_B, TRUNK_B}


@pytest.mark.parametrize("rank", [1, 5])
def test_a_rank_that_the_run_does_not_have_is_refused(devices: Devices, rank: int) -> None:
    with pytest.raises(JoinRefused, match=rf"^\[agent\] rank is {rank}, but the run 'small' has ranks 2 to 4; set it"):
        devices.device(rank=rank)


def test_a_personal_tensor_that_is_no_agents_is_refused(devices: Devices) -> None:
    with pytest.raises(JoinRefused, match=f"{TRUNK_B!r} is no tensor of this agent's bottom or top"):
        devices.device(bottom_blocks=1, personal=[TRUNK_B])


def test_an_agent_that_leaves_the_trunk_no_block_hears_that_it_keeps_one(devices: Devices) -> None:
    said = r"^A bottom of 3 and a top of 1 blocks do not fit this run, whose model has 4: the trunk keeps one at "
    with pytest.raises(JoinRefused, match=said):
        devices.device(bottom_blocks=3)
    with pytest.raises(JoinRefused, match=r"do not fit this run, whose server runs blocks 1 to 2 of 4; hold others"):
        devices.device(bottom_blocks=0)


def test_an_agent_may_join_while_a_worker_looks_at_what_is_contested(devices: Devices) -> None:
    class Joining(Device):
        """A device that another one joins after while it is looked at."""

        @property
        def shared(self) -> dict[str, tuple[int, ...]]:
            devices.put("b", devices.device())
            return super().shared

    devices.put("a", Joining(None, 4, {BOTTOM_B: (6, 4)}))
    assert devices.contested == {BOTTOM_B}
    assert TRUNK_B in devices.contested
