"""Runs of a comparison beyond its sweep: at equal wall time, and with more seeds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder


@dataclass(frozen=True)
class KeptRun:
    """A run on all training classes.

    Attributes:
        row: The row.
        seed: The run's seed.
        steps: Its length.
        seconds: Time of training, without evaluation.
        test: Its metrics on the test classes, in percent.
    """

    row: str
    seed: int
    steps: int
    seconds: float
    test: dict[str, float]


@dataclass(frozen=True)
class Wanted:
    """A run that is to be trained, and the file of its record.

    Attributes:
        row: The row.
        config: What is trained; its name and storage say where.
        file: Its record.
    """

    row: str
    config: Config
    file: Path


def kept_runs(folder: Path) -> list[KeptRun]:
    """The records of a folder; none if it is not there."""
    return [KeptRun(**json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]


def train_runs(wanted: Sequence[Wanted], train: Callable[[str, Config], int], until: float | None) -> int:
    """Trains what has no record, a run a core; returns the first status that is not 0.

    Args:
        wanted: What is to be there.
        train: Trains a configuration in a storage and returns the command's status.
        until: Time by the monotonic clock after which no run is started.
    """

    def one(run: Wanted) -> int:
        if run.file.exists() or (until is not None and time.monotonic() > until):
            return 0
        config = run.config
        if status := train(config.storage, config):
            return status
        summary = Folder(f"{config.storage}/runs/{config.name}").read_json(SUMMARY)
        kept = KeptRun(run.row, config.seed, int(config.length.value), summary["seconds"], summary["final"])
        run.file.parent.mkdir(exist_ok=True)
        run.file.write_text(json.dumps(asdict(kept), indent=1) + "\n")
        return 0

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return next((status for status in pool.map(one, wanted) if status), 0)
