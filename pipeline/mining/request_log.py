"""Rank 0's requests to the mining servers: a thread of their own sends them in order, and replays them after a crash.

Every request that changes state is kept until a snapshot contains it. When a server dies, the log waits for its successor,
restores all servers from the last snapshot and replays the later requests in the same order; callers that wait for an
answer get it with a delay.

A server that owes an answer is asked now and then whether it lives, as a long call may take any time: one that says nothing
for half of `deadline_s` (a stopped process, a machine that froze) is ended, and from there on it is a server that died.
"""

from __future__ import annotations

import functools
import logging
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

_POLL_S = 0.2  # interval between attempts to reach a server that is restarting
PING_EVERY_S = 5.0  # interval at which servers that owe an answer are asked whether they live
MAX_RESTARTS_WITHOUT_ANSWER = 5  # consecutive restarts without an answer after which the run fails

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """One call to all shards, or to some.

    Attributes:
        method: Name of the server's method.
        arguments: Shard to the arguments of its call, without the sequence number.
        merge: Results of the shards, in their order, to the answer.
        logged: Whether it changes state, and is kept until a snapshot contains it.
        ordered: Whether it has a place in the order of requests.
        size: Bytes that keeping it takes.
        shards: The shards that are called; None: all.
        number: Position in the order of requests; assigned when it is sent.
        answer: The merged result.
        results: The results that have arrived, by shard.
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
        transports: One transport for each shard.
        spec: The specification of the servers.
        incarnation: Number of the start of the run.
        folder: The run folder, for the log's own snapshots.
        ordered: Consistency `exact`: a search reflects exactly the puts before it. False (`async`): it does not wait.
        in_flight: Largest number of unanswered puts; `put` waits beyond it.
        deadline_s: Longest time that servers may be unreachable before the run fails; after half of it without a sign of life, a
            server is started again.
        log_bytes: Size of the kept requests beyond which the log takes a snapshot of its own.
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
        self.transports = list(transports)
        self.spec = spec
        self.incarnation = incarnation
        self.folder = folder
        self.ordered = ordered
        self.deadline_s = deadline_s
        self.silent_s = deadline_s / 2  # without a sign of life, after which a server is started again
        self.log_bytes = log_bytes
        self.recoveries = 0
        self.lag = 0  # puts before the newest search that its response did not reflect (async)
        self.recall = 1.0  # recall and number of the index behind that response
        self.generation = 0
        self._free_puts = threading.Semaphore(in_flight)
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._last_number = 0  # of the newest request
        self._last_sent = [0] * len(self.transports)  # newest ordered request of each shard: `previous` of the next one
        self._log: list[Request] = []
        self._unanswered: dict[int, Request] = {}
        self._snapshot: tuple[str | None, int] = (None, 0)
        self._snapshot_running = False
        self._server_epoch = 0  # counts the recoveries: results of earlier epochs are dropped
        self._restarts_without_answer = 0
        self._pings: dict[int, tuple[Future[Any], float]] = {}  # by shard: the last question, and when it was asked
        self._places: dict[int, str] = {}  # by shard: host and process that answered last
        self._next_ping = 0.0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="mining")

    def begin(self, snapshot: str | None) -> None:
        """Restores the servers from a snapshot (a folder that `save` wrote), or empty, and starts sending.

        Raises:
            UserError, RunError: A server refuses, or cannot be reached before the deadline.
        """
        self._snapshot = (snapshot, 0)
        self._begin_servers(time.monotonic() + self.deadline_s)
        self._thread.start()

    def wait(self, answer: Future[Any]) -> Any:
        """The result of a request; every request is answered, with an error if servers stay unreachable."""
        return answer.result()

    def close(self) -> None:
        """Waits for the unanswered requests and ends the thread."""
        if self._thread.is_alive():
            self._events.put(("close", None))
            self._thread.join(self.deadline_s)

    def snapshot_request(self, folder: str) -> Request:
        def merge(results: list[dict[str, str]]) -> dict[str, str]:
            return {f"{shard}/{name}": s for shard, sums in enumerate(results) for name, s in sums.items()}

        request = Request("save", lambda _: (folder,), merge)
        request.answer.add_done_callback(lambda future: self._events.put(("saved", (folder, request, future))))
        return request

    def raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    # ---- the thread ----------------------------------------------------------------------------------------------

    def submit(self, *requests: Request) -> Future[Any]:
        self.raise_if_failed()
        self._events.put(("new", requests))
        return requests[-1].answer

    def _run(self) -> None:
        queued: list[Request] = []  # waiting for a request whose answer they need as an argument
        closing = False
        while not (closing and not self._unanswered and not queued):
            try:
                kind, event = self._events.get(timeout=self._ping_every_s if self._unanswered else None)
            except queue.Empty:
                kind, event = "nothing", None
            try:
                self._check_life()
                if kind == "close":
                    closing = True
                elif kind == "new":
                    queued += event
                    for request in event:  # numbered here, not in `submit`, which two threads call
                        self._last_number += 1
                        request.number = self._last_number
                elif kind == "saved":
                    self._on_snapshot(*event)
                elif kind == "done":
                    self._on_result(*event)
                while queued and self._error is None and not self._awaits_fetch(queued[0]):
                    if queued[0].logged:
                        self._log.append(queued[0])
                    self._send(queued.pop(0))
            except ServerGone:
                self._recover()
            except Exception as error:  # a bug here must not leave callers waiting
                self._fail(RunError(f"mining requests: {type(error).__name__}: {error}"))
            if self._error is not None:
                for request in queued:
                    request.answer.set_exception(self._error)
                queued = []

    @property
    def _ping_every_s(self) -> float:
        return min(PING_EVERY_S, self.silent_s / 3)

    def _check_life(self) -> None:
        """Asks the servers that owe an answer whether they live.

        Raises:
            ServerGone: One has not said so for `silent_s`; it is being started again.
        """
        now = time.monotonic()
        if not self._unanswered or now < self._next_ping:
            return
        self._next_ping = now + self._ping_every_s
        owing = {s for r in self._unanswered.values() for s in self._shards(r) if s not in r.results}
        for shard, (ping, asked_at) in list(self._pings.items()):
            if ping.done():
                del self._pings[shard]
                if ping.exception() is None:
                    self._places[shard] = f" (process {ping.result()['pid']} on {ping.result()['host']})"
            elif now - asked_at > self.silent_s:
                del self._pings[shard]
                logger.warning(
                    "mining server %d%s gives no sign of life for %.0f s (half of mining.deadline_s): it is started again",
                    shard, self._places.get(shard, ""), now - asked_at,
                )  # fmt: skip
                self.transports[shard].restart()
                raise ServerGone(f"no sign of life for {now - asked_at:.0f} s")
        for shard in owing - set(self._pings):
            self._pings[shard] = (self.transports[shard].call("status"), now)

    def _awaits_fetch(self, request: Request) -> bool:
        """True for a search by id whose preceding fetch is unanswered: its arguments are not known yet."""
        previous = self._unanswered.get(request.number - 1)
        return request.method == "search" and previous is not None and previous.method == "fetch"

    def _send(self, request: Request) -> None:
        request.results = {}
        self._unanswered[request.number] = request
        for shard in self._shards(request):
            order: list[Any] = []
            if request.method != "status":
                ordered = SequenceNumber(self.incarnation, request.number, self._last_sent[shard], self._server_epoch)
                order = [ordered if request.ordered else None]
            if request.ordered:
                self._last_sent[shard] = request.number
            future = self.transports[shard].call(request.method, *order, *request.arguments(shard))
            future.add_done_callback(functools.partial(self._enqueue_result, request, shard, self._server_epoch))

    def _enqueue_result(self, request: Request, shard: int, server_epoch: int, future: Future[Any]) -> None:
        self._events.put(("done", (request, shard, server_epoch, future)))

    def _shards(self, request: Request) -> Sequence[int]:
        return range(len(self.transports)) if request.shards is None else request.shards

    def _on_result(self, request: Request, shard: int, server_epoch: int, future: Future[Any]) -> None:
        if server_epoch != self._server_epoch or request.number not in self._unanswered:
            return  # a result of servers that have died since
        error = future.exception()
        if isinstance(error, ServerGone):
            raise error
        if error is not None:
            del self._unanswered[request.number]
            if request.logged:  # a refused batch would be missing for the rest of the run
                self._fail(error if isinstance(error, Exception) else RunError(str(error)))
            request.answer.set_exception(error)
            return
        request.results[shard] = future.result()
        shards = self._shards(request)
        if len(request.results) < len(shards):
            return
        del self._unanswered[request.number]
        self._restarts_without_answer = 0
        result = request.merge([request.results[s] for s in shards])
        if isinstance(result, SearchResponse):
            self.recall = result.recall
            self.generation = result.generation
            unseen = range(result.applied + 1, request.number)  # empty where requests are ordered
            self.lag = sum(1 for r in self._log if r.method == "put" and r.number in unseen)
        request.answer.set_result(result)
        if request.logged:
            self._snapshot_if_full()

    def _on_snapshot(self, folder: str, request: Request, answer: Future[Any]) -> None:
        """Drops the logged requests that a finished snapshot contains."""
        own_folder = (self.folder / "mining").uri
        if request.answer.exception() is not None:
            self._snapshot_running = self._snapshot_running and not folder.startswith(own_folder)
            return
        previous, self._snapshot = self._snapshot[0], (folder, request.number)
        self._log = [r for r in self._log if r.number > request.number]
        if folder.startswith(own_folder):
            self._snapshot_running = False
        if previous is not None and previous != folder and previous.startswith(f"{own_folder}/log-"):
            Folder(previous).remove()

    def _snapshot_if_full(self) -> None:
        if not self._snapshot_running and sum(r.size for r in self._log) > self.log_bytes:
            self._snapshot_running = True
            self.submit(
                self.snapshot_request((self.folder / "mining" / f"log-{self.incarnation}-{self._last_number}").uri)
            )

    # ---- recovery ------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Waits for the servers, restores them from the last snapshot, and replays the later requests."""
        deadline = time.monotonic() + self.deadline_s
        while True:
            self.recoveries += 1
            self._restarts_without_answer += 1
            if self._restarts_without_answer > MAX_RESTARTS_WITHOUT_ANSWER:
                self._fail(
                    RunError(
                        f"the mining servers restarted {MAX_RESTARTS_WITHOUT_ANSWER} times without completing a request "
                        "(out of memory?): lower mining.in_flight or the size of the table, or give the nodes more memory"
                    )
                )
                return
            self._server_epoch += 1  # results of the previous servers are dropped
            self._pings.clear()
            unanswered_or_logged = sorted(
                {r.number: r for r in (*self._log, *self._unanswered.values())}.values(), key=lambda r: r.number
            )
            try:
                self._begin_servers(deadline)
                self._unanswered = {}
                for request in unanswered_or_logged:
                    self._replay(request)
                return
            except ServerGone:
                self._unanswered |= {r.number: r for r in unanswered_or_logged if not r.answer.done()}
            except Exception as error:
                self._unanswered |= {r.number: r for r in unanswered_or_logged if not r.answer.done()}
                self._fail(error)
                return

    def _replay(self, request: Request) -> None:
        """Sends a request again; if it has been answered already, the new answer is ignored."""
        if request.answer.done():
            unheard = replace(request, answer=Future())
            self._log[self._log.index(request)] = unheard
            request = unheard
        self._send(request)

    def _begin_servers(self, deadline: float) -> None:
        folder, number = self._snapshot
        for shard, transport in enumerate(self.transports):
            spec = replace(self.spec, shard=shard, shards=len(self.transports))
            if shard:
                spec = replace(spec, per_class=None, total=None)
            while True:
                try:
                    remaining_s = max(0.1, deadline - time.monotonic())
                    transport.call("begin", spec, self.incarnation, folder, number, self._server_epoch).result(
                        remaining_s
                    )
                    break
                except (ServerGone, TimeoutError) as error:
                    if time.monotonic() > deadline:
                        raise RunError(
                            f"mining server {shard} could not be reached within {self.deadline_s:g} s ({error}): check the "
                            "cluster's free memory and CPUs, or raise mining.deadline_s"
                        ) from error
                    time.sleep(_POLL_S)
        self._last_sent = [number] * len(self.transports)

    def _fail(self, error: Exception) -> None:
        self._error = error
        for request in self._unanswered.values():
            if not request.answer.done():
                request.answer.set_exception(error)
        self._unanswered = {}
