"""Cosine similarity to the same bits in every order of summation: what exact rankings are decided by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from pipeline.neighbours import kernels
from pipeline.neighbours.thread_pool import thread_pool

_CHUNK_ELEMENTS = 2**17  # float64 elements of a temporary array in a loop over rows or pairs: 1 MiB, stays in cache

_HIGH_STEPS = 2.0**26
_UNIT_TOLERANCE = 2.0**-21  # of a length of one

Part = TypeVar("Part", bound="Concatenable")
Block = TypeVar("Block", np.ndarray, slice)


class Concatenable:
    """A dataclass of arrays with one entry a row, so that ranks can each do a range of the rows."""

    @classmethod
    def concatenate(cls: type[Part], parts: Sequence[Part]) -> Part:
        """Joins the results of consecutive ranges, in their order."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class NormedRows:
    """Rows to compare: as given, and their lengths in float64."""

    rows: np.ndarray
    norms: Float64[np.ndarray, " rows"]

    @staticmethod
    def of(embeddings: Tensor, name: str, lengths: bool = True) -> NormedRows:
        """Checks and measures float32 or float64 rows [rows, dim]; `name` is what an error calls them.

        Raises:
            ValueError: Wrong dtype or shape; unless `lengths` do not matter, a row of length zero or with a NaN or infinity.
        """
        if embeddings.dtype not in (torch.float32, torch.float64) or embeddings.ndim != 2 or not embeddings.numel():
            got = f"got {name} {embeddings.dtype} {tuple(embeddings.shape)}"
            raise ValueError(f"{got}: expected float32 or float64 [rows, dim], not empty")
        rows = embeddings.detach().cpu().contiguous().numpy()
        norms = np.empty(len(rows))
        kernels.squared_lengths(rows, norms)
        np.sqrt(norms, out=norms)
        # Beyond these lengths the squares leave the range of float64. A NaN fails both comparisons.
        bad = np.flatnonzero(~((norms > 1e-150) & (norms < 1e150)))
        if len(bad) and lengths:
            raise ValueError(f"{len(bad)} of {len(rows)} {name} rows are zero or not finite, the first is row {bad[0]}")
        return NormedRows(rows, norms)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> NormedRows:
        return NormedRows(self.rows[part], self.norms[part])

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    def unit32(
        self, ids: Int64[np.ndarray, " some"] | None = None, copy: bool = True
    ) -> Float32[np.ndarray, "some dim"]:
        """The given rows in float32, divided by their lengths; default: all.

        Args:
            ids: Positions of the rows.
            copy: False: all rows in their order are returned as they are if they are float32 and their lengths are one but
                for rounding.
        """
        ids = np.arange(len(self)) if ids is None else ids
        is_unit = not copy and self.rows.dtype == np.float32 and np.abs(self.norms - 1).max() <= _UNIT_TOLERANCE
        if is_unit and np.array_equal(ids, np.arange(len(self))):
            return self.rows
        unit = np.empty((len(ids), self.dim), np.float32)
        kernels.unit_rows(self.rows, self.norms, ids, unit)
        return unit

    @property
    def margin(self) -> float:
        """Twice the largest error of a float32 similarity: gamma_n = n u / (1 - n u), u = 2^-24 (Higham 2002, 3.1).

        n = D for the sum in any order, 16 more for two lengths that are off by `_UNIT_TOLERANCE` (where rows are divided by
        their lengths, 2 for rounding both), the rest for comparing with rounded bounds.
        """
        rounding = (self.dim + 26) * 2.0**-24
        return 2 * rounding / (1 - rounding)

    @property
    def low_steps(self) -> float:
        """Steps of the low parts in one: about 2^52 / sqrt(D)."""
        return 2.0 ** (52 - math.ceil(math.log2(self.dim) / 2))

    def high_low(self, ids: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Unit rows as high + low, multiples of 2^-26 and of about 2^-52 sqrt(D), whose dot products are exact.

        A product of two highs is a multiple of 2^-52, and by Cauchy-Schwarz all partial sums of high . high' are below
        2, which is 2^53 such steps: float64 holds them exactly, whatever the order, fused or not. So it does those of
        high . low' + low . high', as |low| <= 2^-27. With low . low' left out, the cosine is right to D 2^-50.
        """
        low = self.rows[ids] / self.norms[ids, None]
        high = _round(low.copy(), _HIGH_STEPS)
        low -= high
        return high, _round(low, self.low_steps)


@dataclass(frozen=True)
class ExactCosine:
    """Exact similarities of queries and gallery rows.

    Their products are fixed-point numbers whose partial sums are exact in float64, so that BLAS may add them in any order.
    """

    queries: NormedRows
    gallery: NormedRows

    def __post_init__(self) -> None:
        if self.queries.dim != self.gallery.dim:
            got = f"queries {self.queries.rows.shape} and gallery {self.gallery.rows.shape}"
            raise ValueError(f"got {got}: expected the same dimension")

    def pairs(
        self, query_ids: Int64[np.ndarray, " pairs"], gallery_ids: Int64[np.ndarray, " pairs"]
    ) -> Float64[np.ndarray, " pairs"]:
        """Of pairs: the same bits as `block` gives."""
        sums = np.empty((len(query_ids), 3))
        kernels.split_dot_products(
            self.queries.rows, self.queries.norms, self.gallery.rows, self.gallery.norms, query_ids, gallery_ids,
            _HIGH_STEPS, self.gallery.low_steps, sums,
        )  # fmt: skip
        return sums[:, 0] + (sums[:, 1] + sums[:, 2])

    def block(self, query_ids: Int64[np.ndarray, " queries"]) -> Float64[np.ndarray, "queries gallery"]:
        """To the whole gallery: 3 float64 matrix products."""
        similarity = np.empty((len(query_ids), len(self.gallery)))
        high, low = self.queries.high_low(query_ids)
        for part in slices(similarity.shape[1], _CHUNK_ELEMENTS // high.shape[1]):
            gallery_high, gallery_low = self.gallery.high_low(part)
            similarity[:, part] = high @ gallery_high.T + (high @ gallery_low.T + low @ gallery_high.T)
        return similarity


def run_blocks(work: Callable[[Block], None], blocks: Iterable[Block]) -> None:
    """Calls `work` on every block, one block a thread of torch."""
    with thread_pool() as pool:
        list(pool.map(work, blocks))


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` (at least 1) that cover `total`."""
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _round(values: np.ndarray, steps: float) -> np.ndarray:
    """Round in place to a multiple of 1 / steps (a power of two, so that nothing else is rounded)."""
    values *= steps
    np.rint(values, out=values)
    values *= 1 / steps
    return values
