"""The newest embedding of every sample, by sample id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from pipeline.errors import UserError
from pipeline.neighbours.exact_search import Rows, by_class

_MIN_MERGE = 1024  # new ids are merged into the sorted ones in batches of at least this size


class Table:
    """Rows of embeddings that are overwritten in place, with their class and the step they are from.

    Bytes per row: 4 D (or 2 D in float16) and 28, and 8 more once `by_class` has been called. Memory is committed as rows
    arrive, up to `capacity`; beyond it the arrays are copied into larger ones.

    Args:
        dim: Dimension D of the embeddings.
        dtype: Data type of the stored embeddings.
        capacity: Expected number of rows.
    """

    def __init__(self, dim: int, dtype: str = "float32", capacity: int = 2**16) -> None:
        self.dim = dim
        self.dtype = np.dtype(dtype)
        self.count = 0
        self.largest = 0.0  # the largest length that a row has had
        self._allocate(max(1, capacity))
        self._sorted_ids = np.empty(0, np.int64)
        self._sorted_rows = np.empty(0, np.int32)  # the row of each sorted id
        self._unmerged: dict[int, int] = {}  # row of each id that came since the last merge
        self._classes: tuple[np.ndarray, np.ndarray] | None = None  # `by_class`, until a class gets or loses a row

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        bytes_per_row = sum(a.itemsize * (a.shape[1] if a.ndim == 2 else 1) for a in self._arrays().values())
        class_bytes = 0 if self._classes is None else sum(a.nbytes for a in self._classes)
        return (
            self.count * bytes_per_row
            + self._sorted_ids.nbytes
            + self._sorted_rows.nbytes
            + class_bytes
            + 100 * len(self._unmerged)
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"values": self._values, "ids": self._ids, "labels": self._labels, "steps": self._steps}

    def _allocate(self, capacity: int) -> None:
        old_arrays = self._arrays() if self.count else {}
        self._values = np.empty((capacity, self.dim), self.dtype)
        self._ids = np.empty(capacity, np.int64)
        self._labels = np.empty(capacity, np.int32)
        self._steps = np.empty(capacity, np.int32)
        for name, array in old_arrays.items():
            self._arrays()[name][: self.count] = array[: self.count]

    def put(
        self,
        ids: Int64[np.ndarray, " rows"],
        embeddings: Float[np.ndarray, "rows dim"],
        labels: Int64[np.ndarray, " rows"],
        step: int,
    ) -> None:
        """Adds or overwrites rows; of an id that is given twice, the last counts.

        Raises:
            UserError: The dimension differs, or rows are not finite (the message names their ids); nothing is stored then.
        """
        validate_rows(ids, embeddings, labels, self.dim)
        _, from_end = np.unique(ids[::-1], return_index=True)
        last_occurrences = np.sort(len(ids) - 1 - from_end)
        ids = ids[last_occurrences]
        embeddings = embeddings[last_occurrences]
        labels = labels[last_occurrences]
        rows = self.rows_of(ids)
        new_positions = np.flatnonzero(rows < 0)
        if len(new_positions):
            rows[new_positions] = np.arange(self.count, self.count + len(new_positions))
            if rows[new_positions[-1]] >= len(self._ids):
                self._allocate(max(self.count + len(new_positions), len(self._ids) * 3 // 2))
            self._ids[rows[new_positions]] = ids[new_positions]
            self._unmerged.update(zip(ids[new_positions].tolist(), rows[new_positions].tolist(), strict=True))
            self.count += len(new_positions)
            self._merge(max(_MIN_MERGE, self.count // 128))
        if len(new_positions) or not np.array_equal(self._labels[rows], labels):
            self._classes = None
        self._values[rows] = embeddings
        self._labels[rows] = labels
        self._steps[rows] = step
        stored_values = self._values[rows].astype(np.float64)
        self.largest = max(self.largest, float(np.sqrt(np.square(stored_values).sum(1)).max(initial=0)))

    def _merge(self, min_size: int) -> None:
        if len(self._unmerged) < min_size:
            return
        new_ids = np.fromiter(self._unmerged.keys(), np.int64, len(self._unmerged))
        new_rows = np.fromiter(self._unmerged.values(), np.int64, len(self._unmerged))
        order = np.argsort(new_ids)
        positions = np.searchsorted(self._sorted_ids, new_ids[order])
        dtype = np.int32 if self.count < 2**31 else np.int64
        self._sorted_ids = np.insert(self._sorted_ids, positions, new_ids[order])
        self._sorted_rows = np.insert(self._sorted_rows.astype(dtype), positions, new_rows[order].astype(dtype))
        self._unmerged = {}

    def rows_of(self, ids: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        """The row of each id; -1 if it is not stored."""
        rows = np.full(len(ids), -1, np.int64)
        if len(self._sorted_ids):
            positions = np.minimum(np.searchsorted(self._sorted_ids, ids), len(self._sorted_ids) - 1)
            rows = np.where(self._sorted_ids[positions] == ids, self._sorted_rows[positions], -1).astype(np.int64)
        if self._unmerged:
            for i in np.flatnonzero(rows < 0).tolist():
                rows[i] = self._unmerged.get(int(ids[i]), -1)
        return rows

    def contains(self, ids: Int64[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        return self.rows_of(ids) >= 0

    def get(self, ids: Int64[np.ndarray, " some"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embeddings [some, dim] float32, labels and steps of the given ids.

        Raises:
            UserError: Some ids are not in the table; the message names them.
        """
        rows = self._require_rows(ids)
        return self._values[rows].astype(np.float32), *self._labels_and_steps(rows)

    def labels_and_steps(self, ids: Int64[np.ndarray, " some"]) -> tuple[np.ndarray, np.ndarray]:
        """Labels and steps of the given ids; as `get`, without the embeddings."""
        return self._labels_and_steps(self._require_rows(ids))

    def _labels_and_steps(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._labels[rows].astype(np.int64), self._steps[rows].astype(np.int64)

    def _require_rows(self, ids: np.ndarray) -> np.ndarray:
        rows = self.rows_of(ids)
        missing = ids[rows < 0]
        if len(missing):
            raise UserError(
                f"{len(missing)} of {len(ids)} sample ids have no embedding in the table (first: {_format_ids(missing)}): "
                "put them first"
            )
        return rows

    def view(self) -> Rows:
        """All rows, not copied: the next `put` changes them."""
        n = self.count
        return Rows(self._values[:n], self._ids[:n], self._labels[:n], self.largest, self.by_class)

    def by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows in the order of their classes; kept until a class gets or loses one."""
        if self._classes is None:
            self._classes = by_class(self._labels[: self.count])
        return self._classes

    def state(self) -> Mapping[str, np.ndarray]:
        """The arrays that `restore` needs, not copied."""
        return {name: array[: self.count] for name, array in self._arrays().items()}

    @classmethod
    def restore(cls, state: Mapping[str, Any], capacity: int) -> Table:
        """A table with the rows of `state`, in their order."""
        values = state["values"]
        table = cls(values.shape[1], values.dtype.name, max(capacity, len(values)))
        table.put(state["ids"], values, state["labels"].astype(np.int64), 0)
        table._steps[: len(values)] = state["steps"]
        return table


def validate_rows(ids: np.ndarray, embeddings: np.ndarray, labels: np.ndarray | None, dim: int) -> None:
    """Raises UserError unless embeddings are finite rows of `dim` numbers, one for each id and label."""
    description = f"embeddings {embeddings.dtype} {embeddings.shape} for {len(ids)} ids"
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or len(embeddings) != len(ids):
        raise UserError(f"got {description}: expected one row of {dim} numbers for each id")
    if labels is not None and len(labels) != len(ids):
        raise UserError(f"got {len(labels)} labels for {len(ids)} ids: expected one for each")
    with np.errstate(over="ignore", invalid="ignore"):
        squared_norms = np.square(embeddings, dtype=np.float32).sum(1)
    non_finite_ids = ids[~np.isfinite(squared_norms)]
    if len(non_finite_ids):
        raise UserError(
            f"{len(non_finite_ids)} of {len(ids)} embeddings are not finite (sample ids {_format_ids(non_finite_ids)}): "
            "lower the learning rate, or inspect these images"
        )


def _format_ids(ids: np.ndarray) -> str:
    return ", ".join(str(i) for i in ids[:8].tolist()) + (" ..." if len(ids) > 8 else "")


def shard_of(ids: Int64[np.ndarray, " some"], shards: int) -> Int64[np.ndarray, " some"]:
    """The shard of each id: the same on every machine and in every run (splitmix64)."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) % np.uint64(shards)).astype(np.int64)
