"""What a run asks of its mining servers: batches stored, searches, indexes, the neighbours of all rows, snapshots.

Rows are spread over the servers by a hash of their id; answers do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from methods.mining import ClassFilter
from pipeline.mining.embedding_table import check, shard_of
from pipeline.mining.memory import Delta
from pipeline.mining.messages import AllNeighbours, SearchRequest, SearchResponse, merge_answers
from pipeline.mining.request_log import Request, RequestLog
from pipeline.neighbours.exact_search import Neighbours, Queries


class MiningClient(RequestLog):
    """The calls of one run; each may be made from one thread, the run's. Arguments as those of `RequestLog`."""

    def put(
        self,
        ids: Int64[np.ndarray, " rows"],
        embeddings: Float[np.ndarray, "rows dim"],
        labels: Int64[np.ndarray, " rows"],
        step: int,
        table: bool = True,
        memory: bool = False,
        tag: str = "",
    ) -> None:
        """Sends a batch on its way, to the table, the memory, or both; waits only while too many are.

        Args:
            ids, embeddings, labels: of the rows.
            step: of training.
            table, memory: where they go.
            tag: what they are of; see `all_neighbours`.

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
                calls[shard] = (step, rows, whole, tag)
        if not calls:
            return
        while not self._slots.acquire(timeout=0.5):
            self.check()
        size = embeddings.nbytes + 16 * len(ids)
        request = Request("put", calls.__getitem__, _nothing, logged=True, size=size, shards=tuple(calls))
        request.answer.add_done_callback(lambda _: self._slots.release())
        self.submit(request)

    def ask(self, ask: SearchRequest) -> Future[SearchResponse]:
        """Starts a search; see `SearchRequest`."""
        if len(self.transports) > 1 and ask.values is None and ask.ids is not None:
            return self._ask_by_id(ask)
        return self.submit(Request("search", lambda _: (ask,), merge_answers, ordered=self.ordered))

    def _ask_by_id(self, ask: SearchRequest) -> Future[SearchResponse]:
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

        fetch = Request("fetch", lambda _: (ids,), collect, ordered=self.ordered)

        def arguments(_: int) -> tuple[Any, ...]:
            if ask.unknown == "error" and not found["known"].all():
                return (ask,)  # each server says so
            labels = found["labels"] if ask.labels is None else ask.labels
            return (replace(ask, values=found["values"], labels=labels),)

        def merge(results: list[SearchResponse]) -> SearchResponse:
            answer = merge_answers(results)
            none = ~found["known"]
            answer.ids[none], answer.distances[none], answer.labels[none], answer.steps[none] = -1, np.inf, -1, -1
            if answer.values is not None:
                answer.values[none] = 0
            return answer

        search = Request("search", arguments, merge, ordered=self.ordered)
        self.submit(fetch, search)
        return search.answer

    def rebuild(self, generation: int, step: int, from_step: int, base: str | None) -> None:
        """Starts building an index in every shard; see `MiningServer.rebuild`."""
        self.submit(
            Request(
                "rebuild",
                lambda shard: (generation, step, from_step, f"{base}-{shard}" if base is not None else None),
                _nothing,
                logged=True,
            )
        )

    def all_neighbours(
        self,
        k: int,
        which: ClassFilter = "all",
        reduce: Callable[[Queries, Neighbours], Any] | None = None,
        tag: str = "",
        approximate: bool = False,
    ) -> AllNeighbours:
        """Lists of all rows; see `MiningServer.all_neighbours` and `AllNeighbours`.

        Raises:
            UserError: rows of another tag.
            RunError: the servers have been away beyond the deadline.
        """
        recall = 1.0
        if len(self.transports) == 1:
            blocks, recall = self._ordered("all_neighbours", lambda r: r[0], k, which, reduce, tag, approximate)
        else:
            blocks = []
            for ids in self._ordered("all_ids", list, tag):
                for start in range(0, len(ids), 2048):
                    queries = self._fetch(ids[start : start + 2048])
                    ask = SearchRequest(k, 0, queries.values, queries.ids, queries.labels, which)
                    lists, found = self._ordered("search_lists", _merge_lists, ask, approximate)
                    recall = min(recall, found)
                    blocks.append((queries.ids, lists if reduce is None else reduce(queries, lists)))
        ids = np.concatenate([b[0] for b in blocks]) if blocks else np.empty(0, np.int64)
        if reduce is not None or not blocks:
            return AllNeighbours(ids, [b[1] for b in blocks], recall)
        order = np.argsort(ids)
        lists = Neighbours.concatenate([b[1] for b in blocks])
        return AllNeighbours(ids[order], [Neighbours(lists.ids[order], lists.distances[order])], recall)

    def _fetch(self, ids: np.ndarray) -> Queries:
        """The stored embeddings and labels of samples, wherever they are."""
        values, labels = np.zeros((len(ids), self.spec.dim), np.float32), np.zeros(len(ids), np.int64)
        for here, some, classes in self._ordered("fetch", list, ids):
            values[here], labels[here] = some, classes
        return Queries(values, ids, labels)

    def _ordered(self, method: str, merge: Callable[[list[Any]], Any], *arguments: Any) -> Any:
        """Calls every shard in its turn, with the same arguments, and waits."""
        return self.wait(self.submit(Request(method, lambda _: arguments, merge)))

    def delta(self, since: int) -> Delta:
        """What a mirror of the memory lacks."""
        return self.wait(self.submit(Request("delta", lambda _: (since,), lambda r: r[0], shards=(0,))))

    def save(self, folder: str) -> dict[str, str]:
        """Writes a snapshot of every shard below `folder`; returns the checksums of its files."""
        return self.wait(self.submit(self.saving(folder)))

    def status(self) -> list[dict[str, Any]]:
        """What every server holds."""
        return self.wait(self.submit(Request("status", lambda _: (), list, ordered=False)))


def _merge_lists(parts: list[tuple[Neighbours, float]]) -> tuple[Neighbours, float]:
    return Neighbours.merge([lists for lists, _ in parts]), min(recall for _, recall in parts)


def _nothing(results: list[Any]) -> None:
    return None
