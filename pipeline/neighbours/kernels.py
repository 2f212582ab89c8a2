"""Compiled loops of the exact engine: each reads a tile of similarities once, while it is in the processor's cache.

A tile is float32 [rows, columns]. The queries are its rows, its columns, or both, so that a pair of rows is multiplied once
and looked at from both sides. Most elements are only compared, eight or sixteen at a time; the few that pass are handled one
by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

_ONE, _NONE = np.float32(1), np.float32(0)
_MINUS_INFINITY = np.float32(-np.inf)
# Reassociation applies to counts below 2**24 only, which float32 holds exactly in any order.
_COUNTING = {"reassoc", "nsz"}


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles with numba, without the GIL; machine code is kept on disk where there is a place for it."""
    function = inspect.unwrap(function)
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor a home can be written
        return numba.njit(nogil=True, **options)(function)


class Candidates(NamedTuple):
    """For each of Q queries the rows that may be among its nearest, and how many are nearer than a reference value.

    Attributes:
        threshold: float32 [Q], similarity from which a row is a candidate; +inf for a query that has been given up.
        margin: float32 [Q], twice the largest error of a similarity.
        depth: int32 [Q], neighbours wanted.
        starts: int64 [Q + 1], where the query's candidates begin in `values` and `rows`.
        counts: int32 [Q], candidates so far.
        values: float32, their similarities.
        rows: int32, their positions.
        ids, labels: int64 [Q], sample and class of the query.
        reference: float32 [Q], similarity of the nearest positive; +inf to count nothing.
        ahead: int32 [Q], rows whose similarity is above the reference by more than the margin.
        close: int32 [Q], rows within the margin of the reference.
        close_query, close_row: int32, these rows.
        close_size: int64 [1], how many are stored.
        most_close: int64 [1], of one query, before it is given up.
    """

    threshold: np.ndarray
    margin: np.ndarray
    depth: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    values: np.ndarray
    rows: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    reference: np.ndarray
    ahead: np.ndarray
    close: np.ndarray
    close_query: np.ndarray
    close_row: np.ndarray
    close_size: np.ndarray
    most_close: np.ndarray


class Mask(NamedTuple):
    """Which rows a query may find.

    Attributes:
        ids: int64 [rows], sample of each row; a query does not find its own.
        labels: int64 [rows], class of each row.
        other: Only rows of another class are found.
    """

    ids: np.ndarray
    labels: np.ndarray
    other: bool


class Hits(NamedTuple):
    """Elements of a tile that have passed: query and row (int32) and similarity (float32)."""

    query: np.ndarray
    row: np.ndarray
    value: np.ndarray


@compiled
def kth_largest(values, k):
    """The k-th largest of `values`, which are reordered (quickselect)."""
    low, high, k = 0, values.size - 1, k - 1
    while high - low >= 12:
        first, middle, last = values[low], values[(low + high) >> 1], values[high]
        pivot = max(min(first, middle), min(max(first, middle), last))
        left, right = low, high
        while left <= right:
            while values[left] > pivot:
                left += 1
            while values[right] < pivot:
                right -= 1
            if left <= right:
                values[left], values[right] = values[right], values[left]
                left += 1
                right -= 1
        if k <= right:
            high = right
        elif k >= left:
            low = left
        else:
            return values[k]
    for i in range(low + 1, high + 1):
        value, j = values[i], i - 1
        while j >= low and values[j] < value:
            values[j + 1] = values[j]
            j -= 1
        values[j + 1] = value
    return values[k]


@compiled
def drop_far_candidates(c, query):
    """Raises the threshold to the depth-th largest candidate less the margin, and drops what lies below."""
    start, count = c.starts[query], c.counts[query]
    if count <= c.depth[query]:
        return
    bound = kth_largest(c.values[start : start + count].copy(), c.depth[query]) - c.margin[query]
    bound = max(bound, c.threshold[query])
    kept = start
    for place in range(start, start + count):
        if c.values[place] >= bound:
            c.values[kept], c.rows[kept] = c.values[place], c.rows[place]
            kept += 1
    c.threshold[query], c.counts[query] = bound, kept - start


