"""Requests to the mining servers and their responses."""

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
    """Specification of a run's mining server; the same from one start of the run to the next.

    Attributes:
        run: The run folder, to which the state belongs.
        dim: Dimension D of the embeddings.
        shard, shards: Number of this server, and of all servers.
        capacity: Expected number of rows in this shard's table.
        dtype: Data type of the table.
        engine, k, target, seed: Arguments of the index; see `faiss_index.build`.
        threads: Number of threads for searches, and for building an index.
        per_class, total: Bounds of the memory; both None: no memory.
        memory_dtype: Data type of the memory's entries.
        wait_s: Longest time that a request waits for its predecessors.
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
    """Position of a request in its client's order.

    Attributes:
        incarnation: Number of the start of the run that sent it.
        number: Number of the request.
        previous: Number of the request that has to be applied before it.
        server_epoch: How often this start of the run has set the servers up again after a server's death.
    """

    incarnation: int
    number: int
    previous: int
    server_epoch: int = 0


@dataclass(frozen=True)
class SearchRequest:
    """A search for nearest neighbours.

    Attributes:
        k: Number of neighbours.
        step: The training step of the search; it decides which index is used.
        embeddings: Query embeddings, float32 [queries, dim]; None: the stored embeddings of `ids`.
        ids: Sample of each query, left out of its own result; -1: no sample.
        labels: Class of each query; None: the labels stored with `ids`.
        class_filter: The classes that are searched.
        with_embeddings: Whether to return the embeddings of the neighbours.
        missing: Treatment of ids without a stored embedding, where `embeddings` is None: "error", or "empty" results.
    """

    k: int
    step: int
    embeddings: Float[np.ndarray, "queries dim"] | None = None
    ids: Int64[np.ndarray, " queries"] | None = None
    labels: Int64[np.ndarray, " queries"] | None = None
    class_filter: ClassFilter = "all"
    with_embeddings: bool = False
    missing: str = "error"


@dataclass(frozen=True)
class SearchResponse:
    """The nearest neighbours of each query.

    Attributes:
        ids, distances: The neighbours, as in `Neighbours`.
        labels: Their classes; -1 where there are fewer than k.
        steps: The steps at which they were put; -1 where there are fewer than k.
        embeddings: Their embeddings, float32 [queries, k, dim], if requested; zeros where there are fewer than k.
        generation: Number of the index that proposed them; 0: exact search.
        applied: Number of the newest request that the response reflects.
        recall: Recall of that index, as measured when it was built; 1 for exact search.
    """

    ids: Int64[np.ndarray, "queries k"]
    distances: np.ndarray
    labels: Int64[np.ndarray, "queries k"]
    steps: Int64[np.ndarray, "queries k"]
    embeddings: np.ndarray | None
    generation: int
    applied: int
    recall: float = 1.0


class AllNeighbours(NamedTuple):
    """The neighbours of all rows.

    Attributes:
        ids: Sample ids of the rows, in the order of the concatenated blocks; ascending without `map_block`.
        blocks: A single `Neighbours` in the order of `ids`; with `map_block`, its result for each block.
        recall: Recall of the index that proposed the neighbours; 1 for exact search.
    """

    ids: Int64[np.ndarray, " rows"]
    blocks: list[Any]
    recall: float


def merge_responses(responses: list[SearchResponse]) -> SearchResponse:
    """The k nearest among the responses of all shards."""
    if len(responses) == 1:
        return responses[0]
    k = responses[0].ids.shape[1]
    ids, distances, labels, steps = (
        np.concatenate([getattr(r, name) for r in responses], 1) for name in ("ids", "distances", "labels", "steps")
    )
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    embeddings = None
    if responses[0].embeddings is not None:
        all_embeddings = np.concatenate([r.embeddings for r in responses if r.embeddings is not None], 1)
        embeddings = np.take_along_axis(all_embeddings, order[:, :, None], 1)
    ids, distances, labels, steps = (np.take_along_axis(a, order, 1) for a in (ids, distances, labels, steps))
    generation = min(r.generation for r in responses)
    applied = min(r.applied for r in responses)
    return SearchResponse(
        ids, distances, labels, steps, embeddings, generation, applied, min(r.recall for r in responses)
    )
