"""Rank 0's requests to the mining servers: they go out in order from a thread of their own, and survive a server's death.

Every request that changes state is kept until a snapshot holds it. When a server dies, the log waits for the new one,
puts all back to the last snapshot and sends again what came after, in the same order; whoever waits for an answer gets it,
later.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import RunError
from pipeline.mining.messages import SearchResponse, SequenceNumber, ServerSpec
from pipeline.mining.transport import ServerGone, Transport
from pipeline.storage import Folder

_POLL_S = 0.2  # between two tries to reach a server that is starting again
MAX_RESTARTS_WITHOUT_ANSWER = 5  # deaths in a row, without an answer between them, that end the run


@dataclass(eq=False)
class Request:
    """One call to every shard, or to some.

    Attributes:
        method, arguments: of each shard's call, without its order.
        merge: the shards' results, in their order, to the answer.
        logged: whether it changes state, and so is kept until a snapshot holds it.
        ordered: whether it takes its place among the others.
        size: bytes that keeping it costs.
        shards: that are called; none: all.
    """

    method: str
    arguments: Callable[[int], tuple[Any, ...]]
    merge: Callable[[list[Any]], Any]
    logged: bool = False
    ordered: bool = True
    size: int = 0
    shards: tuple[int, ...] | None = None
    number: int = 0
    answer: Future[Any] = field(default_factory=Future)
    results: dict[int, Any] = field(default_factory=dict)


class RequestLog:
    """Sends one run's requests; every method may be called from one thread, the run's.

    Args:
        transports: one for each shard.
        spec: of the run.
        incarnation: start of the run.
        folder: of the run, for what the client itself saves.
        ordered: consistency `exact`: a search reflects exactly the puts before it. False (`async`): it does not wait.
        in_flight: puts on their way, after which `put` waits.
        deadline_s: how long servers may be away before the run fails.
        log_bytes: kept requests beyond this are saved in a snapshot of the client's own.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        spec: ServerSpec,
        incarnation: int,
        folder: Folder,
        *,
        ordered: bool = True,
        in_flight: int = 8,
        deadline_s: float = 120.0,
        log_bytes: int = 2**28,
    ) -> None:
        self.transports, self.spec, self.incarnation, self.folder = list(transports), spec, incarnation, folder
        self.ordered, self.deadline_s, self.log_bytes = ordered, deadline_s, log_bytes
        self.recoveries = 0
        self.lag = 0  # puts that the newest answer did not reflect yet (async)
        self.recall, self.generation = 1.0, 0  # of the index that gave it
        self._slots = threading.Semaphore(in_flight)
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._numbers = 0  # of the newest request given out
        self._sent = [0] * len(self.transports)  # newest ordered request of each: what the next one names as previous
        self._log: list[Request] = []
        self._waiting: dict[int, Request] = {}  # sent, not yet answered
        self._snapshot: tuple[str | None, int] = (None, 0)
        self._spilling = False
        self._server_epoch = 0  # of the servers; the next after a death
        self._restarts_without_answer = 0  # deaths since the last answer
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="mining")

    def begin(self, snapshot: str | None) -> None:
        """Puts the servers to the state of a snapshot (a folder that `save` wrote), or empty, and starts sending.

        Raises:
            UserError, RunError: a server refuses, or is not reached before the deadline.
        """
        self._snapshot = (snapshot, 0)
        self._begin_servers(time.monotonic() + self.deadline_s)
        self._thread.start()

    def wait(self, answer: Future[Any]) -> Any:
        """The result; the pump answers every request, by an error if servers stay away."""
        return answer.result()

    def close(self) -> None:
        """Ends the thread; what is on its way is waited for."""
        if self._thread.is_alive():
            self._events.put(("close", None))
            self._thread.join(self.deadline_s)

    def saving(self, folder: str) -> Request:
        def merge(results: list[dict[str, str]]) -> dict[str, str]:
            return {f"{shard}/{name}": s for shard, sums in enumerate(results) for name, s in sums.items()}

        request = Request("save", lambda _: (folder,), merge)
        request.answer.add_done_callback(lambda a: self._events.put(("saved", (folder, request, a))))
        return request

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    # ---- the thread ----------------------------------------------------------------------------------------------

    def submit(self, *requests: Request) -> Future[Any]:
        self.check()
        self._events.put(("new", requests))
        return requests[-1].answer

    def _run(self) -> None:
        queued: list[Request] = []  # behind an request whose arguments are another's answer
        closing = False
        while not (closing and not self._waiting and not queued):
            kind, what = self._events.get()
            try:
                if kind == "close":
                    closing = True
                elif kind == "new":
                    queued += what
                    for request in what:  # here, not where it is submitted: two threads submit
                        self._numbers += 1
                        request.number = self._numbers
                elif kind == "saved":
                    self._saved(*what)
                elif kind == "done":
                    self._done(*what)
                while queued and self._error is None and not self._dependent(queued[0]):
                    if queued[0].logged:
                        self._log.append(queued[0])
                    self._send(queued.pop(0))
            except ServerGone:
                self._recover()
            except Exception as error:  # a bug here must not leave anybody waiting
                self._fail(RunError(f"mining requests: {type(error).__name__}: {error}"))
            if self._error is not None:
                for request in queued:
                    request.answer.set_exception(self._error)
                queued = []

    def _dependent(self, request: Request) -> bool:
        """Whether its arguments are still on their way: the fetch before a search by id."""
        before = self._waiting.get(request.number - 1)
        return request.method == "search" and before is not None and before.method == "fetch"

    def _send(self, request: Request) -> None:
        request.results = {}
        self._waiting[request.number] = request
        for shard in self._shards(request):
            order: list[Any] = []
            if request.method != "status":
                ordered = SequenceNumber(self.incarnation, request.number, self._sent[shard], self._server_epoch)
                order = [ordered if request.ordered else None]
            if request.ordered:
                self._sent[shard] = request.number
            future = self.transports[shard].call(request.method, *order, *request.arguments(shard))
            future.add_done_callback(functools.partial(self._arrived, request, shard, self._server_epoch))

    def _arrived(self, request: Request, shard: int, server_epoch: int, future: Future[Any]) -> None:
        self._events.put(("done", (request, shard, server_epoch, future)))

    def _shards(self, request: Request) -> Sequence[int]:
        return range(len(self.transports)) if request.shards is None else request.shards

    def _done(self, request: Request, shard: int, server_epoch: int, future: Future[Any]) -> None:
        if server_epoch != self._server_epoch or request.number not in self._waiting:
            return  # an answer of servers that have died since
        error = future.exception()
        if isinstance(error, ServerGone):
            raise error
        if error is not None:
            del self._waiting[request.number]
            if request.logged:  # a batch that a server refuses would be missing for ever
                self._fail(error if isinstance(error, Exception) else RunError(str(error)))
            request.answer.set_exception(error)
            return
        request.results[shard] = future.result()
        shards = self._shards(request)
        if len(request.results) < len(shards):
            return
        del self._waiting[request.number]
        self._restarts_without_answer = 0
        result = request.merge([request.results[s] for s in shards])
        if isinstance(result, SearchResponse):
            self.recall, self.generation = result.recall, result.generation
            self.lag = sum(1 for o in self._log if o.method == "put" and o.number > result.applied)
        request.answer.set_result(result)
        if request.logged:
            self._snapshot_if_full()

    def _saved(self, folder: str, request: Request, answer: Future[Any]) -> None:
        """A snapshot holds what came before it: the log may forget that."""
        spill = (self.folder / "mining").uri
        if request.answer.exception() is not None:
            self._spilling = self._spilling and not folder.startswith(spill)
            return
        old, self._snapshot = self._snapshot[0], (folder, request.number)
        self._log = [o for o in self._log if o.number > request.number]
        if folder.startswith(spill):
            self._spilling = False
        if old is not None and old != folder and old.startswith(f"{spill}/log-"):
            Folder(old).remove()

    def _snapshot_if_full(self) -> None:
        if not self._spilling and sum(o.size for o in self._log) > self.log_bytes:
            self._spilling = True
            self.submit(self.saving((self.folder / "mining" / f"log-{self.incarnation}-{self._numbers}").uri))

    # ---- death and recovery --------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Waits for the servers, puts all to the last snapshot, and sends again what came after it."""
        deadline = time.monotonic() + self.deadline_s
        while True:
            self.recoveries += 1
            self._restarts_without_answer += 1
            if self._restarts_without_answer > MAX_RESTARTS_WITHOUT_ANSWER:
                self._fail(
                    RunError(
                        f"the mining servers died {MAX_RESTARTS_WITHOUT_ANSWER} times without an answer: are they out of memory?"
                    )
                )
                return
            self._server_epoch += 1  # answers from before are not for us any more
            again = sorted(
                {o.number: o for o in (*self._log, *self._waiting.values())}.values(), key=lambda o: o.number
            )
            try:
                self._begin_servers(deadline)
                self._waiting = {}
                for request in again:
                    self._replay(request)
                return
            except ServerGone:
                self._waiting |= {o.number: o for o in again if not o.answer.done()}
            except Exception as error:
                self._waiting |= {o.number: o for o in again if not o.answer.done()}
                self._fail(error)
                return

    def _replay(self, request: Request) -> None:
        """Sends an request a second time; one that had been answered is only applied."""
        if request.answer.done():
            silent = replace(request, answer=Future())
            self._log[self._log.index(request)] = silent
            request = silent
        self._send(request)

    def _begin_servers(self, deadline: float) -> None:
        folder, number = self._snapshot
        for shard, transport in enumerate(self.transports):
            spec = replace(self.spec, shard=shard, shards=len(self.transports))
            if shard:
                spec = replace(spec, per_class=None, total=None)
            while True:
                try:
                    left = max(0.1, deadline - time.monotonic())
                    transport.call("begin", spec, self.incarnation, folder, number, self._server_epoch).result(left)
                    break
                except (ServerGone, TimeoutError) as error:
                    if time.monotonic() > deadline:
                        raise RunError(
                            f"mining server {shard} has not come back within {self.deadline_s:g} s ({error}): look at the "
                            "cluster's free memory and CPUs, or raise mining.deadline_s"
                        ) from error
                    time.sleep(_POLL_S)
        self._sent = [number] * len(self.transports)

    def _fail(self, error: Exception) -> None:
        self._error = error
        for request in self._waiting.values():
            if not request.answer.done():
                request.answer.set_exception(error)
        self._waiting = {}
