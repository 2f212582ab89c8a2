"""Memory that a run's mining takes, computed before it starts: of a server, and of a worker's mirror."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods.mining import MiningRequirements
from pipeline.mining.faiss_index import auto_engine, index_bytes
from pipeline.mining.messages import ServerSpec

ROW_BYTES = 37  # of the table beside the embedding: ids, labels, steps, and the sorted ids (36.5 measured)
ENTRY_BYTES = 32  # of the memory beside the features: label, id, sequence number, slot


@dataclass(frozen=True)
class ServerBytes:
    """Bytes of one server at its largest.

    Attributes:
        table: Newest embedding of every sample.
        memory: Past embeddings, first in, first out.
        index: The approximate index in use; 0: exact search.
        build: What building the next index takes besides: a copy of the rows, and that index.
    """

    table: int = 0
    memory: int = 0
    index: int = 0
    build: int = 0

    @property
    def total(self) -> int:
        return self.table + self.memory + self.index + self.build


def server_bytes(needs: MiningRequirements, spec: ServerSpec, classes: int) -> ServerBytes:
    """Bytes of the largest server of a run: the first, which has the memory.

    Args:
        needs: The mining requirements of the method.
        spec: The specification of the servers; its capacity counts the rows of one.
        classes: Number of training classes.
    """
    memory = memory_bytes(needs, spec, classes)
    if not needs.table:
        return ServerBytes(memory=memory)
    rows, width = spec.capacity, np.dtype(spec.dtype).itemsize * spec.dim
    engine = auto_engine(rows) if spec.engine == "auto" else spec.engine
    table = rows * (width + ROW_BYTES)
    if engine == "exact":
        return ServerBytes(table, memory)
    index = index_bytes(engine, rows, spec.dim)
    copies = rows * (width + 16 + (4 * spec.dim if spec.dtype != "float32" else 0))
    return ServerBytes(table, memory, index, copies + index)


def memory_bytes(needs: MiningRequirements, spec: ServerSpec, classes: int) -> int:
    """Bytes of the memory of past embeddings, in the first server, and again on the device of every worker."""
    if not needs.memory:
        return 0
    bounds = [needs.total, None if needs.per_class is None else needs.per_class * classes]
    entries = min(bound for bound in bounds if bound is not None)
    return entries * (np.dtype(spec.memory_dtype).itemsize * spec.dim + ENTRY_BYTES)
