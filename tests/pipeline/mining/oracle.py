"""Neighbours by a plain loop over all rows: what every search is compared with."""

from __future__ import annotations

import numpy as np

from pipeline.neighbours.exact_search import Neighbours, Queries, Rows, empty


def neighbours(queries: Queries, rows: Rows, k: int, which: str = "all") -> Neighbours:
    out = empty(len(queries), k)
    for q, value in enumerate(queries.values.astype(np.float64)):
        found = []
        for row in range(len(rows)):
            same = queries.labels is not None and rows.labels[row] == queries.labels[q]
            if rows.ids[row] == queries.ids[q] or (which == "other" and same) or (which == "same" and not same):
                continue
            difference = value - rows.values[row].astype(np.float64)
            found.append((float(np.vecdot(difference, difference)), int(rows.ids[row])))
        for place, (distance, i) in enumerate(sorted(found)[:k]):
            out.ids[q, place], out.distances[q, place] = i, distance
    return out


def assert_equal(got: Neighbours, expected: Neighbours) -> None:
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.distances, expected.distances)


def clustered(rows: int, dim: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, embeddings of length one around a centre for each class, labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    values = random.normal(size=(classes, dim))[labels] + 0.6 * random.normal(size=(rows, dim))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return random.permutation(10 * rows)[:rows].astype(np.int64), values.astype(np.float32), labels.astype(np.int64)
