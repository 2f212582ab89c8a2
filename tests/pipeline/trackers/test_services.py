"""Runs with the real packages of Weights & Biases (offline) and MLflow (a local store), read back from what they wrote."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import train
from pipeline.config import Config, flat_config
from pipeline.data.store import Store
from pipeline.runs.run_folder import CONFIG, METRICS, REPORT, SUMMARY, run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values
from pipeline.trackers import follow
from pipeline.trackers.follow import RunTracking, lacking, numbers, read_tracking, start_groups
from pipeline.trackers.mlflow_tracker import PARENT, MlflowTracker
from tests.pipeline.trackers.test_follow import lines
from tests.pipeline.trackers.wandb_file import WandbFile

Make = Callable[..., Config]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(follow, "LOCAL_EVERY_S", 0.02)


def offline_runs(run: Folder) -> list[WandbFile]:
    return [WandbFile(path) for path in sorted(Path(run.path(), "wandb").glob("offline-run-*"))]


def client(storage: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")


def history_of(found: Any, identifier: str) -> dict[int, dict[str, float]]:
    """Values by step and MLflow's name; each name once a step."""
    history: dict[int, dict[str, float]] = {}
    for name in found.get_run(identifier).data.metrics:
        for metric in found.get_metric_history(identifier, name):
            assert name not in history.setdefault(metric.step, {})
            history[metric.step][name] = metric.value
    return history


def expected(run: Folder) -> dict[int, dict[str, float]]:
    """What metrics.jsonl has, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in read_metrics(run):
        found.setdefault(line["step"], {}).update(numbers(line))
    return found


def as_mlflow_names(history: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {step: {name.replace("@", "_at_"): v for name, v in values.items()} for step, values in history.items()}


def test_a_run_and_its_continuation_in_both(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    changes: dict[str, Any] = {
        "tracking": ["wandb", {"name": "mlflow", "args": {"experiment": "shoes", "tags": {"a": 1}}}]
    }
    run = Folder(tmp_path / "runs" / "tiny")
    for length in ("1 epochs", "2 epochs"):
        values = tiny_values(str(tmp_path), store.folder.uri, changes | {"length": length})
        recipe.write_text(yaml.safe_dump(values))
        assert train.main([str(recipe)]) == 0
    kept, figures = read_tracking(run), run.read_json(SUMMARY)["final"]
    assert lacking(run) == [] and "track" not in capsys.readouterr().err
    (theirs,) = offline_runs(run)
    assert (theirs.run.run_id, theirs.run.display_name, theirs.run.project) == (kept["wandb"]["id"], "tiny", "raydml")
    assert theirs.config["method.optimizer.lr"] == 3e-3 and theirs.config["length"] == "2 epochs"
    assert theirs.history == expected(run), (
        "the file of the second start has the whole curve, and replaces that of the first"
    )
    assert (
        theirs.summary["test/map@r"] == pytest.approx(figures["map@r"], abs=1e-4)
        and theirs.summary["state"] == "finished"
        and theirs.exit == 0
    )
    assert theirs.artifacts == {"report": [REPORT]}

    found, identifier = client(tmp_path), kept["mlflow"]["id"]
    (experiment,) = found.search_experiments(filter_string="name = 'shoes'")
    (only,) = found.search_runs([experiment.experiment_id])
    assert (only.info.run_id, only.info.run_name, only.info.status) == (identifier, "tiny", "FINISHED")
    assert history_of(found, identifier) == as_mlflow_names(expected(run))
    assert only.data.params["length"] == "1 epochs" and only.data.tags["changed.length"] == "2 epochs"
    assert only.data.params["method.optimizer.lr"] == "0.003" and only.data.tags["a"] == "1"
    assert only.data.tags["test.map_at_r"] == f"{figures['map@r']:.4f}"
    assert [artifact.path for artifact in found.list_artifacts(identifier)] == [REPORT]
    assert only.info.artifact_uri.startswith(str(tmp_path)), "beside the database, not in the working folder"
    assert list((tmp_path / "mlflow-artifacts").rglob(REPORT))


KILLED = """
import os, signal, sys, time, yaml
from pathlib import Path
from pipeline.config import build_config
from pipeline.runs.run_folder import METRICS, run_folder
from pipeline.trackers import follow
from tests.pipeline.trackers.test_follow import lines
follow.LOCAL_EVERY_S = 0.02
config = build_config(yaml.safe_load(Path(sys.argv[1]).read_text()))
run = run_folder(config)
run.write(METRICS, lines(1, 2, 3, 4))
with follow.RunTracking(config):
    while any(kept.get("sent") != {"train": 4} for kept in [follow.read_tracking(run).get(n, {}) for n in ("wandb", "mlflow")]):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_sigkill_of_the_command_each_value_is_there_once(make_config: Make, tmp_path: Path) -> None:
    config = make_config({"tracking": ["wandb", "mlflow"]})
    run = run_folder(config)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = read_tracking(run)
    run.write(METRICS, lines(1, 2))  # resumed from a checkpoint at step 2
    with RunTracking(config) as tracking:
        run.write(METRICS, lines(1, 2, 3, 4, 5, 6))
        run.write_json(SUMMARY, {"final": {"map@r": 31.0, "queries": 9}})
        tracking.finished()
    after = read_tracking(run)
    assert {name: kept["id"] for name, kept in after.items()} == {name: kept["id"] for name, kept in before.items()}
    (theirs,) = offline_runs(run)
    assert theirs.history == expected(run) and sorted(theirs.history) == [1, 2, 3, 4, 5, 6]
    found = client(tmp_path)
    assert history_of(found, after["mlflow"]["id"]) == expected(run)
    assert found.get_run(after["mlflow"]["id"]).info.status == "FINISHED"


