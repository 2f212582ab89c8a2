"""faiss indexes of an index's first segment: built and measured by the engines of mining, kept in a file, memory-mapped.

A faiss index proposes rows and `scan.decide` compares them exactly, so that distances and order of what is found are exact; what
may be missing is a neighbour that faiss does not propose, and how often that happens is the recall that is measured when it is
built.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import faiss
import numpy as np
from jaxtyping import Float32, Int64

from pipeline.mining.faiss_index import build
from pipeline.neighbours.exact_search import Rows
from pipeline.searching.index_files import EngineRecord, FileRecord, new_name, record_of
from pipeline.searching.scan import faiss_threads
from pipeline.storage import Folder
from pipeline.storage.folder import disk_full_as_error

SearchEngine = Literal["auto", "exact", "ivf", "ivf_fp16", "ivf_pq", "hnsw"]
ENGINES: tuple[str, ...] = get_args(SearchEngine)
# Embeddings up to which `auto` searches exactly: a query reads them all, in 10 to 20 ms.
EXACT_BYTES = 2**28
RECALL_K, RECALL_TARGET = 10, 0.95


def build_engine(
    folder: Folder, embeddings: Float32[np.ndarray, "rows dim"], largest: float, requested: SearchEngine, threads: int
) -> EngineRecord:
    """Builds the engine of a segment and writes its file.

    Memory: the faiss index (half of the embeddings with ivf_fp16), and the rows that it is trained on.

    Args:
        folder: The index.
        embeddings: Of its first segment, memory-mapped.
        largest: Length of the longest.
        requested: "auto": exact up to EXACT_BYTES, then ivf_fp16.
        threads: Threads of faiss.
    """
    name = requested
    if requested == "auto":
        name = "exact" if embeddings.nbytes <= EXACT_BYTES else "ivf_fp16"
    if name == "exact":
        return EngineRecord(requested=requested, name="exact", k=RECALL_K, target=RECALL_TARGET)
    count = len(embeddings)
    rows = Rows(embeddings, np.arange(count), np.zeros(count, np.int64), largest)
    index, report = build(rows, name, RECALL_K, RECALL_TARGET, threads=threads)  # type: ignore[arg-type]
    record = EngineRecord(
        requested=requested, name=report.engine, recall=report.recall, k=RECALL_K, target=RECALL_TARGET, note=report.note,
        parameters=report.parameters,
    )  # fmt: skip
    if index is None:
        return record
    file = new_name("engine", ".faiss")
    with disk_full_as_error(folder.path(file), report.bytes):
        index.save(folder.path(file))
    return record.model_copy(
        update={
            "search_parameter": index.search_parameter,
            "overfetch": index.overfetch,
            "file": file,
            "record": record_of(folder.path(file)),
        }
    )


class Engine:
    """A faiss index, memory-mapped from its file.

    Args:
        folder: The index.
        record: Its engine, which has a file.
        rows: Rows of the first segment.
        removed: Positions among them that are not to be proposed, ascending.
    """

    def __init__(self, folder: Folder, record: EngineRecord, rows: int, removed: Int64[np.ndarray, " removed"]) -> None:
        assert record.file is not None and isinstance(record.record, FileRecord)
        self.record, self.rows = record, rows
        library: Any = faiss  # whose stubs lack parameters of searches
        self._index = library.read_index(folder.path(record.file), library.IO_FLAG_MMAP_IFC)
        # faiss.contrib.torch_utils, which other libraries import, replaces `search` by one that takes no parameters.
        self._search = getattr(self._index, "search_numpy", self._index.search)
        name = record.search_parameter.rpartition(".")[2]
        options: dict[str, Any] = {name: record.parameters[name]}
        if len(removed):
            bits = np.zeros(-(-rows // 8) * 8, bool)
            bits[removed] = True
            self._bits = np.packbits(bits, bitorder="little")  # faiss keeps a pointer to it
            self._removed = library.IDSelectorBitmap(self._bits)
            options["sel"] = self._selector = library.IDSelectorNot(self._removed)
        parameters = library.SearchParametersHNSW if record.name == "hnsw" else library.SearchParametersIVF
        self._parameters = parameters(**options)

    def candidates(
        self, queries: Float32[np.ndarray, "queries dim"], k: int
    ) -> Int64[np.ndarray, "queries candidates"]:
        """Positions of proposed rows, -1 where there are fewer."""
        count = min(self.record.overfetch * (k + 1), self.rows)
        with faiss_threads(len(queries)):
            found = self._search(np.ascontiguousarray(queries, np.float32), count, params=self._parameters)[1]
        return found.astype(np.int64)
