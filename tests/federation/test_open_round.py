"""Who is asked to take part in a round, who in whose stead, in which order, and when it is over."""

import pytest

from splitfed.federation import Phase, RoundPolicy, Rounds
from splitfed.federation.cohort import ranked
from tests.federation.machines import finish_round, rounds_of


def order(clients: str, round: int = 1, seed: int = 0) -> list[str]:
    return ranked(clients, seed=seed, round=round)


def test_without_a_cohort_everyone_is_asked() -> None:
    machine = rounds_of("abc")
    assert machine.selected == ["a", "b", "c"]
    assert all(machine.may_start(client) for client in "abc")


def test_a_cohort_is_the_first_of_the_round_s_ranking() -> None:
    machine = rounds_of("abcdef", cohort=2, seed=5)
    for round in (1, 2, 3):
        first = order("abcdef", round, seed=5)[:2]
        assert machine.selected == sorted(first)
        assert [client for client in "abcdef" if machine.may_start(client)] == sorted(first)
        assert sorted(finish_round(machine, now_s=round)) == sorted(first)


def test_a_cohort_is_drawn_from_those_that_are_here() -> None:
    machine = rounds_of("abcdef", cohort=2)
    gone = order("abcdef", round=2)[0]
    machine.leave(gone, 1, for_good=False)
    finish_round(machine, now_s=2)
    assert machine.selected == sorted(order("abcdef", round=2)[1:3])


def test_a_member_that_was_not_asked_cannot_submit() -> None:
    machine = rounds_of("abc", cohort=1)
    last = order("abc")[-1]
    with pytest.raises(ValueError, match=f"'{last}' has no part in round 1"):
        machine.submit(last, 1, now_s=1)
    assert machine.submitted == []


def test_a_round_does_not_wait_for_those_that_were_not_asked() -> None:
    machine = rounds_of("abcd", cohort=2, timeout_s=10)
    for client in machine.selected:
        machine.progress(client, 9)
    assert machine.leave_out_silent(15) == []
    assert machine.joined == 4
    first, second = machine.selected
    machine.submit(first, 1, now_s=15)
    assert not machine.is_complete()
    machine.submit(second, 1, now_s=16)
    assert machine.is_complete()


def test_a_member_that_comes_during_the_round_waits_for_the_next_one() -> None:
    machine = rounds_of("abc", cohort=3)
    machine.join("d", 1, now_s=1)
    assert machine.selected == ["a", "b", "c"]
    assert not machine.may_start("d")
    finish_round(machine, now_s=2)
    assert machine.selected == sorted(order("abcd", round=2)[:3])


def test_without_a_cohort_a_member_that_comes_during_the_round_takes_part_at_once() -> None:
    machine = rounds_of("ab")
    machine.submit("a", 1, now_s=1)
    machine.join("c", 1, now_s=2)
    assert machine.may_start("c")
    machine.submit("b", 1, now_s=3)
    assert not machine.is_complete()
    machine.submit("c", 1, now_s=4)
    assert machine.is_complete()


def test_a_run_of_more_agents_than_it_waits_for_opens_early_and_takes_the_others_later() -> None:
    machine = Rounds(2, 3, 10, population=3)
    machine.join("a", 1, now_s=0)
    assert machine.phase is Phase.WAITING
    machine.join("b", 1, now_s=0)
    assert machine.phase is Phase.OPEN
    machine.join("c", 1, now_s=1)
    with pytest.raises(ValueError, match=r"all its agents \(3\); 'd'"):
        machine.join("d", 1, now_s=1)


def test_a_restarted_run_waits_for_all_that_it_had_and_asks_the_same_again() -> None:
    before = rounds_of("abcdef", agents=2, cohort=2)
    finish_round(before, now_s=1)
    after = Rounds(2, 9, 100, committed=1, population=8, policy=RoundPolicy(cohort=2))
    after.restore(dict.fromkeys("abcdef", 1), now_s=0)
    for client in "fedcb":
        after.join(client, 1, now_s=1)
        assert after.phase is Phase.WAITING
    after.join("a", 1, now_s=1)
    assert after.selected == before.selected


def test_over_selection_asks_more_and_is_over_with_a_cohort_of_updates() -> None:
    machine = rounds_of("abcdef", cohort=2, over_selection=1)
    asked = order("abcdef")[:3]
    assert machine.selected == sorted(asked)
    machine.submit(asked[2], 1, now_s=1)
    assert not machine.is_complete()
    machine.submit(asked[0], 1, now_s=2)
    assert machine.is_complete()
    machine.close()
    with pytest.raises(ValueError, match="Round 1 is closed"):
        machine.submit(asked[1], 1, now_s=3)


def test_no_round_is_over_below_its_quorum() -> None:
    machine = rounds_of("abc", quorum=2, timeout_s=10)
    machine.submit("a", 1, now_s=1)
    machine.leave("b", 2, for_good=False)
    machine.progress("c", 5)
    assert machine.leave_out_silent(16) == ["c"]
    assert not machine.is_complete()
    machine.join("b", 1, now_s=20)
    machine.submit("b", 1, now_s=21)
    assert machine.is_complete()


