"""Successive indexes of one table: each is built in a thread beside the one in use, and used from a given step on."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import RunError
from pipeline.mining.faiss_index import Index, IndexReport, auto_engine, build
from pipeline.mining.messages import ServerSpec
from pipeline.mining.snapshot import Arrays, SavedIndex, write_arrays
from pipeline.neighbours.exact_search import Rows
from pipeline.storage import Folder


@dataclass
class IndexBuild:
    """One index, for steps from `from_step` on, built from the rows saved as `base`."""

    number: int
    from_step: int
    base: str | None
    sums: dict[str, str] = field(default_factory=dict)
    base_saved: threading.Event = field(default_factory=threading.Event)
    ready: threading.Event = field(default_factory=threading.Event)
    index: Index | None = None
    report: IndexReport | None = None
    error: str | None = None


class IndexBuilds:
    """The indexes that a coming step may still use.

    Args:
        spec: The specification of the server.
    """

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.all: list[IndexBuild] = []

    def start(self, number: int, step: int, from_step: int, base: str | None, rows: Rows) -> None:
        """Starts building from a copy of the rows; drops indexes that only steps before `step` could use."""
        if any(b.number == number for b in self.all) or (
            self.spec.engine == "auto" and auto_engine(len(rows)) == "exact"
        ):
            return
        rows = Rows(rows.values.copy(), rows.ids.copy(), rows.labels.copy(), rows.largest)
        in_use = max((b.number for b in self.all if b.from_step <= step), default=0)
        self.all = [b for b in self.all if b.number >= in_use]
        self._build(IndexBuild(number, from_step, base), rows, save=base is not None)

    def restore(self, saved_index: SavedIndex, base_rows: Arrays) -> None:
        """Starts rebuilding an index that a snapshot names, from the rows it was built from."""
        largest = float(np.sqrt(np.square(base_rows["values"], dtype=np.float64).sum(1)).max(initial=0))
        rows = Rows(base_rows["values"], base_rows["ids"], base_rows["labels"], largest)
        self._build(
            IndexBuild(saved_index.number, saved_index.from_step, saved_index.base, saved_index.sums),
            rows,
            save=not saved_index.sums,
        )

    def _build(self, index_build: IndexBuild, rows: Rows, save: bool) -> None:
        spec = self.spec

        def work() -> None:
            try:
                if save and index_build.base is not None:
                    arrays = {"values": rows.values, "ids": rows.ids, "labels": rows.labels}
                    index_build.sums = write_arrays(Folder(index_build.base), "base", arrays)
                index_build.base_saved.set()
                built_index = build(rows, spec.engine, spec.k, spec.target, spec.seed, spec.threads)
                index_build.index, index_build.report = built_index
            except Exception as error:  # `for_step` raises it
                index_build.error = f"{type(error).__name__}: {error}"
            index_build.base_saved.set()
            index_build.ready.set()

        self.all = [*self.all, index_build]
        threading.Thread(target=work, daemon=True, name="build").start()

    def for_step(self, step: int, wait: bool) -> IndexBuild | None:
        """The newest index for a step, waited for; without `wait`, the newest one that is ready."""
        candidates = [b for b in self.all if b.from_step <= step and (wait or b.ready.is_set())]
        if not candidates:
            return None
        newest_build = candidates[-1]
        if not newest_build.ready.wait(self.spec.wait_s):
            raise RunError(
                f"index {newest_build.number} was not built within {self.spec.wait_s:g} s after it was due: "
                "raise mining.swap_after, mining.cpus or mining.deadline_s"
            )
        if newest_build.error is not None:
            raise RunError(f"index {newest_build.number} could not be built: {newest_build.error}")
        return newest_build

    def snapshot_entries(self) -> list[SavedIndex]:
        """The entries of a snapshot for these indexes; waits until their rows are written."""
        for b in self.all:
            b.base_saved.wait()
        return [SavedIndex(b.number, b.from_step, b.base, b.sums) for b in self.all if b.base is not None]
