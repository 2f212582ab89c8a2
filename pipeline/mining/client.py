"""The leader's line to the mining servers: operations go out in order from a thread of its own, and survive a server's death.

Every operation that changes state is kept until a snapshot holds it. When a server dies, the client waits for the new one,
puts it back to the last snapshot and sends again what came after, in the same order; whoever waits for an answer gets it,
later. Answers do not depend on the number of servers, over which rows are spread by a hash of their id.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from methods.base import Which
from pipeline.errors import RunError
from pipeline.mining.dictionary import Delta
from pipeline.mining.exact import Neighbours, Queries
from pipeline.mining.server import Answer, Ask, MiningServer, Order, Spec
from pipeline.mining.table import check, shard_of
from pipeline.storage import Folder

_POLL_S = 0.2  # between two tries to reach a server that is starting again
_FRUITLESS = 5  # deaths in a row, without an answer between them, that end the run


class ServerGone(Exception):
    """The server's process has ended, or cannot be reached."""


@runtime_checkable
class Transport(Protocol):
    """One server, near or far."""

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Starts a call; the future raises ServerGone if the server is not there, or what the method raised."""
        ...


class Local:
    """A server in this process; a call has ended when `call` returns."""

    def __init__(self, server: MiningServer) -> None:
        self.server = server

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(getattr(self.server, method)(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(eq=False)
class _Operation:
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


class MiningClient:
    """Sends one run's operations; every method may be called from one thread, the run's.

    Args:
        transports: one for each shard.
        spec: of the run.
        incarnation: start of the run.
        folder: of the run, for what the client itself saves.
        ordered: consistency `exact`: a search reflects exactly the puts before it. False (`async`): it does not wait.
        in_flight: puts on their way, after which `put` waits.
        deadline_s: how long servers may be away before the run fails.
        log_bytes: kept operations beyond this are saved in a snapshot of the client's own.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        spec: Spec,
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
        self._numbers = 0  # of the newest operation given out
        self._sent = [0] * len(self.transports)  # newest ordered operation of each: what the next one names as previous
        self._log: list[_Operation] = []
        self._waiting: dict[int, _Operation] = {}  # sent, not yet answered
        self._snapshot: tuple[str | None, int] = (None, 0)
        self._spilling = False
        self._life = 0  # of the servers; the next after a death
        self._fruitless = 0  # deaths since the last answer
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._pump, daemon=True, name="mining")

    # ---- the run's calls -----------------------------------------------------------------------------------------

    def begin(self, snapshot: str | None) -> None:
        """Puts the servers to the state of a snapshot (a folder that `save` wrote), or empty, and starts sending.

        Raises:
            UserError, RunError: a server refuses, or is not reached before the deadline.
        """
        self._snapshot = (snapshot, 0)
        self._begin_servers(time.monotonic() + self.deadline_s)
        self._thread.start()

    def put(
        self,
        ids: Int64[np.ndarray, " rows"],
        embeddings: Float[np.ndarray, "rows dim"],
        labels: Int64[np.ndarray, " rows"],
        step: int,
        table: bool = True,
        memory: bool = False,
    ) -> None:
        """Sends a batch on its way, to the table, the memory, or both; waits only while too many are.

        Raises:
            UserError: another dimension, or rows that are not finite.
            RunError: the servers have been away beyond the deadline.
        """
        check(ids, embeddings, labels, self.spec.dim)
        owner = shard_of(ids, len(self.transports))
        calls: dict[int, tuple[Any, ...]] = {}
        for shard in range(len(self.transports)):
            mine = np.flatnonzero(owner == shard)
            rows = (ids[mine], embeddings[mine], labels[mine]) if table and len(mine) else None
            whole = (ids, embeddings, labels) if memory and shard == 0 else None  # the first shard has all of it
            if rows is not None or whole is not None:
                calls[shard] = (step, rows, whole)
        if not calls:
            return
        while not self._slots.acquire(timeout=0.5):
            self._raise()
        size = embeddings.nbytes + 16 * len(ids)
        operation = _Operation("put", calls.__getitem__, _nothing, logged=True, size=size, shards=tuple(calls))
        operation.answer.add_done_callback(lambda _: self._slots.release())
        self._submit(operation)

    def ask(self, ask: Ask) -> Future[Answer]:
        """Starts a search; see `Ask`."""
        if len(self.transports) > 1 and ask.values is None and ask.ids is not None:
            return self._ask_by_id(ask)
        return self._submit(_Operation("search", lambda _: (ask,), _merge_answers, ordered=self.ordered))

    def _ask_by_id(self, ask: Ask) -> Future[Answer]:
        """Two calls: the owners' embeddings of the ids, then the search with them in every shard."""
        assert ask.ids is not None
        ids, dim = ask.ids, self.spec.dim
        found: dict[str, Any] = {}

        def collect(results: list[Any]) -> None:
            values, labels = np.zeros((len(ids), dim), np.float32), np.full(len(ids), -1, np.int64)
            known = np.zeros(len(ids), bool)
            for here, some, classes in results:
                values[here], labels[here] = some, classes
                known |= here
            found.update(values=values, labels=labels, known=known)

        fetch = _Operation("fetch", lambda _: (ids,), collect, ordered=self.ordered)

        def arguments(_: int) -> tuple[Any, ...]:
            if ask.unknown == "error" and not found["known"].all():
                return (ask,)  # each server says so
            labels = found["labels"] if ask.labels is None else ask.labels
            return (replace(ask, values=found["values"], labels=labels),)

        def merge(results: list[Answer]) -> Answer:
            answer = _merge_answers(results)
            none = ~found["known"]
            answer.ids[none], answer.distances[none], answer.labels[none], answer.steps[none] = -1, np.inf, -1, -1
            if answer.values is not None:
                answer.values[none] = 0
            return answer

        search = _Operation("search", arguments, merge, ordered=self.ordered)
        self._submit(fetch, search)
        return search.answer

    def rebuild(self, generation: int, step: int, from_step: int, base: str | None) -> None:
        """Starts building an index in every shard; see `MiningServer.rebuild`."""
        self._submit(
            _Operation(
                "rebuild",
                lambda shard: (generation, step, from_step, f"{base}-{shard}" if base is not None else None),
                _nothing,
                logged=True,
            )
        )

    def all_pairs(
        self, k: int, which: Which = "all", reduce: Callable[[Queries, Neighbours], Any] | None = None
    ) -> tuple[Int64[np.ndarray, " rows"], list[Any]]:
        """Exact lists of all rows: (ids, results in blocks), the ids ascending if there is no `reduce`.

        Raises:
            RunError: the servers have been away beyond the deadline.
        """
        if len(self.transports) == 1:
            blocks = self._ordered("all_pairs", lambda r: r[0], k, which, reduce)
        else:
            blocks = []
            for ids in self._ordered("all_ids", list):
                for start in range(0, len(ids), 2048):
                    queries = self._fetch(ids[start : start + 2048])
                    ask = Ask(k, 0, queries.values, queries.ids, queries.labels, which)
                    lists = self._ordered("search_exactly", Neighbours.merge, ask)
                    blocks.append((queries.ids, lists if reduce is None else reduce(queries, lists)))
        ids = np.concatenate([b[0] for b in blocks]) if blocks else np.empty(0, np.int64)
        if reduce is not None or not blocks:
            return ids, [b[1] for b in blocks]
        order = np.argsort(ids)
        lists = Neighbours.concatenate([b[1] for b in blocks])
        return ids[order], [Neighbours(lists.ids[order], lists.distances[order])]

    def _fetch(self, ids: np.ndarray) -> Queries:
        """The stored embeddings and labels of samples, wherever they are."""
        values, labels = np.zeros((len(ids), self.spec.dim), np.float32), np.zeros(len(ids), np.int64)
        for here, some, classes in self._ordered("fetch", list, ids):
            values[here], labels[here] = some, classes
        return Queries(values, ids, labels)

    def _ordered(self, method: str, merge: Callable[[list[Any]], Any], *arguments: Any) -> Any:
        """Calls every shard in its turn, with the same arguments, and waits."""
        return self.wait(self._submit(_Operation(method, lambda _: arguments, merge)))

    def delta(self, since: int) -> Delta:
        """What a mirror of the memory lacks."""
        return self.wait(self._submit(_Operation("delta", lambda _: (since,), lambda r: r[0], shards=(0,))))

    def save(self, folder: str) -> dict[str, str]:
        """Writes a snapshot of every shard below `folder`; returns the checksums of its files."""
        return self.wait(self._submit(self._saving(folder)))

    def status(self) -> list[dict[str, Any]]:
        """What every server holds."""
        return self.wait(self._submit(_Operation("status", lambda _: (), list, ordered=False)))

    def wait(self, answer: Future[Any]) -> Any:
        """The result; the pump answers every operation, by an error if servers stay away."""
        return answer.result()

    def close(self) -> None:
        """Ends the thread; what is on its way is waited for."""
        if self._thread.is_alive():
            self._events.put(("close", None))
            self._thread.join(self.deadline_s)

    def _saving(self, folder: str) -> _Operation:
        def merge(results: list[dict[str, str]]) -> dict[str, str]:
            return {f"{shard}/{name}": s for shard, sums in enumerate(results) for name, s in sums.items()}

        operation = _Operation("save", lambda _: (folder,), merge)
        operation.answer.add_done_callback(lambda a: self._events.put(("saved", (folder, operation, a))))
        return operation

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _submit(self, *operations: _Operation) -> Future[Any]:
        self._raise()
        self._events.put(("new", operations))
        return operations[-1].answer

    def _pump(self) -> None:
        held: list[_Operation] = []  # behind an operation whose arguments are another's answer
        closing = False
        while not (closing and not self._waiting and not held):
            kind, what = self._events.get()
            try:
                if kind == "close":
                    closing = True
                elif kind == "new":
                    held += what
                    for operation in what:  # here, not where it is submitted: two threads submit
                        self._numbers += 1
                        operation.number = self._numbers
                elif kind == "saved":
                    self._saved(*what)
                elif kind == "done":
                    self._done(*what)
                while held and self._error is None and not self._dependent(held[0]):
                    if held[0].logged:
                        self._log.append(held[0])
                    self._send(held.pop(0))
            except ServerGone:
                self._recover()
            except Exception as error:  # a bug here must not leave anybody waiting
                self._fail(RunError(f"mining client: {type(error).__name__}: {error}"))
            if self._error is not None:
                for operation in held:
                    operation.answer.set_exception(self._error)
                held = []

    def _dependent(self, operation: _Operation) -> bool:
        """Whether its arguments are still on their way: the fetch before a search by id."""
        before = self._waiting.get(operation.number - 1)
        return operation.method == "search" and before is not None and before.method == "fetch"

    def _send(self, operation: _Operation) -> None:
        operation.results = {}
        self._waiting[operation.number] = operation
        for shard in self._shards(operation):
            order: list[Any] = []
            if operation.method != "status":
                ordered = Order(self.incarnation, operation.number, self._sent[shard])
                order = [ordered if operation.ordered else None]
            if operation.ordered:
                self._sent[shard] = operation.number
            future = self.transports[shard].call(operation.method, *order, *operation.arguments(shard))
            future.add_done_callback(functools.partial(self._arrived, operation, shard, self._life))

    def _arrived(self, operation: _Operation, shard: int, life: int, future: Future[Any]) -> None:
        self._events.put(("done", (operation, shard, life, future)))

    def _shards(self, operation: _Operation) -> Sequence[int]:
        return range(len(self.transports)) if operation.shards is None else operation.shards

    def _done(self, operation: _Operation, shard: int, life: int, future: Future[Any]) -> None:
        if life != self._life or operation.number not in self._waiting:
            return  # an answer of servers that have died since
        error = future.exception()
        if isinstance(error, ServerGone):
            raise error
        if error is not None:
            del self._waiting[operation.number]
            if operation.logged:  # a batch that a server refuses would be missing for ever
                self._fail(error if isinstance(error, Exception) else RunError(str(error)))
            operation.answer.set_exception(error)
            return
        operation.results[shard] = future.result()
        shards = self._shards(operation)
        if len(operation.results) < len(shards):
            return
        del self._waiting[operation.number]
        self._fruitless = 0
        result = operation.merge([operation.results[s] for s in shards])
        if isinstance(result, Answer):
            self.recall, self.generation = result.recall, result.generation
            self.lag = sum(1 for o in self._log if o.method == "put" and o.number > result.applied)
        operation.answer.set_result(result)
        if operation.logged:
            self._spill()

    def _saved(self, folder: str, operation: _Operation, answer: Future[Any]) -> None:
        """A snapshot holds what came before it: the log may forget that."""
        spill = (self.folder / "mining").uri
        if operation.answer.exception() is not None:
            self._spilling = self._spilling and not folder.startswith(spill)
            return
        old, self._snapshot = self._snapshot[0], (folder, operation.number)
        self._log = [o for o in self._log if o.number > operation.number]
        if folder.startswith(spill):
            self._spilling = False
        if old is not None and old != folder and old.startswith(f"{spill}/log-"):
            Folder(old).remove()

    def _spill(self) -> None:
        if not self._spilling and sum(o.size for o in self._log) > self.log_bytes:
            self._spilling = True
            self._submit(self._saving((self.folder / "mining" / f"log-{self.incarnation}-{self._numbers}").uri))

    # ---- death and recovery --------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Waits for the servers, puts all to the last snapshot, and sends again what came after it."""
        deadline = time.monotonic() + self.deadline_s
        while True:
            self.recoveries += 1
            self._fruitless += 1
            if self._fruitless > _FRUITLESS:
                self._fail(
                    RunError(f"the mining servers died {_FRUITLESS} times without an answer: are they out of memory?")
                )
                return
            self._life += 1  # answers from before are not for us any more
            again = sorted(
                {o.number: o for o in (*self._log, *self._waiting.values())}.values(), key=lambda o: o.number
            )
            try:
                self._begin_servers(deadline)
                self._waiting = {}
                for operation in again:
                    self._send_again(operation)
                return
            except ServerGone:
                self._waiting |= {o.number: o for o in again if not o.answer.done()}
            except Exception as error:
                self._waiting |= {o.number: o for o in again if not o.answer.done()}
                self._fail(error)
                return

    def _send_again(self, operation: _Operation) -> None:
        """Sends an operation a second time; one that had been answered is only applied."""
        if operation.answer.done():
            silent = replace(operation, answer=Future())
            self._log[self._log.index(operation)] = silent
            operation = silent
        self._send(operation)

    def _begin_servers(self, deadline: float) -> None:
        folder, number = self._snapshot
        for shard, transport in enumerate(self.transports):
            spec = replace(self.spec, shard=shard, shards=len(self.transports))
            if shard:
                spec = replace(spec, per_class=None, total=None)
            while True:
                try:
                    left = max(0.1, deadline - time.monotonic())
                    transport.call("begin", spec, self.incarnation, folder, number).result(left)
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
        for operation in self._waiting.values():
            if not operation.answer.done():
                operation.answer.set_exception(error)
        self._waiting = {}


def _nothing(results: list[Any]) -> None:
    return None


def _merge_answers(parts: list[Answer]) -> Answer:
    """The k nearest of what the shards found."""
    if len(parts) == 1:
        return parts[0]
    k = parts[0].ids.shape[1]
    ids, distances, labels, steps = (
        np.concatenate([getattr(p, name) for p in parts], 1) for name in ("ids", "distances", "labels", "steps")
    )
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    values = None
    if parts[0].values is not None:
        stored = np.concatenate([p.values for p in parts if p.values is not None], 1)
        values = np.take_along_axis(stored, order[:, :, None], 1)
    ids, distances, labels, steps = (np.take_along_axis(a, order, 1) for a in (ids, distances, labels, steps))
    generation, applied = min(p.generation for p in parts), min(p.applied for p in parts)
    return Answer(ids, distances, labels, steps, values, generation, applied, min(p.recall for p in parts))
