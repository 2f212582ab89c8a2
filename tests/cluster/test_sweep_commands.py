"""The sweep's command as a submitted job, with everything in object storage, continued elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.store import Store
from pipeline.storage import Folder
from pipeline.storage.s3 import S3
from pipeline.tuning.sweep_folder import SweepFolder, read_state, sweep_folder
from tests.cluster.nodes import wait_for
from tests.cluster.test_ray_commands import ROOT
from tests.cluster.test_sweep import WHOLE, figures, settings
from tests.pipeline.tuning.sweeps import tiny_sweep
from tests.s3 import s3_server

pytestmark = pytest.mark.cluster


@pytest.mark.slow
def test_a_submitted_sweep_is_stopped_and_continues_from_object_storage_on_another_cluster(
    store: Store,
    tmp_path: Path,
    head: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with s3_server() as endpoint:
        access = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in access.items():
            monkeypatch.setenv(name, value)
        S3.clear_instance_cache()
        S3().mkdir("bucket")
        changes: dict[str, Any] = {
            **WHOLE,
            "settings": settings("12 epochs"),
            "trials_at_once": 1,
            "budget": {"trials": 1},
        }
        tiny_sweep(tmp_path, store, **changes)
        sweep = str(tmp_path / "small.yaml")
        command = [sys.executable, "-m", "pipeline.tune", sweep]
        ray = str(Path(sys.executable).parent / "ray")
        runtime = json.dumps({"env_vars": access})
        submit = [
            ray,
            "job",
            "submit",
            "--no-wait",
            "--submission-id",
            "sweep",
            "--working-dir",
            str(ROOT),
            "--runtime-env-json",
            runtime,
        ]
        deadline = time.monotonic() + 90
        while True:
            sent = subprocess.run(
                [*submit, "--", *command, "--set", "storage=s3://bucket"], env=head, capture_output=True, text=True
            )
            if sent.returncode == 0 or time.monotonic() > deadline:
                break
            time.sleep(1)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        folder = SweepFolder(sweep_folder("s3://bucket", "small"))
        wait_for(lambda: any(run.curve for record in folder.read() for run in record.runs), 180, "the first validation")
        stop = subprocess.run([ray, "job", "stop", "sweep"], env=head, capture_output=True, text=True)
        assert stop.returncode == 0, stop.stderr
        wait_for(lambda: (read_state(folder.folder) or pytest.fail()).state == "stopped", 90, "the saved stop")
        assert [record.state for record in folder.read()] == ["running"]
        here = subprocess.run(
            [*command, "--set", "storage=s3://bucket"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert here.returncode == 0, here.stdout + here.stderr
        records = folder.read()
        assert [record.state for record in records] == ["finished"] * 6 and records[0].starts == 2
        assert "MAP@R in %" in here.stdout and Folder("s3://bucket/sweeps/small").exists("sweep.html")
    alone = subprocess.run(
        [*command, "--set", f"storage={tmp_path / 'alone'}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    assert figures(SweepFolder(sweep_folder(str(tmp_path / "alone"), "small")).read()) == figures(records)
    S3.clear_instance_cache()
