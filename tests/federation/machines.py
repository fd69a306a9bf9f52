"""A run's state machine with members that have joined, for tests."""

from typing import Any

from splitfed.federation import RoundPolicy, Rounds


def rounds_of(
    clients: str, *, agents: int | None = None, rounds: int = 9, timeout_s: float = 100, **policy: Any
) -> Rounds:
    """Open a run that members of one letter have joined at second 0."""
    machine = Rounds(
        agents or len(clients), rounds, timeout_s, population=max(len(clients), 8), policy=RoundPolicy(**policy)
    )
    for client in clients:
        machine.join(client, 1, now_s=0)
    return machine


def finish_round(machine: Rounds, now_s: float) -> list[str]:
    """Let every member that was asked submit, one after the other where turns are taken; gives them in that order."""
    order = []
    while not machine.is_complete():
        client = next(c for c in machine.selected if machine.may_start(c) and not machine.has_submitted(c))
        machine.submit(client, machine.current, now_s)
        order.append(client)
    machine.commit(now_s)
    return order
