"""Plans say what is trained on: which sample stands in which slot of which step. Pure numpy, no torch, no Ray.

A plan is drawn from (labels, seed, epoch) alone, so any process can recompute it, and ranks take contiguous slices of
the slots. Samples are numbered by their position in the training set, 0..N-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True)
class Plan:
    """The samples of one epoch.

    Attributes:
        ids: sample of every slot, [steps, slots]; every step has the same number of slots.
        columns: what a slot needs beside its sample (role, group, kind ...), each [steps, slots].
    """

    ids: Int64[np.ndarray, "steps slots"]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.size == 0:
            raise ValueError(f"a plan needs ids of shape [steps, slots] with at least one slot, got {self.ids.shape}")
        for name, column in self.columns.items():
            if column.shape != self.ids.shape:
                raise ValueError(f"plan column {name!r} has shape {column.shape}, ids have {self.ids.shape}")

    def __len__(self) -> int:
        return len(self.ids)


def class_balanced(
    labels: Int64[np.ndarray, " samples"], classes_per_batch: int, samples_per_class: int, seed: int, epoch: int
) -> Plan:
    """P×K batches: P groups a step, each of K samples of one class; no class twice in a step.

    Every sample is used at least once an epoch. A class whose size is no multiple of K fills its last group with further
    samples of its own (with repeats only if it has fewer than K). Classes of a single image cannot form a positive pair:
    K of them share a group, each once, and so serve as negatives (a group with room left takes single images of classes
    absent from its step; of larger classes if none is absent). Steps that would be short are filled with groups of absent
    classes: nothing is dropped.

    Args:
        labels: contiguous class numbers 0..C-1 of the training samples.
        classes_per_batch: P.
        samples_per_class: K, at least 2.
        seed: of the run.
        epoch: the plan differs from epoch to epoch.

    Raises:
        ValueError: there are fewer groups of distinct classes than P, or no class has two images.

    Cost: O(N log N + steps·P).
    """
    random = np.random.default_rng([seed, epoch, 0x9A7])
    sizes = np.bincount(labels)
    if sizes.max() < 2:
        raise ValueError(
            f"none of the {len(sizes)} training classes has two images: there is no positive pair to train on"
        )
    groups, owners = _groups(labels, samples_per_class, random)
    counts = np.bincount(owners)
    if len(counts) < classes_per_batch:
        singles = int((sizes == 1).sum())
        shared = f" ({singles} classes of one image share groups of {samples_per_class})" if singles else ""
        raise ValueError(
            f"classes_per_batch is {classes_per_batch}, but the training set can fill only {len(counts)} groups of "
            f"different classes{shared}: lower classes_per_batch, or train on more classes"
        )
    steps = max(-(-len(groups) // classes_per_batch), int(counts.max()))
    table = _deal(owners, counts, steps, classes_per_batch, random)
    _fill(table, groups, owners, counts, random)
    ids = np.stack(groups)[table].reshape(steps, classes_per_batch * samples_per_class)
    _complete(ids, labels, random)
    return Plan(ids)


def _groups(labels: np.ndarray, size: int, random: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Cuts every class into groups of `size` samples; returns them with the (dense) number of the class that owns each."""
    shuffled = random.permutation(len(labels))
    members = [shuffled[ids] for ids in _by_class(labels[shuffled])]
    groups: list[np.ndarray] = []
    owners: list[int] = []
    singles: list[int] = []
    owner = 0
    for ids in members:
        if len(ids) == 1:
            singles.append(int(ids[0]))
        if len(ids) < 2:
            continue
        short = -len(ids) % size
        if short:  # the last group takes samples of the earlier groups first, repeats only when the class is too small
            earlier = ids[: len(ids) - (size - short)]
            extra = random.permutation(earlier)[:short]
            if len(extra) < short:
                extra = np.concatenate([extra, random.choice(ids, short - len(extra))])
            ids = np.concatenate([ids, extra])
        groups += list(ids.reshape(-1, size))
        owners += [owner] * (len(ids) // size)
        owner += 1
    mixed = random.permutation(np.array(singles, dtype=np.int64))
    for start in range(0, len(mixed), size):
        group = np.full(size, -1, dtype=np.int64)  # what stays empty here is filled once its step is known
        group[: len(mixed[start : start + size])] = mixed[start : start + size]
        groups.append(group)
        owners.append(owner)
        owner += 1
    return groups, np.array(owners, dtype=np.int64)


def _deal(
    owners: np.ndarray, counts: np.ndarray, steps: int, classes: int, random: np.random.Generator
) -> Int64[np.ndarray, "steps classes"]:
    """Gives every group a step, no class twice in one; returns group numbers, -1 where a step is still short.

    Classes in random order take consecutive entries of a chain of random permutations of the steps. Only the class that
    spans two permutations could meet a step twice; the second permutation is then reordered.
    """
    start = np.concatenate([[0], np.cumsum(counts)])
    by_class = np.argsort(owners, kind="stable")
    sequence = np.concatenate(
        [random.permutation(by_class[start[c] : start[c + 1]]) for c in random.permutation(len(counts))]
    )
    run_owner = owners[sequence]
    table = np.full((steps, classes), -1, dtype=np.int64)
    before = np.empty(0, dtype=np.int64)
    for column in range(classes):
        low, high = column * steps, min((column + 1) * steps, len(sequence))
        if low >= high:
            break
        turn = random.permutation(steps)
        if column and run_owner[low] == run_owner[low - 1]:  # a class continues from the permutation before
            owner = run_owner[low]
            used = before[run_owner[low - steps : low] == owner]
            need = int((run_owner[low:high] == owner).sum())
            free = turn[~np.isin(turn, used)]
            turn = np.concatenate([free[:need], random.permutation(np.concatenate([free[need:], used]))])
        table[turn[: high - low], column] = sequence[low:high]
        before = turn
    return table[random.permutation(steps)]


def _fill(
    table: np.ndarray, groups: list[np.ndarray], owners: np.ndarray, counts: np.ndarray, random: np.random.Generator
) -> None:
    """Fills short steps, in place, with groups of classes that the step does not have yet."""
    by_class = np.split(np.argsort(owners, kind="stable"), np.cumsum(counts)[:-1])
    for step in np.flatnonzero((table < 0).any(axis=1)):
        row = table[step]
        present = owners[row[row >= 0]]
        absent = np.setdiff1d(np.arange(len(counts)), present, assume_unique=False)
        missing = np.flatnonzero(row < 0)
        for slot, owner in zip(missing, random.choice(absent, len(missing), replace=False), strict=True):
            row[slot] = random.choice(by_class[owner])


def _complete(ids: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> None:
    """Fills empty slots, in place, with one image each of classes absent from the step.

    Where no class is absent, with images of classes that have several: a single image never stands beside itself.
    """
    several = np.bincount(labels)[labels] > 1
    for step, slot in zip(*np.nonzero(ids < 0), strict=True):
        row = ids[step]
        present = np.isin(labels, labels[row[row >= 0]])
        row[slot] = random.choice(np.flatnonzero(several if present.all() else ~present))


def combine(
    labels: Int64[np.ndarray, " samples"], groups_per_batch: int, group_size: int, seed: int, epoch: int
) -> Plan:
    """Batches of P random groups of K images of one class; a class may stand in a batch more than once.

    The CombineSampler of Intra-Batch Connections: each class, shuffled and filled to K by repeats if it is smaller, is
    extended by further images of its own to (⌊n/K⌋ + 1)·K (by a whole group where K divides n) and cut into groups; random
    groups are repeated until P divides their number. Every image is used at least once an epoch.

    Args:
        labels: contiguous class numbers of the training samples.
        groups_per_batch: P.
        group_size: K.
        seed, epoch: what the draw depends on.

    Raises:
        ValueError: there are fewer groups than P.
    """
    return _combine(labels, groups_per_batch, group_size, np.random.default_rng([seed, epoch, 0xC0B]))


def combine_any_shape(
    labels: Int64[np.ndarray, " samples"], groups_per_batch: int, group_size: int, seed: int, epoch: int
) -> Plan:
    """`combine` with a shape drawn each epoch: P uniformly among the divisors of P·K from 2 to P·K/2.

    The NumberSampler of Intra-Batch Connections. Shapes that need more groups than the training set has are left out.
    """
    random = np.random.default_rng([seed, epoch, 0x2B5])
    slots = groups_per_batch * group_size
    sizes = np.bincount(labels)
    fits = [
        p
        for p in range(2, slots // 2 + 1)
        if slots % p == 0 and (np.maximum(sizes, slots // p) // (slots // p) + 1).sum() >= p
    ]
    if not fits:
        raise ValueError(f"no shape of {slots} slots fits a training set of {len(sizes)} classes")
    p = int(random.choice(fits))
    return _combine(labels, p, slots // p, random)


def _combine(labels: np.ndarray, groups_per_batch: int, group_size: int, random: np.random.Generator) -> Plan:
    groups = []
    for ids in _by_class(labels):
        ids = random.permutation(ids)
        if len(ids) < group_size:
            ids = np.concatenate([ids, random.choice(ids, group_size - len(ids))])
        missing = (len(ids) // group_size + 1) * group_size - len(ids)
        groups += list(np.concatenate([ids, random.choice(ids, missing, replace=False)]).reshape(-1, group_size))
    if len(groups) < groups_per_batch:
        raise ValueError(
            f"a batch of {groups_per_batch} groups of {group_size} images needs as many groups, the training set of "
            f"{len(labels)} images gives {len(groups)}: lower classes_per_batch or samples_per_class"
        )
    order = random.permutation(len(groups))
    order = np.concatenate([order, random.choice(len(groups), -len(groups) % groups_per_batch, replace=False)])
    return Plan(np.stack(groups)[order].reshape(-1, groups_per_batch * group_size))


def uniform_classes(
    labels: Int64[np.ndarray, " samples"], classes_per_batch: int, samples_per_class: int, seed: int, epoch: int
) -> Plan:
    """Batches of P classes drawn uniformly, whatever their size, each with K images; rows are class-major.

    The sampler of GCA-HNG: within a class, images are taken from a shuffled list that is reshuffled when fewer than K
    remain; a class with fewer than K images draws K with repeats. An epoch has ⌊(N - 1) / PK⌋ steps (at least one), and
    does not promise to use every image. The lists start anew each epoch, so that the plan depends on (seed, epoch) alone.

    Raises:
        ValueError: there are fewer classes than P.
    """
    random = np.random.default_rng([seed, epoch, 0x6CA])
    members = _by_class(labels)
    if len(members) < classes_per_batch:
        raise ValueError(
            f"classes_per_batch is {classes_per_batch}, the training set has {len(members)} classes: lower classes_per_batch"
        )
    steps = max(1, (len(labels) - 1) // (classes_per_batch * samples_per_class))
    lists = [random.permutation(ids) for ids in members]
    cursors = np.zeros(len(members), dtype=np.int64)
    rows = []
    for _ in range(steps):
        row = []
        for c in random.choice(len(members), classes_per_batch, replace=False):
            if len(members[c]) < samples_per_class:
                row.append(random.choice(members[c], samples_per_class))
                continue
            if cursors[c] + samples_per_class > len(lists[c]):
                lists[c], cursors[c] = random.permutation(members[c]), 0
            row.append(lists[c][cursors[c] : cursors[c] + samples_per_class])
            cursors[c] += samples_per_class
        rows.append(np.concatenate(row))
    return Plan(np.stack(rows))


def each_class_once(
    labels: Int64[np.ndarray, " samples"], classes_per_batch: int, samples_per_class: int, seed: int, epoch: int
) -> Plan:
    """Every class once an epoch, with K of its images (with repeats where it has fewer); rows are class-major.

    The sampler of MMSI. Classes come in random order; those of an incomplete last batch are left out of the epoch.

    Raises:
        ValueError: there are fewer classes than P.

    Cost: O(N log N).
    """
    random = np.random.default_rng([seed, epoch, 0x3E1])
    order = np.lexsort((random.random(len(labels)), labels))  # by class, shuffled within
    sizes = np.bincount(labels)
    starts, present = np.cumsum(sizes) - sizes, np.flatnonzero(sizes)
    if len(present) < classes_per_batch:
        raise ValueError(
            f"batches of {classes_per_batch} classes, but the training set has {len(present)}: lower the number of classes "
            "in a batch"
        )
    chosen = random.permutation(present)[: len(present) // classes_per_batch * classes_per_batch]
    column = np.broadcast_to(np.arange(samples_per_class), (len(chosen), samples_per_class))
    again = random.integers(0, sizes[chosen][:, None], column.shape)
    column = np.where(sizes[chosen][:, None] >= samples_per_class, column, again)
    ids = order[starts[chosen][:, None] + column]
    return Plan(ids.reshape(-1, classes_per_batch * samples_per_class))


def side_by_side(parts: Mapping[str, Plan]) -> Plan:
    """Plans of equal length as roles of one: their slots one after the other, with a column `role`."""
    names = np.array(list(parts))
    role = np.repeat(names, [p.ids.shape[1] for p in parts.values()])
    ids = np.concatenate([p.ids for p in parts.values()], 1)
    return Plan(ids, {"role": np.broadcast_to(role, ids.shape)})


def _by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Samples of every class, in their order."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])
