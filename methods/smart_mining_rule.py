"""Which triplets Smart Mining takes from lists of neighbours (eq. 6 and Algorithm 1), and its random ones.

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
        anchor, positive, negative: samples.
        kind: MINED, HALF_MINED or RANDOM.
    """

    anchor: Int64[np.ndarray, " triplets"]
    positive: Int64[np.ndarray, " triplets"]
    negative: Int64[np.ndarray, " triplets"]
    kind: Int64[np.ndarray, " triplets"]


class ClassIndex:
    """Who is in which class, and random members drawn from (key, anchor, draw) alone: in any order, in any process.

    Args:
        labels: of all samples.
        key: of the draws.
    """

    def __init__(self, labels: Int64[np.ndarray, " samples"], key: tuple[int, ...]) -> None:
        self.labels = labels
        self.order = np.argsort(labels, kind="stable")
        self.sizes = np.bincount(labels)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.place = np.empty(len(labels), np.int64)  # of a sample within its class
        self.place[self.order] = np.arange(len(labels)) - np.repeat(self.starts, self.sizes)
        self.seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]

    def uniform(self, anchors: np.ndarray, draw: np.ndarray | int) -> Float64[np.ndarray, " draws"]:
        """A number in [0, 1) for each anchor (splitmix64 of the anchor, the draw and the key)."""
        with np.errstate(over="ignore"):
            z = anchors.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self.seed
            z = _mixed(z) + np.asarray(draw, np.uint64) * np.uint64(0xD1B54A32D192ED03)
        return (_mixed(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def random_positive(self, anchors: np.ndarray, draw: np.ndarray | int) -> Int64[np.ndarray, " draws"]:
        """Another member of each anchor's class."""
        c = self.labels[anchors]
        r = (self.uniform(anchors, 2 * np.asarray(draw)) * (self.sizes[c] - 1)).astype(np.int64)
        return self.order[self.starts[c] + r + (r >= self.place[anchors])]

    def random_negative(self, anchors: np.ndarray, draw: np.ndarray | int) -> Int64[np.ndarray, " draws"]:
        """A sample of another class."""
        c = self.labels[anchors]
        r = (self.uniform(anchors, 2 * np.asarray(draw) + 1) * (len(self.labels) - self.sizes[c])).astype(np.int64)
        return self.order[np.where(r < self.starts[c], r, r + self.sizes[c])]

    def random_triplets(self, anchors: np.ndarray, draw: np.ndarray | int = 0) -> Triplets:
        """One for each anchor, which must not be alone in its class."""
        kind = np.full(len(anchors), RANDOM)
        return Triplets(anchors, self.random_positive(anchors, draw), self.random_negative(anchors, draw), kind)


def _mixed(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class RuleResult(NamedTuple):
    """What the rule takes from the list of each anchor.

    Attributes:
        positive, negative: samples of the t-th triplet; -1 where its kind is RANDOM.
        kind: MINED, HALF_MINED or RANDOM.
        bound: κ d(+NN); NaN without +NN.
        without_positive, without_negative: whether a list has none.
    """

    positive: Int64[np.ndarray, "anchors t"]
    negative: Int64[np.ndarray, "anchors t"]
    kind: Int64[np.ndarray, "anchors t"]
    bound: Float64[np.ndarray, " anchors"]
    without_positive: Bool[np.ndarray, " anchors"]
    without_negative: Bool[np.ndarray, " anchors"]


def apply_rule(
    anchors: Int64[np.ndarray, " anchors"],
    wanted: Bool[np.ndarray, " anchors"],
    ids: Int64[np.ndarray, "anchors k"],
    distances: Float64[np.ndarray, "anchors k"],
    classes: ClassIndex,
    kappa: float,
    count: int,
) -> RuleResult:
    """The mining rule.

    Args:
        anchors: samples.
        wanted: of which anchors triplets are made; none of these is alone in its class.
        ids: samples in their lists; -1 behind the end of a shorter one.
        distances: squared, ascending.
        classes: of all samples.
        kappa: κ.
        count: T, triplets wanted of an anchor.
    """
    c, shape = classes, (len(anchors), count)
    uniform = c.uniform(np.repeat(anchors, count), 2 * np.tile(np.arange(count), len(anchors))).reshape(shape)
    bound, lacking = np.full(len(anchors), np.nan), np.zeros((2, len(anchors)), bool)
    chosen = RuleResult(np.full(shape, -1), np.full(shape, -1), np.full(shape, RANDOM), bound, lacking[0], lacking[1])
    taken = np.empty(ids.shape[1] + 2, np.int64)
    rows = np.flatnonzero(wanted)
    _compiled()(
        rows,
        anchors,
        ids,
        distances,
        float(kappa),
        uniform,
        taken,
        c.labels,
        c.order,
        c.sizes,
        c.starts,
        c.place,
        *chosen,
    )
    return chosen


@no_type_check
def _choose(
    rows, anchors, ids, distances, kappa, uniform, taken, labels, order, sizes, starts, place,
    positive, negative, kind, bound, without_positive, without_negative,
):  # fmt: skip
    """Fills what follows `place`."""
    k, count = ids.shape[1], uniform.shape[1]
    for i in rows:
        listed, own = ids[i], labels[anchors[i]]
        first = other = 0
        while first < k and listed[first] >= 0 and labels[listed[first]] != own:
            first += 1
        while other < k and listed[other] >= 0 and labels[listed[other]] == own:
            other += 1
        without_positive[i] = first == k or listed[first] < 0
        without_negative[i] = other == k or listed[other] < 0
        if without_positive[i]:
            continue
        bound[i] = kappa * distances[i, first]
        start = first + 1
        while start < k and distances[i, start] < bound[i]:
            start += 1
        taken[0], taken[1], many = place[anchors[i]], place[listed[first]], 2  # places in the class
        made = paired = 0  # triplets that have their negative, and that have both
        for r in range(start, k):
            if listed[r] < 0 or paired == count:
                break
            if labels[listed[r]] != own:
                if made < count:
                    negative[i, made], kind[i, made] = listed[r], HALF_MINED
                    made += 1
                continue
            taken[many] = place[listed[r]]
            many += 1
            while paired < made:
                positive[i, paired], kind[i, paired] = listed[r], MINED
                paired += 1
        # Random members that are neither +NN nor could have been taken; any others where none is left.
        if many == sizes[own]:
            many = 1
        for t in range(paired, made):
            free = drawn = int(uniform[i, t] * (sizes[own] - many))
            at = -1
            while at != drawn:  # the free-th place that is not taken: further by as many as are taken up to it
                at, drawn = drawn, free
                for b in range(many):
                    drawn += taken[b] <= at
            positive[i, t] = order[starts[own] + drawn]


@functools.cache
def _compiled() -> Callable[..., Any]:
    import numba  # a second's work: only where triplets are mined

    return numba.njit(nogil=True)(_choose)


class MinedBlock(NamedTuple):
    """Of a block of anchors.

    Attributes:
        triplets: T of each anchor that is not alone in its class.
        without_positive, without_negative: lists that have none.
        seconds: spent on the rule.
    """

    triplets: Triplets
    without_positive: int
    without_negative: int
    seconds: float


def mine(
    queries: Any,
    lists: Any,
    classes: ClassIndex,
    kappa: float,
    count: int,
    wanted: np.ndarray | None,
    positives: Any = None,
) -> MinedBlock:
    """Triplets of a block of anchors from their lists; a `reduce` of `Mining.all_neighbours`.

    Args:
        queries: the anchors: `ids`.
        lists: `ids` and squared `distances`, ascending; with `positives`, of other classes only.
        classes: of all samples.
        kappa: κ.
        count: T.
        wanted: whether each sample is an anchor; none: all.
        positives: (ids [samples], lists of their own class).
    """
    started = time.perf_counter()
    anchors, ids, distances = queries.ids, lists.ids, lists.distances
    kept = classes.sizes[classes.labels[anchors]] > 1
    if wanted is not None:
        kept &= wanted[anchors]
    if kept.mean() < 0.5:  # else a copy takes longer than what it saves
        anchors, ids, distances, kept = anchors[kept], ids[kept], distances[kept], np.ones(kept.sum(), bool)
    if positives is not None:
        ids, distances = _merged(anchors, ids, distances, *positives)
    found = apply_rule(anchors, kept, ids, distances, classes, kappa, count)
    triplets = Triplets(np.repeat(anchors[kept], count), *(column[kept].ravel() for column in found[:3]))
    none, draw = np.flatnonzero(triplets.kind == RANDOM), np.tile(np.arange(count), int(kept.sum()))
    random = classes.random_triplets(triplets.anchor[none], draw[none])
    triplets.positive[none], triplets.negative[none] = random.positive, random.negative
    lacking, crowded = int(found.without_positive.sum()), int(found.without_negative.sum())
    return MinedBlock(triplets, lacking, crowded, time.perf_counter() - started)


def _merged(
    anchors: np.ndarray, ids: np.ndarray, distances: np.ndarray, known: np.ndarray, own: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of other classes and of the own one, as one, by distance and id."""
    rows = np.searchsorted(known, anchors)
    ids, distances = np.concatenate([ids, own.ids[rows]], 1), np.concatenate([distances, own.distances[rows]], 1)
    order = np.lexsort((ids, distances), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
