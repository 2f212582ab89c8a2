"""A plane map of embeddings: principal components, then t-SNE; and for each image its neighbours.

van der Maaten, "Accelerating t-SNE using Tree-Based Algorithms", JMLR 2014, as scikit-learn has it. On a map, what is near is
alike; distances between far groups, sizes of groups and the axes mean nothing.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from pipeline.neighbours.exact_search import Neighbours, Rows, search_all

COMPONENTS = 50  # principal components that t-SNE sees
PERPLEXITY = 30.0  # neighbours that a point is drawn to, about
ITERATIONS = 750  # 250 of them with exaggerated attraction, as scikit-learn does; more change nothing that can be seen


def project(embeddings: Float32[np.ndarray, "images dim"]) -> Float32[np.ndarray, "images 2"]:
    """Places in the unit square, the same for the same embeddings: one thread, a fixed seed.

    About 4 ms an image: 25 s of CPU time for 6,000. Memory: some kB an image.
    """
    spread = embeddings.std(axis=0).max() if len(embeddings) else 0.0
    if (
        len(embeddings) < 3 or not spread > 1e-7
    ):  # t-SNE needs a perplexity below the number of points, and some distance
        return (
            np.full((len(embeddings), 2), 0.5, np.float32)
            + np.linspace(-0.1, 0.1, len(embeddings), dtype=np.float32)[:, None]
        )
    from sklearn.decomposition import PCA  # here: only who draws a map waits for scikit-learn
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums over several threads come out differently each time, and t-SNE magnifies that
        components = min(COMPONENTS, *embeddings.shape)
        rows = PCA(components, svd_solver="full").fit_transform(embeddings)
        perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
        if rows.shape[1] < 2:
            rows = np.pad(rows, ((0, 0), (0, 1)))
        points = TSNE(
            perplexity=perplexity, init=_start(rows), max_iter=ITERATIONS, random_state=0, n_jobs=1
        ).fit_transform(rows.astype(np.float32))
    low, high = points.min(axis=0), points.max(axis=0)
    largest = max(float((high - low).max()), 1e-12)
    return (0.5 + (points - (low + high) / 2) / largest).astype(np.float32)


def _start(rows: np.ndarray) -> np.ndarray:
    """The first two components, small, as t-SNE is best started from; a fixed trifle apart where rows are the same."""
    start = rows[:, :2] / max(float(rows[:, 0].std()), 1e-12) * 1e-4
    return (start + np.random.default_rng(0).normal(0, 1e-6, start.shape)).astype(np.float32)


def nearest(embeddings: Float32[np.ndarray, "images dim"], k: int) -> Int64[np.ndarray, "images k"]:
    """Places of the k nearest other rows of each row, nearest first, exactly; -1 where there are fewer. O(images² dim)."""
    lengths = np.linalg.norm(embeddings, axis=1)
    ids = np.arange(len(embeddings))
    rows = Rows(embeddings, ids, np.zeros(len(ids), np.int64), float(lengths.max(initial=0.0)))
    parts: list[Neighbours] = [answer for _, answer in search_all(rows, k)]
    return Neighbours.concatenate(parts).ids if parts else np.empty((0, k), np.int64)
