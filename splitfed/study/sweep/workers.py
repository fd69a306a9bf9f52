"""Runs in several processes at once: each has one thread, and if it dies only its run is lost."""

import logging
import multiprocessing
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Final

import torch

from splitfed.errors import SplitFedError
from splitfed.study.sweep.bench import Bench, Figures, Job
from splitfed.training.runtime import prepare_process

_READY: Final = "ready"


def outcomes(
    jobs: Sequence[Job], *, processes: int, on_ready: Callable[[], None] = lambda: None
) -> Generator[tuple[Job, Figures]]:
    """Make runs, and give each as soon as it is over.

    Args:
        jobs: The runs.
        processes: Processes to make them in; 1 = in this one.
        on_ready: Told when a process has started and takes its first run.

    Raises:
        SplitFedError: If no process can be started.

    Guarantees:
        * Figures, but for seconds, are the same whatever the number of processes.
        * Processes end when the iterator is closed, and after their present run when this process is killed.
    """
    if processes == 1:
        on_ready()
        yield from _here(jobs)
        return
    crew = [_Worker.start() for _ in range(min(processes, len(jobs)))]
    waiting, has_begun = list(reversed(jobs)), False
    try:
        while waiting or any(worker.job is not None for worker in crew):
            by_connection = {worker.connection: worker for worker in crew}
            for connection in wait(list(by_connection)):
                assert isinstance(connection, Connection)
                worker = by_connection[connection]
                done = worker.receive()
                has_begun = has_begun or worker.is_alive
                if not worker.is_alive:
                    crew.remove(worker)
                    if not has_begun:
                        raise SplitFedError(
                            f"A process {worker.ending} as it started; call run_sweep under if __name__ == "
                            '"__main__", or leave processes out.'
                        )
                    if waiting:
                        crew.append(_Worker.start())
                if done is not None:
                    yield done
                elif worker.is_alive:
                    on_ready()
                if worker.is_alive and waiting:
                    worker.give(waiting.pop())
                elif worker.is_alive:
                    crew.remove(worker)
                    worker.end()
    finally:
        for worker in crew:
            worker.end()


def _here(jobs: Sequence[Job]) -> Generator[tuple[Job, Figures]]:
    bench, threads = Bench(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            yield job, bench.outcome(job)
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Worker:
    """A process, the way to it, and the run that it makes."""

    process: SpawnProcess
    connection: "Connection[object, object]"
    is_alive: bool = True
    job: Job | None = None

    @classmethod
    def start(cls) -> "_Worker":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # its end is the process' alone, so that reading tells when it is gone
        return cls(process, ours)

    def give(self, job: Job) -> None:
        """Let it make a run; that it is gone shows when it is listened to."""
        self.job = job
        try:
            self.connection.send(job)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> tuple[Job, Figures] | None:
        """Take what it says: what became of its run, or none at its start, or at its end without a run."""
        try:
            said = self.connection.recv()
        except (EOFError, ConnectionResetError):
            said = None
        if said == _READY:
            return None
        job, self.job = self.job, None
        if isinstance(said, dict):
            assert job is not None
            return job, said
        self.process.join()
        self.is_alive = False
        self.connection.close()
        error = f"The process of this run {self.ending}; give the sweep fewer processes if memory was short."
        return None if job is None else (job, {"error": error})

    @property
    def ending(self) -> str:
        """How it ended."""
        status = self.process.exitcode
        return (
            f"was ended by {signal.Signals(-status).name}" if status and status < 0 else f"ended with status {status}"
        )

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process.close()


def _serve(connection: "Connection[object, object]") -> None:
    """Make the runs that come over a connection, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process' to answer
    logging.getLogger("splitfed").setLevel(logging.ERROR)
    prepare_process(1)
    bench = Bench()
    try:
        connection.send(_READY)
        while True:
            job = connection.recv()
            assert isinstance(job, Job)
            connection.send(bench.outcome(job))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # whoever asked is gone
