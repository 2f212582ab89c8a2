"""Plans of an epoch: the sample in every slot of every step. Pure numpy, no torch, no Ray.

A plan is drawn from (labels, seed, epoch) alone, so any process can recompute it, and ranks take contiguous slices of
the slots. Samples are numbered by their position in the training set, 0..N-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from methods.random_streams import Stream


@dataclass(frozen=True)
class Plan:
    """The samples of one epoch.

    Attributes:
        ids: Sample of every slot, [steps, slots]; every step has the same number of slots.
        columns: Further properties of the slots (role, group, kind ...), each [steps, slots].
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


MAX_REPEATS = 2.0  # of an image in an epoch, on average


def class_balanced(
    labels: Int64[np.ndarray, " samples"],
    classes_per_batch: int,
    samples_per_class: int,
    seed: int,
    epoch: int,
    max_repeats: float = MAX_REPEATS,
) -> Plan:
    """P×K batches: P groups a step, each of K samples of one class; no class twice in a step, unless it is very large.

    Every sample is used at least once an epoch. A class whose size is no multiple of K fills its last group with further
    samples of its own (with repeats only if it has fewer than K). Classes of a single image cannot form a positive pair:
    K of them share a group, each once, and so serve as negatives (a group with room left takes single images of classes
    absent from its step; of larger classes if none is absent). Steps that would be short are filled with groups of absent
    classes: nothing is dropped.

    A class of more groups than steps would make the epoch as long as itself, and its steps would repeat the others again and again. An
    epoch has at most `max_repeats` times the groups that hold every image once; a class that is too large for so many steps has
    several groups in a step, of different images.

    Args:
        labels: Contiguous class numbers 0..C-1 of the training samples.
        classes_per_batch: P, the number of groups in a batch.
        samples_per_class: K, the size of a group, at least 2.
        seed: Seed of the run.
        epoch: Number of the epoch; every epoch has another plan.
        max_repeats: Largest length of an epoch, relative to the shortest that holds every image; at least 1.

    Raises:
        ValueError: There are fewer groups of distinct classes than P, or no class has two images.

    Cost: O(N log N + steps·P).
    """
    random = np.random.default_rng([seed, epoch, Stream.CLASS_BALANCED])
    sizes = _class_sizes(labels)
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
    shortest = -(-len(groups) // classes_per_batch)
    steps = max(shortest, min(int(counts.max()), int(max_repeats * len(groups) / classes_per_batch)))
    counts = _split(counts, steps)
    table = _assign_steps(counts, steps, classes_per_batch, random)
    _fill_steps(table, counts, random)
    ids = groups[table].reshape(steps, classes_per_batch * samples_per_class)
    _fill_slots(ids, labels, order, sizes, random)
    return Plan(ids)


def _split(counts: np.ndarray, steps: int) -> Int64[np.ndarray, " owners"]:
    """Owners of more groups than steps, as several of nearly equal numbers; groups keep their order."""
    parts = -(-counts // steps)
    if parts.max() == 1:
        return counts
    small, rest = np.divmod(np.repeat(counts, parts), np.repeat(parts, parts))
    return small + (_ragged_arange(parts) < rest)


def _groups(
    order: np.ndarray, sizes: np.ndarray, size: int, random: np.random.Generator
) -> tuple[Int64[np.ndarray, "groups size"], Int64[np.ndarray, " owners"]]:
    """Cuts every class of several samples into groups of `size`, then the single ones; -1 is left empty.

    Returns the groups, and the number of groups of each owner: the classes in order, then one owner per shared group.
    """
    starts, several = np.cumsum(sizes) - sizes, np.flatnonzero(sizes > 1)
    n = sizes[several]
    counts = -(-n // size)
    positions = _group_positions(counts, size)
    last_groups, earlier = np.cumsum(counts) - 1, (counts - 1) * size
    # A last group that is short takes samples of the earlier groups; repeats only where the class is too small.
    large, small = np.flatnonzero(n % size * (n > size)), np.flatnonzero(n < size)
    for classes, fill_positions in (
        (large, _sample_without_replacement(size - 1, earlier[large], random)),
        (small, random.integers(0, n[small, None], (len(small), size - 1))),
    ):
        last_group = positions[last_groups[classes], 1:]
        positions[last_groups[classes], 1:] = np.where(last_group < n[classes, None], last_group, fill_positions)
    positions += np.repeat(starts[several], counts)[:, None]
    groups = order[positions]
    singles = random.permutation(order[starts[sizes == 1]])
    # Slots left over are filled once the group's step is known.
    shared_groups = np.full(-(-len(singles) // size) * size, -1, dtype=np.int64)
    shared_groups[: len(singles)] = singles
    if len(shared_groups):
        groups = np.concatenate([groups, shared_groups.reshape(-1, size)])
    return groups, np.concatenate([counts, np.ones(len(shared_groups) // size, dtype=np.int64)])


def _assign_steps(
    counts: np.ndarray, steps: int, classes: int, random: np.random.Generator
) -> Int64[np.ndarray, "steps classes"]:
    """Assigns every group to a step, no owner twice in one; returns group numbers, -1 where a step is still short.

    Owners in random order take consecutive entries of a chain of random permutations of the steps. Only the owner that
    spans two permutations could meet a step twice; the second permutation is then reordered.
    """
    owner_order = random.permutation(len(counts))
    owners = np.repeat(owner_order, counts[owner_order])
    sequence = (np.cumsum(counts) - counts)[owners] + _ragged_arange(counts[owner_order])
    table = np.full((steps, classes), -1, dtype=np.int64)
    previous_order = np.empty(0, dtype=np.int64)
    for column in range(classes):
        low, high = column * steps, min((column + 1) * steps, len(sequence))
        if low >= high:
            break
        step_order = random.permutation(steps)
        if column and owners[low] == owners[low - 1]:  # an owner continues from the permutation before
            used_steps = previous_order[owners[low - steps : low] == owners[low]]
            num_needed = int((owners[low:high] == owners[low]).sum())
            free_steps = step_order[~np.isin(step_order, used_steps)]
            step_order = np.concatenate(
                [free_steps[:num_needed], random.permutation(np.concatenate([free_steps[num_needed:], used_steps]))]
            )
        table[step_order[: high - low], column] = sequence[low:high]
        previous_order = step_order
    return table[random.permutation(steps)]


def _fill_steps(table: np.ndarray, counts: np.ndarray, random: np.random.Generator) -> None:
    """Fills short steps, in place, with groups of owners that the step does not have yet. Full columns come first."""
    starts = np.cumsum(counts) - counts
    owners = np.repeat(np.arange(len(counts)), counts)
    for column in range(table.shape[1]):
        short_steps = np.flatnonzero(table[:, column] < 0)
        if len(short_steps):
            new_owners = _sample_excluding(
                owners[table[short_steps, :column]], np.full(len(short_steps), len(counts)), random
            )
            table[short_steps, column] = starts[new_owners] + random.integers(0, counts[new_owners])


def _fill_slots(
    ids: np.ndarray, labels: np.ndarray, order: np.ndarray, sizes: np.ndarray, random: np.random.Generator
) -> None:
    """Fills empty slots, in place, with one image each of classes absent from the step.

    Where no class is absent, with images of classes that have several: no image of a single-image class is repeated.
    """
    steps, empty_label = np.flatnonzero((ids < 0).any(axis=1)), len(sizes)
    slots = ids[steps]
    repeatable = order[sizes[labels[order]] > 1] if len(steps) else order
    sizes, starts = np.append(sizes, 0), np.append(np.cumsum(sizes) - sizes, len(labels))
    while (slots < 0).any():  # as often as slots are empty: equally many in each of these steps
        present_classes = np.sort(np.where(slots < 0, empty_label, labels[slots]), axis=1)
        widths = sizes[present_classes]
        widths[:, 1:][present_classes[:, 1:] == present_classes[:, :-1]] = 0
        num_absent = len(labels) - widths.sum(axis=1)
        draws = random.integers(0, np.maximum(num_absent, 1))
        for start, width in zip(starts[present_classes].T, widths.T, strict=True):
            draws += np.where(draws >= start, width, 0)
        repeated_ids = repeatable[random.integers(0, len(repeatable), len(slots))]
        new_ids = np.where(num_absent > 0, order[np.minimum(draws, len(order) - 1)], repeated_ids)
        slots[np.arange(len(slots)), (slots < 0).argmax(axis=1)] = new_ids
    ids[steps] = slots


def combine_sampler(
    labels: Int64[np.ndarray, " samples"], groups_per_batch: int, group_size: int, seed: int, epoch: int
) -> Plan:
    """Batches of P random groups of K images of one class; a class may occur more than once in a batch.

    The CombineSampler of Intra-Batch Connections: each class, shuffled and filled to K by repeats if it is smaller, is
    extended by further images of its own to (⌊n/K⌋ + 1)·K (by a whole group where K divides n) and cut into groups; random
    groups are repeated until P divides their number. Every image is used at least once an epoch.

    Args:
        labels: Contiguous class numbers of the training samples.
        groups_per_batch: P, the number of groups in a batch.
        group_size: K, the number of images in a group.
        seed, epoch: Seed of the run and number of the epoch.

    Raises:
        ValueError: There are fewer groups than P.
    """
    return _combine_plan(
        labels, groups_per_batch, group_size, np.random.default_rng([seed, epoch, Stream.COMBINE_SAMPLER])
    )


def number_sampler(
    labels: Int64[np.ndarray, " samples"], groups_per_batch: int, group_size: int, seed: int, epoch: int
) -> Plan:
    """`combine_sampler` with a shape drawn each epoch: P uniformly among the divisors of P·K from 2 to P·K/2.

    The NumberSampler of Intra-Batch Connections. Shapes that need more groups than the training set has are left out.
    """
    random = np.random.default_rng([seed, epoch, Stream.NUMBER_SAMPLER])
    slots = groups_per_batch * group_size
    sizes = _class_sizes(labels)
    possible_p = [
        p
        for p in range(2, slots // 2 + 1)
        if slots % p == 0 and (np.maximum(sizes, slots // p) // (slots // p) + 1).sum() >= p
    ]
    if not possible_p:
        raise ValueError(f"no shape of {slots} slots fits a training set of {len(sizes)} classes")
    p = int(random.choice(possible_p))
    return _combine_plan(labels, p, slots // p, random)


def _combine_plan(labels: np.ndarray, groups_per_batch: int, group_size: int, random: np.random.Generator) -> Plan:
    sizes = _class_sizes(labels)
    padded_sizes = np.maximum(sizes, group_size)
    counts = padded_sizes // group_size + 1
    positions, last_groups = _group_positions(counts, group_size), np.cumsum(counts) - 1
    large = np.flatnonzero(sizes >= group_size)
    small = np.flatnonzero(sizes < group_size)
    last = positions[last_groups[large]]
    further = _sample_without_replacement(group_size, sizes[large], random)
    positions[last_groups[large]] = np.where(last < sizes[large, None], last, further)
    first = positions[last_groups[small] - 1]
    repeats = random.integers(0, sizes[small, None], (len(small), group_size))
    first = np.where(first < sizes[small, None], first, repeats)
    positions[last_groups[small] - 1] = first
    positions[last_groups[small]] = random.permuted(first, axis=1)
    positions += np.repeat(np.cumsum(sizes) - sizes, counts)[:, None]
    if len(positions) < groups_per_batch:
        raise ValueError(
            f"a batch of {groups_per_batch} groups of {group_size} images needs as many groups, the training set of "
            f"{len(labels)} images gives {len(positions)}: lower classes_per_batch or samples_per_class"
        )
    group_order = random.permutation(len(positions))
    group_order = np.concatenate(
        [group_order, random.choice(len(positions), -len(positions) % groups_per_batch, replace=False)]
    )
    return Plan(_shuffled(labels, random)[positions[group_order]].reshape(-1, groups_per_batch * group_size))


def uniform_classes(
    labels: Int64[np.ndarray, " samples"], classes_per_batch: int, samples_per_class: int, seed: int, epoch: int
) -> Plan:
    """Batches of P classes drawn uniformly, whatever their size, each with K images; rows are class-major.

    The sampler of GCA-HNG: within a class, images are taken from a shuffled list that is reshuffled when fewer than K
    remain; a class with fewer than K images draws K with repeats. An epoch has ⌊(N - 1) / PK⌋ steps (at least one), and
    does not promise to use every image. The lists start anew each epoch, so that the plan depends on (seed, epoch) alone.

    Raises:
        ValueError: There are fewer classes than P.
    """
    random = np.random.default_rng([seed, epoch, Stream.UNIFORM_CLASSES])
    sizes, group_size = _class_sizes(labels), samples_per_class
    if len(sizes) < classes_per_batch:
        raise ValueError(
            f"classes_per_batch is {classes_per_batch}, the training set has {len(sizes)} classes: lower classes_per_batch"
        )
    steps = max(1, (len(labels) - 1) // (classes_per_batch * group_size))
    step_classes = _sample_without_replacement(classes_per_batch, np.full(steps, len(sizes)), random).ravel()
    visits = np.bincount(step_classes, minlength=len(sizes))
    visit_number = np.empty(len(step_classes), dtype=np.int64)  # which of its class's visits each is
    visit_number[np.argsort(step_classes, kind="stable")] = _ragged_arange(visits)
    # A class's lists, one after the other, as many as its visits use up.
    groups_per_list = np.maximum(sizes // group_size, 1)
    num_lists = np.where(sizes < group_size, 0, -(-visits // groups_per_list))
    list_lengths = np.repeat(sizes, num_lists)
    first_list = np.cumsum(num_lists) - num_lists
    list_starts = np.cumsum(list_lengths) - list_lengths
    members = _shuffled(np.repeat(np.arange(len(list_lengths)), list_lengths), random) - np.repeat(
        list_starts, list_lengths
    )
    positions = random.integers(0, sizes[step_classes][:, None], (len(step_classes), group_size))
    large = np.flatnonzero(sizes[step_classes] >= group_size)
    list_number, group_in_list = np.divmod(visit_number[large], groups_per_list[step_classes[large]])
    positions[large] = members[
        (list_starts[first_list[step_classes[large]] + list_number] + group_in_list * group_size)[:, None]
        + np.arange(group_size)
    ]
    positions += (np.cumsum(sizes) - sizes)[step_classes][:, None]
    return Plan(np.argsort(labels, kind="stable")[positions].reshape(steps, -1))


def each_class_once(
    labels: Int64[np.ndarray, " samples"], classes_per_batch: int, samples_per_class: int, seed: int, epoch: int
) -> Plan:
    """Every class once an epoch, with K of its images (with repeats where it has fewer); rows are class-major.

    The sampler of MMSI. Classes come in random order; those of an incomplete last batch are left out of the epoch.

    Raises:
        ValueError: There are fewer classes than P.

    Cost: O(N log N).
    """
    random = np.random.default_rng([seed, epoch, Stream.EACH_CLASS_ONCE])
    order = np.lexsort((random.random(len(labels)), labels))  # by class, shuffled within
    sizes = np.bincount(labels)
    starts, classes = np.cumsum(sizes) - sizes, np.flatnonzero(sizes)
    if len(classes) < classes_per_batch:
        raise ValueError(
            f"batches of {classes_per_batch} classes, but the training set has {len(classes)}: lower the number of classes "
            "in a batch"
        )
    epoch_classes = random.permutation(classes)[: len(classes) // classes_per_batch * classes_per_batch]
    column = np.broadcast_to(np.arange(samples_per_class), (len(epoch_classes), samples_per_class))
    repeated_columns = random.integers(0, sizes[epoch_classes][:, None], column.shape)
    column = np.where(sizes[epoch_classes][:, None] >= samples_per_class, column, repeated_columns)
    ids = order[starts[epoch_classes][:, None] + column]
    return Plan(ids.reshape(-1, classes_per_batch * samples_per_class))


def join_roles(plans_by_role: Mapping[str, Plan]) -> Plan:
    """Plans of equal length as roles of one: their slots one after the other, with a column `role`."""
    names = np.array(list(plans_by_role))
    role = np.repeat(names, [p.ids.shape[1] for p in plans_by_role.values()])
    ids = np.concatenate([p.ids for p in plans_by_role.values()], 1)
    return Plan(ids, {"role": np.broadcast_to(role, ids.shape)})


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _class_sizes(labels: np.ndarray) -> Int64[np.ndarray, " classes"]:
    """Number of samples of each class.

    Raises:
        ValueError: The class numbers have gaps.
    """
    sizes = np.bincount(labels)
    if len(sizes) == 0 or sizes.min() == 0:
        missing = int(sizes.argmin()) if len(sizes) else 0
        raise ValueError(
            f"labels are {len(np.unique(labels))} classes numbered up to {len(sizes) - 1}, without {missing}: number them 0, 1, 2, ..."
        )
    return sizes


def _shuffled(labels: np.ndarray, random: np.random.Generator) -> Int64[np.ndarray, " samples"]:
    """Samples class by class, in random order within. No two keys are equal, so that every machine sorts them alike."""
    order = random.permutation(len(labels))
    keys = labels[order] * len(labels)
    keys += np.arange(len(labels))
    keys.sort()
    keys %= len(labels)
    return order[keys]


def _ragged_arange(counts: np.ndarray) -> Int64[np.ndarray, " all"]:
    """Concatenation of arange(count) for every count."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _group_positions(counts: np.ndarray, size: int) -> Int64[np.ndarray, "groups size"]:
    """Positions 0, 1, ... within each class, in groups of `size`; `counts` groups per class."""
    return _ragged_arange(counts)[:, None] * size + np.arange(size)


def _sample_excluding(
    excluded: np.ndarray, bounds: np.ndarray, random: np.random.Generator
) -> Int64[np.ndarray, " rows"]:
    """For each row a uniform number below its bound, other than the row's `excluded` numbers (which are distinct)."""
    draws = random.integers(0, bounds - excluded.shape[1])
    for number in np.sort(excluded, axis=1).T:
        draws += draws >= number
    return draws


def _sample_without_replacement(
    count: int, bounds: np.ndarray, random: np.random.Generator
) -> Int64[np.ndarray, "rows count"]:
    """For each row `count` distinct numbers below its bound, in random order; O(rows · count²)."""
    draws = np.empty((len(bounds), count), dtype=np.int64)
    for column in range(count):
        draws[:, column] = _sample_excluding(draws[:, :column], bounds, random)
    return draws
