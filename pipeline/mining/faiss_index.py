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

RECALL_SAMPLE_ROWS = 1000  # rows on which recall is measured
_MIN_ROWS = 1000  # smaller tables are searched exactly: too few rows to train an index on, and nothing to gain
_AUTO_EXACT_MAX_ROWS = 2**13  # rows up to which `auto` stays exact: `python -m benchmarks.mining` shows why
# Largest share of the inverted lists that `auto` may probe: a scan of lists does an eighth of the arithmetic per second.
_AUTO_MAX_PROBED_SHARE = 1 / 8
_BLOCK_ROWS = 2048  # queries per search where the neighbours of all rows are listed
OVERFETCH = 4  # a product-quantised index proposes this many times k rows


@dataclass(frozen=True)
class IndexReport:
    """Engine, parameters, recall and cost of an index.

    Attributes:
        engine: The engine in use; "exact" where the requested one stayed below the target.
        parameters: The parameters of the index: nprobe or efSearch, lists, ...
        recall: Recall@k on the sampled rows, the lower of all classes and of other classes only; 1 for exact search.
        seconds: Time of building and measuring.
        bytes: Size of the index.
        note: Why another engine is in use than the requested one, or "".
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
        report: The parameters and the recall of the index.
        rows: Number of indexed rows, the first ones of the table.
        search_parameter: Where faiss keeps how much a search visits ("nprobe", "hnsw.efSearch").
        overfetch: How many times k rows it proposes.
    """

    def __init__(
        self, index: Any, search_parameter: str, rows: int, overfetch: int, largest_class: int, gpu: bool
    ) -> None:
        self._index = index
        self.search_parameter = search_parameter
        self.rows = rows
        self.overfetch = overfetch
        self._largest_class = largest_class
        self._gpu = gpu
        self.report = IndexReport("exact")

    def set_search_width(self, value: int) -> None:
        """Sets how much of the index a search visits (nprobe, efSearch or search_L)."""
        owner, _, name = self.search_parameter.rpartition(".")
        if self._gpu:
            faiss.GpuParameterSpace().set_index_parameter(self._index, name, value)
        else:
            setattr(getattr(self._index, owner) if owner else self._index, name, value)

    def candidates(self, values: np.ndarray, k: int, class_filter: ClassFilter = "all") -> np.ndarray:
        """Positions of proposed rows [queries, c], -1 where there are fewer: k, and as many as the class filter may remove."""
        num_candidates = self.overfetch * (k + 1)
        if class_filter == "other":
            num_candidates += min(self._largest_class, 4 * k + 64)
        return self._index.search(np.ascontiguousarray(values, np.float32), min(num_candidates, self.rows))[1]

    def save(self, path: str) -> None:
        """Writes the faiss index into a file, from which it can be memory-mapped."""
        faiss.write_index(faiss.index_gpu_to_cpu(self._index) if self._gpu else self._index, path)


def build(
    rows: Rows, engine: Engine, k: int, target: float, seed: int = 0, threads: int = 1
) -> tuple[Index | None, IndexReport]:
    """Builds and tunes an index; returns it (None: search exactly) and a report.

    Args:
        rows: Rows of the table; they must not change until this returns.
        engine: The requested engine.
        k: Number of neighbours that searches will ask for.
        target: Recall@k that the index has to reach on sampled rows.
        seed: Seed of the sampled rows and of the index.
        threads: Number of threads that faiss may use, in the calling thread.
    """
    started = time.perf_counter()
    engine_built = auto_engine(len(rows)) if engine == "auto" else engine
    if engine_built == "exact" or len(rows) < _MIN_ROWS:
        note = "" if engine_built == "exact" else f"{len(rows)} rows are searched exactly"
        return None, IndexReport("exact", seconds=time.perf_counter() - started, note=note)
    faiss.omp_set_num_threads(threads)
    values = np.ascontiguousarray(rows.values, np.float32)
    faiss_index, search_parameter, search_widths, parameters, overfetch = _BUILDERS[engine_built](values, seed)
    if engine == "auto":
        search_widths = [f for f in search_widths if f <= max(1, _AUTO_MAX_PROBED_SHARE * parameters["lists"])]
    class_sizes = np.unique(rows.labels, return_counts=True)[1]
    num_bytes = (
        faiss.serialize_index(faiss_index).nbytes
        if len(rows) <= 2**16
        else index_bytes(engine_built, *rows.values.shape)
    )
    gpu = (
        engine_built.startswith("ivf") and faiss.get_num_gpus() > 0
    )  # without a GPU, faiss would return an empty index
    if gpu:
        faiss_index = faiss.index_cpu_to_all_gpus(faiss_index)
    index = Index(faiss_index, search_parameter, len(rows), overfetch, int(class_sizes.max()), gpu)
    sampled_rows = np.random.default_rng(seed).permutation(len(rows))[:RECALL_SAMPLE_ROWS]
    queries = Queries(values[sampled_rows], rows.ids[sampled_rows], rows.labels[sampled_rows].astype(np.int64))
    # Neighbours of other classes are farther away, where the index has visited less: both recalls have to be good.
    filters: tuple[ClassFilter, ...] = ("all", "other") if len(class_sizes) > 1 else ("all",)
    exact_ids = {class_filter: search(queries, rows, k, class_filter).ids for class_filter in filters}
    recall = 0.0
    for search_width in search_widths:
        index.set_search_width(search_width)
        index_ids = {f: rerank(queries, rows, index.candidates(queries.values, k, f), k, f).ids for f in filters}
        recall = min(_recall(index_ids[f], exact_ids[f]) for f in filters)
        if recall >= target:
            break
    report = IndexReport(
        engine_built,
        parameters | {search_parameter.split(".")[-1]: search_width},
        recall,
        time.perf_counter() - started,
        num_bytes,
    )
    if recall < target:
        note = (
            f"{engine_built} reached recall@{k} {recall:.3f} of {target:g} at {search_parameter} {search_width}: "
            "rows are searched exactly"
        )
        return None, IndexReport("exact", report.parameters, 1.0, report.seconds, 0, note)
    index.report = report
    return index, report


