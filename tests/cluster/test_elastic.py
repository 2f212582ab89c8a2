"""Nodes that are lost, announced to be taken away, or added: the run goes on, to the weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import Config, build_config
from pipeline.data.store import Store
from pipeline.training.launch import run_in_process
from tests.cluster.test_ray import ROOT, silent, tensors

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STEPS = 60
RANGE = {"min": 1, "max": 2, "grow_after_s": 3.0}
FIXED_S = 60.0  # beside the configured time-outs: 3 s until a node counts as lost, 15 s until Ray Train asks again


def undisturbed(config: Config, store: Store) -> Config:
    whole = config.model_copy(update={"name": "whole", "runtime": config.runtime.model_copy(update={"workers": 0})})
    whole = build_config(
        whole.model_dump(mode="json") | {"method": whole.method.model_dump(mode="json") | {"pause_s": 0.0}}
    )
    run_in_process(whole, store.folder.uri, silent)
    return whole


def disturbed(config: Config, scenario: str, tmp_path: Path) -> list[tuple[float, str]]:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "output.json"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.changing_nodes", scenario, str(recipe), str(output)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    assert found["error"] is None, found
    print(*(f"{seconds:6.1f} {text}" for seconds, text in found["messages"]), sep="\n")
    return [(seconds, text) for seconds, text in found["messages"]]


def step_of(message: str) -> int:
    return int(message.split("step ")[1].split(" ")[0].rstrip(":;,"))


@pytest.mark.parametrize("scenario", ["resize", "drain", "spare", "lost"])
def test_a_run_goes_on_to_the_same_weights(
    scenario: str, make_config: Callable[..., Config], store: Store, tmp_path: Path
) -> None:
    workers: Any = 2 if scenario in ("spare", "lost") else RANGE
    config = make_config(
        {
            "length": f"{STEPS} steps",
            "checkpoint.every": "3 steps",
            "method.name": "tests.cluster.slow_method:Slow",
            "method.optimizer.name": "sgd",
            "method.optimizer.lr": 0.01,
            "runtime.workers": workers,
            "runtime.worker_resources": {"worker": 0.5},
            "evaluation.test": False,
        },
        name="changing",
    )
    messages = disturbed(config, scenario, tmp_path)
    whole = undisturbed(config, store)
    one, other = tensors(whole), tensors(config)
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference = (other[name] - value).double().norm() / value.double().norm().clamp(min=1e-6)
        assert difference <= 1e-9, f"{name}: {difference:.1e}"
        assert value.dtype in (torch.float64, torch.int64)
    events = {text.removeprefix("# "): seconds for seconds, text in messages if text.startswith("# ")}
    resumed = [(seconds, step_of(text)) for seconds, text in messages if "resumed at step" in text]
    lost = [seconds for seconds, _ in resumed if seconds > events.get("drained", events["killed"])]
    begins = events.get("drained", events.get("added", events["killed"]) if scenario == "lost" else events["killed"])
    assert lost[0] - begins <= FIXED_S + 18
    told = " | ".join(text for _, text in messages)
    if scenario == "resize":
        assert len(resumed) >= 2 and "there is room for 2 workers, 1 run: saving a checkpoint" in told
    if scenario == "drain":
        assert "is about to be taken away in 1" in told or "is about to be taken away in 2" in told
        assert "failed" not in told, "the workers had left before the node went"
    if scenario == "lost":
        assert "the 2 workers have not started yet" in told
    if scenario in ("spare", "lost", "resize"):
        assert "failed" in told
