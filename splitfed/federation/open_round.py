"""One round, from its opening to its close: who is asked, whose turn it is, what it waits for."""

import math
from dataclasses import dataclass, field

from splitfed.federation.cohort import ranked
from splitfed.federation.pace import Pace, deadline_s


@dataclass(frozen=True)
class RoundPolicy:
    """Who is asked to take part in a round, and when it is over.

    Attributes:
        cohort: Updates that a round needs; None: those of everyone who is here.
        over_selection: Members that are asked beyond the cohort.
        quorum: Updates below which no round is over.
        straggler_margin: How many times the median duration a round waits; None: as long as there is progress.
        merges_late: A late update is taken in a later round; otherwise it is dropped.
        takes_turns: One member after the other, in the order of the ranking.
        local_steps: Local steps of a round.
        seed: The run's seed.
        longest_look_s: Seconds between two looks at the clock at most; in a longer gap the clock jumped.
    """

    cohort: int | None = None
    over_selection: int = 0
    quorum: int = 1
    straggler_margin: float | None = None
    merges_late: bool = False
    takes_turns: bool = False
    local_steps: int = 1
    seed: int = 0
    longest_look_s: float = math.inf


@dataclass
class OpenRound:
    """A round that is open.

    Without a cohort everyone who is here is asked, whenever in the round they come. With one, the first of the ranking
    are asked as it opens, and others only where the quorum cannot be met any more without them. Nobody is asked once it
    is closed. All times are a `WatchedClock`'s; `here` is who could take part at the time of the call.

    Attributes:
        number: Which round it is, from 1.
        policy: Who is asked, and when it is over.
        asked: Who was asked to take part, with its pace.
        submitted: Whose update is here.
        refused: Whose update was refused, and why: their part in this round is over, even if it begins again.
        replaced: Who was asked because whom had gone.
        is_closed: It takes no more updates.
    """

    number: int
    policy: RoundPolicy
    asked: dict[str, Pace] = field(default_factory=dict)
    submitted: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    is_closed: bool = False
    _cut_off: set[str] = field(default_factory=set)
    _out: set[str] = field(default_factory=set)
    _turn: str | None = None

    def open(self, here: set[str], now_s: float) -> list[str]:
        """Ask the first of the ranking; gives those that may start."""
        if self.policy.cohort is not None:
            first = ranked(here, seed=self.policy.seed, round=self.number)
            for client in first[: self.policy.cohort + self.policy.over_selection]:
                self.asked[client] = Pace()
        return self.ask(here, now_s)

    def ask(self, here: set[str], now_s: float) -> list[str]:
        """Ask whoever has to be asked by now; gives those that may start from this call on."""
        if self.is_closed:
            return []
        while (client := self._next_needed(here)) is not None:
            self._replace_by(client, here)
            self.asked[client] = Pace()
        if self.policy.takes_turns:
            started = self._next_turn(here)
        else:
            started = [c for c, pace in self.asked.items() if pace.started_s is None and c not in self.refused]
        for client in started:
            self.asked[client].start(now_s)
        return started

    @property
    def taken_out(self) -> set[str]:
        """Those that it goes on without, whatever they do."""
        return set(self._out)

    def may_start(self, client: str) -> bool:
        """Say whether a member is asked to take part, and it is its turn."""
        is_part_over = client in self._out or client in self.refused
        return client in self.asked and not is_part_over and (not self.policy.takes_turns or client == self._turn)

    def waits_for(self, here: set[str]) -> set[str]:
        """Give whose update the round waits for."""
        return (here & self.asked.keys()) - self.submitted - self.refused.keys() - self._cut_off - self._out

    def at_work(self, here: set[str]) -> set[str]:
        """Give those of them that may start."""
        return {client for client in self.waits_for(here) if self.may_start(client)}

    def submit(self, client: str, now_s: float) -> None:
        """Note a member's update; one that was cut off and comes before the round is closed counts.

        Raises:
            ValueError: If this member was not asked, it is not its turn, or the round is closed.
        """
        if self.is_closed:
            raise ValueError(f"Round {self.number} is closed; {client!r} takes part in the next one.")
        if not self.may_start(client):
            raise ValueError(f"{client!r} has no part in round {self.number} now; it waits until it is asked.")
        self.submitted.add(client)
        self.asked[client].submitted_s = now_s
        self._cut_off.discard(client)

    def refuse(self, client: str, why: str, now_s: float) -> None:
        """Go on without a member whose update cannot be counted; its time counts like that of one that submitted."""
        self.refused[client] = why
        self.asked[client].submitted_s = now_s
        self._cut_off.discard(client)

    def was_cut_off(self, client: str) -> bool:
        """Say whether it waits no longer for a member that takes too long."""
        return client in self._cut_off

    def cut_off_stragglers(self, here: set[str], now_s: float) -> list[str]:
        """Wait no longer for those that take too long, once the quorum is here.

        Returns:
            Those that were cut off by this call, in the order of names.
        """
        if self.policy.straggler_margin is None or len(self.submitted) < self.policy.quorum:
            return []
        durations_s = [
            pace.duration_s(now_s, self.policy.local_steps)
            for client, pace in self.asked.items()
            if client in self.submitted or client in here
        ]
        most_s = deadline_s(durations_s, self.policy.straggler_margin)
        late = sorted(client for client in self.at_work(here) if self.asked[client].waits_s(now_s) > most_s)
        self._cut_off.update(late)
        return late

    def can_spare(self, client: str, here: set[str]) -> bool:
        """Say whether the quorum can be met without a member's update."""
        return len((self.submitted | self.waits_for(here)) - {client}) >= max(self.policy.quorum, 1)

    def take_out(self, client: str, here: set[str]) -> bool:
        """Go on without a member that cannot take part any more, whatever it does.

        Returns:
            False if the quorum cannot be met then: the round has to begin again.
        """
        self._out.add(client)
        return self.can_spare(client, here)

    def needs_those_taken_out(self, here: set[str]) -> bool:
        """Say whether it can have its quorum only with those that it goes on without: it has to begin again then."""
        can_count = self.submitted | self.waits_for(here)
        return not self.is_closed and len(can_count) < self.policy.quorum <= len(can_count | (here & self._out))

    def is_complete(self, here: set[str]) -> bool:
        """Say whether it has every update that it waits for, and its quorum."""
        if self.is_closed:
            return True
        if len(self.submitted) < self.policy.quorum:
            return False
        is_full = self.policy.cohort is not None and len(self.submitted) >= self.policy.cohort
        return is_full or not self.waits_for(here)

    def close(self, here: set[str]) -> set[str]:
        """Take no more updates; gives those that are here and may have started, are not done and were not taken out."""
        self.is_closed = True
        started = {client for client, pace in self.asked.items() if pace.started_s is not None}
        return (here & started) - self.submitted - self.refused.keys() - self._out

    def could_still_count(self, clients: set[str]) -> set[str]:
        """Give whose update is here, or could be if all of these came and it began again where it must."""
        return self.submitted | (clients - self.refused.keys())

    def _next_needed(self, here: set[str]) -> str | None:
        """Give the next in the ranking, if there is one and it is needed."""
        can_count = self.submitted | ((here & self.asked.keys()) - self.refused.keys())
        can_meet_quorum = len(can_count) >= self.policy.quorum
        if self.policy.cohort is not None and can_meet_quorum:
            return None
        return next(iter(ranked(here - self.asked.keys(), seed=self.policy.seed, round=self.number)), None)

    def _next_turn(self, here: set[str]) -> list[str]:
        """Give the turn on once its holder has submitted, is gone or was cut off; gives who has it from now on."""
        waiting = self.waits_for(here)
        if self._turn in waiting:
            return []
        order = ranked(waiting, seed=self.policy.seed, round=self.number)
        self._turn = order[0] if order else None
        return order[:1]

    def _replace_by(self, client: str, here: set[str]) -> None:
        """Note for whom a member is asked, if it is for one that is gone or was refused."""
        stays = (here | self.submitted) - self.refused.keys()
        gone = [name for name in self.asked if name not in stays and name not in self.replaced]
        if self.policy.cohort is not None and gone:
            self.replaced[gone[0]] = client
