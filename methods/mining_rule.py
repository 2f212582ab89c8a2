"""Which triplets Smart Mining takes from lists of neighbours (eq. 6 and Algorithm 1), and its random ones; numpy alone.

    bound = κ d(+NN)     +NN the first entry of the anchor's class, d squared distances
    n_t = the t-th entry after +NN of another class with d >= bound
    p_t = the first entry of the own class after n_t; a random member of the class that the list has not, if there is none

What is random depends on (key, anchor, draw) alone: triplets are the same in whatever blocks and processes they are made.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

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


class Classes:
    """Who is in which class, and random members drawn from (key, anchor, draw) alone: in any order, in any process.

    Args:
        labels: of all samples.
        key: of the draws.
    """

    def __init__(self, labels: Int64[np.ndarray, " samples"], key: tuple[int, ...]) -> None:
        self.labels = labels
        width = np.int32 if len(labels) < 2**31 else np.int64
        self.order = np.argsort(labels, kind="stable").astype(width)
        self.sizes = np.bincount(labels)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.place = np.empty(len(labels), width)  # of a sample within its class
        self.place[self.order] = np.arange(len(labels)) - np.repeat(self.starts, self.sizes)
        self.seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]

    def draw(self, anchors: np.ndarray, draw: np.ndarray | int, most: np.ndarray) -> Int64[np.ndarray, " draws"]:
        """A number in 0..most-1 for each anchor (splitmix64 of the anchor, the draw and the key)."""
        with np.errstate(over="ignore"):
            z = anchors.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self.seed
            z = _mixed(z) + np.asarray(draw, np.uint64) * np.uint64(0xD1B54A32D192ED03)
        uniform = (_mixed(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.minimum((uniform * most).astype(np.int64), most - 1)

    def random_positive(self, anchors: np.ndarray, draw: np.ndarray | int) -> Int64[np.ndarray, " draws"]:
        """Another member of each anchor's class."""
        c = self.labels[anchors]
        r = self.draw(anchors, 2 * np.asarray(draw), self.sizes[c] - 1)
        return self.order[self.starts[c] + r + (r >= self.place[anchors])].astype(np.int64)

    def random_negative(self, anchors: np.ndarray, draw: np.ndarray | int) -> Int64[np.ndarray, " draws"]:
        """A sample of another class."""
        c = self.labels[anchors]
        r = self.draw(anchors, 2 * np.asarray(draw) + 1, len(self.labels) - self.sizes[c])
        return self.order[np.where(r < self.starts[c], r, r + self.sizes[c])].astype(np.int64)

    def random_triplets(self, anchors: np.ndarray, draw: np.ndarray | int = 0) -> Triplets:
        """One for each anchor, which must not be alone in its class."""
        kind = np.full(len(anchors), RANDOM)
        return Triplets(anchors, self.random_positive(anchors, draw), self.random_negative(anchors, draw), kind)

    def outside(
        self, anchors: np.ndarray, draw: np.ndarray, listed: np.ndarray, of: np.ndarray
    ) -> Int64[np.ndarray, " draws"]:
        """Another member of each anchor's class that is not among its listed ones; any other where there is none.

        Args:
            anchors: who asks.
            draw: number of the draw.
            listed: samples, all of them.
            of: the (ascending) position in `anchors` that each belongs to.
        """
        c = self.labels[anchors]
        # The anchor and its listed ones, as places within the class, ascending for each asker.
        of = np.concatenate([np.arange(len(anchors)), of])
        taken = np.concatenate([self.place[anchors], self.place[listed]])
        order = np.lexsort((taken, of))
        of, taken = of[order], taken[order]
        counts = np.bincount(of, minlength=len(anchors))
        starts = np.cumsum(counts) - counts
        left = self.sizes[c] - counts
        r = self.draw(anchors, 2 * draw, np.maximum(left, 1))
        # The r-th place that is not taken: r plus the number of taken ones t_0 < t_1 < ... with t_i - i <= r.
        before = taken - (np.arange(len(taken)) - np.repeat(starts, counts)) <= np.repeat(r, counts)
        place = r + np.bincount(of, before, minlength=len(anchors)).astype(np.int64)
        drawn = self.order[self.starts[c] + np.minimum(place, self.sizes[c] - 1)]
        return np.where(left > 0, drawn.astype(np.int64), self.random_positive(anchors, draw))


