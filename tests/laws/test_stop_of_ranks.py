"""A request to stop reaches one rank; all of them stop after the same step, and pay no exchange of their own for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import build_config
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.run_status import RunStatus
from pipeline.testing.tiny import tiny_values
from pipeline.testing.watched_run import make_worker
from tests.laws.runs import METHODS_TRIED
from tests.pool import Pool

LENGTH = 6


class AskedAt(RunStatus):
    """Asked to stop while a step runs."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.at, self.worker = step, None

    def stop_requested(self) -> bool:
        worker: Any = self.worker
        return worker is not None and worker.progress.step + 1 >= self.at


def stopped_at(rank: int, world: int, values: dict[str, Any], asked: int) -> tuple[int, int]:
    """Steps done, and how often the ranks asked each other in an exchange of its own."""
    status = AskedAt(asked if rank == 1 else LENGTH + 1)
    worker = make_worker(build_config(values), rank, (6, 6), status)
    exchanges = []
    original = Ranks.any

    def counted(ranks: Ranks, flag: bool, device: Any = "cpu") -> bool:
        exchanges.append(flag)
        return original(ranks, flag, device)

    Ranks.any = counted  # type: ignore[method-assign]
    try:
        status.worker = worker  # type: ignore[assignment]
        worker()
    finally:
        Ranks.any = original  # type: ignore[method-assign]
    return worker.progress.step, len(exchanges)


@pytest.mark.parametrize(
    ("changes", "step"),
    [({}, 3), (METHODS_TRIED["mmsi"] | {"method.warmup_classes": 8, "method.meta_start": "0 steps"}, 1)],
    ids=["baseline", "a step that trains nothing"],
)
def test_all_ranks_stop_after_the_same_step(
    pool: Pool, store: Store, tmp_path: Path, changes: dict[str, Any], step: int
) -> None:
    quiet = {"length": f"{LENGTH} steps", "evaluation.every": "100 steps", "checkpoint.every": "100 steps"}
    found = []
    for name, asked in (("stopped", step), ("whole", LENGTH + 1)):
        values = tiny_values(str(tmp_path), store.folder.uri, {"name": name, **changes, **quiet})
        found.append(pool(stopped_at, 2, values, asked))
    stopped, whole = found
    assert [done for done, _ in stopped] == [step, step]
    assert [done for done, _ in whole] == [LENGTH, LENGTH]
    assert len({number for _, number in whole}) == 1
    assert whole[0][1] - stopped[0][1] <= 1, "the last step, which evaluates, asks once; no other does"
