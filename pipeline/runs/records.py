"""Runs as their folders record them: found by name, listed, and compared; no module here imports PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.metric_names import COUNTS
from pipeline.runs.run_folder import CONFIG, DATASET, SUMMARY, step_of
from pipeline.storage import Folder, home

PROTOCOL = (
    "profile",
    "dataset",
    "partial",
    "classes",
    "trained_on",
    "checkpoint",
    "test_pixels",
    "distance",
    "embedding_dim",
    "seed",
)
PLACES = ("name", "storage")  # keys in which every two runs may differ
MEASURED_BY = (
    "evaluation.distractors",
    "evaluation.reranking",
    "evaluation.distance",
)  # keys that change what a figure is


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, read.

    Attributes:
        name: Name of the run.
        config: Its config.yaml, by dotted key.
        dataset: Fingerprint of its dataset; None if it never started.
        step: Step of its newest checkpoint; 0 if there is none.
        summary: Its summary.json; empty until the run is finished.
    """

    name: str
    config: Mapping[str, Any]
    dataset: str | None
    step: int
    summary: Mapping[str, Any]

    @property
    def state(self) -> str:
        """ "finished", or the step that a continued run starts from."""
        return "finished" if self.summary and self.summary["step"] >= self.step else f"at step {self.step:,}"

    @property
    def figures(self) -> dict[str, float]:
        """The figures on the test classes, in percent."""
        return {k: v for k, v in self.summary.get("final", {}).items() if k not in COUNTS}

    @property
    def headline(self) -> str:
        """The first figure, and the one that chooses checkpoints."""
        keys = dict.fromkeys([*list(self.figures)[:1], self.setting("evaluation.metric")])
        return ", ".join(f"{key} {self.figures[key]:.2f}" for key in keys if key in self.figures)

    def setting(self, key: str) -> str:
        return _text(self.config.get(key))


def find_run(name: str) -> Folder:
    """The folder of a run.

    Args:
        name: The run's folder, URI, or name below the default storage.

    Raises:
        UserError: There is no such run.
    """
    for folder in (Folder(name), Folder(home()) / "runs" / name):
        if is_run(folder):
            return folder
    raise UserError(f"{name!r} is neither a run folder nor a run in {home()}/runs (no config.yaml)")


def is_run(folder: Folder) -> bool:
    """True if a folder is that of a run."""
    return folder.exists(CONFIG)


def read_run(folder: Folder) -> RunRecord:
    """Reads a run's folder.

    Raises:
        UserError: Its config.yaml is damaged.
    """
    try:
        config = dict(_flatten(yaml.safe_load(folder.read(CONFIG))))
        name = str(config["name"])
    except (yaml.YAMLError, AttributeError, KeyError) as error:
        raise UserError(f"{folder}/{CONFIG} is not the config of a run: restore it, or remove the folder") from error
    steps = [step for name in folder.names("checkpoints") if (step := step_of(name)) is not None]
    dataset = folder.read_json(DATASET)["fingerprint"] if folder.exists(DATASET) else None
    summary = folder.read_json(SUMMARY) if folder.exists(SUMMARY) else {}
    return RunRecord(name, config, dataset, max(steps, default=0), summary)


def run_names(storage: Folder) -> list[str]:
    """Names of all runs below a storage root."""
    runs = storage / "runs"
    return [name for name in runs.names() if (runs / name).exists(CONFIG)]


def comparison(runs: Sequence[RunRecord]) -> dict[str, list[tuple[str, ...]]]:
    """Tables of two or more runs by title, a column a run after the name of each row.

    Settings are those that differ, a key that a run does not have is "-". The protocol says under which conditions figures
    were measured; where runs differ in the dataset, the profile or a key that changes what a figure is, a row says so, as
    their figures cannot be compared.
    """
    header = ("", *(run.name for run in runs))
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in PLACES)
    settings = [(key, *(run.setting(key) for run in runs)) for key in keys]
    figures = dict.fromkeys(key for run in runs for key in run.figures)
    protocols = [run.summary.get("protocol", {}) for run in runs]
    protocol = [(key, *(_text(p.get(key)) for p in protocols)) for key in PROTOCOL if any(key in p for p in protocols)]
    tables = {
        "settings that differ": [header, *(row for row in settings if len(set(row[1:])) > 1)],
        "figures on the test classes, %": [
            header,
            ("state", *(run.state for run in runs)),
            *((key, *(f"{run.figures[key]:.2f}" if key in run.figures else "-" for run in runs)) for key in figures),
        ],
        "protocol": [header, *protocol],
    }
    values: dict[str, list[Any]] = {
        "dataset": [run.dataset for run in runs],
        "protocol": [run.setting("protocol") for run in runs],
        **{key: [run.setting(key) for run in runs if key in run.config] for key in MEASURED_BY},
    }
    differing = [what for what, of_runs in values.items() if len(set(of_runs)) > 1]
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        tables["protocol"].append((f"The {' and the '.join(differing)} {verb}: these figures cannot be compared.",))
    return tables


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value and not key.endswith("_args"):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
