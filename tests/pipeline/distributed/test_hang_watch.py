"""A step that hangs is found and told; long work between steps is not; a rank that falls silent is named."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Config
from pipeline.distributed import hang_watch, run_status
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.hang_watch import HangWatch, collective_timeout
from pipeline.distributed.run_status import RunStatus, worker_label
from pipeline.training.loop import Worker
from pipeline.training.measurements import Measurements
from pipeline.training.ray_train import root_cause

LABEL = worker_label(1, "10.0.0.7")


class Ended(list[str]):
    """What a watch told and did."""

    def watch(self, timeout_s: float | None, **options: Any) -> HangWatch:
        return HangWatch(LABEL, timeout_s, self.append, end=lambda: self.append("ended"), **options)


def test_a_step_that_does_not_end_is_told_with_rank_node_and_step(capfd: pytest.CaptureFixture) -> None:
    ended, steps = Ended(), list[int]()
    with ended.watch(0.3, beat=steps.append) as watch:
        for step in range(3):
            watch.begin_step(step)
            time.sleep(0.15)
            watch.end_step()
        time.sleep(0.5)
        assert not ended
        watch.begin_step(7)
        time.sleep(0.5)
    text, end = ended
    assert (
        text.startswith("[rank 1 @ 10.0.0.7] has not got through step 7 in 0 s (runtime.hang_timeout_s): ")
        and end == "ended"
    )
    assert "most recent call first" in capfd.readouterr().err, "the stacks"
    assert 7 in steps and len(steps) > 5


def test_without_a_time_nothing_is_watched() -> None:
    ended = Ended()
    with ended.watch(None) as watch:
        watch.begin_step(0)
        time.sleep(0.1)
    assert not ended


def test_a_rank_that_waits_for_one_that_has_failed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang_watch, "LONGEST_INTERVAL_S", 0.05)
    ended, failed = Ended(), []
    with ended.watch(60.0, failed=lambda: bool(failed)):
        time.sleep(0.3)
        assert not ended
        failed.append("no space")
        time.sleep(0.4)
    assert ended == ["ended"]


def test_the_process_ends_although_its_thread_hangs(tmp_path: Path) -> None:
    code = """
import time
from pipeline.distributed.hang_watch import HangWatch
with HangWatch("[rank 0 @ here]", 0.2, lambda line: print(line, flush=True)) as watch:
    watch.begin_step(3)
    time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and done.stdout.startswith("[rank 0 @ here] has not got through step 3")
    assert 'File "<string>", line 6 in <module>' in done.stderr, "where it hung"


def test_long_work_between_steps_is_no_hang(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation, and the first images of a start, longer than a step may take; then a step that hangs."""
    validate, pixels = Measurements.validate, Worker._train_segment

    def slow_validate(*arguments: Any) -> Any:
        time.sleep(2.5)
        return validate(*arguments)

    def slow_segment(self: Worker) -> bool:
        stream = self.batches.pixels

        def slow_first(*given: Any) -> Any:
            for i, images in enumerate(stream(*given)):
                time.sleep(2.5 if i == 0 else 0)
                yield images

        monkeypatch.setattr(self.batches, "pixels", slow_first)
        return pixels(self)

    ended = Ended()
    config = make_config({"length": "2 steps", "evaluation.every": "1 steps", "evaluation.test": False})
    with monkeypatch.context() as patch, ended.watch(2.0) as watch:
        patch.setattr(Measurements, "validate", slow_validate)
        patch.setattr(Worker, "_train_segment", slow_segment)
        worker = Worker(config, config.data.source, Ranks(), torch.device("cpu"), RunStatus(), watch=watch)
        worker()
    assert not ended and worker.progress.step == 2
    step = worker.method.training_step

    def hangs(*arguments: Any) -> dict[str, float]:
        time.sleep(2.5)
        return step(*arguments)

    longer = config.model_copy(update={"length": config.length.model_copy(update={"value": 3.0})})
    with ended.watch(2.0) as watch:
        worker = Worker(longer, config.data.source, Ranks(), torch.device("cpu"), RunStatus(), watch=watch)
        worker.method.training_step = hangs  # type: ignore[method-assign]
        worker()
    assert ended[0].startswith("[rank 1 @ 10.0.0.7] has not got through step 2") and ended[1:] == ["ended"]


def test_collectives_wait_longer_than_any_step() -> None:
    assert collective_timeout(600.0) == timedelta(seconds=6000)
    assert collective_timeout(8.0) == timedelta(seconds=1800)


def test_a_silent_rank_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(run_status.time, "monotonic", lambda: now[0])
    status = RunStatus(60.0)

    def told() -> list[str]:
        messages = status.read()["messages"]
        status.messages.clear()
        return messages

    for rank in (0, 1):
        status.beat(rank, f"10.0.0.{rank}", 10 + rank, 12)
    now[0] += 29
    status.beat(0, "10.0.0.0", 10, 12)
    assert told() == []
    now[0] += 5
    line = (
        "[rank 1 @ 10.0.0.1] gives no sign of life for 34 s, the last at step 12: after 60 s (runtime.hang_timeout_s) the workers "
        "are started again"
    )
    assert told() == [line] and told() == []
    status.beat(1, "10.0.0.1", 11, 12)
    assert told() == ["[rank 1 @ 10.0.0.1] gives signs of life again"]
    now[0] += 50
    status.beat(0, "10.0.0.0", 10, 12)
    assert told()[0].startswith("[rank 1 @ 10.0.0.1] gives no sign of life for 50 s")
    status.beat(1, "10.0.0.9", 99, 0)
    assert told() == [], "another process of this rank"
    status.leave(1, 99)
    now[0] += 20
    status.beat(0, "10.0.0.0", 10, 12)
    now[0] += 25
    assert told() == [], "it has ended by itself"
    assert status.label(1) == "[rank 1 @ 10.0.0.9]" and status.label(5) == "[rank 5]"
    assert [worker["node"] for worker in status.summary()["workers"]] == ["10.0.0.0", "10.0.0.9"]


def test_of_several_failures_that_of_the_rank_that_failed_first_is_told() -> None:
    """The others lose their connection to it."""

    failed: Any = RuntimeError("training failed")
    failed.worker_failures = {
        0: RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.8]:1"),
        1: RuntimeError("Ray wraps it\nValueError: a bad image"),
    }

    def where(rank: int) -> str:
        return worker_label(rank, "10.0.0.8")

    assert root_cause(failed, where) == "[rank 1 @ 10.0.0.8] ValueError: a bad image"
    assert root_cause(failed) == "[rank 1] ValueError: a bad image"
    assert root_cause(RuntimeError("no placement group\nis there")) == "is there"
