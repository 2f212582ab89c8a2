"""Processes of a run killed with SIGKILL where it is not the driver's business: workers, Ray Train's controller, a loader; and two runs at once.

The reference is the same run undisturbed in one process.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.training.launch import run_in_process
from pipeline.training.ray_train import run_on_ray
from tests.cluster.test_ray import on_ray, silent, tensors
from tests.laws.runs import METHODS_TRIED

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SHIPPED = [name for name in METHODS_TRIED if name not in ("two_optimizers", "swept_plan")]
KILLS = 3  # of each method's run: 21 in all


def processes(title: str) -> list[int]:
    """Process ids of the processes below this one whose title contains a text."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


class KillAt:
    """Kills a process with a title as soon as the run has done some steps; called with the run's status.

    Args:
        title: Part of the process's title.
        steps: Increasing numbers of steps, one a kill.
    """

    def __init__(self, title: str, steps: list[int]) -> None:
        self.title, self.steps = title, steps
        self.kills: list[int] = []
        self.messages: list[str] = []
        self._resumed_from = 0

    def __call__(self, state: dict[str, Any]) -> None:
        self.messages += state["messages"]
        resumed = sum("resumed at step" in text for text in self.messages)
        step = state["progress"].get("step", 0)
        if self.steps and resumed >= len(self.kills) and step >= self.steps[0]:
            for victim in processes(self.title)[:1]:
                os.kill(victim, signal.SIGKILL)
                self.kills.append(step)
                self.steps.pop(0)


def alone(config: Config, store: Store) -> Config:
    whole = config.model_copy(
        update={"name": "alone", "runtime": config.runtime.model_copy(update={"workers": 0, "loader": "in_process"})}
    )
    run_in_process(whole, store.folder.uri, silent)
    return whole


def assert_equal(one: Config, other: Config) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


@pytest.mark.parametrize("method", SHIPPED)
def test_a_worker_killed_at_random_steps(
    ray_here: Any, make_config: Callable[..., Config], store: Store, method: str
) -> None:
    changes = {
        "length": "400 steps",
        "checkpoint.every": "3 steps",
        "evaluation.every": "1 epochs" if "method.reload_best" in METHODS_TRIED[method] else "200 steps",
        **METHODS_TRIED[method],
    }
    config = on_ray(make_config(changes, name="killed"), workers=1, loader="in_process", max_failures=KILLS)
    kill = KillAt("RayTrainWorker", sorted(random.sample(range(2, 300), KILLS)))
    assert run_on_ray(config, store.folder.uri, kill, ray_here) is None
    assert len(kill.kills) == KILLS, (kill.kills, kill.messages)
    assert_equal(config, alone(config, store))


def test_ray_trains_controller_killed(ray_here: Any, make_config: Callable[..., Config], store: Store) -> None:
    """What it held is given back, what others hold in the same job is not."""
    anothers = ray_here.util.placement_group([{"CPU": 0.01}])
    changes = {"length": "160 steps", "checkpoint.every": "3 steps", "evaluation.every": "40 steps"}
    config = on_ray(make_config(changes, name="controller"), workers=2, cpus_per_worker=2, loader="in_process")
    kill = KillAt("TrainController", [60])
    assert run_on_ray(config, store.folder.uri, kill, ray_here) is None
    assert kill.kills and any("controller died: starting again" in text for text in kill.messages)
    assert any("resumed at step" in text for text in kill.messages)
    first, second = tensors(config), tensors(alone(config, store))
    for name, value in second.items():
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-8)
    table = ray_here.util.placement_group_table()
    assert [name for name, group in table.items() if group["state"] != "REMOVED"] == [anothers.id.hex()]
    ray_here.util.remove_placement_group(anothers)
    deadline = time.monotonic() + 10
    while processes("PlacementGroupCleaner"):
        assert time.monotonic() < deadline, "the actor that watches over the dead controller's groups is left"
        time.sleep(0.2)


def test_a_loaders_process_killed(ray_here: Any, make_config: Callable[..., Config], store: Store) -> None:
    changes = {"length": "60 epochs", "checkpoint.every": "3 steps", "evaluation.every": "20 epochs"}
    config = on_ray(make_config(changes, name="loader"), workers=1, loader="ray")
    kills: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not ended.is_set() and len(kills) < 3:
            for victim in processes("ray::MapBatches")[:1]:
                os.kill(victim, signal.SIGKILL)
                kills.append(victim)
                ended.wait(1.0)
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert run_on_ray(config, store.folder.uri, silent, ray_here) is None
    finally:
        ended.set()
        killer.join()
    assert kills, "no process of the loader was found"
    assert_equal(config, alone(config, store))


def test_two_runs_where_there_is_room_for_one(ray_here: Any, make_config: Callable[..., Config], store: Store) -> None:
    """The second waits, says so, and ends as it would have alone."""
    changes = {"length": "150 steps", "evaluation.every": "50 steps", "method.name": "tests.cluster.slow_method:Slow"}
    configs = [
        on_ray(
            make_config({**changes, "seed": seed}, name=f"run{seed}"), workers=1, cpus_per_worker=4, loader="in_process"
        )
        for seed in (0, 1)
    ]
    told: dict[str, list[str]] = {config.name: [] for config in configs}
    errors: list[BaseException] = []

    def train(config: Config) -> None:
        try:
            run_on_ray(config, store.folder.uri, lambda state: told[config.name].extend(state["messages"]), ray_here)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
        time.sleep(1)
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert sum(any("has not started yet" in line for line in lines) for lines in told.values()) == 1, told
    for config in configs:
        whole = config.model_copy(update={"method": config.method.model_copy(update={"pause_s": 0.0})})
        torch.testing.assert_close(
            tensors(config), tensors(alone(whole, store)), rtol=1e-9, atol=1e-12
        )  # other threads
