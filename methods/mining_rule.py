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
        self.short_labels = labels.astype(np.int32)  # they stay in a core's cache
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
        counts = 1 + np.bincount(of, minlength=len(anchors))
        bits = int(self.sizes.max()).bit_length()
        keys = np.concatenate([np.arange(len(anchors)) << bits | self.place[anchors], of << bits | self.place[listed]])
        taken = np.sort(keys) & (1 << bits) - 1
        starts = np.cumsum(counts) - counts
        left = self.sizes[c] - counts
        r = self.draw(anchors, 2 * draw, np.maximum(left, 1))
        # The r-th place that is not taken: r plus the number of taken ones t_0 < t_1 < ... with t_i - i <= r.
        of = np.repeat(np.arange(len(anchors)), counts)
        before = of[taken - np.arange(len(taken)) <= (r - starts)[of]]
        place = r + np.bincount(before, minlength=len(anchors))
        drawn = self.order[self.starts[c] + np.minimum(place, self.sizes[c] - 1)].astype(np.int64)
        full = np.flatnonzero(left <= 0)
        drawn[full] = self.random_positive(anchors[full], draw[full])
        return drawn


def _mixed(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Chosen(NamedTuple):
    """What the rule finds in lists: ranks in them, -1 where there is none.

    Attributes:
        negative, positive: of the t-th triplet of each anchor.
        bound: κ d(+NN); NaN without +NN.
        rows, ranks: of +NN and of the positives that a triplet may take, by row and rank.
        without_positive, without_negative: whether a list has none.
    """

    negative: Int64[np.ndarray, "anchors t"]
    positive: Int64[np.ndarray, "anchors t"]
    bound: Float64[np.ndarray, " anchors"]
    rows: Int64[np.ndarray, " entries"]
    ranks: Int64[np.ndarray, " entries"]
    without_positive: Bool[np.ndarray, " anchors"]
    without_negative: Bool[np.ndarray, " anchors"]


class Entries(NamedTuple):
    """Entries of lists that are of the anchor's class, by row, then rank.

    Attributes:
        rows, ranks: where they stand.
    """

    rows: Int64[np.ndarray, " entries"]
    ranks: Int64[np.ndarray, " entries"]


def choose(
    entries: Entries,
    lengths: Int64[np.ndarray, " anchors"],
    distances: Float64[np.ndarray, "anchors k"],
    kappa: float,
    count: int,
) -> Chosen:
    """The mining rule, on all lists at once: of their entries it looks at those of the own class, and a few beside them.

    Args:
        entries: of the own class.
        lengths: entries of each list.
        distances: squared, ascending.
        kappa: κ.
        count: T, triplets wanted of an anchor.
    """
    rows, ranks = entries
    anchors, k = np.arange(len(distances)), distances.shape[1]
    counts = np.bincount(rows, minlength=len(anchors))
    none = counts == 0
    first = np.zeros(len(anchors), np.int64)
    first[~none] = ranks[(np.cumsum(counts) - counts)[~none]]
    bound = np.where(none, np.nan, kappa * distances[anchors, first])
    # Where a triplet's entries start: after +NN, at the first distance that is not below the bound.
    start = np.where(none, lengths, first + 1)
    searched, step = np.flatnonzero(start < lengths), 1
    while len(searched):  # it mostly is near: look 1, 2, 4, ... entries further, then bisect what was passed over
        at = start[searched]
        ahead = np.minimum(at + step, lengths[searched]) - 1
        below = distances[searched, ahead] < bound[searched]
        start[searched] = np.where(below, ahead + 1, at)
        if step > 1:
            within = searched[~below]
            start[within] = _bisect(distances, within, start[within], ahead[~below], bound[within])
        searched, step = searched[below & (ahead + 1 < lengths[searched])], 2 * step
    kept = ranks >= start[rows]
    own, own_ranks = rows[kept], ranks[kept]
    held = np.bincount(own, minlength=len(anchors))
    within = np.arange(len(own)) - np.repeat(np.cumsum(held) - held, held)
    keys = own * (k + 1) + own_ranks
    negative, positive = np.full((len(anchors), count), -1), np.full((len(anchors), count), -1)
    for t in range(count):
        # The t-th entry of another class: t, and as many further as entries of the own class stand before it.
        passed = np.bincount(own[own_ranks - within - start[own] <= t], minlength=len(anchors))
        rank = start + t + passed
        there = rank < lengths
        negative[there, t] = rank[there]
        later = np.searchsorted(keys, anchors * (k + 1) + rank, "right")
        found = there & (later < len(keys))
        found[found] = own[later[found]] == anchors[found]
        positive[found, t] = own_ranks[later[found]]
    listed = kept | (ranks == first[rows])
    return Chosen(negative, positive, bound, rows[listed], ranks[listed], none, counts == lengths)


def _bisect(
    distances: np.ndarray, rows: np.ndarray, start: np.ndarray, stop: np.ndarray, bound: np.ndarray
) -> np.ndarray:
    """The first rank in start..stop of each row whose distance is not below its bound, that at `stop` not being."""
    while (start < stop).any():
        middle = (start + stop) // 2
        below = distances[rows, middle] < bound
        start, stop = np.where(below, middle + 1, start), np.where(below, stop, middle)
    return start


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
    if kept.mean() < 0.5:  # else a copy takes longer than what it saves
        anchors, ids, distances, kept = anchors[kept], ids[kept], distances[kept], np.ones(kept.sum(), bool)
    if positives is not None:
        ids, distances = _merged(anchors, ids, distances, *positives)
    lengths = (ids >= 0).sum(1) if (ids[:, -1:] < 0).any() else np.full(len(ids), ids.shape[1])
    found = choose(_own_entries(classes, anchors, ids), lengths, distances, kappa, count)
    chosen = np.flatnonzero(kept)
    rows, draw = np.repeat(chosen, count), np.tile(np.arange(count), len(chosen))
    negative, positive = found.negative[chosen].ravel(), found.positive[chosen].ravel()
    kind = np.where(negative < 0, RANDOM, np.where(positive < 0, HALF_MINED, MINED))
    n = ids[rows, np.maximum(negative, 0)]
    p = ids[rows, np.maximum(positive, 0)]
    half = np.flatnonzero(kind == HALF_MINED)
    if len(half):
        # Each asks for a member of its class that is neither +NN nor could have been taken: those of its list.
        counts = np.bincount(found.rows, minlength=len(anchors))
        each, first = counts[rows[half]], (np.cumsum(counts) - counts)[rows[half]]
        entries = np.repeat(first - (np.cumsum(each) - each), each) + np.arange(each.sum())
        listed = ids[found.rows[entries], found.ranks[entries]]
        p[half] = classes.outside(anchors[rows[half]], draw[half], listed, np.repeat(np.arange(len(half)), each))
    none = np.flatnonzero(kind == RANDOM)
    random = classes.random_triplets(anchors[rows[none]], draw[none])
    p[none], n[none] = random.positive, random.negative
    triplets = Triplets(anchors[rows], p, n, kind)
    lacking, crowded = (int(m[chosen].sum()) for m in (found.without_positive, found.without_negative))
    return Mined(triplets, lacking, crowded, time.perf_counter() - started)


def _own_entries(classes: Classes, anchors: np.ndarray, ids: np.ndarray) -> Entries:
    """Entries of the anchors' own classes. Where a class has been seen in full, its list is not read any further."""
    labels, k = classes.short_labels, ids.shape[1]
    own = labels[anchors]
    left = classes.sizes[own] - 1
    keys, rows, first = [], np.arange(len(anchors)), 0
    while first < k and len(rows):
        last = min(k, max(16, 4 * first))
        for start in range(0, len(rows), 4096):  # parts that stay in a core's cache
            part = rows[start : start + 4096]
            some = ids[part, first:last] if len(rows) < len(ids) else ids[start : start + 4096, first:last]
            same = (labels.take(some, mode="clip") == own[part][:, None]) & (some >= 0)
            entry = np.flatnonzero(same)
            row = entry // (last - first)
            keys.append(part[row] * k + first + entry - row * (last - first))
            left[part] -= np.bincount(row, minlength=len(part))
        rows, first = rows[left[rows] > 0], last
    found = np.sort(np.concatenate(keys), kind="stable") if keys else np.zeros(0, np.int64)
    row = found // k
    return Entries(row, found - row * k)


def _merged(
    anchors: np.ndarray, ids: np.ndarray, distances: np.ndarray, known: np.ndarray, own: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of other classes and of the own one, as one, by distance and id."""
    rows = np.searchsorted(known, anchors)
    ids, distances = np.concatenate([ids, own.ids[rows]], 1), np.concatenate([distances, own.distances[rows]], 1)
    order = np.lexsort((ids, distances), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
