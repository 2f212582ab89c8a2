"""The memory of past embeddings against plain lists, and its mirrors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.mining.memory import EmbeddingMemory


class Lists:
    """First in, first out, row by row: a list for every class, the bound over all classes by age."""

    def __init__(self, per_class: int | None, total: int | None) -> None:
        self.per_class, self.total, self.entries = per_class, total, list[tuple[int, int]]()

    def append(self, label: int, number: int) -> None:
        own = [e for e in self.entries if e[0] == label]
        if self.per_class is not None and len(own) == self.per_class:
            self.entries.remove(own[0])
        elif self.total is not None and len(self.entries) == self.total:
            self.entries.pop(0)
        self.entries.append((label, number))


Bounds = st.tuples(st.none() | st.integers(1, 4), st.none() | st.integers(1, 12)).filter(any)


def rows(labels: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features that say which entry they are."""
    numbers = torch.arange(start, start + len(labels))
    return (
        torch.stack([numbers, torch.tensor(labels, dtype=torch.int64)], 1).float(),
        torch.tensor(labels, dtype=torch.int64),
        numbers % 7,
    )


def content(memory: EmbeddingMemory) -> list[tuple[int, int]]:
    order = np.argsort(memory._sequence_numbers[: len(memory)])
    assert torch.equal(memory.features[:, 0].long() % 7, memory.ids)
    return [(int(memory.labels[i]), int(memory.features[i, 0])) for i in order]


@settings(max_examples=150, deadline=None)
@given(Bounds, st.lists(st.lists(st.integers(0, 5), max_size=9), max_size=12), st.integers(0, 12), st.booleans())
def test_a_memory_is_lists_and_a_late_mirror_catches_up(
    bounds: tuple[int | None, int | None], batches: list[list[int]], late: int, own: bool
) -> None:
    """A mirror that appends every batch itself, or one that stops doing so and asks for the difference, is the same."""
    memory, mirror, lists, number = EmbeddingMemory(2, *bounds), EmbeddingMemory(2, *bounds), Lists(*bounds), 0
    for step, labels in enumerate(batches):
        batch = rows(labels, number)
        memory.append(*batch)
        if own or step < late:
            mirror.append(*batch)
        for label in labels:
            lists.append(label, number)
            number += 1
    assert content(memory) == lists.entries
    assert set(memory.classes) == {label for label, _ in lists.entries}
    delta = memory.changes_since(mirror.version)
    assert len(delta.slots) == 0 or not own
    mirror.apply(delta)
    assert mirror.version == memory.version == number
    for name in ("features", "labels", "ids"):
        assert torch.equal(getattr(mirror, name), getattr(memory, name)), "slot for slot"
    batch = rows([0, 1, 1, 0, 2], number)  # and stays the same
    memory.append(*batch), mirror.append(*batch)
    assert torch.equal(mirror.features, memory.features)
    saved = EmbeddingMemory(2, *bounds)
    saved.load(memory.state())
    saved.append(*rows([3, 0], number + 5)), memory.append(*rows([3, 0], number + 5))
    assert torch.equal(saved.features, memory.features) and content(saved) == content(memory)


def test_a_class_with_room_for_one_keeps_the_last_of_the_batch() -> None:
    memory = EmbeddingMemory(2, per_class=1)
    memory.append(*rows([4, 4, 5, 4], 0))
    assert content(memory) == [(5, 2), (4, 3)]


def test_features_are_constants_and_may_be_stored_in_half() -> None:
    memory = EmbeddingMemory(2, total=3, dtype=torch.float16)
    features = torch.randn(2, 2, requires_grad=True)
    memory.append(features, torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert not memory.features.requires_grad and memory.features.dtype == torch.float16
    mirror = EmbeddingMemory(2, total=3, dtype=torch.float16)
    mirror.apply(memory.changes_since(0))
    assert torch.equal(mirror.features, features.detach().half())


def test_changes_that_cannot_be_written_to_are_applied_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    memory, mirror = (EmbeddingMemory(2, 5) for _ in range(2))
    memory.append(torch.randn(3, 2), torch.arange(3), torch.arange(3))
    changes = memory.changes_since(0)
    for array in (changes.slots, changes.features, changes.ids, changes.labels, changes.sequence_numbers):
        array.flags.writeable = False  # as Ray's objects are
    mirror.apply(changes)
    assert torch.equal(mirror.features, memory.features) and not recwarn.list


def test_bad_input() -> None:
    for bounds in ((None, None), (0, None), (None, -1)):
        with pytest.raises(UserError, match=r"expected at least 1|needs a bound"):
            EmbeddingMemory(2, *bounds)
    memory = EmbeddingMemory(2, per_class=2)
    memory.append(*rows([1], 0))
    for features, message in (
        (torch.full((1, 2), torch.nan), "not finite"),
        (torch.ones(1, 3), "one row of 2 numbers"),
    ):
        with pytest.raises(UserError, match=message):
            memory.append(features, torch.tensor([0]), torch.tensor([0]))
    assert content(memory) == [(1, 0)]
    with pytest.raises(UserError, match="dimension 2, this run's has 3"):
        EmbeddingMemory(3, per_class=2).load(memory.state())
