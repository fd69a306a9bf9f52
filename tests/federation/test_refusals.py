"""Members whose update is refused: their part in the round is over, and the round goes on without them."""

import pytest

from splitfed.federation import Phase
from splitfed.federation.cohort import ranked
from tests.federation.machines import finish_round, rounds_of

LONG = "The change has an L2 norm of 2, above refuse_norm = 1."


def test_a_round_goes_on_without_a_refused_update_and_its_member_takes_part_in_the_next_one() -> None:
    machine = rounds_of("abc")
    machine.refuse("a", 1, LONG, now_s=1)
    assert machine.refused == {"a": LONG}
    assert not machine.may_start("a")
    assert machine.is_done("a")
    finish_round(machine, now_s=2)
    assert machine.selected == ["a", "b", "c"]
    assert machine.may_start("a")
    assert machine.refused == {}


def test_a_refused_update_counts_for_no_quorum() -> None:
    machine = rounds_of("abc", quorum=2)
    machine.submit("a", 1, now_s=1)
    machine.refuse("b", 1, LONG, now_s=1)
    assert not machine.is_complete()
    machine.submit("c", 1, now_s=2)
    assert machine.is_complete()


def test_a_member_cannot_take_back_that_its_update_was_refused() -> None:
    machine = rounds_of("ab")
    machine.refuse("a", 1, LONG, now_s=1)
    machine.join("a", 1, now_s=2)
    assert not machine.may_start("a")
    with pytest.raises(ValueError, match="'a' has no part in round 1 now"):
        machine.submit("a", 1, now_s=3)
    with pytest.raises(ValueError, match="No update of 'a' for round 1 is expected; the run is at round 1"):
        machine.refuse("a", 1, LONG, now_s=3)


def test_a_refused_update_gives_the_turn_on() -> None:
    machine = rounds_of("abc", takes_turns=True)
    first, second, third = ranked("abc", seed=0, round=1)
    machine.refuse(first, 1, LONG, now_s=1)
    assert machine.may_start(second)
    assert finish_round(machine, now_s=2) == [second, third]


def test_one_that_was_refused_is_replaced_where_the_quorum_needs_it() -> None:
    machine = rounds_of("abcd", cohort=2, quorum=2)
    first, second, third, _ = ranked("abcd", seed=0, round=1)
    machine.refuse(first, 1, LONG, now_s=1)
    assert machine.replaced == {first: third}
    machine.submit(second, 1, now_s=2)
    machine.submit(third, 1, now_s=2)
    assert machine.is_complete()


def test_a_late_update_that_is_refused_is_waited_for_no_longer_and_its_member_is_asked_again() -> None:
    machine = rounds_of("abcd", straggler_margin=3, merges_late=True, local_steps=2)
    machine.progress("d", 0.5, steps=1)
    for client in "abc":
        machine.submit(client, 1, now_s=1)
    machine.cut_off_stragglers(4)
    machine.commit(4)
    assert not machine.may_start("d")
    machine.refuse("d", 1, LONG, now_s=5)
    assert (machine.refused, machine.merged, machine.lateness("d")) == ({"d": LONG}, {}, None)
    assert machine.may_start("d")


def test_too_many_are_refused_when_the_rest_cannot_make_the_quorum() -> None:
    machine = rounds_of("abc", quorum=2)
    machine.refuse("a", 1, LONG, now_s=1)
    assert not machine.has_refused_too_many(1)
    machine.refuse("b", 1, LONG, now_s=1)
    assert machine.has_refused_too_many(1)
    assert machine.phase is Phase.OPEN


def test_one_that_went_may_still_make_the_quorum_but_is_not_waited_for_for_ever() -> None:
    machine = rounds_of("ab", timeout_s=10)
    machine.leave("b", 1, for_good=False)
    machine.refuse("a", 1, LONG, now_s=2)
    assert not machine.has_refused_too_many(11)
    assert machine.has_refused_too_many(11.5)


def test_a_quorum_that_lacks_more_than_the_refused_is_waited_for() -> None:
    machine = rounds_of("abc", quorum=3, timeout_s=10)
    machine.leave("c", 1, for_good=False)
    machine.refuse("a", 1, LONG, now_s=2)
    machine.submit("b", 1, now_s=2)
    assert not machine.has_refused_too_many(100)
    machine.join("c", 1, now_s=101)
    assert machine.has_refused_too_many(101)


def test_one_that_lost_its_place_can_make_the_quorum_when_the_round_begins_again() -> None:
    machine = rounds_of("abc", quorum=2)
    assert machine.take_out("a", 1)
    machine.refuse("b", 1, LONG, now_s=2)
    assert not machine.has_refused_too_many(2)
    assert machine.begin_again_where_it_must(2)
    assert machine.working == ["a", "c"]


def test_too_many_are_refused_where_beginning_again_would_make_no_quorum_either() -> None:
    machine = rounds_of("abcde", quorum=4)
    assert machine.take_out("a", 1)
    machine.refuse("b", 1, LONG, now_s=2)
    assert not machine.has_refused_too_many(2)
    machine.leave("c", 3, for_good=True)
    for client in "de":
        machine.submit(client, 1, now_s=4)
    assert not machine.begin_again_where_it_must(4)
    assert machine.has_refused_too_many(4)


def test_in_a_round_that_begins_again_there_is_no_second_try() -> None:
    machine = rounds_of("ab")
    machine.refuse("a", 1, LONG, now_s=1)
    assert not machine.take_out("b", 2)
    assert (machine.refused, machine.absences.begun_again) == ({"a": LONG}, 1)
    assert machine.working == ["b"]
    assert finish_round(machine, now_s=3) == ["b"]
    assert machine.absences.begun_again == 0
    assert machine.working == ["a", "b"]
