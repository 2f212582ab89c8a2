"""Records of a comparison for tests, and runs that are not trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import compare
from benchmarks.compare_results import Results
from pipeline.config import Config
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_file import load_sweep


def load(tmp_path: Path, name: str) -> SweepConfig:
    return load_sweep(str(compare.sweep_file(name, tmp_path, {"storage": f"{tmp_path}/root"})))


def change_finals(results: Results, row: str, change: Callable[[dict[str, Any]], object], search: bool = False) -> None:
    """Changes the records of a row's final trials; with `search` those of its search too."""
    for file in (results.folder / "trials").glob("*.json"):
        record = json.loads(file.read_text())
        if record["method"] == row and (search or record["stage"] == "final"):
            change(record)
            file.write_text(json.dumps(record))


@dataclass
class Training:
    """Stands for the training of a run: writes its summary.

    Attributes:
        seconds: What the run takes.
        figures: Its metrics on the test classes.
        trained: What has been trained.
    """

    seconds: float = 100.0
    figures: Callable[[Config], dict[str, float]] = lambda config: {"recall@1": 62.0, "map@r": 53.0}
    trained: list[Config] = field(default_factory=list)

    def __call__(self, root: str, config: Config) -> int:
        self.trained.append(config)
        summary = {"seconds": self.seconds, "final": self.figures(config)}
        Folder(f"{root}/runs/{config.name}").write_json(SUMMARY, summary)
        return 0
