"""What clients and servers of the mining say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from methods.mining import ClassFilter
from pipeline.mining.faiss_index import Engine

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # sample ids [rows], embeddings [rows, dim], labels [rows]


@dataclass(frozen=True)
class ServerSpec:
    """What a run wants of its mining server; the same from one start of the run to the next.

    Attributes:
        run: whose state it is: run folder and trial.
        dim: D of embeddings.
        shard, shards: which of how many servers this is.
        capacity: rows expected in this shard's table.
        dtype: of the table.
        engine, k, target, seed: of the index; see `faiss_index.build`.
        threads: for searches, and for building an index.
        per_class, total: bounds of the memory; none of them: no memory.
        memory_dtype: of its entries.
        wait_s: how long a request waits for those before it.
    """

    run: str
    dim: int
    capacity: int = 2**16
    dtype: str = "float32"
    engine: Engine = "auto"
    k: int = 10
    target: float = 0.95
    seed: int = 0
    threads: int = 1
    per_class: int | None = None
    total: int | None = None
    memory_dtype: str = "float32"
    wait_s: float = 120.0
    shard: int = 0
    shards: int = 1


@dataclass(frozen=True)
class SequenceNumber:
    """Where a request stands among those of its client.

    Attributes:
        incarnation, life: start of the run that sent it, and how often that has begun anew after a server's death.
        number: of the request.
        previous: that it comes after.
    """

    incarnation: int
    number: int
    previous: int
    life: int = 0


@dataclass(frozen=True)
class SearchRequest:
    """A search.

    Attributes:
        k: neighbours wanted.
        step: of training, for which it is asked: declares the index generation.
        values: float32 [queries, dim]; none: the stored embeddings of `ids`.
        ids: sample of each query, left out of its answer; -1: none.
        labels: class of each query; none: those stored with `ids`.
        which: classes searched.
        with_values: whether to return the found embeddings.
        unknown: what to do for ids that have no stored embedding, where `values` is none.
    """

    k: int
    step: int
    values: Float[np.ndarray, "queries dim"] | None = None
    ids: Int64[np.ndarray, " queries"] | None = None
    labels: Int64[np.ndarray, " queries"] | None = None
    which: ClassFilter = "all"
    with_values: bool = False
    unknown: str = "error"


@dataclass(frozen=True)
class SearchResponse:
    """What a search found.

    Attributes:
        ids, distances: as in `Neighbours`.
        labels: classes of the found rows; -1 where there is none.
        steps: at which they were put; -1 where there is none.
        values: their embeddings, float32 [queries, k, dim]; zeros where there is none; none if not asked for.
        generation: of the index that proposed them; 0: exact search.
        applied: number of the newest operation that it reflects.
        recall: of that index, as measured when it was built; 1 for exact search.
    """

    ids: Int64[np.ndarray, "queries k"]
    distances: np.ndarray
    labels: Int64[np.ndarray, "queries k"]
    steps: Int64[np.ndarray, "queries k"]
    values: np.ndarray | None
    generation: int
    applied: int
    recall: float = 1.0


class AllNeighbours(NamedTuple):
    """Lists of all rows.

    Attributes:
        ids: of the rows, in the order of the blocks one after the other; ascending if there is no `reduce`.
        blocks: [lists], a single block in the order of `ids`; with `reduce`, what it made of each block.
        recall: of the index that proposed them; 1: exact.
    """

    ids: Int64[np.ndarray, " rows"]
    blocks: list[Any]
    recall: float


def merge_answers(parts: list[SearchResponse]) -> SearchResponse:
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
    return SearchResponse(ids, distances, labels, steps, values, generation, applied, min(p.recall for p in parts))
