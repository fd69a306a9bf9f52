"""What holds whatever agents do, and in whatever order: random runs of the state machine."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitfed.federation import Phase, RoundPolicy, Rounds
from splitfed.federation.cohort import ranked

NAMES = "abcdefg"
TIMEOUT_S, STEPS = 50.0, 4

clients = st.sampled_from(NAMES)


class AnyRun(RuleBasedStateMachine):
    """A run of at most seven agents, driven at random; it keeps its own book of what was counted."""

    @initialize(
        agents=st.integers(1, 4),
        joined=st.integers(1, len(NAMES)),
        cohort=st.none() | st.integers(1, 5),
        over_selection=st.integers(0, 2),
        quorum=st.integers(1, 3),
        margin=st.none() | st.sampled_from([1.0, 3.0]),
        merges=st.booleans(),
        takes_turns=st.booleans(),
        seed=st.integers(0, 3),
    )
    def start(self, agents, joined, cohort, over_selection, quorum, margin, merges, takes_turns, seed) -> None:
        policy = RoundPolicy(
            cohort=cohort,
            over_selection=over_selection,
            quorum=min(quorum, agents, cohort or agents),
            straggler_margin=margin,
            merges_late=merges,
            takes_turns=takes_turns,
            local_steps=STEPS,
            seed=seed,
        )
        self.rounds = Rounds(agents, 5, TIMEOUT_S, population=len(NAMES), policy=policy)
        self.now_s = 0.0
        self.counted: Counter[tuple[str, int]] = Counter()
        for client in NAMES[: max(agents, joined)]:
            self.joins(client)

    @rule(seconds=st.sampled_from([0.0, 1.0, 7.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(client=clients)
    def joins(self, client: str) -> None:
        if not self.rounds.has_left_for_good(client):
            self._opening(lambda: self.rounds.join(client, 1, self.now_s))

    @rule(client=clients, for_good=st.booleans())
    def leaves(self, client: str, for_good: bool) -> None:
        if client in self.rounds.members:
            self._opening(lambda: self.rounds.leave(client, self.now_s, for_good=for_good and client in "ab"))

    @rule(client=clients, steps=st.none() | st.integers(0, STEPS))
    def makes_progress(self, client: str, steps: int | None) -> None:
        if client in self.rounds.members:
            self.rounds.progress(client, self.now_s, steps=steps)

    @rule(index=st.integers(0, len(NAMES) - 1))
    def one_at_work_goes_on(self, index: int) -> None:
        at_work = [c for c in self.rounds.members if self.rounds.may_start(c) and not self.rounds.has_submitted(c)]
        if at_work:
            self.rounds.progress(at_work[index % len(at_work)], self.now_s, steps=1)

    @rule(index=st.integers(0, len(NAMES) - 1))
    def one_at_work_submits(self, index: int) -> None:
        at_work = [c for c in self.rounds.members if self.rounds.may_start(c) and not self.rounds.has_submitted(c)]
        if at_work and not self.rounds.is_complete():
            assert self.rounds.submit(at_work[index % len(at_work)], self.rounds.current, self.now_s)
            self.counted[at_work[index % len(at_work)], self.rounds.current] += 1

    @rule(index=st.integers(0, len(NAMES) - 1))
    def one_at_work_is_refused(self, index: int) -> None:
        at_work = [c for c in self.rounds.members if self.rounds.may_start(c) and not self.rounds.has_submitted(c)]
        if at_work and not self.rounds.is_complete():
            client = at_work[index % len(at_work)]
            self.rounds.refuse(client, self.rounds.current, "It is too long.", self.now_s)
            assert not self.rounds.may_start(client)
            assert client not in self.rounds.submitted

    @precondition(lambda self: not self.rounds.policy.takes_turns)
    @rule(index=st.integers(0, len(NAMES) - 1), is_silent=st.booleans())
    def one_at_work_loses_its_place(self, index: int, is_silent: bool) -> None:
        at_work = self.rounds.working
        if at_work and not self.rounds.is_complete():
            client = at_work[index % len(at_work)]
            if not self.rounds.take_out(client, self.now_s, is_silent=is_silent):
                self._begun_again()
            else:
                assert not self.rounds.may_start(client)

    @rule()
    def all_go_on_and_submit_until_the_round_is_over(self) -> None:
        for client in self.rounds.selected:
            self.rounds.progress(client, self.now_s, steps=1)
        for index in range(len(NAMES)):
            self.one_at_work_submits(index)
        if self.rounds.is_complete():
            self.a_round_is_written(is_closed_first=True)

    @rule()
    def the_late_submit_twice(self) -> None:
        for client in self.rounds.members:
            if lateness := self.rounds.lateness(client):
                self.submits(client, lateness)
                self.submits(client, lateness)
                assert client in self.rounds.merged

    @rule(client=clients, back=st.integers(0, 3))
    def submits(self, client: str, back: int) -> None:
        """Any update at any time; what is refused is not counted, and changes nothing that is."""
        if client not in self.rounds.members:
            return
        round, before = self.rounds.current - back, (self.rounds.submitted, self.rounds.merged)
        lateness = self.rounds.lateness(client)
        try:
            is_new = self.rounds.submit(client, round, self.now_s)
        except ValueError:
            assert (self.rounds.submitted, self.rounds.merged) == before
            return
        self.counted[client, round] += is_new
        if is_new and back > 0:
            assert lateness == back

    @rule()
    def the_clock_is_looked_at(self) -> None:
        self._opening(lambda: self.rounds.leave_out_silent(self.now_s))
        self.rounds.cut_off_stragglers(self.now_s)

    @precondition(lambda self: self.rounds.is_complete())
    @rule(is_closed_first=st.booleans())
    def a_round_is_written(self, is_closed_first: bool) -> None:
        round, submitted = self.rounds.current, self.rounds.submitted
        assert len(submitted) >= self.rounds.policy.quorum
        assert all(self.counted[client, round] == 1 for client in submitted)
        assert {name for name, made_in in self.counted if made_in == round} == set(submitted)
        if is_closed_first:
            self.rounds.close()
            assert not set(self.rounds.late) & set(submitted)
        self._opening(lambda: self.rounds.commit(self.now_s))

    def _opening(self, change) -> None:
        """Make a change; note who was here if it opened a round."""
        before = (self.rounds.phase, self.rounds.current)
        change()
        if self.rounds.phase is Phase.OPEN and before != (Phase.OPEN, self.rounds.current):
            self._check_cohort()

    def _check_cohort(self) -> None:
        policy = self.rounds.policy
        here = {c for c in self.rounds.members if self._is_here(c) and self.rounds.lateness(c) is None}
        wanted = len(here) if policy.cohort is None else policy.cohort + policy.over_selection
        first = ranked(here, seed=policy.seed, round=self.rounds.current)[:wanted]
        assert self.rounds.selected == sorted(first)

    def _begun_again(self) -> None:
        """What was counted in the round so far is not."""
        assert self.rounds.submitted == []
        for client in NAMES:
            self.counted.pop((client, self.rounds.current), None)

    def _is_here(self, client: str) -> bool:
        return client in self.rounds._members.here

    @invariant()
    def no_run_has_more_rounds_than_it_was_given(self) -> None:
        assert self.rounds.committed <= self.rounds.rounds

    @invariant()
    def no_update_is_counted_twice(self) -> None:
        assert all(times <= 1 for times in self.counted.values())

    @invariant()
    def no_round_can_be_closed_below_its_quorum(self) -> None:
        if len(self.rounds.submitted) < self.rounds.policy.quorum:
            assert not self.rounds.is_complete()
            with pytest.raises(ValueError, match="still waits"):
                self.rounds.close()

    @invariant()
    def only_those_that_were_asked_submit_and_the_late_have_no_part(self) -> None:
        assert set(self.rounds.submitted) <= set(self.rounds.selected)
        late = {client for client in self.rounds.members if self.rounds.lateness(client) is not None}
        assert not any(self.rounds.may_start(client) for client in late | set(self.rounds.merged))

    @invariant()
    def one_member_has_the_turn_where_turns_are_taken(self) -> None:
        if self.rounds.policy.takes_turns:
            starting = [c for c in self.rounds.members if self.rounds.may_start(c) and not self.rounds.has_submitted(c)]
            assert len(starting) <= 1

    @invariant()
    def an_open_round_always_has_someone_to_wait_for_while_there_is_someone_to_ask(self) -> None:
        """No deadlock: whoever is here and free can be at work where the round is not over, once it is looked at."""
        if self.rounds.begin_again_where_it_must(self.now_s):
            self._begun_again()
        if self.rounds.phase is not Phase.OPEN or self.rounds.is_complete():
            return
        free = [c for c in self.rounds.members if self._is_here(c) and self.rounds.lateness(c) is None]
        idle = [c for c in free if not self.rounds.is_done(c) and c not in self.rounds.merged]
        placed = [c for c in idle if c not in self.rounds.taken_out]
        if placed:
            assert any(self.rounds.may_start(c) for c in placed)
        elif idle:
            assert len({*self.rounds.submitted, *idle}) < self.rounds.policy.quorum


TestAnyRun = AnyRun.TestCase
TestAnyRun.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
