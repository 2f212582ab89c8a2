"""The newest embedding of every sample, by sample id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from pipeline.errors import UserError
from pipeline.neighbours.exact_search import Rows, by_class

_TAIL = 1024  # new ids are merged into the sorted ones in batches of so many at least


class Table:
    """Rows of embeddings that are overwritten in place, with their class and the step they are from.

    Bytes a row: 4 D (or 2 D in float16) and 28, 8 more once classes have been asked for. Memory is taken from the system as rows come, up to `capacity`; beyond it
    the arrays are copied into larger ones.

    Args:
        dim: D.
        dtype: of the stored embeddings.
        capacity: rows expected.
    """

    def __init__(self, dim: int, dtype: str = "float32", capacity: int = 2**16) -> None:
        self.dim, self.dtype = dim, np.dtype(dtype)
        self.count = 0
        self.largest = 0.0  # the largest length that a row has had
        self._allocate(max(1, capacity))
        self._keys, self._rows = np.empty(0, np.int64), np.empty(0, np.int32)  # sorted ids and where they stand
        self._tail: dict[int, int] = {}  # ids since the last merge
        self._classes: tuple[np.ndarray, np.ndarray] | None = None  # `by_class`, until a class gets or loses a row

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        each = sum(a.itemsize * (a.shape[1] if a.ndim == 2 else 1) for a in self._arrays().values())
        classes = 0 if self._classes is None else sum(a.nbytes for a in self._classes)
        return self.count * each + self._keys.nbytes + self._rows.nbytes + classes + 100 * len(self._tail)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"values": self._values, "ids": self._ids, "labels": self._labels, "steps": self._steps}

    def _allocate(self, capacity: int) -> None:
        old = self._arrays() if self.count else {}
        self._values = np.empty((capacity, self.dim), self.dtype)
        self._ids, self._labels = np.empty(capacity, np.int64), np.empty(capacity, np.int32)
        self._steps = np.empty(capacity, np.int32)
        for name, array in old.items():
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
            UserError: another dimension, or rows that are not finite (their ids are named); nothing has been stored then.
        """
        check(ids, embeddings, labels, self.dim)
        _, last = np.unique(ids[::-1], return_index=True)
        chosen = np.sort(len(ids) - 1 - last)
        ids, embeddings, labels = ids[chosen], embeddings[chosen], labels[chosen]
        rows = self.rows_of(ids)
        new = np.flatnonzero(rows < 0)
        if len(new):
            rows[new] = np.arange(self.count, self.count + len(new))
            if rows[new[-1]] >= len(self._ids):
                self._allocate(max(self.count + len(new), len(self._ids) * 3 // 2))
            self._ids[rows[new]] = ids[new]
            self._tail.update(zip(ids[new].tolist(), rows[new].tolist(), strict=True))
            self.count += len(new)
            self._merge(max(_TAIL, self.count // 128))
        if len(new) or not np.array_equal(self._labels[rows], labels):
            self._classes = None
        self._values[rows], self._labels[rows], self._steps[rows] = embeddings, labels, step
        stored = self._values[rows].astype(np.float64)
        self.largest = max(self.largest, float(np.sqrt(np.square(stored).sum(1)).max(initial=0)))

    def _merge(self, above: int) -> None:
        if len(self._tail) < above:
            return
        keys = np.fromiter(self._tail.keys(), np.int64, len(self._tail))
        rows = np.fromiter(self._tail.values(), np.int64, len(self._tail))
        order = np.argsort(keys)
        place = np.searchsorted(self._keys, keys[order])
        width = np.int32 if self.count < 2**31 else np.int64
        self._keys = np.insert(self._keys, place, keys[order])
        self._rows = np.insert(self._rows.astype(width), place, rows[order].astype(width))
        self._tail = {}

    def rows_of(self, ids: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        """Where each id stands; -1 if it is not there."""
        rows = np.full(len(ids), -1, np.int64)
        if len(self._keys):
            place = np.minimum(np.searchsorted(self._keys, ids), len(self._keys) - 1)
            rows = np.where(self._keys[place] == ids, self._rows[place], -1).astype(np.int64)
        if self._tail:
            for i in np.flatnonzero(rows < 0).tolist():
                rows[i] = self._tail.get(int(ids[i]), -1)
        return rows

    def has(self, ids: Int64[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        return self.rows_of(ids) >= 0

    def get(self, ids: Int64[np.ndarray, " some"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embeddings [some, dim] float32, labels and steps of the given ids.

        Raises:
            UserError: ids that are not in the table, named.
        """
        rows = self._rows_there(ids)
        return self._values[rows].astype(np.float32), *self._about(rows)

    def about(self, ids: Int64[np.ndarray, " some"]) -> tuple[np.ndarray, np.ndarray]:
        """As `get`, without the embeddings."""
        return self._about(self._rows_there(ids))

    def _about(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._labels[rows].astype(np.int64), self._steps[rows].astype(np.int64)

    def _rows_there(self, ids: np.ndarray) -> np.ndarray:
        rows = self.rows_of(ids)
        missing = ids[rows < 0]
        if len(missing):
            raise UserError(
                f"{len(missing)} of {len(ids)} sample ids have no embedding in the table (first: {_some(missing)}): put them first"
            )
        return rows

    def view(self) -> Rows:
        """All rows, without copying: they change with the next `put`."""
        n = self.count
        return Rows(self._values[:n], self._ids[:n], self._labels[:n], self.largest, self.by_class)

    def by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows in the order of their classes; kept until a class gets or loses one."""
        if self._classes is None:
            self._classes = by_class(self._labels[: self.count])
        return self._classes

    def state(self) -> Mapping[str, np.ndarray]:
        """All that `restore` needs, without copying."""
        return {name: array[: self.count] for name, array in self._arrays().items()}

    @classmethod
    def restore(cls, state: Mapping[str, Any], capacity: int) -> Table:
        """A table with the rows of `state`, in their order."""
        values = state["values"]
        table = cls(values.shape[1], values.dtype.name, max(capacity, len(values)))
        table.put(state["ids"], values, state["labels"].astype(np.int64), 0)
        table._steps[: len(values)] = state["steps"]
        return table


def check(ids: np.ndarray, embeddings: np.ndarray, labels: np.ndarray | None, dim: int) -> None:
    """Raises UserError unless embeddings are finite rows of `dim` numbers, one for each id and label."""
    got = f"embeddings {embeddings.dtype} {embeddings.shape} for {len(ids)} ids"
    if embeddings.ndim != 2 or embeddings.shape[1] != dim or len(embeddings) != len(ids):
        raise UserError(f"got {got}: expected one row of {dim} numbers for each id")
    if labels is not None and len(labels) != len(ids):
        raise UserError(f"got {len(labels)} labels for {len(ids)} ids: expected one for each")
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.square(embeddings, dtype=np.float32).sum(1)
    bad = ids[~np.isfinite(lengths)]
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(ids)} embeddings are not finite (sample ids {_some(bad)}): lower the learning rate, "
            "or look at these images"
        )


def _some(ids: np.ndarray) -> str:
    return ", ".join(str(i) for i in ids[:8].tolist()) + (" ..." if len(ids) > 8 else "")


def shard_of(ids: Int64[np.ndarray, " some"], shards: int) -> Int64[np.ndarray, " some"]:
    """The shard of each id: the same on every machine and in every run (splitmix64)."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) % np.uint64(shards)).astype(np.int64)
