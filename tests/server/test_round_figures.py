from collections import Counter

from splitfed.server.contribution import Contribution
from splitfed.server.round_figures import RoundFigures


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_bytes_and_seconds_add_up_by_member_whatever_an_update_says_of_them() -> None:
    figures = RoundFigures(Clock())
    figures.count_bytes("a", up=3)
    figures.count_bytes("a", up=4, down=5)
    figures.count_bytes("b", down=1)
    figures.count_seconds("a", 0.5)
    figures.count_update("a", Contribution(tokens=7, bytes_up=99))
    figures.count_seconds("a", 0.25)
    assert figures.contributions(["a"]) == {"a": Contribution(tokens=7, bytes_up=7, bytes_down=5, server_seconds=0.75)}


def test_a_round_counts_from_nothing_and_the_server_goes_on() -> None:
    figures = RoundFigures(clock := Clock())
    figures.count_bytes("a", up=3)
    clock.now_s = 130.0
    assert figures.seconds == 30.0
    figures.begin()
    figures.count_bytes("a", up=2)
    assert (figures.seconds, figures.contributions("a")) == (0.0, {"a": Contribution(bytes_up=2)})
    assert figures.wire_bytes == Counter({("a", "up"): 5})


def test_the_time_in_which_a_round_waits_for_agents_is_not_counted() -> None:
    figures = RoundFigures(clock := Clock())
    clock.now_s = 130.0
    figures.start_clock()
    clock.now_s = 131.0
    assert figures.seconds == 1.0


def test_what_happened_adds_up_by_members_or_by_times() -> None:
    figures = RoundFigures(Clock())
    figures.note({"late": ["a", "b"], "begun_again": 2})
    figures.note({"late": ["a"]})
    assert figures.happened == Counter({"late": 3, "begun_again": 2})
