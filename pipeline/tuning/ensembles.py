"""The concatenated embeddings of each method's final runs, measured once they have all finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray

from pipeline.console import console
from pipeline.errors import RunError, UserError
from pipeline.inference.ensemble import measure_ensemble
from pipeline.runs.run_folder import SUMMARY
from pipeline.storage import Folder
from pipeline.tuning.resources import TrialResources
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_folder import ENSEMBLES, TrialRecord, final_trials


def write_ensembles(
    sweep: SweepConfig, folder: Folder, records: Sequence[TrialRecord], trials: dict[str, TrialResources]
) -> None:
    """Measures the concatenated embeddings of each method's final runs, once they have all finished."""
    for label, seed, names in missing_ensembles(sweep, folder, records):
        console.print(f"{label}: measuring the concatenated embeddings of {len(names)} runs", highlight=False)
        held = trials[label].worker
        task: Any = ray.remote(num_cpus=held["CPU"], num_gpus=held.get("GPU", 0))(measure_ensemble)
        folders = [Folder(sweep.root) / "runs" / name for name in names]
        try:
            metrics = ray.get(task.remote(folders, threads=int(held["CPU"])))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (RunError, UserError)):
                raise error.cause from None
            raise
        known = read_ensembles(folder)
        others = [entry for entry in known.get(label, []) if entry["seed"] != seed]
        folder.write_json(ENSEMBLES, known | {label: [*others, {"seed": seed, "runs": names, "metrics": metrics}]})


def read_ensembles(folder: Folder) -> dict[str, list[dict[str, Any]]]:
    """By method: seed, runs and figures of each ensemble that has been measured."""
    return dict(folder.read_json(ENSEMBLES)) if folder.exists(ENSEMBLES) else {}


def missing_ensembles(
    sweep: SweepConfig, folder: Folder, records: Sequence[TrialRecord]
) -> list[tuple[str, int | None, list[str]]]:
    """Method, seed and runs of each ensemble that can be measured and has not been; a run may have been removed."""
    known = read_ensembles(folder)
    measured = [(label, entry["runs"]) for label, entries in known.items() for entry in entries]
    runs = Folder(sweep.root) / "runs"
    return [
        (label, seed, names)
        for label, seed, names in ensembles(sweep, records)
        if (label, names) not in measured and all(runs.exists(f"{name}/{SUMMARY}") for name in names)
    ]


def ensembles(sweep: SweepConfig, records: Sequence[TrialRecord]) -> Iterator[tuple[str, int | None, list[str]]]:
    """Method, seed and runs of each ensemble: a seed's folds, or all seeds where runs are trained on all classes."""
    if sweep.final is None:
        return
    for label in sweep.methods:
        finals = [record for record in final_trials(records, label) if record.state == "finished"]
        if len(finals) < len(sweep.final.seeds):
            continue
        if sweep.final.classes == "folds":
            groups = [(record.seed, [run.name for run in record.runs]) for record in finals]
        else:
            groups = [(None, [run.name for record in finals for run in record.runs])]
        yield from ((label, seed, names) for seed, names in groups if len(names) > 1)
