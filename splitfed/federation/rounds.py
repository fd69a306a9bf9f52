"""When a round opens, who is in it, and when it is over: a pure state machine, with the clock passed in."""

from dataclasses import dataclass, field
from enum import Enum

from splitfed.federation.absences import Absences
from splitfed.federation.late import LateUpdates
from splitfed.federation.members import Members, Place
from splitfed.federation.open_round import OpenRound, RoundPolicy
from splitfed.federation.pace import WatchedClock


class Phase(Enum):
    """Where a run stands."""

    WAITING = "waiting"
    OPEN = "open"
    FINISHED = "finished"


@dataclass
class Rounds:
    """The rounds of one run.

    The first round opens when the configured number of agents has joined, each further one when the one before is
    written; `RoundPolicy` says who is asked to take part. A round is over when every member that was asked and still
    makes progress has submitted, or enough have, but never below the quorum. A member that is silent for `timeout_s` is
    left out of the round and may come back in the next one. A member that leaves is not waited for at all, and an
    update that it submitted before counts; it may come back by joining again, unless it left for good. A member that is
    at work on a round that was closed without it is late: its update is dropped, or taken once in a later round. A
    member whose update is refused has no further part in the round. One that a round was closed without because it took
    too long is asked again once something was heard of it.

    Attributes:
        agents: Agents to wait for.
        rounds: Rounds in the run.
        timeout_s: Seconds without progress after which a member is left out.
        committed: Rounds that are over.
        population: Agents that may ever join; None: the agents that are waited for.
        policy: Who is asked, and when a round is over.

    Guarantees:
        * No round is over below its quorum.
        * An update is counted at most once, in the round that it was made in or, late, in one after it.
        * Who is asked as a round opens is a function of the seed, the round and who is here.
        * While at least half of those that were asked at once are at work, none of them is cut off.
    """

    agents: int
    rounds: int
    timeout_s: float
    committed: int = 0
    population: int | None = None
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    _round: OpenRound | None = None
    _late: LateUpdates = field(default_factory=LateUpdates)
    _absences: Absences = field(default_factory=Absences)
    _absences_at_close: Absences = field(default_factory=Absences)

    def __post_init__(self) -> None:
        self._members = Members(self.agents, self.population or self.agents)
        self._clock = WatchedClock(self.policy.longest_look_s)

    @property
    def phase(self) -> Phase:
        """Where the run stands."""
        if self.committed >= self.rounds:
            return Phase.FINISHED
        return Phase.WAITING if self._round is None else Phase.OPEN

    @property
    def current(self) -> int:
        """The round that is open, or will be next, from 1."""
        return self.committed + 1

    @property
    def members(self) -> list[str]:
        """Every agent that ever joined, in the order of names."""
        return self._members.names

    @property
    def joined(self) -> int:
        """Members that are here."""
        return len(self._members.here)

    @property
    def is_abandoned(self) -> bool:
        """So many agents left the run for good that no round can have its quorum any more."""
        if self.phase is Phase.FINISHED:
            return False
        submitted = set() if self._round is None else self._round.submitted
        room = self._members.population - len(self._members)
        return len(submitted | self._members.may_come) + room < self.policy.quorum

    @property
    def standing(self) -> str:
        """Where the run stands, for a sentence."""
        if self.phase is Phase.FINISHED:
            return f"the run is over, after {self.rounds} rounds"
        if self.phase is Phase.WAITING:
            return f"the run waits for agents before it opens round {self.current}"
        return f"the run is at round {self.current} ({self.phase.value})"

    def has_refused_too_many(self, now_s: float) -> bool:
        """Say whether the open round cannot have its quorum because updates were refused.

        Those that went are waited for as long as anyone that is silent, and no longer.
        """
        if self._round is None or not self._round.refused:
            return False
        could_count = self._round.could_still_count(self._members.expected(self._look(now_s), self.timeout_s))
        return len(could_count) < self.policy.quorum <= len(could_count | self._round.refused.keys())

    @property
    def selected(self) -> list[str]:
        """Members that were asked to take part in the open round, in the order of names."""
        return [] if self._round is None else sorted(self._round.asked)

    @property
    def present(self) -> set[str]:
        """Members that are here."""
        return set(self._members.here)

    @property
    def working(self) -> list[str]:
        """Members whose update the open round waits for and that may start, in the order of names."""
        return [] if self._round is None else sorted(self._round.at_work(self._free()))

    @property
    def submitted(self) -> list[str]:
        """Members whose update of the open round is here, in the order of names."""
        return [] if self._round is None else sorted(self._round.submitted)

    @property
    def merged(self) -> dict[str, int]:
        """Members whose late update is taken in the open round, and the round that it was made in."""
        return dict(sorted(self._late.merged.items()))

    @property
    def replaced(self) -> dict[str, str]:
        """Members that went from the open round, and who was asked in their stead."""
        return {} if self._round is None else dict(self._round.replaced)

    @property
    def taken_out(self) -> list[str]:
        """Members that the open round goes on without because they lost their place in it, in the order of names."""
        return [] if self._round is None else sorted(self._round.taken_out - self._round.submitted)

    @property
    def late(self) -> list[str]:
        """Members that are at work on the open round, which was closed without them, in the order of names."""
        return sorted(self._late.closed_without)

    @property
    def dropped(self) -> list[str]:
        """Members whose late update was given up in the open round, in the order of names."""
        return sorted(self._late.dropped)

    @property
    def refused(self) -> dict[str, str]:
        """Members whose update was refused in the open round, and why, in the order of names."""
        return dict(sorted({**self._late.refused, **(self._round.refused if self._round else {})}.items()))

    @property
    def absences(self) -> Absences:
        """Who went from the open round, up to its close, and how often it began again."""
        return self._absences_at_close if self._round is not None and self._round.is_closed else self._absences

    def weight(self, client: str) -> int:
        """Give a member's weight in every mean."""
        return self._members[client].weight

    def restore(self, weights: dict[str, int], now_s: float) -> None:
        """Take up the members of a run that goes on; they count as here once they join again."""
        self._members.restore(weights, self._look(now_s))

    def can_join(self, client: str) -> bool:
        """Say whether there is room for this agent, or it is a member already."""
        return self._members.can_join(client)

    def join(self, client: str, weight: int, now_s: float) -> None:
        """Take an agent in, or back in. The first round opens with the last agent that was waited for.

        Raises:
            ValueError: If the run has its agents already, or this one left for good.
        """
        watched_s = self._look(now_s)
        self._members.join(client, weight, watched_s)
        self._late.give_up(client)
        if self._round is not None and client in self._round.asked:
            self._round.asked[client].note(watched_s, steps=0)  # it runs the round from its beginning
        self._open_if_all_are_here()
        self._ask()

    def leave(self, client: str, now_s: float, *, for_good: bool) -> bool:
        """Note that a member goes of its own accord; that it leaves for good it cannot take back.

        An open round goes on without it. One that is yet to open waits for it like for a silent one, unless it left for
        good.

        Returns:
            False if that was known already.
        """
        if not self._members.leave(client, self._look(now_s), for_good=for_good):
            return False
        self._late.give_up(client)
        if self._round is not None:
            self._absences.left.add(client)
        self._open_if_all_are_here()
        self._ask()
        return True

    def has_left(self, client: str) -> bool:
        """Say whether a member left, for good or not, and has not joined again."""
        return self._members[client].has_left

    def has_left_for_good(self, client: str) -> bool:
        """Say whether an agent left for good."""
        return client in self._members and self._members[client].place is Place.LEFT_FOR_GOOD

    def progress(self, client: str, now_s: float, *, steps: int | None = None) -> None:
        """Note that a member is at work. What still comes from one that left changes nothing: it has to join again.

        Args:
            client: The member.
            now_s: What the clock says.
            steps: Local steps that it has made in the round so far, where one was just made; 0 if it starts afresh.
        """
        member, watched_s = self._members[client], self._look(now_s)
        if member.has_left:
            return
        member.last_progress_s, member.place = watched_s, Place.HERE
        if self._round is not None and client in self._round.asked:
            self._round.asked[client].note(watched_s, steps)
        self._ask()

    def may_start(self, client: str) -> bool:
        """Say whether a member that is here is asked to take part in the open round, and it is its turn."""
        return self._round is not None and self._round.may_start(client) and client in self._free()

    def lateness(self, client: str) -> int | None:
        """Give how many rounds behind the update is that a late member is still at work on; None: it is not late."""
        made_in = self._late.waited_for.get(client)
        return None if made_in is None else self.current - made_in

    def has_missed(self, client: str, round: int) -> bool:
        """Say whether a round was closed without this member while it was at work on it."""
        return self._late.has_missed(client, round)

    def has_submitted(self, client: str) -> bool:
        """Say whether this member's update of the open round is here."""
        return self._round is not None and client in self._round.submitted

    def is_done(self, client: str) -> bool:
        """Say whether this member has no more to do in the open round: its update is here, or was refused."""
        return self._round is not None and (client in self._round.submitted or client in self._round.refused)

    def is_counted(self, client: str, round: int) -> bool:
        """Say whether this member's update of a round, the open one or an earlier one, is in the open round already."""
        return self._late.merged.get(client) == round or (round == self.current and self.has_submitted(client))

    def expects(self, client: str, round: int) -> bool:
        """Say whether this member's update of a round would be taken now."""
        if round < self.current:
            return self._round is not None and self._late.waited_for.get(client) == round
        if self._round is None or self._round.is_closed or round != self.current:
            return False
        return self._round.may_start(client) and client not in self._round.submitted

    def submit(self, client: str, round: int, now_s: float) -> bool:
        """Note a member's update; a late one is taken in the open round, whose quorum it does not count for.

        Returns:
            False if it was here already: it must not be counted again.

        Raises:
            ValueError: If that round is not open, and the update not one that is still waited for; or if the member has
                no part in it.
        """
        if self.phase is Phase.OPEN and round < self.current and (is_new := self._late.take(client, round)) is not None:
            self.progress(client, now_s)
            return is_new
        if self.has_missed(client, round) and round < self.current:
            raise ValueError(f"Round {round} was closed without {client!r}, which was late; its update is dropped.")
        if self._round is None or round != self.current:
            raise ValueError(f"Round {round} is not open; {self.standing}.")
        self.progress(client, now_s)
        if client in self._round.submitted:
            return False
        self._round.submit(client, self._clock.now_s)
        self._ask()
        return True

    def refuse(self, client: str, round: int, why: str, now_s: float) -> None:
        """Go on without a member whose update is here and cannot be counted; it takes part in the next round.

        Args:
            client: The member.
            round: The round that the update was made in.
            why: A sentence that says what is wrong with it.
            now_s: What the clock says.

        Raises:
            ValueError: If its update of that round is not expected.
        """
        if not self.expects(client, round):
            raise ValueError(f"No update of {client!r} for round {round} is expected; {self.standing}.")
        self.progress(client, now_s)
        if round < self.current:
            self._late.refuse(client, why)
        elif self._round is not None:
            self._round.refuse(client, why, self._clock.now_s)
        self._ask()

    def leave_out_silent(self, now_s: float) -> list[str]:
        """Leave out the members at work that were silent for too long.

        Where too few are left to open a round at all, the silent ones are left out of the wait as well.

        Returns:
            Those that were left out by this call, in the order of names.
        """
        watched_s = self._look(now_s)
        if self.phase is Phase.FINISHED or len(self._members) < self.agents:
            return []
        if self._round is None:
            if self.joined >= self.policy.quorum and self._members.are_others_silent(watched_s, self.timeout_s):
                self._open()
            return []
        at_work = self._round.at_work(self._free()) | (self._late.waited_for.keys() & self._members.here)
        silent = sorted(c for c in at_work if watched_s - self._members[c].last_progress_s > self.timeout_s)
        for client in silent:
            self._members[client].place = Place.SILENT
            self._late.give_up(client)
        self._absences.silent.update(silent)
        self._ask()
        return silent

    def cut_off_stragglers(self, now_s: float) -> list[str]:
        """Wait no longer for members of the open round that take too long; they may still submit before it is closed.

        Returns:
            Those that were cut off by this call, in the order of names.
        """
        watched_s = self._look(now_s)
        if self._round is None:
            return []
        late = self._round.cut_off_stragglers(self._free(), watched_s)
        self._ask()
        return late

    def can_spare(self, client: str) -> bool:
        """Say whether the open round can have its quorum without a member's update."""
        return self._round is not None and self._round.can_spare(client, self._free())

    def take_out(self, client: str, now_s: float, *, is_silent: bool = False) -> bool:
        """Go on without a member that lost its place in the open round; it takes part in the next one.

        Args:
            client: The member.
            now_s: What the clock says.
            is_silent: The others wait for it: it is not asked for the next round either until it was heard of.

        Returns:
            False if the round cannot be over any more without it: then it has begun again, for everyone.
        """
        if self._round is None:
            return True
        goes_on = self._round.take_out(client, self._free())
        if is_silent:
            self._members[client].place = Place.SILENT
        if not goes_on:
            self._begin_again(self._round, now_s)
        return goes_on

    def begin_again_where_it_must(self, now_s: float) -> bool:
        """Begin the open round again where those left in it, who were enough, have gone since others were taken out.

        Returns:
            True if it has begun again, for everyone.
        """
        if self._round is None or not self._round.needs_those_taken_out(self._free()):
            return False
        self._begin_again(self._round, now_s)
        return True

    def is_complete(self) -> bool:
        """Say whether the open round has every update that it waits for, and its quorum."""
        return self._round is not None and self._round.is_complete(self._free())

    def close(self) -> None:
        """Take no more updates: whoever comes back while the round is being written takes part in the next one.

        Whoever is at work is late; a member that gave no sign of life at all in the round is silent. Neither is asked
        again before it is heard of, save one that is merely slower than as many as the round needs.

        Raises:
            ValueError: If it still waits for someone.
        """
        if self._round is None or not self.is_complete():
            raise ValueError(f"Round {self.current} still waits for updates.")
        if self._round.is_closed:
            return
        for client in self._round.close(self._free()):
            pace = self._round.asked[client]
            is_waited_for = self.policy.merges_late and pace.steps > 0
            if pace.has_moved:
                self._late.miss(client, self.current, is_waited_for=is_waited_for)
            else:
                self._absences.silent.add(client)
            if not pace.has_moved or (self._round.was_cut_off(client) and not is_waited_for):
                self._members[client].place = Place.SILENT
        self._absences_at_close, self._absences = self._absences, Absences()
        if self.current == self.rounds:
            self._late.give_up_all()

    def commit(self, now_s: float | None = None) -> int:
        """Open the next round, now that this one is written.

        Args:
            now_s: What the clock says; None: what it said last.

        Returns:
            The round that is over.

        Raises:
            ValueError: If it still waits for someone.
        """
        self.close()
        self.committed += 1
        self._late.begin_round()
        self._round = None
        if self.phase is not Phase.FINISHED:
            if now_s is not None:
                self._look(now_s)
            self._open()
        return self.committed

    def _open_if_all_are_here(self) -> None:
        """Open the first round once every agent is here, save those that left for good."""
        if self.phase is Phase.WAITING and self._members.are_all_here():
            self._open()

    def _begin_again(self, round: OpenRound, now_s: float) -> None:
        self._look(now_s)
        self._absences.begun_again += 1
        self._open(refused=round.refused)

    def _open(self, *, refused: dict[str, str] | None = None) -> None:
        self._round = OpenRound(self.current, self.policy, refused=refused or {})
        self._note_start(self._round.open(self._free(), self._clock.now_s))

    def _ask(self) -> None:
        if self._round is not None:
            self._note_start(self._round.ask(self._free(), self._clock.now_s))

    def _note_start(self, started: list[str]) -> None:
        """Wait for those that may start from now on, however long ago they were last heard of."""
        for client in started:
            self._members[client].last_progress_s = self._clock.now_s

    def _free(self) -> set[str]:
        """Give those that could take part in the open round: here, and done with an update of an earlier one."""
        return self._members.here - self._late.busy

    def _look(self, now_s: float) -> float:
        return self._clock.look(now_s)