@pytest.mark.parametrize("goes", ["left", "left for good", "silent"])
def test_a_member_that_goes_is_replaced_by_the_next_in_the_ranking_where_the_quorum_needs_it(goes: str) -> None:
    machine = rounds_of("abcde", cohort=2, quorum=2, timeout_s=10)
    first, second, third, *_ = order("abcde")
    machine.submit(first, 1, now_s=1)
    if goes == "silent":
        assert machine.leave_out_silent(11) == [second]
    else:
        machine.leave(second, 2, for_good=goes == "left for good")
    assert machine.may_start(third)
    assert machine.replaced == {second: third}
    machine.submit(third, 1, now_s=12)
    assert machine.is_complete()


def test_a_member_that_goes_is_not_replaced_while_the_quorum_can_be_met_without_it() -> None:
    machine = rounds_of("abcde", cohort=3, quorum=2)
    asked = order("abcde")[:3]
    machine.leave(asked[0], 1, for_good=False)
    assert machine.selected == sorted(asked)
    machine.leave(asked[1], 1, for_good=False)
    assert machine.replaced == {asked[0]: order("abcde")[3]}


def test_one_that_was_replaced_and_comes_back_takes_part_again() -> None:
    machine = rounds_of("abc", cohort=1)
    first, second, _ = order("abc")
    machine.leave(first, 1, for_good=False)
    machine.join(first, 1, now_s=2)
    assert machine.may_start(first)
    assert machine.may_start(second)
    machine.submit(first, 1, now_s=3)
    assert machine.is_complete()


def test_a_round_that_nobody_is_left_for_asks_the_first_that_comes() -> None:
    machine = rounds_of("ab", cohort=1)
    for client in "ab":
        machine.leave(client, 1, for_good=False)
    late = order("ab")[1]
    machine.join(late, 1, now_s=2)
    assert machine.may_start(late)


def test_a_run_that_too_few_are_left_in_for_its_quorum_is_abandoned() -> None:
    machine = Rounds(3, 2, 10, policy=RoundPolicy(quorum=2))
    for client in "abc":
        machine.join(client, 1, now_s=0)
    machine.submit("a", 1, now_s=1)
    machine.leave("a", 2, for_good=True)
    machine.leave("b", 3, for_good=True)
    assert not machine.is_abandoned
    machine.submit("c", 1, now_s=4)
    machine.commit()
    assert machine.is_abandoned


def test_turns_are_taken_in_the_order_of_the_ranking() -> None:
    machine = rounds_of("abcd", takes_turns=True)
    for round in (1, 2):
        assert [client for client in "abcd" if machine.may_start(client)] == order("abcd", round)[:1]
        assert finish_round(machine, now_s=round) == order("abcd", round)


def test_nobody_submits_before_its_turn() -> None:
    machine = rounds_of("ab", takes_turns=True)
    last = order("ab")[1]
    with pytest.raises(ValueError, match=f"'{last}' has no part in round 1 now"):
        machine.submit(last, 1, now_s=1)


def test_the_turn_goes_on_when_its_holder_goes_and_comes_back_to_it_later() -> None:
    machine = rounds_of("abc", takes_turns=True)
    first, second, third = order("abc")
    machine.leave(first, 1, for_good=False)
    assert machine.may_start(second)
    machine.join(first, 1, now_s=2)
    assert machine.may_start(second)
    assert not machine.may_start(first)
    machine.submit(second, 1, now_s=3)
    assert machine.may_start(first)
    machine.submit(first, 1, now_s=4)
    assert machine.may_start(third)


def test_who_waits_for_its_turn_is_not_taken_for_silent_and_gets_all_the_time_from_then_on() -> None:
    machine = rounds_of("abc", takes_turns=True, timeout_s=10)
    first, second, _ = order("abc")
    machine.progress(first, 9)
    machine.progress(first, 18)
    assert machine.leave_out_silent(19) == []
    machine.submit(first, 1, now_s=20)
    assert machine.leave_out_silent(30) == []
    assert machine.leave_out_silent(30.5) == [second]


def test_after_a_long_round_the_next_one_waits_for_its_members_from_its_opening_on() -> None:
    machine = rounds_of("ab", timeout_s=10)
    machine.submit("a", 1, now_s=1)
    for now_s in (9, 18, 27):
        machine.progress("b", now_s)
    machine.submit("b", 1, now_s=30)
    machine.commit(31)
    assert machine.leave_out_silent(41) == []
    assert machine.leave_out_silent(41.5) == ["a", "b"]


def test_a_run_that_is_over_opens_no_round_for_whoever_joins() -> None:
    machine = rounds_of("ab", rounds=1)
    finish_round(machine, now_s=1)
    machine.join("a", 1, now_s=2)
    assert machine.leave_out_silent(1000) == []
    assert (machine.phase, machine.selected, machine.may_start("a")) == (Phase.FINISHED, [], False)
    with pytest.raises(ValueError, match="Round 2 is not open"):
        machine.submit("a", 2, now_s=3)
