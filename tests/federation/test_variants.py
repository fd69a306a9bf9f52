"""What a variant decides, how stale a step may be, and who goes from a round of joint steps."""

import pytest

from splitfed.federation.variants import ASYNC, PARALLEL, SFLV1, SFLV2, Staleness, variant_of
from tests.federation.machines import rounds_of


@pytest.mark.parametrize(
    ("variant", "averages_trunk", "shares_adapter", "takes_turns", "steps_jointly", "is_deterministic"),
    [
        (SFLV1, True, False, False, False, True),
        (SFLV2, False, False, True, False, True),
        (PARALLEL, False, True, False, True, True),
        (ASYNC, False, True, False, False, False),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_variant_decides_who_shares_what_and_when(
    variant, averages_trunk, shares_adapter, takes_turns, steps_jointly, is_deterministic
) -> None:
    assert variant_of(variant.name) is variant
    assert variant.averages_trunk == averages_trunk
    assert (variant.shares_adapter, variant.takes_turns) == (shares_adapter, takes_turns)
    assert (variant.steps_jointly, variant.is_deterministic) == (steps_jointly, is_deterministic)


def test_a_variant_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"no variant 'sfl'; choose among sflv1, sflv2, parallel, async\."):
        variant_of("sfl")


def test_a_step_counts_for_less_the_older_it_is() -> None:
    staleness = Staleness(most=9, clients=3, exponent=0.5)
    assert [staleness.rate(age) for age in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert Staleness(most=9, clients=3, exponent=0.0).rate(8) == 1.0


def test_the_oldest_may_always_step_and_others_only_while_there_is_room() -> None:
    staleness = Staleness(most=5, clients=3)
    assert staleness.allows(age_of_oldest_other=3, own_age=0)
    assert not staleness.allows(age_of_oldest_other=4, own_age=2)
    assert staleness.allows(age_of_oldest_other=4, own_age=3)  # it began with the oldest other


@pytest.mark.parametrize("clients", [1, 2, 7])
def test_a_bound_below_what_all_at_work_make_at_once_cannot_be_kept(clients: int) -> None:
    Staleness(most=clients - 1, clients=clients)
    with pytest.raises(ValueError, match=f"max_staleness is {clients - 2}, but {clients} clients at work"):
        Staleness(most=clients - 2, clients=clients)


# A place in joint steps that is lost


def test_a_round_goes_on_without_one_that_is_taken_out_and_takes_it_again_in_the_next() -> None:
    machine = rounds_of("abc")
    assert machine.take_out("b", now_s=1)
    assert machine.taken_out == ["b"]
    assert not machine.may_start("b")
    assert not machine.expects("b", 1)
    assert machine.working == ["a", "c"]
    with pytest.raises(ValueError, match="'b' has no part in round 1 now"):
        machine.submit("b", 1, now_s=2)
    for client in "ac":
        machine.submit(client, 1, now_s=2)
    assert machine.is_complete()
    machine.close()
    assert (machine.late, machine.dropped) == ([], [])
    machine.commit(now_s=3)
    assert machine.taken_out == []
    assert machine.working == ["a", "b", "c"]


def test_coming_back_gives_no_place_back_that_is_lost() -> None:
    machine = rounds_of("abc")
    machine.take_out("b", now_s=1)
    machine.leave("b", 2, for_good=False)
    machine.join("b", 1, now_s=3)
    machine.progress("b", 4, steps=0)
    assert not machine.may_start("b")


def test_a_round_begins_again_where_its_quorum_cannot_be_met_any_more() -> None:
    machine = rounds_of("abc", quorum=2)
    machine.submit("a", 1, now_s=1)
    assert machine.can_spare("b")
    assert machine.take_out("b", now_s=2)
    assert not machine.can_spare("c")
    assert not machine.take_out("c", now_s=3)
    assert (machine.current, machine.submitted, machine.taken_out) == (1, [], [])
    assert machine.working == ["a", "b", "c"]


@pytest.mark.parametrize("goes", ["leaves", "leaves for good", "falls silent"])
def test_a_round_begins_again_for_one_that_was_taken_out_when_the_last_one_in_it(goes: str) -> None:
    machine = rounds_of("ab", timeout_s=10)
    assert machine.take_out("b", now_s=1)
    assert not machine.begin_again_where_it_must(now_s=1)
    machine.progress("b", now_s=11)
    if goes == "falls silent":
        assert machine.leave_out_silent(11) == ["a"]
    else:
        machine.leave("a", 11, for_good=goes == "leaves for good")
    assert machine.begin_again_where_it_must(now_s=11)
    assert (machine.working, machine.taken_out, machine.absences.begun_again) == (["b"], [], 1)
    assert not machine.begin_again_where_it_must(now_s=12)


def test_a_round_does_not_begin_again_where_that_makes_no_quorum_or_none_is_lacking() -> None:
    machine = rounds_of("abc", quorum=2)
    assert machine.take_out("c", now_s=1)
    machine.leave("a", 2, for_good=False)
    machine.leave("c", 2, for_good=False)
    assert not machine.begin_again_where_it_must(now_s=2)
    machine.join("a", 1, now_s=3)
    machine.join("c", 1, now_s=3)
    for client in "ab":
        machine.submit(client, 1, now_s=4)
    machine.close()
    machine.leave("a", 5, for_good=False)
    assert not machine.begin_again_where_it_must(now_s=5)


def test_a_round_that_has_its_quorum_spares_whoever_is_still_at_work() -> None:
    machine = rounds_of("abc", quorum=2)
    for client in "ab":
        machine.submit(client, 1, now_s=1)
    assert machine.can_spare("c")
    assert machine.take_out("c", now_s=2)
    assert machine.is_complete()


def test_one_that_is_alone_begins_again_rather_than_end_a_round_without_anybody() -> None:
    machine = rounds_of("a")
    assert not machine.can_spare("a")
    assert not machine.take_out("a", now_s=1)
    assert machine.may_start("a")
