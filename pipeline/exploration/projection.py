"""A plane map of embeddings: principal components, then t-SNE; and for each image its neighbours.

Of fewer than 50 images the first two principal components are the map: so few have no neighbourhoods to unfold.

van der Maaten, "Accelerating t-SNE using Tree-Based Algorithms", JMLR 2014, as scikit-learn has it. On a map, what is near is
alike; distances between far groups, sizes of groups and the axes mean nothing.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from pipeline.neighbours.exact_search import Neighbours, Rows, search_all

COMPONENTS = 50  # principal components that t-SNE sees
FEWEST_FOR_TSNE = 50
PERPLEXITY = 30.0  # neighbours that a point is drawn to, about
SAME = 1e-7  # spread below which all rows are the same
ITERATIONS = 750  # 250 of them with exaggerated attraction, as scikit-learn does; more change nothing that can be seen


def project(embeddings: Float32[np.ndarray, "images dim"]) -> Float32[np.ndarray, "images 2"]:
    """Places in the unit square, the same for the same embeddings: one thread, a fixed seed.

    About 4 ms an image: 25 s of CPU time for 6,000. Memory: some kB an image.
    """
    from threadpoolctl import threadpool_limits  # here, and scikit-learn below: only who draws a map waits for them

    with threadpool_limits(1):  # sums over several threads come out differently each time, and t-SNE magnifies that
        points = _principal_components(embeddings)
        if len(points) >= FEWEST_FOR_TSNE and points[:, 0].std() > SAME:
            points = _tsne(points)
    low, high = (points[:, :2].min(axis=0), points[:, :2].max(axis=0)) if len(points) else (0.0, 0.0)
    largest = max(float(np.max(np.subtract(high, low))), SAME)
    return (0.5 + (points[:, :2] - np.add(low, high) / 2) / largest).astype(np.float32)


def _principal_components(embeddings: np.ndarray) -> np.ndarray:
    """The rows in their first 50 principal components, two at least; the sign of each makes its largest weight positive."""
    centred = embeddings - embeddings.mean(axis=0) if len(embeddings) else embeddings
    _, axes = np.linalg.eigh(centred.T.astype(np.float64) @ centred.astype(np.float64))
    axes = axes[:, ::-1][:, :COMPONENTS]
    axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], 0) < 0, -1, 1)
    rows = centred @ axes
    return np.pad(rows, ((0, 0), (0, max(0, 2 - rows.shape[1]))))


def _tsne(rows: np.ndarray) -> np.ndarray:
    """Places in the plane, begun at the first two components; a fixed trifle parts rows that are the same."""
    from sklearn.manifold import TSNE

    start = rows[:, :2] / rows[:, 0].std() * 1e-4
    start = start + np.random.default_rng(0).normal(0, 1e-6, start.shape)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init=start.astype(np.float32), max_iter=ITERATIONS, random_state=0, n_jobs=1)
    return np.asarray(tsne.fit_transform(rows.astype(np.float32)))


def nearest(embeddings: Float32[np.ndarray, "images dim"], k: int) -> Int64[np.ndarray, "images k"]:
    """Places of the k nearest other rows of each row, nearest first, exactly; -1 where there are fewer. O(images² dim)."""
    lengths = np.linalg.norm(embeddings, axis=1)
    ids = np.arange(len(embeddings))
    rows = Rows(embeddings, ids, np.zeros(len(ids), np.int64), float(lengths.max(initial=0.0)))
    parts: list[Neighbours] = [answer for _, answer in search_all(rows, k)]
    return Neighbours.concatenate(parts).ids if parts else np.empty((0, k), np.int64)