@compiled
def give_up(c, query):
    """Too many rows are too near to tell: the query collects nothing any more."""
    c.threshold[query], c.reference[query], c.counts[query] = np.inf, np.inf, 0


@compiled
def take_hits(c, mask, hits, start, stop, width):
    """Adds elements that have passed a scan to the candidates and to the rows close to the reference.

    Returns:
        The hit that was reached; before `stop` if there is no more room for rows close to the reference.
    """
    threshold, reference, starts, counts, values, rows = c.threshold, c.reference, c.starts, c.counts, c.values, c.rows
    close, close_query, close_row = c.close, c.close_query, c.close_row
    stored = c.close_size[0]
    for hit in range(start, stop):
        query, row, value = hits.query[hit], hits.row[hit], hits.value[hit]
        if mask.ids[row] == c.ids[query] or (mask.other and mask.labels[row] == c.labels[query]):
            continue
        if abs(value - reference[query]) <= width:
            if stored == close_row.size:
                c.close_size[0] = stored
                return hit
            close_query[stored], close_row[stored] = query, row
            stored += 1
            close[query] += 1
            if close[query] > c.most_close[0]:
                give_up(c, query)
        if value >= threshold[query]:
            place = starts[query] + counts[query]
            values[place], rows[place] = value, row
            counts[query] += 1
            if place + 1 == starts[query + 1]:
                drop_far_candidates(c, query)
                if 8 * counts[query] > 7 * (starts[query + 1] - starts[query]):
                    give_up(c, query)
    c.close_size[0] = stored
    return stop


