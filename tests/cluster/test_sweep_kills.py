"""A sweep's driver, its trials' processes and their mining servers, killed with SIGKILL at random moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.data.store import Store
from pipeline.testing.tiny import tiny_values
from pipeline.tuning.sweep_folder import SweepFolder, TrialRecord, sweep_folder
from tests.cluster.test_sweep import figures

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900


class Sweep:
    """A sweep over a baseline and a method with a mining server, in a process of its own."""

    def __init__(self, root: Path, store: Store, trials: int, workers: int = 1) -> None:
        self.root = root
        root.mkdir()
        changes = {
            "baseline": {},
            "smart_mining": {
                "method": {
                    "name": "smart_mining", "embedding_dim": 8, "triplets_per_batch": 4, "list_length": 10, "random_epochs": 1,
                    "optimizer": {"name": "adamw", "lr": 3e-3, "eps": 1e-6},
                }
            },
        }  # fmt: skip
        for name, change in changes.items():
            recipe = tiny_values(str(root), store.folder.uri) | change
            (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        values: dict[str, Any] = {
            "name": "killed",
            "storage": str(root),
            "methods": {name: {"recipe": f"{name}.yaml"} for name in changes},
            "settings": {
                "length": "60 steps", "evaluation.every": "20 steps", "checkpoint.every": "5 steps",
                "runtime": {"workers": workers, "cpus_per_worker": 1, "loader": "in_process"},
            },
            "space": {"method.optimizer.lr": {"log_uniform": [1e-3, 1e-2]}},
            "searcher": {"name": "random"},
            "scheduler": {"name": "none"},
            "budget": {"trials": trials},
            "retries": 10,
            "final": None,
        }  # fmt: skip
        (root / "sweep.yaml").write_text(yaml.safe_dump(values))
        self.folder = SweepFolder(sweep_folder(str(root), "killed"))

    def start(self) -> subprocess.Popen[bytes]:
        with open(self.root / "log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline.tune", str(self.root / "sweep.yaml")],
                cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def finish(self) -> list[TrialRecord]:
        process = self.start()
        assert process.wait(TIMEOUT_S) == 0, (self.root / "log").read_text()[-3000:]
        return self.folder.read()

    def processes(self, driver: subprocess.Popen[bytes], title: str) -> list[psutil.Process]:
        """The driver's Ray processes of a title."""
        try:
            children = psutil.Process(driver.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if _title(child).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def undisturbed(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Any]]:
    """The figures of every trial of the sweep when nothing is killed."""
    sweep = Sweep(tmp_path_factory.mktemp("undisturbed") / "sweep", store, trials=3)
    yield figures(sweep.finish())


@pytest.mark.slow
@pytest.mark.parametrize("title", ["ray::ResourceTrainable", "ray::MiningActor"])
def test_trials_and_mining_servers_are_killed(
    undisturbed: dict[int, Any], store: Store, tmp_path: Path, title: str
) -> None:
    sweep = Sweep(tmp_path / "sweep", store, trials=3)
    driver = sweep.start()
    source = random.Random(title)
    kills = 0
    while driver.poll() is None:
        time.sleep(source.uniform(0.5, 4))
        busy = [p for p in sweep.processes(driver, title) if sweep.folder.read()]
        if busy and kills < 5:
            busy[0].send_signal(signal.SIGKILL)
            kills += 1
            time.sleep(12 if title == "ray::ResourceTrainable" else 2)  # for its successor to start
    log = (sweep.root / "log").read_text()
    assert driver.returncode == 0, log[-3000:]
    assert kills == 5, f"only {kills} kills hit"
    records = sweep.folder.read()
    assert figures(records) == undisturbed
    if title == "ray::ResourceTrainable":
        retried = [reason for record in records for reason in record.retried]
        assert len(retried) == 5 and log.count("is started again from its checkpoint") == 5


@pytest.mark.slow
@pytest.mark.parametrize("title", ["ray::TrainController", "ray::ResourceTrainable"])
def test_trials_of_several_workers_leave_nothing(store: Store, tmp_path: Path, title: str) -> None:
    """Room for one trial alone: what a dead controller or trial held has to be given back, or nothing goes on."""
    sweep = Sweep(tmp_path / "sweep", store, trials=2, workers=2)
    driver = sweep.start()
    kills = 0
    while driver.poll() is None:
        time.sleep(1)
        training = [record for record in sweep.folder.read() if any(run.curve for run in record.runs)]
        victims = sweep.processes(driver, title)
        if victims and len(training) > kills and kills < 2:
            victims[0].send_signal(signal.SIGKILL)
            kills += 1
    log = (sweep.root / "log").read_text()
    assert driver.returncode == 0, log[-3000:]
    assert kills == 2
    assert [record.state for record in sweep.folder.read()] == ["finished"] * 4


@pytest.mark.slow
def test_the_driver_is_killed(undisturbed: dict[int, Any], store: Store, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "sweep", store, trials=3)
    source = random.Random(5)
    for _ in range(5):
        driver = sweep.start()
        known = len(sweep.folder.read())
        while driver.poll() is None and len(sweep.folder.read()) == known and known < 6:
            time.sleep(0.1)
        time.sleep(source.uniform(0, 6))
        driver.kill()
        driver.wait()
    records = sweep.finish()
    assert figures(records) == undisturbed
    assert max(record.starts for record in records) > 1
    assert int(sweep.folder.folder.read_json("starts")) >= 5
