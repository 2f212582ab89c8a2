"""The mining server: table, index and memory of one run, in plain Python; `actor.py` makes a Ray actor of it.

Requests are applied in the order in which rank 0 sent them (`request_order.py`). So the response to a search reflects
exactly the puts that were sent before it. A search without a sequence number (consistency `async`) does not wait, and
reads the present rows.

An index is built beside the one in use, from a copy of the rows, in a thread of its own; a search uses the newest index
for its step, and waits for one that is still being built only if the index is due at that step.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from methods.mining import ClassFilter
from pipeline.errors import RunError, UserError
from pipeline.mining.embedding_table import Table
from pipeline.mining.faiss_index import Index, all_neighbour_lists, build, neighbour_lists
from pipeline.mining.index_builds import IndexBuild, IndexBuilds
from pipeline.mining.locks import ReadersWriter
from pipeline.mining.memory import EmbeddingMemory, MemoryChanges
from pipeline.mining.messages import Batch, SearchRequest, SearchResponse, SequenceNumber, ServerSpec
from pipeline.mining.request_order import RequestOrder
from pipeline.mining.snapshot import Header, Tag, read, write
from pipeline.neighbours.exact_search import Neighbours, Queries, Rows, as_queries, rerank, search, search_all
from pipeline.storage import Folder


class MiningServer:
    """One shard of a run's mining state. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.spec: ServerSpec | None = None
        self._requests = RequestOrder()
        self._state_lock = ReadersWriter()
        self._reset()

    def _reset(self) -> None:
        self._table: Table | None = None
        self._memory: EmbeddingMemory | None = None
        self._generations = IndexBuilds(self.spec) if self.spec is not None else None
        self._tag = Tag()
        self._num_puts = 0
        self._list_index_lock = threading.Lock()
        # ((puts, k) when it was built, index, recall): for lists of all rows
        self._list_index: tuple[tuple[int, int], Index | None, float] | None = None

    # ---- start ---------------------------------------------------------------------------------------------------

    def begin(
        self, spec: ServerSpec, incarnation: int, snapshot: str | None, applied: int = 0, server_epoch: int = 0
    ) -> None:
        """Sets the server up for a run: the state becomes that of `snapshot` (a folder that `save` wrote), or empty.

        Args:
            spec: The specification of the server.
            incarnation: Number of the start of the run; requests of earlier ones are refused from now on.
            snapshot: URI of the folder, or None.
            applied: Number of the request that wrote the snapshot.
            server_epoch: How often this start of the run has called `begin`; requests of earlier epochs are refused.

        Raises:
            RunError: A newer start of the run owns the server.
            UserError: The snapshot is damaged, or belongs to another run or has another dimension.
        """
        with self._requests.held():
            if self.spec is not None and spec.run != self.spec.run:
                raise UserError(f"this mining server belongs to run {self.spec.run}, not to {spec.run}")
            self._requests.restart(incarnation, server_epoch, spec.wait_s)
            self.spec = spec
            self._reset()
            with self._state_lock.write():
                self._table = Table(spec.dim, spec.dtype, spec.capacity)
                if spec.per_class is not None or spec.total is not None:
                    dtype = getattr(torch, spec.memory_dtype)
                    self._memory = EmbeddingMemory(spec.dim, spec.per_class, spec.total, dtype)
                if snapshot is not None:
                    self._restore(Folder(snapshot), spec)
            self._requests.applied = applied

    def status(self) -> dict[str, Any]:
        """Host and process id, start of the run, newest applied request, and the sizes of table, memory and index."""
        table, memory = self._table, self._memory
        builds = self._generations.all if self._generations is not None else []
        newest_report = next((g.report for g in reversed(builds) if g.report is not None), None)
        return {
            "host": socket.gethostname(), "pid": os.getpid(), "incarnation": self._requests.incarnation, "applied": self._requests.applied,
            "rows": len(table) if table is not None else 0, "table_bytes": table.nbytes if table is not None else 0,
            "memory": len(memory) if memory is not None else 0, "index": newest_report,
            "building": sum(not g.ready.is_set() for g in builds),
        }  # fmt: skip

    @property
    def _spec(self) -> ServerSpec:
        assert self.spec is not None
        return self.spec

    @property
    def table(self) -> Table:
        if self._table is None:
            raise RunError("the mining server has not begun a run")
        return self._table

    @property
    def generations(self) -> IndexBuilds:
        if self._generations is None:
            raise RunError("the mining server has not begun a run")
        return self._generations

    @property
    def memory(self) -> EmbeddingMemory:
        if self._memory is None:
            raise UserError("this run keeps no memory: give per_class or total")
        return self._memory

    # ---- requests that change the state --------------------------------------------------------------------------

    def put(self, order: SequenceNumber, step: int, table: Batch | None, memory: Batch | None, tag: str = "") -> int:
        """Writes a batch to the table (overwriting) and appends one to the memory; a repeated request does nothing.

        Args:
            order: The sequence number.
            step: The training step.
            table, memory: The batches for the table and the memory.
            tag: The origin of the embeddings; `all_neighbours` checks that all rows have the same.

        Returns:
            The number of the request.
        """
        with self._requests.in_order(order) as first_time:
            if first_time:
                with self._state_lock.write():
                    if table is not None:
                        self.table.put(*table, step)
                        self._num_puts += 1
                        self._list_index = None
                        self._tag = Tag(tag, step)
                    if memory is not None:
                        ids, embeddings, labels = (torch.from_numpy(np.array(a)) for a in memory)
                        self.memory.append(embeddings, labels, ids)
        return order.number

    def rebuild(self, order: SequenceNumber, generation: int, step: int, from_step: int, base: str | None) -> int:
        """Starts building an index of the present rows, for searches of `from_step` and later.

        Args:
            order: The sequence number.
            generation: Number of the index, greater than all before.
            step: The present training step: indexes that only earlier steps could use are dropped.
            from_step: The first step whose searches use the index.
            base: Folder to save the rows in, from which the same index can be rebuilt after a restart.
        """
        with self._requests.in_order(order) as first_time:
            if first_time:
                with self._state_lock.read():
                    self.generations.start(generation, step, from_step, base, self.table.view())
        return order.number

    # ---- requests that read --------------------------------------------------------------------------------------

    def search(self, order: SequenceNumber | None, request: SearchRequest) -> SearchResponse:
        """Answers a search; see `SearchRequest` and `SearchResponse`.

        Raises:
            UserError: k is below 1, the dimension differs, queries are not finite, ids are not stored, or labels are missing.
        """
        with self._requests.in_order(order), self._state_lock.read():
            _check_k(request.k)
            queries, is_stored = self._queries(request)
            index_build = self.generations.for_step(request.step, wait=order is not None)
            neighbours = self._search(queries, request.k, request.class_filter, index_build)
            if is_stored is not None:
                neighbours.ids[~is_stored] = -1
                neighbours.distances[~is_stored] = np.inf
            return self._response(neighbours, request.with_embeddings, index_build)

    def _queries(self, request: SearchRequest) -> tuple[Queries, np.ndarray | None]:
        if request.embeddings is None and request.ids is None:
            raise UserError("a search needs embeddings or ids")
        if request.embeddings is not None:
            embeddings = np.asarray(request.embeddings, np.float32)
            if embeddings.ndim != 2 or embeddings.shape[1] != self.table.dim:
                raise UserError(f"got queries {embeddings.shape}: expected rows of {self.table.dim} numbers")
            if not np.isfinite(embeddings).all():
                raise UserError("queries are not finite: lower the learning rate, or inspect these images")
            ids = np.full(len(embeddings), -1, np.int64) if request.ids is None else request.ids
            return Queries(embeddings, ids, request.labels), None
        assert request.ids is not None
        is_stored = self.table.contains(request.ids)
        if request.missing == "error" or is_stored.all():
            embeddings, labels, _ = self.table.get(request.ids)
        else:
            embeddings = np.zeros((len(request.ids), self.table.dim), np.float32)
            labels = np.full(len(request.ids), -1, np.int64)
            embeddings[is_stored], labels[is_stored], _ = self.table.get(request.ids[is_stored])
        return Queries(embeddings, request.ids, labels if request.labels is None else request.labels), is_stored

    def _search(
        self, queries: Queries, k: int, class_filter: ClassFilter, index_build: IndexBuild | None
    ) -> Neighbours:
        rows = self.table.view()
        index = index_build.index if index_build is not None else None
        if index is None or class_filter == "same":
            return search(queries, rows, k, class_filter)
        neighbours = rerank(queries, rows, index.candidates(queries.values, k, class_filter), k, class_filter)
        if len(rows) > index.rows:  # rows that came after the build
            newer_rows = Rows(
                rows.values[index.rows :], rows.ids[index.rows :], rows.labels[index.rows :], rows.largest
            )
            neighbours = Neighbours.merge([neighbours, search(queries, newer_rows, k, class_filter)])
        incomplete = np.flatnonzero(neighbours.ids[:, -1] < 0)
        if len(incomplete):  # the index proposed too few of the wanted classes
            exact_neighbours = search(queries[incomplete], rows, k, class_filter)
            neighbours.ids[incomplete] = exact_neighbours.ids
            neighbours.distances[incomplete] = exact_neighbours.distances
        return neighbours

    def _response(
        self, neighbours: Neighbours, with_embeddings: bool, index_build: IndexBuild | None
    ) -> SearchResponse:
        is_row = neighbours.ids >= 0
        labels = np.full(neighbours.ids.shape, -1, np.int64)
        steps = np.full(neighbours.ids.shape, -1, np.int64)
        embeddings = None
        if with_embeddings:
            embeddings = np.zeros((*neighbours.ids.shape, self.table.dim), np.float32)
            embeddings[is_row], labels[is_row], steps[is_row] = self.table.get(neighbours.ids[is_row])
        else:
            labels[is_row], steps[is_row] = self.table.labels_and_steps(neighbours.ids[is_row])
        build_number, recall = 0, 1.0
        if index_build is not None and index_build.index is not None:
            build_number, recall = index_build.number, index_build.index.report.recall
        return SearchResponse(
            neighbours.ids,
            neighbours.distances,
            labels,
            steps,
            embeddings,
            build_number,
            self._requests.applied,
            recall,
        )

    def search_lists(
        self, order: SequenceNumber | None, request: SearchRequest, approximate: bool
    ) -> tuple[Neighbours, float]:
        """The neighbours of some rows of any shard, and the recall of the index that proposed them (1: exact)."""
        with self._requests.in_order(order), self._state_lock.read():
            queries, rows = self._queries(request)[0], self.table.view()
            index, recall = self._index_of_present_rows(request.k, request.class_filter) if approximate else (None, 1.0)
            return neighbour_lists(queries, rows, index, request.k, request.class_filter), recall

    def _index_of_present_rows(self, k: int, class_filter: ClassFilter) -> tuple[Index | None, float]:
        """An index of the present rows, built by the first call after a put."""
        if class_filter == "same":
            return None, 1.0  # members of a class are found without an index
        with self._list_index_lock:
            key = (self._num_puts, k)
            if self._list_index is None or self._list_index[0] != key:
                self._list_index = None
                spec = self._spec
                index, report = build(self.table.view(), spec.engine, k, spec.target, spec.seed, spec.threads)
                self._list_index = (key, index, report.recall)
            return self._list_index[1:]

    def fetch(
        self, order: SequenceNumber | None, ids: Int64[np.ndarray, " some"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mask of the ids that this shard stores, and the embeddings and labels of those."""
        with self._requests.in_order(order), self._state_lock.read():
            is_stored = self.table.contains(ids)
            embeddings, labels, _ = self.table.get(ids[is_stored])
            return is_stored, embeddings, labels

    def all_ids(self, order: SequenceNumber | None, tag: str = "") -> np.ndarray:
        """Ids of all rows, in order of arrival; see `all_neighbours` for the tag."""
        with self._requests.in_order(order), self._state_lock.read():
            self._check_tag(tag)
            return self.table.view().ids.copy()

    def _check_tag(self, tag: str) -> None:
        if not tag:
            return
        if self._tag.name != tag:
            raise UserError(
                f"neighbours of {tag!r} were requested, but the table holds embeddings of "
                f"{self._tag.name or 'training steps'!r}: put the embeddings of all samples first"
            )
        num_outdated = int((self.table.state()["steps"] != self._tag.step).sum())
        if num_outdated:
            raise UserError(
                f"neighbours of {tag!r} were requested, but {num_outdated} of {len(self.table)} rows are older: put the "
                "embeddings of all samples first"
            )

    def all_neighbours(
        self,
        order: SequenceNumber | None,
        k: int,
        class_filter: ClassFilter = "all",
        map_block: Callable[[Queries, Neighbours], Any] | None = None,
        tag: str = "",
        approximate: bool = False,
    ) -> tuple[list[tuple[np.ndarray, Any]], float]:
        """The neighbours of all rows, ([(ids, neighbours)] in blocks, recall), or the results of `map_block`.

        Args:
            order: The sequence number.
            k: Number of neighbours.
            class_filter: The classes that are searched.
            map_block: Called with the queries and neighbours of each block; only its result is returned.
            tag: The tag that all rows must have been put with, since the last put with another; "": any.
            approximate: Use an index of the engine, if it reaches the recall; else exact, each pair compared once.

        Raises:
            UserError: k is below 1, or rows have another tag.
        """
        with self._requests.in_order(order), self._state_lock.read():
            _check_k(k)
            self._check_tag(tag)
            rows, results = self.table.view(), []
            index, recall = self._index_of_present_rows(k, class_filter) if approximate and len(rows) else (None, 1.0)
            list_blocks = (
                search_all(rows, k, class_filter)
                if index is None
                else all_neighbour_lists(rows, index, k, class_filter)
            )
            for block, lists in list_blocks:
                queries = as_queries(rows, block)
                results.append((queries.ids.copy(), lists if map_block is None else map_block(queries, lists)))
            self._list_index = None
            return results, recall

    def changes_since(self, order: SequenceNumber | None, since: int) -> MemoryChanges:
        """Entries of the memory that a mirror lacks; see `EmbeddingMemory.changes_since`."""
        with self._requests.in_order(order), self._state_lock.read():
            return self.memory.changes_since(since)

    # ---- snapshots -----------------------------------------------------------------------------------------------

    def save(self, order: SequenceNumber, folder: str) -> dict[str, str]:
        """Writes this shard's part of a snapshot; returns the checksum of every file.

        Indexes are not written: they are rebuilt from their rows, which `rebuild` has saved.
        """
        with self._requests.in_order(order), self._state_lock.read():
            spec = self._spec
            memory = self._memory.state() if self._memory is not None else None
            return write(
                Folder(folder),
                Header(spec.run, spec.dim, spec.shard, spec.shards),
                self.table.state(),
                memory,
                self.generations.snapshot_entries(),
                self._tag,
            )

    def _restore(self, folder: Folder, spec: ServerSpec) -> None:
        """Reads this shard's rows from a snapshot, whatever the number of shards that wrote it."""
        restored = read(folder, Header(spec.run, spec.dim, spec.shard, spec.shards))
        self._table = Table.restore(restored.table, spec.capacity)
        self._tag = restored.tag
        if self._memory is not None and restored.memory is not None:
            self._memory.load(restored.memory)
        for saved_index, base_rows in restored.built:
            self.generations.restore(saved_index, base_rows)


def _check_k(k: int) -> None:
    if k < 1:
        raise UserError(f"k is {k}: expected at least 1 neighbour")
