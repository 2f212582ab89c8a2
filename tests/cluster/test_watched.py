"""A run on Ray as it is watched from outside: its state on the storage, its gauges, lines of its workers, and the stop request."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import stop, watch
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.gauges import GAUGES, VALIDATION
from pipeline.errors import RunError
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import CONFIG, run_folder
from pipeline.runs.run_state import read_run_state
from pipeline.training.launch import run_in_process
from pipeline.training.ray_train import run_on_ray
from tests.cluster.nodes import wait_for
from tests.cluster.test_ray import on_ray, silent, tensors

pytestmark = pytest.mark.cluster
LOSSES = "tests.cluster.loss_that_prints"


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """Ray whose nodes show their gauges every second, instead of every ten."""
    from pipeline.distributed.ray_session import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with ray_session(6) as ray:
            yield ray


def scrape(ray: Any, name: str) -> dict[str, float]:
    """The values of one metric on all nodes, by the labels of ours."""
    found = {}
    for node in ray.nodes():
        with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as page:
            text = page.read().decode()
        for labels, value in re.findall(rf"^ray_{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE):
            own = {key: v for key, v in re.findall(r'(\w+)="([^"]*)"', labels) if key in ("run", "rank", "metric")}
            found[json.dumps(own, sort_keys=True)] = float(value)
    return found


def test_a_run_is_watched_and_stopped_from_outside(
    ray_here: Any, make_config: Callable[..., Config], store: Store, capsys: pytest.CaptureFixture
) -> None:
    config = on_ray(
        make_config({"length": "3000 epochs", "evaluation.every": "2 epochs", "evaluation.test": False}, name="seen"),
        loader="in_process",
    )
    folder = run_folder(config)
    folder.write(CONFIG, yaml.safe_dump(config.model_dump(mode="json")).encode())
    messages: list[str] = []
    ended: list[int | None] = []
    thread = threading.Thread(
        target=lambda: ended.append(
            run_on_ray(config, store.folder.uri, lambda s: messages.extend(s["messages"]), ray_here)
        )
    )
    thread.start()
    try:
        wait_for(lambda: bool((s := read_run_state(folder)) and s.best and len(s.workers) == 2), 90, "a validation")
        assert watch.main([str(folder), "--once", "--json"]) == 0
        seen = json.loads(capsys.readouterr().out)
        assert seen["alive"] and seen["group"] == 1 and [worker["rank"] for worker in seen["workers"]] == [0, 1]
        assert seen["progress"]["loss"] > 0 and seen["progress"]["total"] > seen["progress"]["step"] > 0
        mine = json.dumps({"rank": "0", "run": "seen"})
        measured = json.dumps({"metric": "map@r", "rank": "0", "run": "seen"})
        wait_for(lambda: scrape(ray_here, VALIDATION[0]).get(measured, 0) > 0, 60, "the gauge of a validation")
        for key in ("step", "epoch", "images_per_second", "loss"):
            name = GAUGES[key][0]
            wait_for(lambda name=name: scrape(ray_here, name).get(mine, 0) > 0, 60, f"the gauge {name}")
        assert 0 <= scrape(ray_here, GAUGES["waiting"][0])[mine] < 1
    finally:
        status = stop.main([str(folder), "--timeout", "100"])
        thread.join(60)
    out = capsys.readouterr().out
    assert status == 0 and ended == [signal.SIGTERM]
    assert " is stopped at step " in out and "the same command continues it" in out
    latest = Checkpoints(folder).latest()
    assert latest is not None and not latest.finished and any(f"stopped at step {latest.step}" in m for m in messages)


@pytest.mark.slow
def test_lines_of_workers_and_a_failure_name_rank_and_node(
    ray_here: Any, make_config: Callable[..., Config], store: Store
) -> None:
    config = on_ray(
        make_config({"method.loss": f"{LOSSES}:LossThatPrints"}, name="lines"), loader="in_process", max_failures=0
    )
    messages: list[str] = []
    with pytest.raises(Exception, match=r"^training failed: \[rank 1 @ [\d.]+\] .*no memory is left here"):
        run_on_ray(config, store.folder.uri, lambda s: messages.extend(s["messages"]), ray_here)
    told = [line for line in messages if "a warning of a user's loss" in line]
    assert sorted(line.split("]")[0].split(" @")[0] for line in told) == ["[rank 0", "[rank 1"], messages
    time.sleep(1)
    logs = Path(ray_here._private.worker._global_node.get_logs_dir_path())
    text = "\n".join(path.read_text(errors="replace") for path in logs.glob("worker-*"))
    assert re.search(r"^.*\[rank 1 @ [\d.]+\] printed by a user's loss$", text, re.MULTILINE)
    assert re.search(r"^\[rank 1 @ [\d.]+\] Traceback \(most recent call last\):$", text, re.MULTILINE)


@pytest.mark.slow
def test_the_others_do_not_wait_for_a_rank_that_has_failed(
    ray_here: Any, make_config: Callable[..., Config], store: Store
) -> None:
    """It has told its error and lives on; gloo's connections stay open, and the others wait in a collective."""
    config = on_ray(make_config({"method.loss": f"{LOSSES}:LossThatFails"}, name="alone"), loader="in_process")
    started = time.monotonic()
    with pytest.raises(RunError, match=r"^step \d+: LossThatFails failed on a batch .*of rank 1 alone"):
        run_on_ray(config, store.folder.uri, silent, ray_here)
    assert time.monotonic() - started < 300