def _mixed(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Chosen(NamedTuple):
    """What the rule finds in lists: ranks in them, -1 where there is none.

    Attributes:
        negative, positive: of the t-th triplet of each anchor.
        admitted: positives that a triplet may take.
        first: rank of +NN.
        bound: κ d(+NN); NaN without +NN.
    """

    negative: Int64[np.ndarray, "anchors t"]
    positive: Int64[np.ndarray, "anchors t"]
    admitted: Bool[np.ndarray, "anchors k"]
    first: Int64[np.ndarray, " anchors"]
    bound: Float64[np.ndarray, " anchors"]


def choose(
    same: Bool[np.ndarray, "anchors k"],
    there: Bool[np.ndarray, "anchors k"],
    distances: Float64[np.ndarray, "anchors k"],
    kappa: float,
    count: int,
) -> Chosen:
    """The mining rule (eq. 6 and Algorithm 1), on all lists at once.

    Args:
        same: whether an entry is of the anchor's class.
        there: whether there is one: lists may be shorter than K.
        distances: squared, ascending.
        kappa: κ.
        count: T, triplets wanted of an anchor.
    """
    rows, k = same.shape
    none = ~same.any(1)
    first = same.argmax(1)
    nearest = distances[np.arange(rows), first]
    bound = np.where(none, np.nan, kappa * nearest)
    # Entries after +NN and not within the bound: a suffix of the list, as distances ascend.
    start = (distances < np.where(none, np.inf, bound)[:, None]).sum(1)
    start = np.where(none, k, np.maximum(start, first + 1))
    suffix = (np.arange(k) >= start[:, None]) & there
    admitted, foreign = suffix & same, suffix & ~same
    negative = np.full((rows, count), -1)
    row, rank = np.nonzero(foreign) if count > 1 else (np.flatnonzero(foreign.any(1)), np.empty(0, np.int64))
    if count > 1:
        each = np.bincount(row, minlength=rows)
        turn = np.arange(len(row)) - np.repeat(np.cumsum(each) - each, each)
        kept = turn < count
        negative[row[kept], turn[kept]] = rank[kept]
    else:
        negative[row, 0] = foreign[row].argmax(1)
    positive = np.full((rows, count), -1)
    for t in range(count):
        some = np.flatnonzero(negative[:, t] >= 0)
        later = admitted[some] & (np.arange(k) > negative[some, t][:, None])
        found = later.any(1)
        positive[some[found], t] = later[found].argmax(1)
    return Chosen(negative, positive, admitted, np.where(none, -1, first), bound)


class Mined(NamedTuple):
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
    classes: Classes,
    kappa: float,
    count: int,
    wanted: np.ndarray | None,
    positives: Any = None,
) -> Mined:
    """Triplets of a block of anchors from their lists; a `reduce` of `Mining.all_pairs`.

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
    alone = classes.sizes[classes.labels[anchors]] < 2
    kept = ~alone if wanted is None else ~alone & wanted[anchors]
    anchors, ids, distances = anchors[kept], ids[kept], distances[kept]
    if positives is not None:
        ids, distances = _merged(anchors, ids, distances, *positives)
    there = ids >= 0
    same = there & (classes.labels[ids] == classes.labels[anchors][:, None])
    found = choose(same, there, distances, kappa, count)
    rows, draw = np.repeat(np.arange(len(anchors)), count), np.tile(np.arange(count), len(anchors))
    negative, positive = found.negative.ravel(), found.positive.ravel()
    kind = np.where(negative < 0, RANDOM, np.where(positive < 0, HALF_MINED, MINED))
    n = ids[rows, np.maximum(negative, 0)]
    p = ids[rows, np.maximum(positive, 0)]
    half = np.flatnonzero(kind == HALF_MINED)
    if len(half):
        listed = found.admitted.copy()
        some = np.flatnonzero(found.first >= 0)
        listed[some, found.first[some]] = True  # +NN is in the list as well
        askers, rank = np.nonzero(listed[rows[half]])
        p[half] = classes.outside(anchors[rows[half]], draw[half], ids[rows[half]][askers, rank], askers)
    none = np.flatnonzero(kind == RANDOM)
    random = classes.random_triplets(anchors[rows[none]], draw[none])
    p[none], n[none] = random.positive, random.negative
    triplets = Triplets(anchors[rows], p, n, kind)
    return Mined(
        triplets, int((~same.any(1)).sum()), int((~(there & ~same).any(1)).sum()), time.perf_counter() - started
    )


def _merged(
    anchors: np.ndarray, ids: np.ndarray, distances: np.ndarray, known: np.ndarray, own: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of other classes and of the own one, as one, by distance and id."""
    rows = np.searchsorted(known, anchors)
    ids, distances = np.concatenate([ids, own.ids[rows]], 1), np.concatenate([distances, own.distances[rows]], 1)
    order = np.lexsort((ids, distances), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
