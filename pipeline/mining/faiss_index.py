"""Approximate neighbour indexes (faiss) behind one interface, tuned on the embeddings they were built from.

An index proposes rows; `exact_search.rerank` decides among them. `build` measures recall@k on rows of the actual embeddings and
searches wider until the target is reached; an index that cannot reach it is not used, and the report says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import faiss
import numpy as np

from methods.mining import ClassFilter
from pipeline.neighbours.exact_search import Neighbours, Queries, Rows, as_queries, rerank, search

Engine = Literal["auto", "exact", "ivf", "ivf_fp16", "ivf_pq", "hnsw", "nsg"]
ENGINES: tuple[Engine, ...] = ("exact", "ivf", "ivf_fp16", "ivf_pq", "hnsw", "nsg")

SAMPLED = 1000  # rows on which recall is measured
_FEWEST = 1000  # rows; fewer are too few to train an index on, and nothing would be gained
_EXACT_UP_TO = 2**13  # rows up to which `auto` stays exact: `python -m benchmarks.mining` shows why
_AUTO_SHARE = 1 / 8  # of the lists that `auto` may look at: a scan of lists does an eighth of the arithmetic per second
_BLOCK = 2048  # queries of one search for lists of all rows
OVERFETCH = 4  # a quantised index proposes so many times k rows


@dataclass(frozen=True)
class IndexReport:
    """What an index is and how good.

    Attributes:
        engine: that answers; "exact" where the one asked for stayed below the target.
        parameters: nprobe or efSearch, lists, ...
        recall: recall@k on the sampled rows, the lower of all classes and of other classes only; 1 for exact.
        seconds: of building and measuring.
        bytes: of the index.
        note: why another engine answers than the one asked for, or "".
    """

    engine: str
    parameters: dict[str, int] = field(default_factory=dict)
    recall: float = 1.0
    seconds: float = 0.0
    bytes: int = 0
    note: str = ""


class Index:
    """Proposes rows of the table it was built from.

    Attributes:
        report: what was built.
        rows: how many rows of the table are in it, the first ones.
    """

    def __init__(self, index: Any, width: str, rows: int, overfetch: int, largest_class: int, gpu: bool) -> None:
        self._index, self._width, self.rows, self._overfetch = index, width, rows, overfetch
        self._largest_class, self._gpu = largest_class, gpu
        self.report = IndexReport("exact")

    def widen(self, value: int) -> None:
        """Sets how much of the index a search looks at (lists, or nodes)."""
        owner, _, name = self._width.rpartition(".")
        if self._gpu:
            faiss.GpuParameterSpace().set_index_parameter(self._index, name, value)
        else:
            setattr(getattr(self._index, owner) if owner else self._index, name, value)

    def candidates(self, values: np.ndarray, k: int, which: ClassFilter = "all") -> np.ndarray:
        """Positions of proposed rows [queries, c], -1 where there are fewer: k of them, and those a mask may take away."""
        c = self._overfetch * (k + 1)
        if which == "other":
            c += min(self._largest_class, 4 * k + 64)
        return self._index.search(np.ascontiguousarray(values, np.float32), min(c, self.rows))[1]


def build(
    rows: Rows, engine: Engine, k: int, target: float, seed: int = 0, threads: int = 1
) -> tuple[Index | None, IndexReport]:
    """Builds and tunes an index; returns it (none: exact search answers) and what answers, how well, and why.

    Args:
        rows: of the table; they must not change until this returns.
        engine: asked for.
        k: neighbours that will be asked for.
        target: recall@k that the index has to reach on sampled rows.
        seed: of the sampled rows and of the index.
        threads: faiss may use, in the calling thread.
    """
    started = time.perf_counter()
    chosen = choose(len(rows)) if engine == "auto" else engine
    if chosen == "exact" or len(rows) < _FEWEST:
        note = "" if chosen == "exact" else f"{len(rows)} rows are searched exactly"
        return None, IndexReport("exact", seconds=time.perf_counter() - started, note=note)
    faiss.omp_set_num_threads(threads)
    values = np.ascontiguousarray(rows.values, np.float32)
    raw, width, widths, parameters, overfetch = _MAKERS[chosen](values, seed)
    if engine == "auto":
        widths = [w for w in widths if w <= max(1, _AUTO_SHARE * parameters["lists"])]
    sizes = np.unique(rows.labels, return_counts=True)[1]
    size = faiss.serialize_index(raw).nbytes if len(rows) <= 2**16 else _bytes(chosen, rows)
    gpu = chosen.startswith("ivf") and faiss.get_num_gpus() > 0  # without a GPU, faiss would return an empty index
    if gpu:
        raw = faiss.index_cpu_to_all_gpus(raw)
    index = Index(raw, width, len(rows), overfetch, int(sizes.max()), gpu)
    sample = np.random.default_rng(seed).permutation(len(rows))[:SAMPLED]
    queries = Queries(values[sample], rows.ids[sample], rows.labels[sample].astype(np.int64))
    # Neighbours of other classes lie farther off, where the index has looked less: both have to be good.
    masks: tuple[ClassFilter, ...] = ("all", "other") if len(sizes) > 1 else ("all",)
    truth = {which: search(queries, rows, k, which).ids for which in masks}
    recall = 0.0
    for value in widths:
        index.widen(value)
        found = {w: rerank(queries, rows, index.candidates(queries.values, k, w), k, w).ids for w in masks}
        recall = min(_recall(found[w], truth[w]) for w in masks)
        if recall >= target:
            break
    report = IndexReport(
        chosen, parameters | {width.split(".")[-1]: value}, recall, time.perf_counter() - started, size
    )
    if recall < target:
        note = f"{chosen} reached recall@{k} {recall:.3f} of {target:g} at {width} {value}: rows are searched exactly"
        return None, IndexReport("exact", report.parameters, 1.0, report.seconds, 0, note)
    index.report = report
    return index, report


def choose(rows: int) -> Engine:
    """The engine that `auto` builds for so many rows."""
    return "exact" if rows <= _EXACT_UP_TO else "ivf_fp16"


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    hits = (found[:, :, None] == truth[:, None, :]) & (truth[:, None, :] >= 0)
    return float(hits.any(1).sum() / max(1, (truth >= 0).sum()))


def _bytes(engine: str, rows: Rows) -> int:
    n, d = len(rows), rows.values.shape[1]
    each = {"ivf": 4 * d + 8, "ivf_fp16": 2 * d + 8, "ivf_pq": _codes(d) + 8, "hnsw": 4 * d + 272, "nsg": 4 * d + 128}
    return n * each[engine]


# ---- the engines: (index, what widens a search, its values, parameters, candidates for each neighbour) ---------------

BuiltIndex = tuple[Any, str, list[int], dict[str, int], int]


def _lists(rows: int) -> int:
    return max(1, min(round(4 * rows**0.5), rows // 39))


def _train(index: Any, values: np.ndarray, lists: int, seed: int) -> None:
    index.cp.seed = seed + 1
    index.cp.niter = 10
    order = np.random.default_rng(seed).permutation(len(values))[: 64 * lists]
    index.train(values[order])
    index.add(values)


def _ivf(kind: str) -> Callable[[np.ndarray, int], BuiltIndex]:
    def make(values: np.ndarray, seed: int) -> BuiltIndex:
        d, lists = values.shape[1], _lists(len(values))
        index: Any
        quantizer = faiss.IndexFlatL2(d)
        if kind == "flat":
            index, wider = faiss.IndexIVFFlat(quantizer, d, lists), 1
        elif kind == "fp16":
            index, wider = faiss.IndexIVFScalarQuantizer(quantizer, d, lists, faiss.ScalarQuantizer.QT_fp16), 1
        else:
            index, wider = faiss.IndexIVFPQ(quantizer, d, lists, _codes(d), 8), OVERFETCH
        _train(index, values, lists, seed)
        widths = [w for w in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if w <= lists // 2] or [1]
        return index, "nprobe", widths, {"lists": lists}, wider

    return make


def _codes(dim: int) -> int:
    """Bytes of a product-quantised row: one for every 4 numbers, of a divisor of the dimension."""
    return max(m for m in range(1, max(1, dim // 4) + 1) if dim % m == 0)


def _hnsw(values: np.ndarray, seed: int) -> BuiltIndex:
    index: Any = faiss.IndexHNSWFlat(values.shape[1], 32)
    index.hnsw.efConstruction = 80
    index.hnsw.rng = faiss.RandomGenerator(seed + 1)  # type: ignore[attr-defined]
    index.add(values)
    return index, "hnsw.efSearch", [32, 64, 128, 256, 512, 1024], {"links": 32}, 1


def _nsg(values: np.ndarray, seed: int) -> BuiltIndex:
    index = faiss.IndexNSGFlat(values.shape[1], 32)
    index.nsg.search_L = 64
    index.add(values)
    return index, "nsg.search_L", [64, 128, 256, 512, 1024], {"links": 32}, 1


_MAKERS: dict[str, Callable[[np.ndarray, int], BuiltIndex]] = {
    "ivf": _ivf("flat"), "ivf_fp16": _ivf("fp16"), "ivf_pq": _ivf("pq"), "hnsw": _hnsw, "nsg": _nsg,
}  # fmt: skip


def all_lists(rows: Rows, index: Index, k: int, which: ClassFilter) -> Iterator[tuple[slice, Neighbours]]:
    """The lists of all rows, block by block."""
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, min(start + _BLOCK, len(rows)))
        yield part, lists(as_queries(rows, part), rows, index, k, which)


def lists(queries: Queries, rows: Rows, index: Index | None, k: int, which: ClassFilter) -> Neighbours:
    """The lists of an index of all rows, re-ranked; what it left short, and without one all, by exact search."""
    if index is None:
        return search(queries, rows, k, which)
    found = rerank(queries, rows, index.candidates(queries.values, k, which), k, which)
    short = np.flatnonzero(found.ids[:, min(k, len(rows) - 1) - 1] < 0) if len(rows) > 1 else np.arange(0)
    if len(short):
        exact = search(queries[short], rows, k, which)
        found.ids[short], found.distances[short] = exact.ids, exact.distances
    return found
