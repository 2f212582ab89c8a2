"""Processes for tests that need several: a pool of ranks with a gloo group, and runs of the real program to be killed.

All come from one fork server, a fresh interpreter that has imported the program and run nothing: a process then starts
in a tenth of a second instead of the ten that the imports take. No child is forked from a process that has used threads.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import connection, forkserver
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["tests.stubs", "tests.pool", "tests.preload"]
TIMEOUT_S = 120
GRACE_S = 5  # after one rank has failed, for the others to notice


def fork_server() -> Any:
    """The multiprocessing context that every process of the tests is started from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def warm_up() -> None:
    """Starts the fork server, whose imports take seconds, and does not wait for it."""
    fork_server()
    forkserver.ensure_running()


class RankFailed(Exception):
    """A rank raised, died or hung; the message holds its traceback."""


class Pool:
    """Ranks that stay alive between calls, each with one thread.

    Args:
        size: number of processes.
    """

    def __init__(self, size: int = 3) -> None:
        self.size = size
        self.ranks: dict[int, tuple[Any, connection.Connection]] = {}

    def __call__(
        self, function: Callable[..., Any], world: int, *arguments: Any, timeout_s: float = TIMEOUT_S
    ) -> list[Any]:
        """Runs `function(rank, world, *arguments)` on the first `world` ranks; returns what each returned.

        With several ranks they form a fresh gloo group; with one there is none.

        Args:
            function: of a module, so that it can be pickled.
            world: number of ranks.
            arguments: picklable.
            timeout_s: ranks that are not done by then are killed.

        Raises:
            RankFailed: with the traceback of the first rank that failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world):
                self._rank(rank).send_bytes(pickle.dumps((function, rank, world, f"{folder}/group", arguments)))
            return self._answers(world, timeout_s)

    def _rank(self, rank: int) -> connection.Connection:
        if rank not in self.ranks:
            ours, theirs = multiprocessing.Pipe()
            process = fork_server().Process(target=_serve, args=(theirs,), daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()
            self.ranks[rank] = (process, ours)
        return self.ranks[rank][1]

    def _answers(self, world: int, timeout_s: float) -> list[Any]:
        answers: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout_s
        waiting = {self.ranks[rank][1]: rank for rank in range(world)}
        while waiting and time.monotonic() < deadline:
            for ready in connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting.pop(ready)  # type: ignore[call-overload]
                try:
                    error, answers[rank] = pickle.loads(self.ranks[rank][1].recv_bytes())
                except (EOFError, ConnectionError):
                    error = f"died with exit code {self._remove(rank)}"
                if error:
                    failures.append(f"rank {rank}: {error}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in waiting.values():
            failures.append(
                f"rank {rank}: hung for {timeout_s:g} s and was killed" if not failures else f"rank {rank}: killed"
            )
            self._remove(rank)
        if failures:  # a rank that failed while its group was being made cannot join another one
            for rank in set(range(world)) & set(self.ranks):
                self._remove(rank)
            raise RankFailed("\n".join(failures))
        return [answers[rank] for rank in range(world)]

    def _remove(self, rank: int) -> int | None:
        process, pipe = self.ranks.pop(rank)
        pipe.close()
        process.kill()
        process.join()
        return process.exitcode

    def close(self) -> None:
        for rank in list(self.ranks):
            self._remove(rank)


def _serve(pipe: connection.Connection) -> None:
    """One rank: runs what it is sent until the pipe is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            function, rank, world, group, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        error, answer = None, None
        try:
            if world > 1:
                limit = timedelta(seconds=TIMEOUT_S)
                dist.init_process_group(
                    "gloo", init_method=f"file://{group}", rank=rank, world_size=world, timeout=limit
                )
            answer = function(rank, world, *arguments)
        except Exception:
            error = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps((error, answer)))


class Program:
    """`python -m pipeline.train ARGUMENTS`, with the stubs registered, as a process that may be killed.

    Args:
        arguments: of the command line.
        log: file that takes its output; `log.writes` lists the files it writes, in order.
        kill_at_write: SIGKILL itself at this file write (0 is the first).
        after: kill just after that write, not just before it.
        environment: variables beside those of the fork server.

    The report at the end of a run is replaced by an empty file: drawing it takes longer than these runs.
    """

    def __init__(
        self,
        arguments: list[str],
        log: str,
        kill_at_write: int | None = None,
        after: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        given = (arguments, log, kill_at_write, after, dict(environment or {}))
        self.process = fork_server().Process(target=_program, args=given)
        self.process.start()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit status, negative for a signal that ended it.

        Raises:
            TimeoutError: it hung, and was killed.
        """
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"the program hung for {timeout_s} s:\n{self.output()}")
        return self.process.exitcode

    def running(self) -> bool:
        return self.process.exitcode is None

    def output(self) -> str:
        with open(self.log) as file:
            return file.read()


def _program(
    arguments: list[str], log: str, kill_at_write: int | None, after: bool, environment: Mapping[str, str]
) -> None:
    import signal
    import sys

    from pipeline import train
    from pipeline.runs.run_state import STATE
    from pipeline.storage import Folder
    from pipeline.training import start
    from tests.stubs import registered

    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    write = Folder.write
    written: list[str] = []

    def counted(self: Folder, name: str, data: bytes) -> None:
        if name == STATE:  # by a thread of its own, at any time
            return write(self, name, data)
        if len(written) == kill_at_write and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, name, data)
        if len(written) == kill_at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(name)
        writes.write(f"{name}\n")

    Folder.write = counted  # type: ignore[method-assign]
    start.write_report = lambda folder, store: folder.write("report.html", b"")
    with open(f"{log}.writes", "w") as writes, registered():
        status = train.main(arguments)
    sys.stdout.flush()
    sys.exit(status)
