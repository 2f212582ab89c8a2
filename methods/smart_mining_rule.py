"""The triplets that Smart Mining takes from lists of neighbours (eq. 6 and Algorithm 1), and its random triplets.

    bound = κ d(+NN)     +NN the first entry of the anchor's class, d squared distances
    n_t = the t-th entry after +NN of another class with d >= bound
    p_t = the first entry of the own class after n_t; if there is none, a random member that the list does not offer

The rule is compiled by numba: it mostly stops early in a list, and array operations would read on. What is random depends on
(key, anchor, draw) alone: triplets are the same in whatever blocks and processes they are made.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import numpy as np
from jaxtyping import Bool, Float64, Int64

MINED, HALF_MINED, RANDOM = 0, 1, 2  # kinds: all mined | its positive is random | both are


class Triplets(NamedTuple):
    """Triplets in the order of their anchors, T of each.

    Attributes:
        anchor, positive, negative: Sample ids.
        kind: MINED, HALF_MINED or RANDOM.
    """

    anchor: Int64[np.ndarray, " triplets"]
    positive: Int64[np.ndarray, " triplets"]
    negative: Int64[np.ndarray, " triplets"]
    kind: Int64[np.ndarray, " triplets"]


class ClassIndex:
    """The members of each class, and random draws among them that depend on (key, anchor, draw) alone.

    Args:
        labels: Labels of all samples.
        key: Seed of the draws.
    """

    def __init__(self, labels: Int64[np.ndarray, " samples"], key: tuple[int, ...]) -> None:
        self.labels = labels
        self.order = np.argsort(labels, kind="stable")
        self.sizes = np.bincount(labels)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.position = np.empty(len(labels), np.int64)  # of a sample within its class
        self.position[self.order] = np.arange(len(labels)) - np.repeat(self.starts, self.sizes)
        self.seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]

    def uniform(self, anchors: np.ndarray, draw: np.ndarray | int) -> Float64[np.ndarray, " draws"]:
        """A number in [0, 1) for each anchor (splitmix64 of the anchor, the draw and the key)."""
        with np.errstate(over="ignore"):
            z = anchors.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self.seed
            z = _splitmix64(z) + np.asarray(draw, np.uint64) * np.uint64(0xD1B54A32D192ED03)
        return (_splitmix64(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def random_positive(self, anchors: np.ndarray, draw: np.ndarray | int) -> Int64[np.ndarray, " draws"]:
        """Another member of each anchor's class."""
        c = self.labels[anchors]
        r = (self.uniform(anchors, 2 * np.asarray(draw)) * (self.sizes[c] - 1)).astype(np.int64)
        return self.order[self.starts[c] + r + (r >= self.position[anchors])]

    def random_negative(self, anchors: np.ndarray, draw: np.ndarray | int) -> Int64[np.ndarray, " draws"]:
        """A sample of another class."""
        c = self.labels[anchors]
        r = (self.uniform(anchors, 2 * np.asarray(draw) + 1) * (len(self.labels) - self.sizes[c])).astype(np.int64)
        return self.order[np.where(r < self.starts[c], r, r + self.sizes[c])]

    def random_triplets(self, anchors: np.ndarray, draw: np.ndarray | int = 0) -> Triplets:
        """One for each anchor, which must not be alone in its class."""
        kind = np.full(len(anchors), RANDOM)
        return Triplets(anchors, self.random_positive(anchors, draw), self.random_negative(anchors, draw), kind)


