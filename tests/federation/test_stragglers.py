"""Members that are too slow for a round: who is cut off, who is not, and what becomes of a late update."""

import pytest

from splitfed.federation import Rounds
from tests.federation.machines import finish_round, rounds_of

STEPS = 10


def racing(clients: str, margin: float = 3, **policy: object) -> Rounds:
    return rounds_of(clients, straggler_margin=margin, local_steps=STEPS, timeout_s=1e6, **policy)


def run_at(machine: Rounds, paces_s: dict[str, float], until_s: float, look_s: float = 0.5) -> dict[str, float]:
    """Let each member step at its pace and submit after its steps; gives who was cut off, and when."""
    cut_off = {}
    for look in range(1, int(until_s / look_s) + 1):
        now_s = look * look_s
        for client, pace_s in paces_s.items():
            steps = min(int(now_s / pace_s), STEPS)
            if machine.is_complete() or client in cut_off or machine.has_submitted(client):
                continue
            machine.progress(client, now_s, steps=steps)
            if steps == STEPS:
                machine.submit(client, 1, now_s)
        cut_off |= dict.fromkeys(machine.cut_off_stragglers(now_s), now_s)
    return cut_off


def test_a_straggler_is_cut_off_at_the_margin_times_the_median_time() -> None:
    machine = racing("abcd")
    assert run_at(machine, {"a": 1, "b": 1, "c": 1.2, "d": 20}, until_s=60) == {"d": 36.5}
    assert machine.is_complete()
    machine.commit()
    assert (machine.committed, machine.joined) == (1, 3)


def test_without_a_margin_nobody_is_cut_off() -> None:
    machine = rounds_of("abcd", local_steps=STEPS, timeout_s=1e6)
    assert run_at(machine, {"a": 1, "b": 1, "c": 1, "d": 20}, until_s=150) == {}
    assert not machine.is_complete()


def test_a_single_fast_member_cuts_nobody_off() -> None:
    machine = racing("abcd")
    assert run_at(machine, {"a": 0.05, "b": 5, "c": 6, "d": 7}, until_s=80) == {}
    assert machine.is_complete()


def test_two_members_wait_for_each_other() -> None:
    """With one against one nobody knows which of them is the odd one."""
    machine = racing("ab")
    assert run_at(machine, {"a": 1, "b": 50}, until_s=400) == {}


def test_nobody_is_cut_off_below_the_quorum() -> None:
    machine = racing("abcd", quorum=4)
    assert run_at(machine, {"a": 1, "b": 1, "c": 1, "d": 20}, until_s=100) == {}


def test_a_clock_that_jumps_cuts_nobody_off() -> None:
    machine = racing("abcd", longest_look_s=1)
    for now_s in range(1, 6):
        machine.progress("d", now_s)
    for client in "abc":
        machine.progress(client, 5, steps=STEPS)
        machine.submit(client, 1, now_s=5)
    machine.progress("d", 5, steps=4)
    assert machine.cut_off_stragglers(5) == []
    assert machine.cut_off_stragglers(86_405) == []
    machine.progress("d", 86_406, steps=7)
    assert machine.cut_off_stragglers(86_407) == []
    machine.submit("d", 1, now_s=86_408)
    assert machine.submitted == list("abcd")


def test_a_member_that_was_asked_late_has_its_own_time() -> None:
    machine = racing("abcdef", cohort=4, quorum=4)
    for client in machine.selected[:3]:
        machine.submit(client, 1, now_s=10)
    machine.leave(machine.selected[3], 100, for_good=False)
    (substitute,) = machine.replaced.values()
    machine.progress(substitute, 101, steps=1)
    assert machine.cut_off_stragglers(125) == []
    machine.submit(substitute, 1, now_s=125)
    assert machine.is_complete()


