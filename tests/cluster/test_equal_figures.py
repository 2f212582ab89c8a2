"""The same figures whatever else the cluster does, and whatever the number of workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config, build_config
from pipeline.data.store import Store
from pipeline.runs.run_folder import SUMMARY, run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.testing.tiny import tiny_values
from pipeline.training.launch import run_in_process
from pipeline.training.ray_train import run_on_ray
from pipeline.tuning.driver import run_sweep
from pipeline.tuning.sweep_folder import SweepFolder, TrialRecord, sweep_folder
from tests.cluster.test_ray import ROOT, silent, tensors
from tests.cluster.test_sweep import WHOLE, left_behind, settings
from tests.laws.runs import METHODS_TRIED, TIMED
from tests.pipeline.tuning.sweeps import tiny_sweep

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def figures_of(config: Config) -> dict[tuple[int, str, str], float]:
    """All numbers of a run's log and summary but for what was timed."""
    folder = run_folder(config)
    found = {
        (line["step"], line["kind"], name): value
        for line in read_metrics(folder)
        for name, value in line.items()
        if name not in TIMED | {"step", "kind"} and isinstance(value, (int, float))
    }
    return found | {(0, "final", name): value for name, value in folder.read_json(SUMMARY)["final"].items()}


def assert_equal_figures(one: Config, other: Config) -> None:
    first, second = figures_of(one), figures_of(other)
    assert first and first.keys() == second.keys()
    assert first == pytest.approx(second, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", ["baseline", "mined"])
def test_the_same_job_on_one_two_and_three_workers_twice(
    ray_here: Any, make_config: Callable[..., Config], store: Store, method: str
) -> None:
    whole = make_config(METHODS_TRIED[method] | {"length": "2 epochs"}, name="whole")
    run_in_process(whole, store.folder.uri, silent)
    for workers in (1, 2, 3):
        configs = [
            whole.model_copy(
                update={
                    "name": f"{workers}-workers-{which}",
                    "runtime": whole.runtime.model_copy(update={"workers": workers}),
                }
            )
            for which in ("first", "second")
        ]
        for config in configs:
            assert run_on_ray(config, store.folder.uri, silent, ray_here) is None
            assert_equal_figures(config, whole)
        one, other = map(tensors, configs)
        assert all((one[name] == other[name]).all() for name in one), "the same number of workers: bit for bit"


def by_trial(records: list[TrialRecord]) -> dict[Any, Any]:
    """Settings and figures of each trial; the numbers of final trials, and so the names of their runs, are given as methods end."""
    return {
        (r.stage, r.method, r.seed): (r.values, r.state, r.score, [(run.curve, run.test) for run in r.runs])
        for r in records
    }


def test_two_runs_and_a_sweep_on_one_cluster(ray_here: Any, store: Store, tmp_path: Path) -> None:
    """Three commands at once, each a driver of its own, in one storage: each ends as it would have alone."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    recipes = {
        name: tiny_values(
            str(together),
            store.folder.uri,
            {**METHODS_TRIED[name], "name": name, "length": "6 epochs", "runtime.workers": workers},
        )
        for name, workers in (("baseline", 2), ("mined", 1))
    }
    for name, values in recipes.items():
        (together / f"{name}.yaml").write_text(yaml.safe_dump(values))
    changes: dict[str, Any] = {**WHOLE, "settings": settings(), "trials_at_once": 2, "budget": {"trials": 1}}
    sweep = tiny_sweep(together, store, **changes)
    commands = [("train", f"{name}.yaml") for name in recipes] + [("tune", "small.yaml")]
    environment = os.environ | {"RAY_ADDRESS": ray_here.get_runtime_context().gcs_address}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"pipeline.{command}", str(together / file)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for command, file in commands
    ]  # fmt: skip
    told = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    assert left_behind(ray_here) == []
    for values in recipes.values():
        config = build_config(values)
        whole = config.model_copy(
            update={"storage": str(alone), "runtime": config.runtime.model_copy(update={"workers": 0})}
        )
        run_in_process(whole, store.folder.uri, silent)
        assert_equal_figures(config, whole)
    records = SweepFolder(sweep_folder(sweep.storage, sweep.name)).read()
    assert by_trial(records) == by_trial(run_sweep(tiny_sweep(alone, store, **changes)).records)
    assert {record.state for record in records} == {"finished"}
