"""Neighbours by a plain loop over all rows: what every search is compared with."""

from __future__ import annotations

import numpy as np

from pipeline.neighbours.exact_search import Neighbours, Queries, Rows, empty


def neighbours(queries: Queries, rows: Rows, k: int, class_filter: str = "all") -> Neighbours:
    out = empty(len(queries), k)
    for q, value in enumerate(queries.values.astype(np.float64)):
        found = []
        distances = squared_distances(value, rows.values.astype(np.float64))
        for row in range(len(rows)):
            same = queries.labels is not None and rows.labels[row] == queries.labels[q]
            if (
                rows.ids[row] == queries.ids[q]
                or (class_filter == "other" and same)
                or (class_filter == "same" and not same)
            ):
                continue
            found.append((float(distances[row]), int(rows.ids[row])))
        for place, (distance, i) in enumerate(sorted(found)[:k]):
            out.ids[q, place], out.distances[q, place] = i, distance
    return out


def squared_distances(value: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """In the order that the engine promises: number i of every eight goes to the i-th sum, what is left over to the first."""
    squares = (value - rows) * (value - rows)
    sums = np.zeros((len(rows), 8))
    for i, column in enumerate(squares.T):
        sums[:, i % 8 if i < squares.shape[1] // 8 * 8 else 0] += column
    return ((sums[:, 0] + sums[:, 4]) + (sums[:, 1] + sums[:, 5])) + (
        (sums[:, 2] + sums[:, 6]) + (sums[:, 3] + sums[:, 7])
    )


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
