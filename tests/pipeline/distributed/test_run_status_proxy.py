"""A worker's questions to the status in another process: seldom, and never waited for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.distributed import run_status
from pipeline.distributed.run_status import RunStatusProxy


def test_a_stop_request_is_asked_for_three_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, now = list[float](), 0.0

    def ask() -> int:
        asked.append(now)
        return len(asked)

    import ray

    monkeypatch.setattr(ray, "wait", lambda pending, timeout: (pending, []))
    monkeypatch.setattr(ray, "get", lambda number: number >= 3)
    monkeypatch.setattr(run_status, "time", SimpleNamespace(monotonic=lambda: now))
    actor: Any = SimpleNamespace(stop_requested=SimpleNamespace(remote=ask))
    status, answers = RunStatusProxy(actor), list[bool]()
    for _ in range(100):  # steps of 10 ms
        answers.append(status.stop_requested())
        now += 0.01
    assert len(asked) == 4
    assert 60 <= answers.index(True) <= 63, "the third answer is yes; it has come by the next step"
