"""Indexes of one table, one after the other: built in a thread beside the one in use, used from a declared step."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import RunError
from pipeline.mining.faiss_index import Index, IndexReport, build, choose
from pipeline.mining.messages import ServerSpec
from pipeline.mining.snapshot import Arrays, SavedIndex, write_arrays
from pipeline.neighbours.exact_search import Rows
from pipeline.storage import Folder


@dataclass
class IndexBuild:
    """One index: declared for steps from `from_step` on, built from the rows saved as `base`."""

    number: int
    from_step: int
    base: str | None
    sums: dict[str, str] = field(default_factory=dict)
    saved: threading.Event = field(default_factory=threading.Event)
    ready: threading.Event = field(default_factory=threading.Event)
    index: Index | None = None
    report: IndexReport | None = None
    error: str | None = None


class IndexBuilds:
    """All that a step to come may still use.

    Args:
        spec: of the server.
    """

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.all: list[IndexBuild] = []

    def start(self, number: int, step: int, from_step: int, base: str | None, rows: Rows) -> None:
        """Starts building from a copy of the rows; what only steps before `step` could use is dropped."""
        if any(g.number == number for g in self.all) or (self.spec.engine == "auto" and choose(len(rows)) == "exact"):
            return
        rows = Rows(rows.values.copy(), rows.ids.copy(), rows.labels.copy(), rows.largest)
        in_use = max((g.number for g in self.all if g.from_step <= step), default=0)
        self.all = [g for g in self.all if g.number >= in_use]
        self._build(IndexBuild(number, from_step, base), rows, save=base is not None)

    def restore(self, built: SavedIndex, base: Arrays) -> None:
        """Starts building again what a snapshot names, from the rows it was built from."""
        largest = float(np.sqrt(np.square(base["values"], dtype=np.float64).sum(1)).max(initial=0))
        rows = Rows(base["values"], base["ids"], base["labels"], largest)
        self._build(IndexBuild(built.number, built.from_step, built.base, built.sums), rows, save=not built.sums)

    def _build(self, generation: IndexBuild, rows: Rows, save: bool) -> None:
        spec = self.spec

        def work() -> None:
            try:
                if save and generation.base is not None:
                    arrays = {"values": rows.values, "ids": rows.ids, "labels": rows.labels}
                    generation.sums = write_arrays(Folder(generation.base), "base", arrays)
                generation.saved.set()
                found = build(rows, spec.engine, spec.k, spec.target, spec.seed, spec.threads)
                generation.index, generation.report = found
            except Exception as error:  # told to whoever asks for this generation
                generation.error = f"{type(error).__name__}: {error}"
            generation.saved.set()
            generation.ready.set()

        self.all = [*self.all, generation]
        threading.Thread(target=work, daemon=True, name="build").start()

    def declared(self, step: int, wait: bool) -> IndexBuild | None:
        """The newest index declared for a step, waited for; without `wait`, the newest that is ready."""
        declared = [g for g in self.all if g.from_step <= step and (wait or g.ready.is_set())]
        if not declared:
            return None
        newest = declared[-1]
        if not newest.ready.wait(self.spec.wait_s):
            raise RunError(
                f"index generation {newest.number} was not built within {self.spec.wait_s:g} s after its first use was due: "
                "raise mining.swap_after, mining.cpus or mining.deadline_s"
            )
        if newest.error is not None:
            raise RunError(f"index generation {newest.number} could not be built: {newest.error}")
        return newest

    def saved(self) -> list[SavedIndex]:
        """What a snapshot says of them, when their rows are written."""
        for g in self.all:
            g.saved.wait()
        return [SavedIndex(g.number, g.from_step, g.base, g.sums) for g in self.all if g.base is not None]
