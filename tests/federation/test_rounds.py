"""The state machine of rounds, with a clock that the tests hold."""

import pytest

from splitfed.federation import Phase, Rounds


def open_rounds(*clients: str, rounds: int = 2, timeout_s: float = 10) -> Rounds:
    machine = Rounds(agents=len(clients), rounds=rounds, timeout_s=timeout_s)
    for client in clients:
        machine.join(client, 1, now_s=0)
    return machine


def test_the_first_round_opens_with_the_last_agent() -> None:
    machine = Rounds(agents=2, rounds=1, timeout_s=10)
    machine.join("a", 1, now_s=0)
    assert machine.phase is Phase.WAITING
    machine.join("b", 1, now_s=1)
    assert machine.phase is Phase.OPEN
    assert machine.current == 1


def test_an_agent_that_joins_twice_is_counted_once() -> None:
    machine = Rounds(agents=2, rounds=1, timeout_s=10)
    machine.join("a", 1, now_s=0)
    machine.join("a", 1, now_s=1)
    assert machine.joined == 1
    assert machine.phase is Phase.WAITING


def test_a_run_that_has_its_agents_takes_no_other() -> None:
    machine = open_rounds("a")
    assert not machine.can_join("b")
    with pytest.raises(ValueError, match="has its 1 agents already"):
        machine.join("b", 1, now_s=0)


def test_a_round_is_over_when_every_member_has_submitted() -> None:
    machine = open_rounds("a", "b")
    assert machine.submit("a", 1, now_s=1)
    assert not machine.is_complete()
    with pytest.raises(ValueError, match="still waits"):
        machine.commit()
    assert machine.submit("b", 1, now_s=2)
    assert machine.is_complete()
    assert machine.commit() == 1
    assert machine.current == 2
    assert machine.submitted == []


def test_an_update_that_comes_twice_is_counted_once() -> None:
    machine = open_rounds("a", "b")
    assert machine.submit("a", 1, now_s=1)
    assert not machine.submit("a", 1, now_s=2)
    assert machine.submitted == ["a"]


def test_a_member_that_comes_back_while_the_round_is_written_takes_part_in_the_next_one() -> None:
    machine = open_rounds("a", "b")
    machine.submit("a", 1, now_s=5)
    machine.leave_out_silent(11)
    machine.close()
    machine.progress("b", 12)
    with pytest.raises(ValueError, match="Round 1 is closed; 'b' takes part in the next one"):
        machine.submit("b", 1, now_s=12)
    assert machine.commit() == 1
    machine.submit("a", 2, now_s=13)
    assert not machine.is_complete()
    machine.submit("b", 2, now_s=14)
    assert machine.is_complete()


def test_a_round_that_waits_for_someone_cannot_be_closed() -> None:
    machine = open_rounds("a", "b")
    machine.submit("a", 1, now_s=1)
    with pytest.raises(ValueError, match="still waits"):
        machine.close()


@pytest.mark.parametrize("round", [0, 2])
def test_an_update_of_another_round_is_refused(round: int) -> None:
    with pytest.raises(ValueError, match=f"Round {round} is not open"):
        open_rounds("a").submit("a", round, now_s=1)


def test_the_run_is_finished_after_its_last_round() -> None:
    machine = open_rounds("a", rounds=1)
    machine.submit("a", 1, now_s=1)
    machine.commit()
    assert machine.phase is Phase.FINISHED
    with pytest.raises(ValueError, match="is not open"):
        machine.submit("a", 2, now_s=2)


def test_a_silent_member_is_left_out_and_the_round_goes_on() -> None:
    machine = open_rounds("a", "b")
    machine.submit("a", 1, now_s=5)
    assert machine.leave_out_silent(10) == []
    assert machine.leave_out_silent(10.1) == ["b"]
    assert machine.leave_out_silent(11) == []
    assert machine.is_complete()


def test_progress_keeps_a_member_in() -> None:
    machine = open_rounds("a", "b")
    machine.submit("a", 1, now_s=5)
    machine.progress("b", 9)
    assert machine.leave_out_silent(15) == []
    assert not machine.is_complete()


def test_a_round_that_nobody_finishes_stays_open() -> None:
    machine = open_rounds("a", "b")
    assert machine.leave_out_silent(100) == ["a", "b"]
    assert not machine.is_complete()
    machine.join("a", 1, now_s=101)
    machine.submit("a", 1, now_s=102)
    assert machine.is_complete()


def test_a_member_that_was_left_out_is_waited_for_again_once_it_is_back() -> None:
    machine = open_rounds("a", "b")
    machine.leave_out_silent(100)
    machine.progress("a", 101)
    machine.progress("b", 101)
    machine.submit("a", 1, now_s=102)
    assert not machine.is_complete()


def test_a_restored_run_waits_for_its_members_to_come_back() -> None:
    machine = Rounds(agents=2, rounds=3, timeout_s=10, committed=1)
    machine.restore({"a": 5, "b": 7}, now_s=0)
    assert machine.phase is Phase.WAITING
    machine.join("b", 7, now_s=1)
    assert machine.phase is Phase.WAITING
    machine.join("a", 5, now_s=2)
    assert machine.phase is Phase.OPEN
    assert machine.current == 2
    assert [machine.weight(client) for client in machine.members] == [5, 7]


def test_a_restored_run_goes_on_without_a_member_that_stays_away() -> None:
    machine = Rounds(agents=2, rounds=3, timeout_s=10, committed=1)
    machine.restore({"a": 1, "b": 1}, now_s=0)
    machine.join("a", 1, now_s=8)
    machine.leave_out_silent(9)
    assert machine.phase is Phase.WAITING
    machine.leave_out_silent(10.5)
    assert machine.phase is Phase.OPEN
    machine.submit("a", 2, now_s=11)
    assert machine.is_complete()
