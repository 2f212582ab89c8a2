"""A memory bank of past embeddings: first in, first out per class (MMSI's dictionary) or over all classes (XBM).

The same class is the server's durable copy and each worker's mirror. A mirror appends every batch itself, before the step
uses it, and so equals the server after the step's `put`; a mirror that starts late fetches `changes_since`.
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
from pipeline.mining.embedding_table import validate_rows


@dataclass(frozen=True)
class MemoryChanges:
    """Entries that were appended after a version and are still stored.

    Attributes:
        version: Version of the memory after the changes.
        slots: Slot of each entry.
        features, ids, labels: The entries.
        sequence_numbers: Position of each entry among all entries ever appended.
    """

    version: int
    slots: Int64[np.ndarray, " entries"]
    features: np.ndarray
    ids: Int64[np.ndarray, " entries"]
    labels: Int64[np.ndarray, " entries"]
    sequence_numbers: Int64[np.ndarray, " entries"]


class EmbeddingMemory:
    """Entries in slots 0..len-1; an entry that evicts another takes its slot.

    Args:
        dim: Dimension D of the features.
        per_class: Largest number of entries of one class; None: unbounded.
        total: Largest number of entries of all classes; None: unbounded.
        dtype: Data type of the stored features.
        device: Device of the stored features.
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
        self.dim = dim
        self.per_class = per_class
        self.total = total
        self.version = 0  # entries ever appended
        self._count = 0
        self._features = torch.empty((0, dim), dtype=dtype, device=device)
        self._labels, self._ids = (torch.empty(0, dtype=torch.int64, device=device) for _ in range(2))
        self._sequence_numbers = np.empty(0, np.int64)
        self._classes: dict[int, deque[int]] = {}  # slots of each class, oldest first
        self._slots_by_age: dict[int, int] = {}  # class of each slot, oldest entry first

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
        self,
        features: Float[Tensor, "rows dim"],
        labels: Int64[Tensor, " rows"],
        ids: Int64[Tensor, " rows"],
        host_features: Float[Tensor, "rows dim"] | None = None,
    ) -> None:
        """Adds rows in their order; entries beyond a bound are evicted, the oldest first.

        Args:
            features: The rows, on any device.
            labels, ids: Class and sample of each; on the CPU, or the device is waited for.
            host_features: The features on the CPU, where the caller has them; None: they are copied.

        Raises:
            UserError: The dimension differs, or rows are not finite; nothing is stored then.
        """
        host = features.detach().cpu() if host_features is None else host_features
        labels, ids = labels.cpu(), ids.cpu()
        validate_rows(ids.numpy(), host.float().numpy(), labels.numpy(), self.dim)
        slots = [self._place(label) for label in labels.tolist()]
        row_of_slot = {slot: row for row, slot in enumerate(slots)}  # a slot that the batch itself overwrites
        rows = np.fromiter(row_of_slot.values(), np.int64, len(row_of_slot))
        overwritten_slots = np.fromiter(row_of_slot.keys(), np.int64, len(row_of_slot))
        on_device = torch.from_numpy(rows).to(features.device, non_blocking=True)
        kept = (features.detach()[on_device], ids[rows], labels[rows])
        self._write(overwritten_slots, *kept, self.version + rows)
        self.version += len(slots)

    def _place(self, label: int) -> int:
        """The slot of the next entry of a class."""
        members = self._classes.setdefault(label, deque())
        if self.per_class is not None and len(members) == self.per_class:
            slot = members.popleft()
            del self._slots_by_age[slot]
        elif self.total is not None and self._count == self.total:
            slot, oldest = next(iter(self._slots_by_age.items()))
            del self._slots_by_age[slot]
            self._classes[oldest].popleft()
            if not self._classes[oldest] and oldest != label:
                del self._classes[oldest]
        else:
            slot = self._count
            self._count += 1
        members.append(slot)
        self._slots_by_age[slot] = label
        return slot

    def _write(
        self, slots: np.ndarray, features: Tensor, ids: Tensor, labels: Tensor, sequence_numbers: np.ndarray
    ) -> None:
        if self._count > len(self._sequence_numbers):
            doubled = min(2 * len(self._sequence_numbers), self.total or 2**62)
            num_new = max(self._count, doubled) - len(self._sequence_numbers)
            self._features = torch.cat([self._features, self._features.new_empty((num_new, self.dim))])
            self._labels, self._ids = (torch.cat([t, t.new_empty(num_new)]) for t in (self._labels, self._ids))
            self._sequence_numbers = np.concatenate([self._sequence_numbers, np.empty(num_new, np.int64)])
        positions = torch.from_numpy(slots).to(self._features.device, non_blocking=True)
        self._features[positions] = features.to(self._features, non_blocking=True)
        self._ids[positions] = ids.to(self._ids, non_blocking=True)
        self._labels[positions] = labels.to(self._labels, non_blocking=True)
        self._sequence_numbers[slots] = sequence_numbers

    def changes_since(self, since: int) -> MemoryChanges:
        """Entries that a mirror of version `since` lacks; 0: all entries."""
        slots = np.flatnonzero(self._sequence_numbers[: self._count] >= since)
        positions = torch.tensor(slots, device=self._features.device)
        features, ids, labels = (t[positions].cpu().numpy() for t in (self._features, self._ids, self._labels))
        return MemoryChanges(self.version, slots, features, ids, labels, self._sequence_numbers[slots])

    def apply(self, changes: MemoryChanges) -> None:
        """Brings a mirror up to date with `changes_since(self.version)` of the original."""
        self._count = max(self._count, int(changes.slots.max(initial=-1)) + 1)
        # Copies: what Ray hands over cannot be written to, which PyTorch warns of.
        features, ids, labels = (torch.from_numpy(np.array(a)) for a in (changes.features, changes.ids, changes.labels))
        self._write(np.array(changes.slots), features, ids, labels, changes.sequence_numbers)
        self.version = changes.version
        self._classes = {}
        self._slots_by_age = {}
        classes = self.labels.tolist()
        for slot in np.argsort(self._sequence_numbers[: self._count]).tolist():
            self._classes.setdefault(classes[slot], deque()).append(slot)
            self._slots_by_age[slot] = classes[slot]

    def state(self) -> Mapping[str, np.ndarray]:
        """The arrays that `load` needs."""
        changes = self.changes_since(0)
        return {"version": np.array(changes.version), "slots": changes.slots, "features": changes.features, "ids": changes.ids,
                "labels": changes.labels, "numbers": changes.sequence_numbers}  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Replaces all entries by those of `state`."""
        if state["features"].shape[1] != self.dim:
            raise UserError(f"the saved memory has dimension {state['features'].shape[1]}, this run's has {self.dim}")
        self._count = 0
        self.version = 0
        self.apply(
            MemoryChanges(int(state["version"]), *(state[n] for n in ("slots", "features", "ids", "labels", "numbers")))
        )