def test_trials_belong_to_their_sweep(make_config: Make, tmp_path: Path) -> None:
    sweep = Folder(tmp_path / "sweeps" / "losses")
    configs = [make_config({"tracking": ["wandb", "mlflow"]}, name=f"losses-{i}") for i in range(2)]
    groups = [start_groups(config, "losses", sweep) for config in (configs[0], configs[1], configs[0])]
    assert groups[0] == groups[1] == groups[2] and set(groups[0]) == {"mlflow"}, "one, also after a second start"
    for config in configs:
        run_folder(config).write(METRICS, lines(1))
        with RunTracking(config, "losses", groups[0]):
            pass
        (theirs,) = offline_runs(run_folder(config))
        assert theirs.run.run_group == "losses" and theirs.summary["state"] == "stopped"
    found = client(tmp_path)
    (experiment,) = found.search_experiments(filter_string="name = 'raydml'")
    trials = found.search_runs([experiment.experiment_id], f"tags.`{PARENT}` = '{groups[0]['mlflow']}'")
    assert sorted(trial.info.run_name for trial in trials) == ["losses-0", "losses-1"]
    assert {trial.info.status for trial in trials} == {"KILLED"}
    assert found.get_run(groups[0]["mlflow"]).info.run_name == "losses"


def test_a_start_that_fails_half_way_makes_no_second_run(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, failures = MlflowTracker._log_config, iter([True])

    def fail_once(self: MlflowTracker, config: Any) -> None:
        if next(failures, False):
            raise ConnectionError("gone")
        really(self, config)

    monkeypatch.setattr(MlflowTracker, "_log_config", fail_once)
    monkeypatch.setattr(follow, "AGAIN_S", 0.0)
    config = make_config({"tracking": ["mlflow"]})
    run_folder(config).write(METRICS, lines(1, 2))
    with RunTracking(config):
        pass
    found = client(tmp_path)
    (experiment,) = found.search_experiments(filter_string="name = 'raydml'")
    (only,) = found.search_runs([experiment.experiment_id])
    assert lacking(run_folder(config)) == [] and history_of(found, only.info.run_id) == expected(run_folder(config))


def test_mlflows_folder_store_where_it_is_allowed(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    config = make_config({"tracking": [{"name": "mlflow", "args": {"tracking_uri": uri}}]})
    run = run_folder(config)
    run.write(METRICS, lines(1, 2))
    with RunTracking(config):
        pass
    assert lacking(run) == []
    assert history_of(MlflowClient(tracking_uri=uri), read_tracking(run)["mlflow"]["id"]) == expected(run)


def test_no_secret_of_the_environment_is_written(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "M4RKED5ECRET" * 4
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, secret)
    config = make_config({"tracking": ["wandb", "mlflow"]})
    run_folder(config).write(CONFIG, yaml.safe_dump(flat_config(config)).encode())
    run_folder(config).write(METRICS, lines(1))
    with RunTracking(config):
        pass
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any(path.suffix == ".db" for path in files)
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