def _scan_rows(tile, start, threshold, reference, ahead, width, first_row, hits):
    """Lists the elements of a tile that reach their query's threshold or lie about its reference, and counts those above.

    The queries are the rows of the tile, of which `start` is the first to be looked at; its columns are the rows from
    `first_row` on.

    Returns:
        (the tile row that was reached, hits); before the last row if there is too little room for hits.
    """
    columns, size = tile.shape[1], 0
    flags = np.zeros(-(-columns // 8) * 8, np.uint8)  # of columns that pass, read eight at a time
    words = flags.view(np.uint64)
    for query in range(start, tile.shape[0]):
        if hits.value.size - size < columns:
            return query, size
        part, lowest, middle, above = tile[query], threshold[query], reference[query], _NONE
        for i in range(columns):
            flags[i] = (part[i] >= lowest) | (abs(part[i] - middle) <= width)
        for i in range(columns):
            above += _ONE if part[i] - middle > width else _NONE
        ahead[query] += np.int32(above)
        for word in range(words.size):
            if words[word] != 0:
                for i in range(8 * word, min(8 * word + 8, columns)):
                    if flags[i] != 0:
                        hits.query[size], hits.row[size], hits.value[size] = query, first_row + i, part[i]
                        size += 1
    return tile.shape[0], size


def _scan_columns(tile, start, threshold, reference, ahead, width, first_row, hits):
    """As `scan_rows`, with the tile's columns as the queries and its rows from `first_row` on as the rows.

    The tile has a multiple of four rows: four are read at once, so that what is known of the queries is loaded less often.
    """
    columns, size, reached = tile.shape[1], 0, tile.shape[0]
    flags = np.zeros(-(-columns // 8) * 8, np.uint8)
    words, counts = flags.view(np.uint64), np.zeros(columns, np.float32)
    for row in range(start, tile.shape[0], 4):
        if hits.value.size - size < 4 * columns:
            reached = row
            break
        first, second, third, fourth = tile[row], tile[row + 1], tile[row + 2], tile[row + 3]
        for i in range(columns):
            middle = reference[i]
            p, q, r, s = first[i] - middle, second[i] - middle, third[i] - middle, fourth[i] - middle
            best = max(max(first[i], second[i]), max(third[i], fourth[i]))
            closest = min(min(abs(p), abs(q)), min(abs(r), abs(s)))
            flags[i] = (best >= threshold[i]) | (closest <= width)
            counts[i] += ((_ONE if p > width else _NONE) + (_ONE if q > width else _NONE)) + (
                (_ONE if r > width else _NONE) + (_ONE if s > width else _NONE)
            )
        for word in range(words.size):
            if words[word] != 0:
                for i in range(8 * word, min(8 * word + 8, columns)):
                    if flags[i] != 0:
                        for j in range(row, row + 4):
                            value = tile[j, i]
                            if value >= threshold[i] or abs(value - reference[i]) <= width:
                                hits.query[size], hits.row[size], hits.value[size] = i, first_row + j, value
                                size += 1
    for i in range(columns):
        ahead[i] += np.int32(counts[i])
    return reached, size


scan_rows = compiled(_scan_rows, fastmath=_COUNTING)
scan_columns = compiled(_scan_columns, fastmath=_COUNTING)


@compiled
def raise_thresholds(tile, c, mask, first_row):
    """Gives the queries (the tile's rows) a first threshold: the depth-th largest of the maxima of groups of columns.

    At least `depth` allowed rows reach it, so that no neighbour is lost. It spares most of what would be collected before the
    thresholds have risen by themselves.
    """
    columns, most = tile.shape[1], np.int32(0)
    for query in range(tile.shape[0]):
        most = max(most, c.depth[query] + 1)  # one more: a query may find itself
    if columns < 4 * most:
        return
    groups = columns // 16 if columns >= 32 * most else columns // 2
    maxima = np.empty(groups, np.float32)
    for query in range(tile.shape[0]):
        maxima[:] = _MINUS_INFINITY
        for base in range(0, columns - groups + 1, groups):
            part = tile[query, base : base + groups]
            if mask.other:
                for i in range(groups):
                    if part[i] > maxima[i] and mask.labels[first_row + base + i] != c.labels[query]:
                        maxima[i] = part[i]
            else:
                for i in range(groups):
                    maxima[i] = part[i] if part[i] > maxima[i] else maxima[i]
        bound = kth_largest(maxima, c.depth[query] + 1) - c.margin[query]
        c.threshold[query] = max(c.threshold[query], bound)


@compiled
def sort_descending(keys, rows, ids):
    """Sorts keys, largest first, ties by the smaller id, and the rows with them (Shell's sort, Ciura's gaps)."""
    gap = 1
    while gap < keys.size:
        gap = gap * 9 // 4 + 1
    while gap > 0:
        for i in range(gap, keys.size):
            key, row, j = keys[i], rows[i], i - gap
            while j >= 0 and (keys[j] < key or (keys[j] == key and ids[rows[j]] > ids[row])):
                keys[j + gap], rows[j + gap] = keys[j], rows[j]
                j -= gap
            keys[j + gap], rows[j + gap] = key, row
        gap = gap * 4 // 9


@compiled
def sort_candidates(c, ids):
    """Drops what is too far, and sorts each query's candidates by similarity."""
    for query in range(c.counts.size):
        drop_far_candidates(c, query)
        start, stop = c.starts[query], c.starts[query] + c.counts[query]
        sort_descending(c.values[start:stop], c.rows[start:stop], ids)


@compiled
def places_to_compare(c):
    """Places in `values` of candidates that lie within the margin of a neighbouring one of the same query."""
    near = np.zeros(c.values.size, np.bool_)
    for query in range(c.counts.size):
        start = c.starts[query]
        for place in range(start + 1, start + c.counts[query]):
            if c.values[place - 1] - c.values[place] <= c.margin[query]:
                near[place - 1] = near[place] = True
    return np.flatnonzero(near)


@compiled
def sort_runs(starts, counts, values, margin, rows, exact, ids):
    """Sorts the rows of each run of near values by (exact value, largest first; smaller id).

    Args:
        starts, counts: Where each query's rows stand.
        values: float32, descending for each query. Those further apart than `margin` are in the right order.
        margin: float32 [queries].
        rows: int32 or int64, positions; sorted in place, and `exact` with them.
        exact: float64, wherever a run has several rows.
        ids: int64, of all rows.
    """
    for query in range(counts.size):
        first, end = starts[query], starts[query] + counts[query]
        while first < end:
            stop = first + 1
            while stop < end and values[stop - 1] - values[stop] <= margin[query]:
                stop += 1
            if stop - first > 1:
                sort_descending(exact[first:stop], rows[first:stop], ids)
            first = stop


@compiled
def squared_lengths(rows, out):
    """Writes each row's squared length in float64 to `out`, always added up in the same order: see `squared_distances`."""
    whole = rows.shape[1] - rows.shape[1] % 8
    sums = np.zeros(8)
    for i in range(out.size):
        row = rows[i]
        sums[:] = 0
        for base in range(0, whole, 8):
            part = row[base : base + 8]
            for lane in range(8):
                sums[lane] += np.float64(part[lane]) * np.float64(part[lane])
        for d in range(whole, row.size):
            sums[0] += np.float64(row[d]) * np.float64(row[d])
        out[i] = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]))


@compiled
def unit_rows(rows, norms, ids, out):
    """Writes the rows `ids`, divided by their lengths in float64, to `out`, float32 [ids, dim]."""
    for i in range(ids.size):
        row, norm = rows[ids[i]], norms[ids[i]]
        unit = out[i]
        for d in range(row.size):
            unit[d] = np.float64(row[d]) / norm


def _split_dot_products(queries, query_norms, rows, row_norms, query_ids, row_ids, high_steps, low_steps, sums):
    """The three dot products of which the cosine of each pair is the sum; see `exact_cosine.NormedRows.high_low`.

    Every partial sum is exact, so that they may be added in any order, fused or not. `sums` is float64 [pairs, 3].
    """
    split, last = np.empty((2, queries.shape[1])), -1
    high_step, low_step = 1 / high_steps, 1 / low_steps  # powers of two: multiplying by them is exact, and fast
    for pair in range(len(sums)):
        if query_ids[pair] != last:  # pairs of one query mostly follow each other
            last = query_ids[pair]
            query, norm = queries[last], query_norms[last]
            for d in range(query.size):
                unit = np.float64(query[d]) / norm
                split[0, d] = np.rint(unit * high_steps) * high_step
                split[1, d] = np.rint((unit - split[0, d]) * low_steps) * low_step
        row, norm = rows[row_ids[pair]], row_norms[row_ids[pair]]
        high_high = high_low = low_high = 0.0
        for d in range(row.size):
            unit = np.float64(row[d]) / norm
            high = np.rint(unit * high_steps) * high_step
            low = np.rint((unit - high) * low_steps) * low_step
            high_high += split[0, d] * high
            high_low += split[0, d] * low
            low_high += split[1, d] * high
        sums[pair, 0], sums[pair, 1], sums[pair, 2] = high_high, high_low, low_high


split_dot_products = compiled(_split_dot_products, fastmath={"reassoc", "nsz", "contract"})


@compiled
def squared_distances(queries, rows, query_ids, row_ids, out):
    """Squared Euclidean distances of pairs in float64, always added up in the same order: eight partial sums, then those."""
    whole = queries.shape[1] - queries.shape[1] % 8
    sums = np.zeros(8)
    for pair in range(out.size):
        query, row = queries[query_ids[pair]], rows[row_ids[pair]]
        sums[:] = 0
        for base in range(0, whole, 8):
            query_part, row_part = query[base : base + 8], row[base : base + 8]
            for lane in range(8):
                difference = np.float64(query_part[lane]) - np.float64(row_part[lane])
                sums[lane] += difference * difference
        for i in range(whole, query.size):
            difference = np.float64(query[i]) - np.float64(row[i])
            sums[0] += difference * difference
        out[pair] = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]))