def test_in_turns_time_counts_from_the_turn_on_and_the_next_one_gets_it() -> None:
    machine = racing("abcd", takes_turns=True)
    order = []
    for now_s in (10, 20, 30):
        (client,) = [c for c in "abcd" if machine.may_start(c)]
        order.append(client)
        if now_s < 30:
            machine.submit(client, 1, now_s)
    assert machine.cut_off_stragglers(49) == []
    assert machine.cut_off_stragglers(51) == order[2:]
    with pytest.raises(ValueError, match="has no part in round 1 now"):
        machine.submit(order[2], 1, now_s=52)
    (last,) = [c for c in "abcd" if machine.may_start(c)]
    assert machine.cut_off_stragglers(80) == []
    machine.submit(last, 1, now_s=80)
    assert machine.is_complete()


def test_a_straggler_that_submits_before_the_round_is_closed_counts() -> None:
    machine = racing("abcd", quorum=3)
    for client in "abc":
        machine.submit(client, 1, now_s=1)
    assert machine.cut_off_stragglers(4) == ["d"]
    machine.submit("d", 1, now_s=4)
    machine.commit(4)
    assert machine.has_missed("d", 1) is False


def closed_without_d(**policy: object) -> Rounds:
    """A round that a, b and c have submitted, and that was closed while d was at work."""
    machine = racing("abcd", **policy)
    machine.progress("d", 0.5, steps=1)
    for client in "abc":
        machine.submit(client, 1, now_s=1)
    machine.cut_off_stragglers(4)
    machine.close()
    return machine


def test_a_late_update_is_dropped_with_a_sentence_of_its_own() -> None:
    machine = closed_without_d()
    assert (machine.late, machine.dropped) == (["d"], ["d"])
    machine.commit(5)
    assert machine.lateness("d") is None
    with pytest.raises(ValueError, match="Round 1 was closed without 'd', which was late; its update is dropped"):
        machine.submit("d", 1, now_s=6)
    with pytest.raises(ValueError, match=r"Round 1 is not open; the run is at round 2"):
        machine.submit("a", 1, now_s=6)
    machine.progress("d", 6)
    assert machine.may_start("d")
    assert (machine.late, machine.dropped) == ([], [])


def test_a_late_update_is_merged_once_in_the_round_that_it_comes_in() -> None:
    machine = closed_without_d(merges_late=True)
    assert (machine.late, machine.dropped) == (["d"], [])
    machine.commit(5)
    assert machine.lateness("d") == 1
    assert not machine.may_start("d")
    assert machine.selected == ["a", "b", "c"]
    assert machine.submit("d", 1, now_s=6)
    assert not machine.submit("d", 1, now_s=6)
    assert (machine.merged, machine.submitted, machine.lateness("d")) == ({"d": 1}, [], None)
    assert not machine.may_start("d")
    finish_round(machine, now_s=7)
    assert machine.may_start("d")
    with pytest.raises(ValueError, match="its update is dropped"):
        machine.submit("d", 1, now_s=8)


def test_one_that_has_made_no_step_has_no_update_to_wait_for_and_takes_part_in_the_next_round() -> None:
    machine = racing("abcd", merges_late=True)
    machine.progress("d", 0.5)
    for client in "abc":
        machine.submit(client, 1, now_s=1)
    machine.cut_off_stragglers(4)
    machine.close()
    assert (machine.late, machine.dropped) == (["d"], ["d"])
    machine.commit(5)
    machine.progress("d", 6)
    assert machine.may_start("d")


def test_a_late_update_counts_for_no_quorum() -> None:
    machine = closed_without_d(merges_late=True, quorum=2)
    machine.commit(5)
    machine.submit("d", 1, now_s=6)
    machine.submit("a", 2, now_s=6)
    assert not machine.is_complete()


def test_a_late_member_may_take_several_rounds() -> None:
    machine = closed_without_d(merges_late=True)
    machine.commit(5)
    finish_round(machine, now_s=6)
    assert machine.lateness("d") == 2
    assert machine.submit("d", 1, now_s=7)


@pytest.mark.parametrize("how", ["joins again", "leaves", "falls silent"])
def test_a_late_update_is_given_up_when_its_member(how: str) -> None:
    machine = closed_without_d(merges_late=True)
    machine.commit(5)
    if how == "joins again":
        machine.join("d", 1, now_s=6)
        assert machine.may_start("d")
    elif how == "leaves":
        machine.leave("d", 6, for_good=False)
    else:
        assert "d" in machine.leave_out_silent(2e6)
    assert (machine.lateness("d"), machine.dropped) == (None, ["d"])
    with pytest.raises(ValueError, match="its update is dropped"):
        machine.submit("d", 1, now_s=2e6)


