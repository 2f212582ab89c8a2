"""/dev/shm, where Ray keeps its objects, fills up while a run trains: it ends with one line or goes on; nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import run_folder
from pipeline.training.launch import run_in_process
from tests.cluster.nodes import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
# In a mount namespace of its own: a small /dev/shm that fills up as soon as the file `fill` is there.
SMALL = """
mount -t tmpfs -o size=600m tmpfs /dev/shm
(until [ -e "$FILL" ]; do sleep 0.1; done; dd if=/dev/zero of=/dev/shm/filled bs=1M status=none; touch "$FILL.done") &
"$@"
status=$?
kill %1 2>/dev/null
exit $status
"""


def final(folder: Path) -> dict[str, torch.Tensor]:
    step = Checkpoints(folder_of(folder)).steps()[-1]
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "trunk.safetensors")


def folder_of(path: Path) -> Any:
    from pipeline.storage import Folder

    return Folder(path)


def test_shared_memory_fills_up_while_a_run_trains(
    make_config: Callable[..., Config], store: Store, tmp_path: Path
) -> None:
    assert shutil.which("unshare"), "unshare (util-linux) gives the test a /dev/shm of its own"
    changes: dict[str, Any] = {
        "length": "800 steps", "checkpoint.every": "20 steps", "evaluation.every": "400 steps",
        "method.optimizer.name": "sgd", "method.optimizer.lr": 1e-3,  # Adam enlarges the rounding of gradients that are zero
    }  # fmt: skip
    config = make_config({**changes, "runtime": {"workers": 2, "cpus_per_worker": 1, "loader": "ray"}}, name="full")
    recipe = tmp_path / "full.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    fill = tmp_path / "fill"
    train = [sys.executable, "-m", "pipeline.train", str(recipe)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"FILL": str(fill)}
    started = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", SMALL, "sh", *train], env=environment, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "runs" / "full"
    checkpoints = Checkpoints(run_folder(config))
    wait_for(lambda: started.poll() is not None or len(checkpoints.steps()) > 1, 240, "checkpoints")
    assert started.poll() is None
    fill.touch()
    wait_for(lambda: Path(f"{fill}.done").exists(), 120, "a full /dev/shm")
    _, err = started.communicate(timeout=600)
    if started.returncode:
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ") and "/dev/shm is full: make room there" in last, err[-3000:]
        assert checkpoints.latest() is not None and "Traceback" not in err
        subprocess.run(train, env=environment, check=True, capture_output=True, timeout=900)
    whole = make_config({**changes, "runtime": {"workers": 0, "loader": "in_process"}}, name="whole")
    run_in_process(whole, store.folder.uri, lambda _: None)
    one, other = final(folder), final(tmp_path / "runs" / "whole")
    differences = {
        n: float((one[n].double() - v.double()).norm() / v.double().norm().clamp(min=1e-6)) for n, v in other.items()
    }
    assert max(differences.values()) <= 1e-9, max(differences, key=differences.__getitem__)
