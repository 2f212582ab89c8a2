"""Calls of a run to its mining servers: storing batches, searches, indexes, the neighbours of all rows, snapshots.

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
from pipeline.mining.embedding_table import shard_of, validate_rows
from pipeline.mining.memory import MemoryChanges
from pipeline.mining.messages import AllNeighbours, SearchRequest, SearchResponse, merge_responses
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
        """Sends a batch to the table, the memory, or both; waits only while too many puts are unanswered.

        Args:
            ids, embeddings, labels: The rows.
            step: The training step.
            table, memory: Where the rows are stored.
            tag: The origin of the embeddings (epoch, weights); see `all_neighbours`.

        Raises:
            UserError: The dimension differs, or rows are not finite.
            RunError: The servers were unreachable beyond the deadline.
        """
        validate_rows(ids, embeddings, labels, self.spec.dim)
        owner = shard_of(ids, len(self.transports))
        calls: dict[int, tuple[Any, ...]] = {}
        for shard in range(len(self.transports)):
            members = np.flatnonzero(owner == shard)
            table_rows = (ids[members], embeddings[members], labels[members]) if table and len(members) else None
            memory_rows = (ids, embeddings, labels) if memory and shard == 0 else None  # the first shard has all of it
            if table_rows is not None or memory_rows is not None:
                calls[shard] = (step, table_rows, memory_rows, tag)
        if not calls:
            return
        while not self._free_puts.acquire(timeout=0.5):
            self.raise_if_failed()
        num_bytes = embeddings.nbytes + 16 * len(ids)
        request = Request("put", calls.__getitem__, _discard_results, logged=True, size=num_bytes, shards=tuple(calls))
        request.answer.add_done_callback(lambda _: self._free_puts.release())
        self.submit(request)

    def search(self, request: SearchRequest) -> Future[SearchResponse]:
        """Starts a search; see `SearchRequest`."""
        if len(self.transports) > 1 and request.embeddings is None and request.ids is not None:
            return self._search_by_id(request)
        return self.submit(Request("search", lambda _: (request,), merge_responses, ordered=self.ordered))

    def _search_by_id(self, request: SearchRequest) -> Future[SearchResponse]:
        """Two calls: the owners' embeddings of the ids, then the search with them in every shard."""
        assert request.ids is not None
        ids, dim = request.ids, self.spec.dim
        fetched: dict[str, Any] = {}

        def collect(results: list[Any]) -> None:
            embeddings = np.zeros((len(ids), dim), np.float32)
            labels = np.full(len(ids), -1, np.int64)
            is_stored = np.zeros(len(ids), bool)
            for in_shard, shard_embeddings, shard_labels in results:
                embeddings[in_shard], labels[in_shard] = shard_embeddings, shard_labels
                is_stored |= in_shard
            fetched.update(embeddings=embeddings, labels=labels, is_stored=is_stored)

        fetch_request = Request("fetch", lambda _: (ids,), collect, ordered=self.ordered)

        def arguments(_: int) -> tuple[Any, ...]:
            if request.missing == "error" and not fetched["is_stored"].all():
                return (request,)  # each server raises the error
            labels = fetched["labels"] if request.labels is None else request.labels
            return (replace(request, embeddings=fetched["embeddings"], labels=labels),)

        def merge(results: list[SearchResponse]) -> SearchResponse:
            response = merge_responses(results)
            not_stored = ~fetched["is_stored"]
            response.ids[not_stored] = -1
            response.distances[not_stored] = np.inf
            response.labels[not_stored] = -1
            response.steps[not_stored] = -1
            if response.embeddings is not None:
                response.embeddings[not_stored] = 0
            return response

        search_request = Request("search", arguments, merge, ordered=self.ordered)
        self.submit(fetch_request, search_request)
        return search_request.answer

    def rebuild(self, generation: int, step: int, from_step: int, base: str | None) -> None:
        """Starts building an index in every shard; see `MiningServer.rebuild`."""
        self.submit(
            Request(
                "rebuild",
                lambda shard: (generation, step, from_step, f"{base}-{shard}" if base is not None else None),
                _discard_results,
                logged=True,
            )
        )

    def all_neighbours(
        self,
        k: int,
        class_filter: ClassFilter = "all",
        map_block: Callable[[Queries, Neighbours], Any] | None = None,
        tag: str = "",
        approximate: bool = False,
    ) -> AllNeighbours:
        """Lists of all rows; see `MiningServer.all_neighbours` and `AllNeighbours`.

        Raises:
            UserError: Rows have another tag.
            RunError: The servers were unreachable beyond the deadline.
        """
        recall = 1.0
        if len(self.transports) == 1:
            blocks, recall = self._ordered(
                "all_neighbours", lambda r: r[0], k, class_filter, map_block, tag, approximate
            )
        else:
            blocks = []
            for ids in self._ordered("all_ids", list, tag):
                for start in range(0, len(ids), 2048):
                    queries = self._fetch(ids[start : start + 2048])
                    request = SearchRequest(k, 0, queries.values, queries.ids, queries.labels, class_filter)
                    lists, block_recall = self._ordered("search_lists", _merge_lists, request, approximate)
                    recall = min(recall, block_recall)
                    blocks.append((queries.ids, lists if map_block is None else map_block(queries, lists)))
        ids = np.concatenate([b[0] for b in blocks]) if blocks else np.empty(0, np.int64)
        if map_block is not None or not blocks:
            return AllNeighbours(ids, [b[1] for b in blocks], recall)
        order = np.argsort(ids)
        lists = Neighbours.concatenate([b[1] for b in blocks])
        return AllNeighbours(ids[order], [Neighbours(lists.ids[order], lists.distances[order])], recall)

    def _fetch(self, ids: np.ndarray) -> Queries:
        """The stored embeddings and labels of samples, wherever they are."""
        embeddings = np.zeros((len(ids), self.spec.dim), np.float32)
        labels = np.zeros(len(ids), np.int64)
        for in_shard, shard_embeddings, shard_labels in self._ordered("fetch", list, ids):
            embeddings[in_shard], labels[in_shard] = shard_embeddings, shard_labels
        return Queries(embeddings, ids, labels)

    def _ordered(self, method: str, merge: Callable[[list[Any]], Any], *arguments: Any) -> Any:
        """Calls every shard, in the order of the log and with the same arguments, and waits."""
        return self.wait(self.submit(Request(method, lambda _: arguments, merge)))

    def changes_since(self, since: int) -> MemoryChanges:
        """Entries of the memory that a mirror of version `since` lacks."""
        return self.wait(self.submit(Request("changes_since", lambda _: (since,), lambda r: r[0], shards=(0,))))

    def save(self, folder: str) -> dict[str, str]:
        """Writes a snapshot of every shard below `folder`; returns the checksums of its files."""
        return self.wait(self.submit(self.snapshot_request(folder)))

    def status(self) -> list[dict[str, Any]]:
        """Process id, progress and contents of every server."""
        return self.wait(self.submit(Request("status", lambda _: (), list, ordered=False)))


def _merge_lists(shard_results: list[tuple[Neighbours, float]]) -> tuple[Neighbours, float]:
    return Neighbours.merge([lists for lists, _ in shard_results]), min(recall for _, recall in shard_results)


def _discard_results(results: list[Any]) -> None:
    return None