def test_a_late_update_of_the_last_round_is_dropped() -> None:
    machine = racing("abcd", merges_late=True)
    machine.rounds = 1
    machine.progress("d", 0.5, steps=1)
    for client in "abc":
        machine.submit(client, 1, now_s=1)
    machine.cut_off_stragglers(4)
    machine.close()
    assert machine.dropped == ["d"]


def test_the_last_round_gives_up_what_is_late_since_an_earlier_one() -> None:
    machine = closed_without_d(merges_late=True)
    machine.rounds = 2
    machine.commit(5)
    for client in "abc":
        machine.submit(client, 2, now_s=6)
    machine.close()
    assert (machine.late, machine.dropped, machine.lateness("d")) == ([], ["d"], None)


def test_a_member_that_gave_no_sign_of_life_in_a_round_is_not_asked_again_until_it_does() -> None:
    machine = racing("abcd")
    for client in "abc":
        machine.submit(client, 1, now_s=1)
    assert machine.cut_off_stragglers(4) == ["d"]
    machine.commit(4)
    assert machine.selected == ["a", "b", "c"]
    machine.progress("d", 5)
    assert machine.may_start("d")


def test_a_member_that_was_cut_off_is_not_asked_again_before_it_is_heard_of() -> None:
    machine = closed_without_d()
    machine.commit(5)
    assert machine.selected == ["a", "b", "c"]
    for client in "abc":
        machine.submit(client, 2, now_s=6)
    assert machine.is_complete()
    machine.progress("d", 7)
    assert machine.may_start("d")
    assert not machine.is_complete()


def test_those_that_over_selection_leaves_over_are_asked_again_at_once() -> None:
    machine = racing("abc", cohort=2, over_selection=1)
    for client in machine.selected:
        machine.progress(client, 1, steps=3)
    for client in machine.selected[:2]:
        machine.submit(client, 1, now_s=2)
    machine.commit(2)
    assert machine.selected == ["a", "b", "c"]


def test_a_member_that_keeps_others_waiting_is_not_asked_for_the_next_round_before_it_is_heard_of() -> None:
    machine = rounds_of("abc")
    assert machine.take_out("c", 1, is_silent=True)
    for client in "ab":
        machine.submit(client, 1, now_s=2)
    machine.commit(2)
    assert machine.selected == ["a", "b"]
    machine.progress("c", 3)
    assert machine.may_start("c")


def test_who_went_is_told_of_the_round_that_it_went_from() -> None:
    machine = racing("abcdef")
    for client in "abc":
        machine.submit(client, 1, now_s=1)
    machine.leave("e", 2, for_good=False)
    machine.leave("f", 2, for_good=True)
    machine.progress("d", 0, steps=1)
    assert machine.leave_out_silent(2e6) == ["d"]
    machine.close()
    machine.leave("c", 2e6, for_good=False)  # while the round is written
    assert (machine.absences.left, machine.absences.silent) == ({"e", "f"}, {"d"})
    machine.commit(2e6)
    assert (machine.absences.left, machine.absences.silent) == ({"c"}, set())


def test_one_that_is_cut_off_and_gave_no_sign_of_life_is_silent() -> None:
    machine = racing("abcd")
    for client in "abc":
        machine.submit(client, 1, now_s=1)
    machine.cut_off_stragglers(4)
    machine.close()
    assert (machine.absences.silent, machine.late) == ({"d"}, [])


def test_those_that_over_selection_leaves_over_are_late_as_well() -> None:
    machine = racing("abcd", cohort=2, over_selection=1, merges_late=True)
    first, second, third = machine.selected
    machine.progress(third, 1, steps=3)
    machine.submit(first, 1, now_s=2)
    machine.submit(second, 1, now_s=2)
    machine.commit(2)
    assert machine.lateness(third) == 1
