"""A memory of past embeddings: per class first in, first out (MMSI's dictionary), over all classes too (cross-batch memory).

The same class is the server's durable copy and each worker's mirror. A mirror appends every batch itself, before the step
uses it, and so equals the server after the step's `put`; only one that starts late asks for `delta`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.errors import UserError
from pipeline.mining.embedding_table import check


@dataclass(frozen=True)
class Delta:
    """Entries that have changed: those that came after a version and are still there.

    Attributes:
        version: of the memory that this leads to.
        slots: where each entry stands.
        features, ids, labels, numbers: of the entries; `numbers` count all entries ever appended.
    """

    version: int
    slots: Int64[np.ndarray, " entries"]
    features: np.ndarray
    ids: Int64[np.ndarray, " entries"]
    labels: Int64[np.ndarray, " entries"]
    numbers: Int64[np.ndarray, " entries"]


class EmbeddingMemory:
    """Entries stand in slots 0..len-1; an entry that makes another leave takes its slot.

    Args:
        dim: D.
        per_class: entries of one class; none: any number.
        total: entries of all classes; none: any number.
        dtype: of the stored features.
        device: where they are.
    """

    def __init__(
        self,
        dim: int,
        per_class: int | None = None,
        total: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if per_class is None and total is None:
            raise UserError("a memory needs a bound: give the entries of a class, or of all classes together")
        for name, bound in (("per_class", per_class), ("total", total)):
            if bound is not None and bound < 1:
                raise UserError(f"the memory's {name} is {bound}: expected at least 1")
        self.dim, self.per_class, self.total = dim, per_class, total
        self.version = 0  # entries ever appended
        self._count = 0
        self._features = torch.empty((0, dim), dtype=dtype, device=device)
        self._labels, self._ids = (torch.empty(0, dtype=torch.int64, device=device) for _ in range(2))
        self._numbers = np.empty(0, np.int64)
        self._classes: dict[int, deque[int]] = {}  # slots of each class, oldest first
        self._order: dict[int, int] = {}  # class of each slot, oldest entry first

    def __len__(self) -> int:
        return self._count

    @property
    def classes(self) -> Collection[int]:
        """Classes that have entries."""
        return self._classes.keys()

    @property
    def features(self) -> Float[Tensor, "entries dim"]:
        return self._features[: self._count]

    @property
    def labels(self) -> Int64[Tensor, " entries"]:
        return self._labels[: self._count]

    @property
    def ids(self) -> Int64[Tensor, " entries"]:
        """Sample of each entry."""
        return self._ids[: self._count]

    def append(
        self, features: Float[Tensor, "rows dim"], labels: Int64[Tensor, " rows"], ids: Int64[Tensor, " rows"]
    ) -> None:
        """Adds rows in their order; what exceeds a bound leaves, the oldest first.

        Raises:
            UserError: another dimension, or rows that are not finite; nothing has been stored then.
        """
        check(ids.cpu().numpy(), features.detach().float().cpu().numpy(), labels.cpu().numpy(), self.dim)
        slots = [self._place(label) for label in labels.tolist()]
        last = {slot: row for row, slot in enumerate(slots)}  # a slot that the batch itself overwrites
        kept = torch.tensor(list(last.values()), dtype=torch.int64, device=ids.device)
        numbers = self.version + np.fromiter(last.values(), np.int64, len(last))
        where = np.fromiter(last.keys(), np.int64, len(last))
        self._write(where, features.detach()[kept], ids[kept], labels[kept], numbers)
        self.version += len(slots)

    def _place(self, label: int) -> int:
        """The slot of the next entry of a class."""
        members = self._classes.setdefault(label, deque())
        if self.per_class is not None and len(members) == self.per_class:
            slot = members.popleft()
            del self._order[slot]
        elif self.total is not None and self._count == self.total:
            slot, oldest = next(iter(self._order.items()))
            del self._order[slot]
            self._classes[oldest].popleft()
            if not self._classes[oldest] and oldest != label:
                del self._classes[oldest]
        else:
            slot = self._count
            self._count += 1
        members.append(slot)
        self._order[slot] = label
        return slot

    def _write(self, slots: np.ndarray, features: Tensor, ids: Tensor, labels: Tensor, numbers: np.ndarray) -> None:
        if self._count > len(self._numbers):
            wanted = min(2 * len(self._numbers), self.total or 2**62)
            room = max(self._count, wanted) - len(self._numbers)
            self._features = torch.cat([self._features, self._features.new_empty((room, self.dim))])
            self._labels, self._ids = (torch.cat([t, t.new_empty(room)]) for t in (self._labels, self._ids))
            self._numbers = np.concatenate([self._numbers, np.empty(room, np.int64)])
        where = torch.from_numpy(slots).to(self._features.device)
        self._features[where] = features.to(self._features)
        self._ids[where], self._labels[where] = ids.to(self._ids), labels.to(self._labels)
        self._numbers[slots] = numbers

    def delta(self, since: int) -> Delta:
        """What a mirror of version `since` lacks; `since` 0 gives all."""
        slots = np.flatnonzero(self._numbers[: self._count] >= since)
        where = torch.from_numpy(slots).to(self._features.device)
        features, ids, labels = (t[where].cpu().numpy() for t in (self._features, self._ids, self._labels))
        return Delta(self.version, slots, features, ids, labels, self._numbers[slots])

    def apply(self, delta: Delta) -> None:
        """Brings a mirror to the version of `delta`, which has been asked for with this mirror's version."""
        self._count = max(self._count, int(delta.slots.max(initial=-1)) + 1)
        features, ids, labels = (torch.from_numpy(np.array(a)) for a in (delta.features, delta.ids, delta.labels))
        self._write(delta.slots, features, ids, labels, delta.numbers)
        self.version = delta.version
        self._classes, self._order = {}, {}
        classes = self.labels.tolist()
        for slot in np.argsort(self._numbers[: self._count]).tolist():
            self._classes.setdefault(classes[slot], deque()).append(slot)
            self._order[slot] = classes[slot]

    def state(self) -> Mapping[str, np.ndarray]:
        """All that `load` needs."""
        d = self.delta(0)
        return {"version": np.array(d.version), "slots": d.slots, "features": d.features, "ids": d.ids,
                "labels": d.labels, "numbers": d.numbers}  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Replaces all entries by those of `state`."""
        if state["features"].shape[1] != self.dim:
            raise UserError(f"the saved memory has dimension {state['features'].shape[1]}, this run's has {self.dim}")
        self._count, self.version = 0, 0
        self.apply(Delta(int(state["version"]), *(state[n] for n in ("slots", "features", "ids", "labels", "numbers"))))
