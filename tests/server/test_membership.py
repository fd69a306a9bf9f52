"""Which agent each name of a run belongs to."""

import pytest

from splitfed.errors import JoinRefused, RoundLost
from splitfed.federation import Rounds
from splitfed.server.membership import Membership

IDS = {name: name.encode() * 16 for name in "abc"}


class Book:
    """The membership of a run of two agents."""

    def __init__(self, **agent_ids: str) -> None:
        self.rounds = Rounds(2, rounds=1, timeout_s=10.0)
        self.rounds.restore(dict.fromkeys(agent_ids, 1), 0.0)
        self.membership = Membership("small", self.rounds, agent_ids)

    def join(self, *clients: str) -> None:
        for client in clients:
            self.membership.admit(client, IDS[client])
            self.rounds.join(client, 1, 0.0)


def test_a_name_belongs_to_the_agent_that_took_it() -> None:
    book = Book()
    book.join("a")
    with pytest.raises(JoinRefused, match=r"Another agent is called 'a'.*give this one back the file agent-id"):
        book.membership.admit("a", IDS["b"])
    book.join("a")
    assert book.membership.agent_ids == {"a": IDS["a"].hex()}


def test_a_name_that_a_certificate_proves_goes_to_a_device_that_lost_its_id() -> None:
    book = Book()
    book.join("a")
    book.membership.admit("a", IDS["b"], is_proven=True)
    book.membership.check("a", IDS["b"])
    with pytest.raises(JoinRefused):
        book.membership.check("a", IDS["a"])


def test_a_full_run_takes_no_other_agent_and_says_who_is_in_it() -> None:
    book = Book()
    book.join("a", "b")
    with pytest.raises(JoinRefused, match=r"all its agents already \(a, b\)"):
        book.join("c")
    with pytest.raises(RoundLost, match="'c' has not joined"):
        book.membership.check("c", IDS["c"])


def test_who_left_for_good_is_not_taken_in_again() -> None:
    book = Book()
    book.join("a", "b")
    book.rounds.leave("b", 0.0, for_good=True)
    with pytest.raises(JoinRefused, match=r"'b' left the run 'small' for good.*--resume"):
        book.join("b")


def test_a_call_under_anothers_name_is_refused() -> None:
    book = Book()
    book.join("a")
    book.membership.check("a", IDS["a"])
    with pytest.raises(JoinRefused, match="Another agent is called 'a'"):
        book.membership.check("a", IDS["b"])
    with pytest.raises(RoundLost, match="'b' has not joined"):
        book.membership.check("b", IDS["b"])


def test_names_of_a_run_that_goes_on_still_belong_to_their_agents() -> None:
    book = Book(a=IDS["a"].hex())
    with pytest.raises(JoinRefused, match="Another agent is called 'a'"):
        book.membership.admit("a", IDS["c"])
    book.join("a", "b")
    assert book.membership.agent_ids == {name: IDS[name].hex() for name in "ab"}
