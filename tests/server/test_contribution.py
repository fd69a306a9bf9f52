"""What was out of the ordinary in a round, for a machine and for a person."""

from splitfed.server.contribution import happenings, here, in_words
from tests.federation.machines import rounds_of


def test_who_went_and_why_is_told_by_name_and_nothing_else_is() -> None:
    machine = rounds_of("abcdef", straggler_margin=3, local_steps=4)
    machine.leave("f", 0, for_good=False)
    machine.refuse("e", 1, "It is too long.", now_s=1)
    machine.progress("d", 1, steps=1)
    for client in "ab":
        machine.submit(client, 1, now_s=1)
    machine.leave("b", 1, for_good=True)
    machine.submit("c", 1, now_s=1)
    machine.cut_off_stragglers(9)
    machine.close()
    happened = happenings(machine, refused=machine.refused, left_out=["c"])
    assert happened == {
        "left": ["b", "f"],
        "late": ["d"],
        "dropped": ["d"],
        "refused": {"e": "It is too long."},
        "left_out": ["c"],
    }
    assert in_words(happened) == (
        "left: b, f; closed while at work: d; late and dropped: d; refused: e; left out by the rule: c"
    )


def test_a_round_in_which_nothing_happened_says_nothing() -> None:
    machine = rounds_of("a")
    machine.submit("a", 1, now_s=1)
    machine.close()
    assert happenings(machine, refused={}, left_out=[]) == {}


def test_pairs_and_counts_are_written_out() -> None:
    happened = {"replaced": {"a": "c"}, "begun_again": 2, "merged": {"d": 3}}
    assert in_words(happened) == (
        "asked in place of one that went or was refused: c for a; begun again: 2 times; late and taken: d (of round 3)"
    )
    assert in_words({"begun_again": 1, "silent": ["b"]}) == "begun again: once; nothing was heard of b"


def test_more_agents_than_were_waited_for_are_not_counted_against_these() -> None:
    assert (here(2, 3), here(3, 3), here(4, 3)) == ("2 of 3 here", "3 of 3 here", "4 here")