STEADY = {
    "length": "6 epochs",
    "checkpoint.every": "3 steps",
    "method.optimizer.name": "sgd",
    "method.optimizer.lr": 0.1,
}
HANG_TIMEOUT_S = 12.0


def hang(
    ray: Any, config: Config, store: Store, interrupt: Callable[[tuple[Any, ...]], None] | None = None
) -> tuple[list[str], float]:
    """Trains a run, which is interrupted once it is past step 4; what it told, and how long it took after that."""
    messages: list[str] = []
    since: list[float] = []

    def show(state: dict[str, Any]) -> None:
        messages.extend(state["messages"])
        if not since and state["progress"].get("step", 0) >= 5:
            found = read_run_state(run_folder(config))
            if interrupt is not None and found is not None and found.workers:
                interrupt(found.workers)
                since.append(time.monotonic())

    assert run_on_ray(config, store.folder.uri, show, ray) is None
    return messages, time.monotonic() - since[0] if since else 0.0


def assert_same_weights(one: Config, other: Config) -> None:
    expected, got = tensors(one), tensors(other)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        difference = (got[name] - value).double().norm() / value.double().norm().clamp(min=1e-6)
        assert difference <= 1e-7, f"{name}: {difference:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 1])
def test_a_stopped_worker_is_found_named_and_replaced(
    ray_here: Any, make_config: Callable[..., Config], store: Store, workers: int
) -> None:
    """SIGSTOP of the last rank: within the configured time, and the weights are those of the undisturbed run."""
    alone = make_config(STEADY, name=f"calm{workers}")
    run_in_process(alone, store.folder.uri, silent)
    config = on_ray(
        make_config(STEADY, name=f"stopped{workers}"),
        loader="in_process",
        workers=workers,
        hang_timeout_s=HANG_TIMEOUT_S,
    )
    stopped: list[int] = []

    def interrupt(found: tuple[Any, ...]) -> None:
        stopped.append(found[-1]["pid"])
        os.kill(stopped[0], signal.SIGSTOP)

    messages, seconds = hang(ray_here, config, store, interrupt)
    assert stopped
    named = [line for line in messages if line.startswith(f"[rank {workers - 1} @ ")]
    assert any("gives no sign of life for " in line and "the last at step " in line for line in named), messages
    assert any("resumed at step" in line for line in messages) and seconds < HANG_TIMEOUT_S + 120
    assert not Path(f"/proc/{stopped[0]}").exists()
    assert_same_weights(alone, config)


@pytest.mark.slow
def test_a_collective_that_never_returns_is_found_and_the_workers_start_again(
    ray_here: Any, make_config: Callable[..., Config], store: Store, tmp_path: Path
) -> None:
    """Rank 1 never joins, and is alive: rank 0 finds its own step too long, or rank 1 does."""
    loss = {"method.loss": f"{LOSSES}:LossThatHangs", "method.loss_args": {"marker": str(tmp_path / "hung")}}
    alone = make_config(STEADY | loss, name="steady")
    run_in_process(alone, store.folder.uri, silent)
    assert not (tmp_path / "hung").exists()
    config = on_ray(make_config(STEADY | loss, name="hung"), loader="in_process", hang_timeout_s=HANG_TIMEOUT_S)
    messages, _ = hang(ray_here, config, store)
    assert (tmp_path / "hung").exists()
    assert any(re.match(r"\[rank [01] @ [\d.]+\] has not got through step 4 in 1[2-9] s", line) for line in messages), (
        messages
    )
    assert any("resumed at step 3" in line for line in messages)
    assert_same_weights(alone, config)