def _splitmix64(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class RuleResult(NamedTuple):
    """The triplets that the rule takes from the list of each anchor.

    Attributes:
        positive, negative: Sample ids of the t-th triplet; -1 where its kind is RANDOM.
        kind: MINED, HALF_MINED or RANDOM.
        bound: κ d(+NN); NaN without +NN.
        without_positive, without_negative: True for lists without a positive, or without a negative.
    """

    positive: Int64[np.ndarray, "anchors t"]
    negative: Int64[np.ndarray, "anchors t"]
    kind: Int64[np.ndarray, "anchors t"]
    bound: Float64[np.ndarray, " anchors"]
    without_positive: Bool[np.ndarray, " anchors"]
    without_negative: Bool[np.ndarray, " anchors"]


def apply_rule(
    anchors: Int64[np.ndarray, " anchors"],
    is_anchor: Bool[np.ndarray, " anchors"],
    ids: Int64[np.ndarray, "anchors k"],
    distances: Float64[np.ndarray, "anchors k"],
    classes: ClassIndex,
    kappa: float,
    count: int,
) -> RuleResult:
    """The mining rule.

    Args:
        anchors: Sample ids of the anchors.
        is_anchor: Mask of the anchors that get triplets; none of these is alone in its class.
        ids: Sample ids of their neighbours; -1 after the end of a shorter list.
        distances: Squared distances, ascending.
        classes: The class index of all samples.
        kappa: κ.
        count: T, the number of triplets per anchor.
    """
    c, shape = classes, (len(anchors), count)
    uniform = c.uniform(np.repeat(anchors, count), 2 * np.tile(np.arange(count), len(anchors))).reshape(shape)
    bound, lacks = np.full(len(anchors), np.nan), np.zeros((2, len(anchors)), bool)
    result = RuleResult(np.full(shape, -1), np.full(shape, -1), np.full(shape, RANDOM), bound, lacks[0], lacks[1])
    excluded_buffer = np.empty(ids.shape[1] + 2, np.int64)
    rows = np.flatnonzero(is_anchor)
    _compiled()(
        rows,
        anchors,
        ids,
        distances,
        float(kappa),
        uniform,
        excluded_buffer,
        c.labels,
        c.order,
        c.sizes,
        c.starts,
        c.position,
        *result,
    )
    return result


@no_type_check
def _apply_rule_loop(
    rows, anchors, ids, distances, kappa, uniform, excluded, labels, order, sizes, starts, position_in_class,
    positive, negative, kind, bound, without_positive, without_negative,
):  # fmt: skip
    """Fills the arrays of `RuleResult`, in place."""
    k, count = ids.shape[1], uniform.shape[1]
    for i in rows:
        list_ids, own_class = ids[i], labels[anchors[i]]
        first_positive = first_negative = 0
        while first_positive < k and list_ids[first_positive] >= 0 and labels[list_ids[first_positive]] != own_class:
            first_positive += 1
        while first_negative < k and list_ids[first_negative] >= 0 and labels[list_ids[first_negative]] == own_class:
            first_negative += 1
        without_positive[i] = first_positive == k or list_ids[first_positive] < 0
        without_negative[i] = first_negative == k or list_ids[first_negative] < 0
        if without_positive[i]:
            continue
        bound[i] = kappa * distances[i, first_positive]
        start = first_positive + 1
        while start < k and distances[i, start] < bound[i]:
            start += 1
        excluded[0], excluded[1], num_excluded = (
            position_in_class[anchors[i]],
            position_in_class[list_ids[first_positive]],
            2,
        )  # places in the class
        num_negatives = num_pairs = 0  # triplets that have their negative, and that have both
        for r in range(start, k):
            if list_ids[r] < 0 or num_pairs == count:
                break
            if labels[list_ids[r]] != own_class:
                if num_negatives < count:
                    negative[i, num_negatives] = list_ids[r]
                    kind[i, num_negatives] = HALF_MINED
                    num_negatives += 1
                continue
            excluded[num_excluded] = position_in_class[list_ids[r]]
            num_excluded += 1
            while num_pairs < num_negatives:
                positive[i, num_pairs], kind[i, num_pairs] = list_ids[r], MINED
                num_pairs += 1
        # Random members other than +NN and those in the list; where there are none, any member but the anchor.
        if num_excluded == sizes[own_class]:
            num_excluded = 1
        for t in range(num_pairs, num_negatives):
            rank = drawn = int(uniform[i, t] * (sizes[own_class] - num_excluded))
            previous = -1
            while (
                previous != drawn
            ):  # the rank-th member that is not excluded: further by as many as are excluded up to it
                previous, drawn = drawn, rank
                for b in range(num_excluded):
                    drawn += excluded[b] <= previous
            positive[i, t] = order[starts[own_class] + drawn]


@functools.cache
def _compiled() -> Callable[..., Any]:
    import numba  # takes a second to import: only where triplets are mined

    return numba.njit(nogil=True)(_apply_rule_loop)


class MinedBlock(NamedTuple):
    """The triplets of a block of anchors.

    Attributes:
        triplets: T triplets of each anchor that is not alone in its class.
        without_positive, without_negative: Number of lists without a positive, or without a negative.
        seconds: Time spent on the rule.
    """

    triplets: Triplets
    without_positive: int
    without_negative: int
    seconds: float


def mine_triplets(
    queries: Any,
    lists: Any,
    classes: ClassIndex,
    kappa: float,
    count: int,
    is_anchor: np.ndarray | None,
    positives: Any = None,
) -> MinedBlock:
    """Triplets of a block of anchors from their lists; a `map_block` of `Mining.all_neighbours`.

    Args:
        queries: The anchors, as `ids`.
        lists: Their neighbours: `ids` and squared `distances`, ascending; with `positives`, of other classes only.
        classes: The class index of all samples.
        kappa: κ.
        count: T, the number of triplets per anchor.
        is_anchor: Mask of the samples that are anchors; None: all.
        positives: (ids [samples], lists of neighbours of the same class).
    """
    started = time.perf_counter()
    anchors = queries.ids
    ids = lists.ids
    distances = lists.distances
    has_triplets = classes.sizes[classes.labels[anchors]] > 1
    if is_anchor is not None:
        has_triplets &= is_anchor[anchors]
    if has_triplets.mean() < 0.5:  # else a copy takes longer than what it saves
        anchors = anchors[has_triplets]
        ids = ids[has_triplets]
        distances = distances[has_triplets]
        has_triplets = np.ones(len(anchors), bool)
    if positives is not None:
        ids, distances = _merge_lists(anchors, ids, distances, *positives)
    result = apply_rule(anchors, has_triplets, ids, distances, classes, kappa, count)
    triplets = Triplets(
        np.repeat(anchors[has_triplets], count), *(column[has_triplets].ravel() for column in result[:3])
    )
    random_rows = np.flatnonzero(triplets.kind == RANDOM)
    draw = np.tile(np.arange(count), int(has_triplets.sum()))
    random = classes.random_triplets(triplets.anchor[random_rows], draw[random_rows])
    triplets.positive[random_rows] = random.positive
    triplets.negative[random_rows] = random.negative
    without_positive = int(result.without_positive.sum())
    without_negative = int(result.without_negative.sum())
    return MinedBlock(triplets, without_positive, without_negative, time.perf_counter() - started)


def _merge_lists(
    anchors: np.ndarray, ids: np.ndarray, distances: np.ndarray, own_ids: np.ndarray, own_lists: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of other classes and of the own class merged into one, by distance and id."""
    rows = np.searchsorted(own_ids, anchors)
    ids = np.concatenate([ids, own_lists.ids[rows]], 1)
    distances = np.concatenate([distances, own_lists.distances[rows]], 1)
    order = np.lexsort((ids, distances), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
