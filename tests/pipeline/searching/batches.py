"""Indexes of made-up embeddings, for tests that need no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.searching.changes import Change, IndexBatch, build_index
from pipeline.searching.index_files import ModelRecord

MODEL = ModelRecord(source="/runs/birds", checkpoint=None, fingerprint="a" * 64)


def vectors(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    """Unit vectors, float32 [count, dim]."""
    values = np.random.default_rng(seed).normal(size=(count, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def batches(
    values: np.ndarray, prefix: str = "/photos/a", classes: Sequence[str | None] = ("x", "y"), size: int = 7
) -> Iterator[IndexBatch]:
    """Images PREFIX/0.jpg, ..., of the classes by turns; every third has no thumbnail."""
    for start in range(0, len(values), size):
        numbers = range(start, min(start + size, len(values)))
        yield IndexBatch(
            values[start : start + size],
            [f"{prefix}/{i}.jpg" for i in numbers],
            None,
            [classes[i % len(classes)] for i in numbers],
            [b"" if i % 3 == 2 else f"jpeg {prefix} {i}".encode() for i in numbers],
        )


def make_index(path: Path, values: np.ndarray, **options: object) -> Change:
    options = {"distance": "cosine", "thumbnail_side": 96} | options
    distance = options.pop("distance")
    return build_index(path, MODEL, values.shape[1], distance, batches(values), threads=1, **options)  # type: ignore[arg-type]
