"""Interface of the mining server to a method that mines over the whole training set: part of the method contract."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, Int64
from torch import Tensor

# The classes that a search returns: all | all but the query's | only the query's.
ClassFilter = Literal["all", "other", "same"]


@dataclass(frozen=True)
class MiningRequirements:
    """The parts of the mining server that a method needs; see `Mining`.

    Attributes:
        table: Whether to keep the newest embedding of every sample, for searches.
        neighbours: k for which an approximate index is tuned.
        per_class, total: Bounds of a memory of past embeddings, first in, first out; both None: no memory.
    """

    table: bool = False
    neighbours: int = 10
    per_class: int | None = None
    total: int | None = None

    @property
    def memory(self) -> bool:
        return self.per_class is not None or self.total is not None


@runtime_checkable
class SearchResult(Protocol):
    """The nearest neighbours of each query, nearest first.

    Attributes:
        ids: Positions of the neighbours in `Context.labels`; -1 where there are fewer than k.
        distances: Squared Euclidean distances, float64; inf where there are fewer than k.
        labels: Classes of the neighbours; -1 where there are fewer than k.
        steps: Steps at which their embeddings were put; -1 where there are fewer than k.
        embeddings: Their embeddings, float32 [queries, k, dim], if requested; zeros where there are fewer than k.
    """

    @property
    def ids(self) -> Int64[np.ndarray, "queries k"]: ...

    @property
    def distances(self) -> Float64[np.ndarray, "queries k"]: ...

    @property
    def labels(self) -> Int64[np.ndarray, "queries k"]: ...

    @property
    def steps(self) -> Int64[np.ndarray, "queries k"]: ...

    @property
    def embeddings(self) -> Float[np.ndarray, "queries k dim"] | None: ...


@runtime_checkable
class Memory(Protocol):
    """Past embeddings, on this rank's device: constants, in no particular order."""

    @property
    def features(self) -> Float[Tensor, "entries dim"]: ...

    @property
    def classes(self) -> Collection[int]:
        """Classes that have entries."""
        ...

    @property
    def labels(self) -> Int64[Tensor, " entries"]: ...

    @property
    def ids(self) -> Int64[Tensor, " entries"]: ...


@runtime_checkable
class Mining(Protocol):
    """Embeddings of the whole training set, kept by the mining server; every rank makes the same calls and gets the same.

    A sample's id is its position in `Context.labels`. A search reflects every `put` before it (consistency `exact`), or
    those that have arrived (`async`).
    """

    @property
    def memory(self) -> Memory | None:
        """The memory of past embeddings, if the method requires it; after `put` it contains the batch."""
        ...

    def put(
        self,
        ids: Int64[Tensor, " rows"],
        embeddings: Float[Tensor, "rows dim"],
        labels: Int64[Tensor, " rows"],
        tag: str = "",
    ) -> None:
        """Stores embeddings, as constants, in the table and the memory (those of the two that the method requires).

        Args:
            ids, embeddings, labels: The rows; at most some thousands per call.
            tag: Origin of the embeddings (epoch, weights), for `all_neighbours`.
        """
        ...

    def neighbours(self, k: int, **ask: Any) -> SearchResult:
        """The k nearest rows of the table.

        Args:
            k: Number of neighbours.
            embeddings: Query embeddings [queries, dim]; or
            ids: Samples whose stored embeddings are the queries. A sample is left out of its own result.
            labels: Classes of the queries, where `embeddings` are given and `class_filter` is not "all".
            class_filter: "all" classes, classes "other" than the query's, or the "same" class.
            with_embeddings: Whether to return the embeddings of the neighbours.
            missing: For ids without a stored embedding: "error", or "empty" for a result without neighbours.
        """
        ...

    def prefetch(self, name: str, k: int, **ask: Any) -> None:
        """Starts a search for the next step, with the arguments of `neighbours`; its result survives a restart of the run."""
        ...

    def take_prefetched(self, name: str) -> SearchResult | None:
        """The result of the last `prefetch` of that name, once; None if there is none."""
        ...

    def all_neighbours(
        self,
        k: int,
        class_filter: ClassFilter = "all",
        map_block: Callable[[Any, Any], Any] | None = None,
        tag: str = "",
        approximate: bool = False,
    ) -> tuple[Int64[np.ndarray, " rows"], list[Any], float]:
        """The neighbours of all rows of the table: (ids, [neighbours], recall); with `map_block`, its result for each block.

        Args:
            k: Number of neighbours.
            class_filter: As in `neighbours`.
            map_block: A function of (queries, neighbours) that the server calls for each block; only its result is sent.
                Queries have `ids`, `values` and `labels`; neighbours have `ids` and `distances`, as `SearchResult`.
            tag: The tag that every row must have been put with, since the last put with another; "": any.
            approximate: Use an approximate index (`mining.engine`, `mining.recall`); else exact.

        Raises:
            UserError: Rows have another tag.
        """
        ...