def auto_engine(num_rows: int) -> Engine:
    """The engine that `auto` builds for a table of this size."""
    return "exact" if num_rows <= _AUTO_EXACT_MAX_ROWS else "ivf_fp16"


def _recall(index_ids: np.ndarray, exact_ids: np.ndarray) -> float:
    hits = (index_ids[:, :, None] == exact_ids[:, None, :]) & (exact_ids[:, None, :] >= 0)
    return float(hits.any(1).sum() / max(1, (exact_ids >= 0).sum()))


def index_bytes(engine: str, num_rows: int, dim: int) -> int:
    """Bytes of an index of so many rows of dimension `dim`; "exact" has none."""
    bytes_per_row = {
        "exact": 0,
        "ivf": 4 * dim + 8,
        "ivf_fp16": 2 * dim + 8,
        "ivf_pq": _pq_code_bytes(dim) + 8,
        "hnsw": 4 * dim + 272,
        "nsg": 4 * dim + 128,
    }
    centres = 4 * dim * _num_inverted_lists(num_rows) if engine.startswith("ivf") else 0
    return num_rows * bytes_per_row[engine] + centres


# ---- the engines: (index, name of its search-width parameter, values to try, parameters, candidates per neighbour) ---

BuiltIndex = tuple[Any, str, list[int], dict[str, int], int]


def _num_inverted_lists(num_rows: int) -> int:
    return max(1, min(round(4 * num_rows**0.5), num_rows // 39))


def _train(index: Any, values: np.ndarray, num_lists: int, seed: int) -> None:
    index.cp.seed = seed + 1
    index.cp.niter = 10
    training_rows = np.random.default_rng(seed).permutation(len(values))[: 64 * num_lists]
    index.train(values[training_rows])
    index.add(values)


def _ivf(kind: str) -> Callable[[np.ndarray, int], BuiltIndex]:
    def build_ivf(values: np.ndarray, seed: int) -> BuiltIndex:
        d = values.shape[1]
        num_lists = _num_inverted_lists(len(values))
        index: Any
        quantizer = faiss.IndexFlatL2(d)
        if kind == "flat":
            index = faiss.IndexIVFFlat(quantizer, d, num_lists)
            overfetch = 1
        elif kind == "fp16":
            index = faiss.IndexIVFScalarQuantizer(quantizer, d, num_lists, faiss.ScalarQuantizer.QT_fp16)
            overfetch = 1
        else:
            index = faiss.IndexIVFPQ(quantizer, d, num_lists, _pq_code_bytes(d), 8)
            overfetch = OVERFETCH
        _train(index, values, num_lists, seed)
        search_widths = [w for w in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if w <= num_lists // 2] or [1]
        return index, "nprobe", search_widths, {"lists": num_lists}, overfetch

    return build_ivf


def _pq_code_bytes(dim: int) -> int:
    """Bytes of a product-quantised row: the largest divisor of the dimension up to a quarter of it."""
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


_BUILDERS: dict[str, Callable[[np.ndarray, int], BuiltIndex]] = {
    "ivf": _ivf("flat"), "ivf_fp16": _ivf("fp16"), "ivf_pq": _ivf("pq"), "hnsw": _hnsw, "nsg": _nsg,
}  # fmt: skip


def all_neighbour_lists(
    rows: Rows, index: Index, k: int, class_filter: ClassFilter
) -> Iterator[tuple[slice, Neighbours]]:
    """The neighbours of all rows, block by block."""
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, min(start + _BLOCK_ROWS, len(rows)))
        yield block, neighbour_lists(as_queries(rows, block), rows, index, k, class_filter)


def neighbour_lists(queries: Queries, rows: Rows, index: Index | None, k: int, class_filter: ClassFilter) -> Neighbours:
    """Neighbours from an index of all rows, re-ranked; exact search for lists it leaves incomplete, and without an index."""
    if index is None:
        return search(queries, rows, k, class_filter)
    neighbours = rerank(queries, rows, index.candidates(queries.values, k, class_filter), k, class_filter)
    incomplete = np.flatnonzero(neighbours.ids[:, min(k, len(rows) - 1) - 1] < 0) if len(rows) > 1 else np.arange(0)
    if len(incomplete):
        exact_neighbours = search(queries[incomplete], rows, k, class_filter)
        neighbours.ids[incomplete] = exact_neighbours.ids
        neighbours.distances[incomplete] = exact_neighbours.distances
    return neighbours
