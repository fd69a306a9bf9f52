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
    with pytest.raises(ValueError, match=r"has all its agents \(1\); 'b' is not one of them"):
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


def test_a_round_does_not_wait_for_a_member_that_left() -> None:
    machine = open_rounds("a", "b")
    machine.submit("a", 1, now_s=1)
    assert machine.leave("b", 2, for_good=False)
    assert machine.is_complete()
    assert (machine.joined, machine.members) == (1, ["a", "b"])
    assert machine.commit() == 1
    assert machine.submit("a", 2, now_s=3)
    assert machine.is_complete()


def test_an_update_that_was_submitted_counts_although_its_member_left() -> None:
    machine = open_rounds("a", "b")
    machine.submit("a", 1, now_s=1)
    machine.leave("a", 2, for_good=True)
    assert not machine.is_complete()
    machine.submit("b", 1, now_s=3)
    assert machine.is_complete()
    assert machine.submitted == ["a", "b"]


def test_leaving_twice_is_leaving_once_and_for_good_cannot_be_taken_back() -> None:
    machine = open_rounds("a", "b")
    assert machine.leave("a", 1, for_good=False)
    assert not machine.leave("a", 2, for_good=False)
    assert machine.leave("a", 3, for_good=True)
    assert not machine.leave("a", 4, for_good=True)
    assert not machine.leave("a", 5, for_good=False)
    assert machine.has_left_for_good("a")


def test_a_member_that_left_comes_back_by_joining_and_is_waited_for_again() -> None:
    machine = open_rounds("a", "b")
    machine.leave("a", 1, for_good=False)
    assert machine.has_left("a")
    machine.join("a", 1, now_s=2)
    assert not machine.has_left("a")
    machine.submit("b", 1, now_s=3)
    assert not machine.is_complete()
    machine.submit("a", 1, now_s=4)
    assert machine.is_complete()


def test_a_member_that_left_for_good_cannot_come_back() -> None:
    machine = open_rounds("a", "b")
    assert not machine.has_left_for_good("a")
    machine.leave("a", 1, for_good=True)
    with pytest.raises(ValueError, match="'a' left the run for good"):
        machine.join("a", 1, now_s=2)
    assert machine.joined == 1


@pytest.mark.parametrize("for_good", [False, True])
def test_what_was_still_on_its_way_brings_no_member_back_that_left(for_good: bool) -> None:
    machine = open_rounds("a", "b")
    machine.leave("a", 1, for_good=for_good)
    machine.progress("a", 2)
    assert machine.joined == 1
    assert machine.leave_out_silent(3) == []
    machine.submit("b", 1, now_s=3)
    assert machine.is_complete()


def test_a_round_that_every_member_leaves_waits_for_one_to_come_back() -> None:
    machine = open_rounds("a", "b")
    machine.leave("a", 1, for_good=False)
    machine.leave("b", 1, for_good=True)
    assert machine.leave_out_silent(100) == []
    assert (machine.phase, machine.joined) == (Phase.OPEN, 0)
    assert not machine.is_complete()
    assert not machine.is_abandoned
    machine.join("a", 1, now_s=101)
    machine.submit("a", 1, now_s=102)
    assert machine.is_complete()


def test_a_run_that_every_agent_left_for_good_is_abandoned() -> None:
    machine = open_rounds("a", "b")
    machine.leave("a", 1, for_good=True)
    assert not machine.is_abandoned
    machine.leave("b", 2, for_good=True)
    assert machine.is_abandoned


def test_a_run_is_not_abandoned_before_the_last_update_is_written() -> None:
    machine = open_rounds("a", "b")
    machine.submit("a", 1, now_s=1)
    machine.leave("a", 2, for_good=True)
    machine.leave("b", 2, for_good=True)
    assert not machine.is_abandoned
    assert machine.commit() == 1
    assert machine.is_abandoned


def test_a_run_that_is_over_is_not_abandoned() -> None:
    machine = open_rounds("a", rounds=1)
    machine.submit("a", 1, now_s=1)
    machine.commit()
    machine.leave("a", 2, for_good=True)
    assert machine.phase is Phase.FINISHED
    assert not machine.is_abandoned


def test_a_run_with_room_for_another_agent_is_not_abandoned() -> None:
    machine = Rounds(agents=2, rounds=1, timeout_s=10)
    machine.join("a", 1, now_s=0)
    machine.leave("a", 1, for_good=True)
    assert not machine.is_abandoned
    machine.join("b", 1, now_s=2)
    assert (machine.phase, machine.joined) == (Phase.OPEN, 1)


def test_the_first_round_does_not_wait_for_a_member_that_left_for_good() -> None:
    machine = Rounds(agents=2, rounds=3, timeout_s=10, committed=1)
    machine.restore({"a": 1, "b": 1}, now_s=0)
    machine.join("a", 1, now_s=1)
    assert machine.phase is Phase.WAITING
    machine.leave("b", 2, for_good=True)
    assert machine.phase is Phase.OPEN


def test_the_first_round_waits_for_a_member_that_left_as_for_one_that_is_silent() -> None:
    machine = Rounds(agents=2, rounds=1, timeout_s=10)
    machine.join("a", 1, now_s=0)
    machine.leave("a", 1, for_good=False)
    machine.join("b", 1, now_s=2)
    machine.leave_out_silent(11)
    assert machine.phase is Phase.WAITING
    machine.leave_out_silent(11.5)
    assert machine.phase is Phase.OPEN
    assert machine.joined == 1


def test_a_restored_run_waits_for_the_silent_and_not_for_the_one_that_left_for_good() -> None:
    machine = Rounds(agents=3, rounds=3, timeout_s=10, committed=1)
    machine.restore({"a": 1, "b": 1, "c": 1}, now_s=0)
    machine.join("a", 1, now_s=9)
    machine.leave("b", 9, for_good=True)
    machine.leave_out_silent(10)
    assert machine.phase is Phase.WAITING
    machine.leave_out_silent(10.5)
    assert machine.phase is Phase.OPEN
