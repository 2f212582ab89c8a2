"""The mining server: table, index and memory of one run, in plain Python; `actor.py` wraps it, tests use it as it is.

Operations arrive in the order in which the run's leader sent them, and are applied in that order: each names the one
before it and waits for it. So the answer to a search reflects exactly the puts that were sent before it. A search that
names none (consistency `async`) does not wait, and reads what is there.

An index is built beside the one in use, from a copy of the rows, in a thread of its own; a search uses the newest
generation that is declared for its step, and waits for one that is still being built only where it is declared.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from methods.mining import ClassFilter
from pipeline.errors import RunError, UserError
from pipeline.mining.embedding_table import Table
from pipeline.mining.faiss_index import Index, all_lists, build, lists
from pipeline.mining.index_builds import IndexBuild, IndexBuilds
from pipeline.mining.locks import ReadersWriter
from pipeline.mining.memory import Delta, EmbeddingMemory
from pipeline.mining.messages import Batch, SearchRequest, SearchResponse, SequenceNumber, ServerSpec
from pipeline.mining.snapshot import Header, Tag, read, write
from pipeline.neighbours.exact_search import Neighbours, Queries, Rows, as_queries, rerank, search, search_all
from pipeline.storage import Folder


class MiningServer:
    """One shard of a run's mining state. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.incarnation = self.life = 0
        self.spec: ServerSpec | None = None
        self._order = threading.Condition()
        self._turns = ReadersWriter()
        self._reset()

    def _reset(self) -> None:
        self.applied = 0
        self._table: Table | None = None
        self._memory: EmbeddingMemory | None = None
        self._generations = IndexBuilds(self.spec) if self.spec is not None else None
        self._tag = Tag()
        self._puts = 0
        self._lists = threading.Lock()
        self._list_index: tuple[tuple[int, int], Index | None, float] | None = None  # of (puts, k); its recall

    # ---- life ----------------------------------------------------------------------------------------------------

    def begin(self, spec: ServerSpec, incarnation: int, snapshot: str | None, applied: int = 0, life: int = 0) -> None:
        """Takes up a run: the state becomes exactly that of `snapshot` (a folder that `save` wrote), or empty.

        Args:
            spec: of the run.
            incarnation: start of the run; operations of older ones are refused from now on.
            snapshot: folder URI, or none.
            applied: number of the operation that the snapshot was.
            life: how often this start has begun before; operations of earlier lives are refused too.

        Raises:
            RunError: a newer start of the run has taken the server over.
            UserError: the snapshot is damaged, or of another run or dimension.
        """
        with self._order:
            if self.spec is not None and spec.run != self.spec.run:
                raise UserError(f"this mining server belongs to run {self.spec.run}, not to {spec.run}")
            if incarnation < self.incarnation:
                raise RunError(_superseded(incarnation, self.incarnation))
            self.incarnation, self.life = incarnation, life
            self.spec = spec
            self._reset()
            with self._turns.write():
                self._table = Table(spec.dim, spec.dtype, spec.capacity)
                if spec.per_class is not None or spec.total is not None:
                    dtype = getattr(torch, spec.memory_dtype)
                    self._memory = EmbeddingMemory(spec.dim, spec.per_class, spec.total, dtype)
                if snapshot is not None:
                    self._restore(Folder(snapshot), spec)
            self.applied = applied
            self._order.notify_all()

    def status(self) -> dict[str, Any]:
        """Id of the process, incarnation, applied, and what is stored."""
        table, memory = self._table, self._memory
        generations = self._generations.all if self._generations is not None else []
        newest = next((g.report for g in reversed(generations) if g.report is not None), None)
        return {
            "pid": os.getpid(), "incarnation": self.incarnation, "applied": self.applied,
            "rows": len(table) if table is not None else 0, "table_bytes": table.nbytes if table is not None else 0,
            "memory": len(memory) if memory is not None else 0, "index": newest,
            "building": sum(not g.ready.is_set() for g in generations),
        }  # fmt: skip

    @contextmanager
    def _turn(self, order: SequenceNumber | None) -> Iterator[bool]:
        """Runs the block when everything before `order` has been applied; False: it has been applied itself before."""
        if order is None:
            yield True
            return
        with self._order:
            self._check(order)
            due = self._order.wait_for(
                lambda: self.applied >= order.previous or not self._from_current_client(order), self._spec.wait_s
            )
            self._check(order)
            if not due:
                raise RunError(
                    f"mining operation {order.number} waited {self._spec.wait_s:g} s for {order.previous}, the newest applied is "
                    f"{self.applied}: raise mining.deadline_s, or look at the leader's log"
                )
            first = self.applied < order.number
        try:
            yield first
        finally:  # a refused operation counts as applied: those after it go on
            with self._order:
                if self._from_current_client(order):
                    self.applied = max(self.applied, order.number)
                    self._order.notify_all()

    def _check(self, order: SequenceNumber) -> None:
        if self.spec is None:
            raise RunError("the mining server has not begun a run")
        if not self._from_current_client(order):
            raise RunError(_superseded(order.incarnation, self.incarnation))

    def _from_current_client(self, order: SequenceNumber) -> bool:
        return (order.incarnation, order.life) == (self.incarnation, self.life)

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

    # ---- what changes state --------------------------------------------------------------------------------------

    def put(self, order: SequenceNumber, step: int, table: Batch | None, memory: Batch | None, tag: str = "") -> int:
        """Stores a batch in the table (overwriting), appends one to the memory; the second time, nothing happens.

        Args:
            step: of training.
            table, memory: what is put there.
            tag: whose embeddings these are, for lists of all rows that must be of one origin.

        Returns:
            The operation's number.
        """
        with self._turn(order) as first:
            if first:
                with self._turns.write():
                    if table is not None:
                        self.table.put(*table, step)
                        self._puts, self._list_index = self._puts + 1, None
                        self._tag = Tag(tag, step)
                    if memory is not None:
                        ids, embeddings, labels = (torch.from_numpy(np.array(a)) for a in memory)
                        self.memory.append(embeddings, labels, ids)
        return order.number

    def rebuild(self, order: SequenceNumber, generation: int, step: int, from_step: int, base: str | None) -> int:
        """Starts building an index of the present rows, for searches of `from_step` and later.

        Args:
            generation: its number, above all before.
            step: of training, now: what earlier steps alone could use is dropped.
            base: folder to save the rows in, from which the same index can be built again after a restart.
        """
        with self._turn(order) as first:
            if first:
                with self._turns.read():
                    self.generations.start(generation, step, from_step, base, self.table.view())
        return order.number

    # ---- what reads ----------------------------------------------------------------------------------------------

    def search(self, order: SequenceNumber | None, ask: SearchRequest) -> SearchResponse:
        """Answers a search; see `SearchRequest` and `SearchResponse`.

        Raises:
            UserError: k below 1, another dimension, queries that are not finite, unknown ids, classes missing.
        """
        with self._turn(order), self._turns.read():
            _check_k(ask.k)
            queries, known = self._queries(ask)
            generation = self.generations.declared(ask.step, wait=order is not None)
            found = self._search(queries, ask.k, ask.which, generation)
            if known is not None:
                found.ids[~known], found.distances[~known] = -1, np.inf
            return self._answer(found, ask.with_values, generation)

    def _queries(self, ask: SearchRequest) -> tuple[Queries, np.ndarray | None]:
        if ask.values is None and ask.ids is None:
            raise UserError("a search needs values or ids")
        if ask.values is not None:
            values = np.asarray(ask.values, np.float32)
            if values.ndim != 2 or values.shape[1] != self.table.dim:
                raise UserError(f"got queries {values.shape}: expected rows of {self.table.dim} numbers")
            if not np.isfinite(values).all():
                raise UserError("queries are not finite: lower the learning rate, or look at these images")
            ids = np.full(len(values), -1, np.int64) if ask.ids is None else ask.ids
            return Queries(values, ids, ask.labels), None
        assert ask.ids is not None
        known = self.table.has(ask.ids)
        if ask.unknown == "error" or known.all():
            values, labels, _ = self.table.get(ask.ids)
        else:
            values, labels = np.zeros((len(ask.ids), self.table.dim), np.float32), np.full(len(ask.ids), -1, np.int64)
            values[known], labels[known], _ = self.table.get(ask.ids[known])
        return Queries(values, ask.ids, labels if ask.labels is None else ask.labels), known

    def _search(self, queries: Queries, k: int, which: ClassFilter, generation: IndexBuild | None) -> Neighbours:
        rows = self.table.view()
        index = generation.index if generation is not None else None
        if index is None or which == "same":
            return search(queries, rows, k, which)
        found = rerank(queries, rows, index.candidates(queries.values, k, which), k, which)
        if len(rows) > index.rows:  # rows that came after the build
            new = Rows(rows.values[index.rows :], rows.ids[index.rows :], rows.labels[index.rows :], rows.largest)
            found = Neighbours.merge([found, search(queries, new, k, which)])
        short = np.flatnonzero(found.ids[:, -1] < 0)
        if len(short):  # the index proposed too few of the wanted classes
            exact = search(queries[short], rows, k, which)
            found.ids[short], found.distances[short] = exact.ids, exact.distances
        return found

    def _answer(self, found: Neighbours, with_values: bool, generation: IndexBuild | None) -> SearchResponse:
        there = found.ids >= 0
        labels, steps = np.full(found.ids.shape, -1, np.int64), np.full(found.ids.shape, -1, np.int64)
        stored = None
        if with_values:
            stored = np.zeros((*found.ids.shape, self.table.dim), np.float32)
            stored[there], labels[there], steps[there] = self.table.get(found.ids[there])
        else:
            labels[there], steps[there] = self.table.about(found.ids[there])
        number, recall = 0, 1.0
        if generation is not None and generation.index is not None:
            number, recall = generation.number, generation.index.report.recall
        return SearchResponse(found.ids, found.distances, labels, steps, stored, number, self.applied, recall)

    def search_lists(
        self, order: SequenceNumber | None, ask: SearchRequest, approximate: bool
    ) -> tuple[Neighbours, float]:
        """The lists of some rows of any shard, and the recall of the index that proposed them (1: exact)."""
        with self._turn(order), self._turns.read():
            queries, rows = self._queries(ask)[0], self.table.view()
            index, recall = self._index_of_all(ask.k, ask.which) if approximate else (None, 1.0)
            return lists(queries, rows, index, ask.k, ask.which), recall

    def _index_of_all(self, k: int, which: ClassFilter) -> tuple[Index | None, float]:
        """An index of the present rows, built when first asked for after a put."""
        if which == "same":
            return None, 1.0  # members of a class are found without one
        with self._lists:
            key = (self._puts, k)
            if self._list_index is None or self._list_index[0] != key:
                self._list_index = None
                s = self._spec
                index, report = build(self.table.view(), s.engine, k, s.target, s.seed, s.threads)
                self._list_index = (key, index, report.recall)
            return self._list_index[1:]

    def fetch(
        self, order: SequenceNumber | None, ids: Int64[np.ndarray, " some"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which of the ids are here, and their embeddings and labels (of these only)."""
        with self._turn(order), self._turns.read():
            known = self.table.has(ids)
            values, labels, _ = self.table.get(ids[known])
            return known, values, labels

    def all_ids(self, order: SequenceNumber | None, tag: str = "") -> np.ndarray:
        """Ids of all rows, in the order in which they came; see `all_neighbours` for the tag."""
        with self._turn(order), self._turns.read():
            self._check_tag(tag)
            return self.table.view().ids.copy()

    def _check_tag(self, tag: str) -> None:
        if not tag:
            return
        if self._tag.name != tag:
            raise UserError(
                f"lists of {tag!r} were asked for, but the table holds embeddings of {self._tag.name or 'training steps'!r}: "
                "put those of all samples first"
            )
        old = int((self.table.state()["steps"] != self._tag.step).sum())
        if old:
            raise UserError(
                f"lists of {tag!r} were asked for, but {old} of {len(self.table)} rows are older: put those of all samples first"
            )

    def all_neighbours(
        self,
        order: SequenceNumber | None,
        k: int,
        which: ClassFilter = "all",
        reduce: Callable[[Queries, Neighbours], Any] | None = None,
        tag: str = "",
        approximate: bool = False,
    ) -> tuple[list[tuple[np.ndarray, Any]], float]:
        """The lists of all rows, ([(ids, lists)] in blocks, recall), or what `reduce` makes of each block.

        Args:
            k: length of a list.
            which: classes searched.
            reduce: called with each block's queries and lists; only its result is returned.
            tag: that all rows must have been put with, since the last other put; "": any.
            approximate: through an index of the engine, if it reaches the recall; else exact, each pair compared once.

        Raises:
            UserError: k below 1, or rows of another tag.
        """
        with self._turn(order), self._turns.read():
            _check_k(k)
            self._check_tag(tag)
            rows, out = self.table.view(), []
            index, recall = self._index_of_all(k, which) if approximate and len(rows) else (None, 1.0)
            found = search_all(rows, k, which) if index is None else all_lists(rows, index, k, which)
            for part, lists in found:
                queries = as_queries(rows, part)
                out.append((queries.ids.copy(), lists if reduce is None else reduce(queries, lists)))
            self._list_index = None
            return out, recall

    def delta(self, order: SequenceNumber | None, since: int) -> Delta:
        """What a mirror of the memory lacks; see `EmbeddingMemory.delta`."""
        with self._turn(order), self._turns.read():
            return self.memory.delta(since)

    # ---- snapshots -----------------------------------------------------------------------------------------------

    def save(self, order: SequenceNumber, folder: str) -> dict[str, str]:
        """Writes what cannot be derived into this shard's part of a snapshot; returns the checksum of every file.

        An index is never written: its rows are (`rebuild`'s base), where it was built from others than the present ones.
        """
        with self._turn(order), self._turns.read():
            spec = self._spec
            memory = self._memory.state() if self._memory is not None else None
            return write(
                Folder(folder),
                Header(spec.run, spec.dim, spec.shard, spec.shards),
                self.table.state(),
                memory,
                self.generations.saved(),
                self._tag,
            )

    def _restore(self, folder: Folder, spec: ServerSpec) -> None:
        """Takes this shard's rows from a snapshot, whatever the number of shards that wrote it."""
        saved = read(folder, Header(spec.run, spec.dim, spec.shard, spec.shards))
        self._table, self._tag = Table.restore(saved.table, spec.capacity), saved.tag
        if self._memory is not None and saved.memory is not None:
            self._memory.load(saved.memory)
        for built, base in saved.built:
            self.generations.restore(built, base)


def _check_k(k: int) -> None:
    if k < 1:
        raise UserError(f"k is {k}: expected at least 1 neighbour")


def _superseded(old: int, new: int) -> str:
    return f"start {old} of the run spoke to its mining server, which start {new} has taken over: this one stops"
