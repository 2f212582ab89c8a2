"""Runs of a comparison beyond its sweep: with more seeds, for their time alone, and at equal wall time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder

SAME = 0.1  # lengths and times that differ by no more count as the same: those of a step differ by as much between runs


@dataclass(frozen=True)
class KeptRun:
    """A run on all training classes.

    Attributes:
        row: The row.
        values: The setting that the search chose.
        seed: The run's seed.
        steps: Its length.
        seconds: Time of training, without evaluation.
        test: Its metrics on the test classes, in percent.
    """

    row: str
    values: dict[str, Any]
    seed: int
    steps: int
    seconds: float
    test: dict[str, float]


@dataclass(frozen=True)
class Wanted:
    """A run that is to be trained, and the file of its record.

    Attributes:
        row: The row.
        values: The setting that the search chose.
        config: What is trained; its name and storage say where.
        file: Its record.
    """

    row: str
    values: dict[str, Any]
    config: Config
    file: Path

    def is_kept(self) -> bool:
        """Whether there is a record of this setting and about this length, and not of earlier ones."""
        if not self.file.exists():
            return False
        kept = read_run(self.file)
        return kept.values == self.values and abs(kept.steps / self.config.length.value - 1) <= SAME


def read_run(file: Path) -> KeptRun:
    return KeptRun(**json.loads(file.read_text()))


def kept_runs(folder: Path, row: str, values: dict[str, Any]) -> list[KeptRun]:
    """A folder's records of a row in this setting; none if it is not there."""
    runs = [read_run(file) for file in sorted(folder.glob(f"{row}-*.json"))]
    return [run for run in runs if run.values == values]


def train_runs(wanted: Sequence[Wanted], train: Callable[[str, Config], int], until: float | None) -> int:
    """Trains what has no record, a run a core; returns the first status that is not 0.

    Args:
        wanted: What is to be there.
        train: Trains a configuration in a storage and returns the command's status.
        until: Time by the monotonic clock after which no run is started.
    """

    def one(run: Wanted) -> int:
        if run.is_kept() or (until is not None and time.monotonic() > until):
            return 0
        config = run.config
        if status := train(config.storage, config):
            return status
        summary = Folder(f"{config.storage}/runs/{config.name}").read_json(SUMMARY)
        steps = int(config.length.value)
        kept = KeptRun(run.row, run.values, config.seed, steps, summary["seconds"], summary["final"])
        Folder(run.file.parent).write(run.file.name, (json.dumps(asdict(kept), indent=1) + "\n").encode())
        return 0

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return next((status for status in pool.map(one, wanted) if status), 0)
