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
    order = _shuffled(labels, random)
    groups, counts = _groups(order, sizes, samples_per_class, random)
    if len(counts) < classes_per_batch:
        singles = int((sizes == 1).sum())
        shared = f" ({singles} classes of one image share groups of {samples_per_class})" if singles else ""
        raise ValueError(
            f"classes_per_batch is {classes_per_batch}, but the training set can fill only {len(counts)} groups of "
            f"different classes{shared}: lower classes_per_batch, or train on more classes"
        )
    steps = max(-(-len(groups) // classes_per_batch), int(counts.max()))
    table = _assign_steps(counts, steps, classes_per_batch, random)
    _fill_steps(table, counts, random)
    ids = groups[table].reshape(steps, classes_per_batch * samples_per_class)
    _fill_slots(ids, labels, order, sizes, random)
    return Plan(ids)


def _groups(
    order: np.ndarray, sizes: np.ndarray, size: int, random: np.random.Generator
) -> tuple[Int64[np.ndarray, "groups size"], Int64[np.ndarray, " owners"]]:
    """Cuts every class of several samples into groups of `size`, then the single ones; -1 is left empty.

    Returns them with the number of groups of each owner, in order: the classes, then each group of single ones for itself.
    """
    starts, several = np.cumsum(sizes) - sizes, np.flatnonzero(sizes > 1)
    n = sizes[several]
    counts = -(-n // size)
    places = _group_positions(counts, size)
    last, earlier = np.cumsum(counts) - 1, (counts - 1) * size
    # A last group that is short takes samples of the earlier groups; repeats only where the class is too small.
    large, small = np.flatnonzero(n % size * (n > size)), np.flatnonzero(n < size)
    for which, drawn in (
        (large, _sample_without_replacement(size - 1, earlier[large], random)),
        (small, random.integers(0, n[small, None], (len(small), size - 1))),
    ):
        own = places[last[which], 1:]
        places[last[which], 1:] = np.where(own < n[which, None], own, drawn)
    places += np.repeat(starts[several], counts)[:, None]
    groups = order[places]
    singles = random.permutation(order[starts[sizes == 1]])
    mixed = np.full(-(-len(singles) // size) * size, -1, dtype=np.int64)  # the rest is filled once its step is known
    mixed[: len(singles)] = singles
    if len(mixed):
        groups = np.concatenate([groups, mixed.reshape(-1, size)])
    return groups, np.concatenate([counts, np.ones(len(mixed) // size, dtype=np.int64)])


def _assign_steps(
    counts: np.ndarray, steps: int, classes: int, random: np.random.Generator
) -> Int64[np.ndarray, "steps classes"]:
    """Gives every group a step, no owner twice in one; returns group numbers, -1 where a step is still short.

    Owners in random order take consecutive entries of a chain of random permutations of the steps. Only the owner that
    spans two permutations could meet a step twice; the second permutation is then reordered.
    """
    dealt = random.permutation(len(counts))
    owners = np.repeat(dealt, counts[dealt])
    sequence = (np.cumsum(counts) - counts)[owners] + _ragged_arange(counts[dealt])
    table = np.full((steps, classes), -1, dtype=np.int64)
    before = np.empty(0, dtype=np.int64)
    for column in range(classes):
        low, high = column * steps, min((column + 1) * steps, len(sequence))
        if low >= high:
            break
        turn = random.permutation(steps)
        if column and owners[low] == owners[low - 1]:  # an owner continues from the permutation before
            used = before[owners[low - steps : low] == owners[low]]
            need = int((owners[low:high] == owners[low]).sum())
            free = turn[~np.isin(turn, used)]
            turn = np.concatenate([free[:need], random.permutation(np.concatenate([free[need:], used]))])
        table[turn[: high - low], column] = sequence[low:high]
        before = turn
    return table[random.permutation(steps)]


def _fill_steps(table: np.ndarray, counts: np.ndarray, random: np.random.Generator) -> None:
    """Fills short steps, in place, with groups of owners that the step does not have yet. Full columns come first."""
    starts, owners = np.cumsum(counts) - counts, np.repeat(np.arange(len(counts)), counts)
    for column in range(table.shape[1]):
        short = np.flatnonzero(table[:, column] < 0)
        if len(short):
            owner = _sample_excluding(owners[table[short, :column]], np.full(len(short), len(counts)), random)
            table[short, column] = starts[owner] + random.integers(0, counts[owner])


def _fill_slots(
    ids: np.ndarray, labels: np.ndarray, order: np.ndarray, sizes: np.ndarray, random: np.random.Generator
) -> None:
    """Fills empty slots, in place, with one image each of classes absent from the step.

    Where no class is absent, with images of classes that have several: a single image never stands beside itself.
    """
    steps, none = np.flatnonzero((ids < 0).any(axis=1)), len(sizes)
    rows, several = ids[steps], order[sizes[labels[order]] > 1] if len(steps) else order
    sizes, starts = np.append(sizes, 0), np.append(np.cumsum(sizes) - sizes, len(labels))
    while (rows < 0).any():  # as often as slots are empty: equally many in each of these steps
        present = np.sort(np.where(rows < 0, none, labels[rows]), axis=1)
        widths = sizes[present]
        widths[:, 1:][present[:, 1:] == present[:, :-1]] = 0
        left = len(labels) - widths.sum(axis=1)
        drawn = random.integers(0, np.maximum(left, 1))
        for start, width in zip(starts[present].T, widths.T, strict=True):
            drawn += np.where(drawn >= start, width, 0)
        again = several[random.integers(0, len(several), len(rows))]
        chosen = np.where(left > 0, order[np.minimum(drawn, len(order) - 1)], again)
        rows[np.arange(len(rows)), (rows < 0).argmax(axis=1)] = chosen
    ids[steps] = rows


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
    sizes = np.bincount(labels)
    filled = np.maximum(sizes, group_size)
    counts = filled // group_size + 1
    places, last = _group_positions(counts, group_size), np.cumsum(counts) - 1
    large, small = np.flatnonzero(sizes >= group_size), np.flatnonzero(sizes < group_size)
    own, more = places[last[large]], _sample_without_replacement(group_size, sizes[large], random)
    places[last[large]] = np.where(own < sizes[large, None], own, more)
    own, more = places[last[small] - 1], random.integers(0, sizes[small, None], (len(small), group_size))
    places[last[small] - 1] = first = np.where(own < sizes[small, None], own, more)
    places[last[small]] = random.permuted(first, axis=1)
    places += np.repeat(np.cumsum(sizes) - sizes, counts)[:, None]
    if len(places) < groups_per_batch:
        raise ValueError(
            f"a batch of {groups_per_batch} groups of {group_size} images needs as many groups, the training set of "
            f"{len(labels)} images gives {len(places)}: lower classes_per_batch or samples_per_class"
        )
    turn = random.permutation(len(places))
    turn = np.concatenate([turn, random.choice(len(places), -len(places) % groups_per_batch, replace=False)])
    return Plan(_shuffled(labels, random)[places[turn]].reshape(-1, groups_per_batch * group_size))


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
    sizes, size = np.bincount(labels), samples_per_class
    if len(sizes) < classes_per_batch:
        raise ValueError(
            f"classes_per_batch is {classes_per_batch}, the training set has {len(sizes)} classes: lower classes_per_batch"
        )
    steps = max(1, (len(labels) - 1) // (classes_per_batch * size))
    visited = _sample_without_replacement(classes_per_batch, np.full(steps, len(sizes)), random).ravel()
    visits = np.bincount(visited, minlength=len(sizes))
    visit = np.empty(len(visited), dtype=np.int64)  # which of its class's visits each is
    visit[np.argsort(visited, kind="stable")] = _ragged_arange(visits)
    # A class's lists, one after the other, as many as its visits use up.
    per_list = np.maximum(sizes // size, 1)
    lists = np.where(sizes < size, 0, -(-visits // per_list))
    lengths, first = np.repeat(sizes, lists), np.cumsum(lists) - lists
    starts = np.cumsum(lengths) - lengths
    members = _shuffled(np.repeat(np.arange(len(lengths)), lengths), random) - np.repeat(starts, lengths)
    places = random.integers(0, sizes[visited][:, None], (len(visited), size))
    large = np.flatnonzero(sizes[visited] >= size)
    which, turn = np.divmod(visit[large], per_list[visited[large]])
    places[large] = members[(starts[first[visited[large]] + which] + turn * size)[:, None] + np.arange(size)]
    places += (np.cumsum(sizes) - sizes)[visited][:, None]
    return Plan(np.argsort(labels, kind="stable")[places].reshape(steps, -1))


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


def join_roles(parts: Mapping[str, Plan]) -> Plan:
    """Plans of equal length as roles of one: their slots one after the other, with a column `role`."""
    names = np.array(list(parts))
    role = np.repeat(names, [p.ids.shape[1] for p in parts.values()])
    ids = np.concatenate([p.ids for p in parts.values()], 1)
    return Plan(ids, {"role": np.broadcast_to(role, ids.shape)})


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _shuffled(labels: np.ndarray, random: np.random.Generator) -> Int64[np.ndarray, " samples"]:
    """Samples class by class, in random order within. No two keys are equal, so that every machine sorts them alike."""
    order = random.permutation(len(labels))
    keys = labels[order] * len(labels)
    keys += np.arange(len(labels))
    keys.sort()
    keys %= len(labels)
    return order[keys]


def _ragged_arange(counts: np.ndarray) -> Int64[np.ndarray, " all"]:
    """0, 1, ... of every owner in turn, as many as it has."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _group_positions(counts: np.ndarray, size: int) -> Int64[np.ndarray, "groups size"]:
    """Places 0, 1, ... within every class, which has so many groups."""
    return _ragged_arange(counts)[:, None] * size + np.arange(size)


def _sample_excluding(taken: np.ndarray, below: np.ndarray, random: np.random.Generator) -> Int64[np.ndarray, " rows"]:
    """For each row a number below its bound that is not among those taken (distinct ones), all equally likely."""
    drawn = random.integers(0, below - taken.shape[1])
    for number in np.sort(taken, axis=1).T:
        drawn += drawn >= number
    return drawn


def _sample_without_replacement(
    count: int, below: np.ndarray, random: np.random.Generator
) -> Int64[np.ndarray, "rows count"]:
    """For each row `count` different numbers below its bound, in random order; O(rows · count²)."""
    drawn = np.empty((len(below), count), dtype=np.int64)
    for column in range(count):
        drawn[:, column] = _sample_excluding(drawn[:, :column], below, random)
    return drawn
