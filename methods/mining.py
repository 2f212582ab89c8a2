"""What a method that mines over the whole training set asks for, and what the loop then offers it: part of the contract."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, Int64
from torch import Tensor

ClassFilter = Literal[
    "all", "other", "same"
]  # classes that a search looks at: every one | all but the query's | the query's


@dataclass(frozen=True)
class MiningRequirements:
    """What a method wants to be kept over the whole training set; see `Mining`.

    Attributes:
        table: the newest embedding of every sample that was put, and their neighbours.
        neighbours: k for which an approximate index is tuned.
        per_class, total: bounds of a memory of past embeddings, first in, first out; both none: no memory.
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
    """What a search found, nearest first.

    Attributes:
        ids: positions in `Context.labels` of the found samples; -1 where there are fewer than k.
        distances: squared Euclidean, float64; inf where there is none.
        labels: their classes; -1 where there is none.
        steps: at which their embeddings were put; -1 where there is none.
        embeddings: their embeddings, float32 [queries, k, dim], if asked for; zeros where there is none.
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
        """Of past embeddings, if the method asked for it; after `put` it holds the batch."""
        ...

    def put(
        self,
        ids: Int64[Tensor, " rows"],
        embeddings: Float[Tensor, "rows dim"],
        labels: Int64[Tensor, " rows"],
        tag: str = "",
    ) -> None:
        """Stores embeddings, as constants, in the table and the memory (those of the two that the method needs).

        Args:
            ids, embeddings, labels: of the rows; at most some thousands a call.
            tag: what they are of (epoch, weights), for `all_neighbours`.
        """
        ...

    def neighbours(self, k: int, **ask: Any) -> SearchResult:
        """The k nearest rows of the table.

        Args:
            k: how many.
            embeddings: queries [queries, dim]; or
            ids: the samples whose stored embeddings are the queries. A sample is left out of its own answer.
            labels: classes of the queries, where `embeddings` are given and `class_filter` is not "all".
            class_filter: "all" classes, "other" than the query's, or the "same".
            with_embeddings: whether to return the found embeddings.
            missing: for ids without a stored embedding: "error", or "empty" for an answer without neighbours.
        """
        ...

    def prefetch(self, name: str, k: int, **ask: Any) -> None:
        """Starts a search, as `neighbours`; its answer survives a restart of the run."""
        ...

    def take_prefetched(self, name: str) -> SearchResult | None:
        """The answer of the last `prefetch` of that name, once; none if there was none since."""
        ...

    def all_neighbours(
        self,
        k: int,
        class_filter: ClassFilter = "all",
        map_block: Callable[[Any, Any], Any] | None = None,
        tag: str = "",
        approximate: bool = False,
    ) -> tuple[Int64[np.ndarray, " rows"], list[Any], float]:
        """Lists of all rows of the table: (ids, [lists], recall); with `map_block`, what it makes of each block of lists.

        Args:
            k: length of a list.
            class_filter: as in `neighbours`.
            map_block: a function of (queries, lists), called where the lists are; only its result travels. Queries have `ids`,
                `values` and `labels`; lists have `ids` and `distances`, as `SearchResult`.
            tag: that every row has to have been put with, since any other put; "": any.
            approximate: through an index (`mining.engine`, `mining.recall`); else exact.

        Raises:
            UserError: rows of another tag.
        """
        ...
