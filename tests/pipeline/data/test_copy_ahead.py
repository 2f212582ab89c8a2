"""Batches are copied one ahead, in order; errors and the end of a loader come where they would have come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator

import pytest
import torch
from torch import Tensor

from pipeline.data.copy_ahead import on_device, one_ahead


def loader(events: list[str], count: int, fails_at: int = -1) -> Generator[Tensor, None, None]:
    try:
        for i in range(count):
            if i == fails_at:
                raise OSError("a damaged shard")
            yield torch.tensor([i])
    finally:
        events.append("closed")


def start_copy(pixels: Tensor) -> Callable[[], Tensor]:
    assert threading.current_thread() is not threading.main_thread()
    return lambda: pixels


def test_every_batch_comes_once_in_order_and_the_loader_is_closed() -> None:
    events: list[str] = []
    assert [int(x) for x in one_ahead(loader(events, 5), start_copy)] == [0, 1, 2, 3, 4]
    assert events == ["closed"]


def test_the_next_batch_is_copied_while_one_is_used() -> None:
    started = [threading.Event() for _ in range(3)]

    def watched(pixels: Tensor) -> Callable[[], Tensor]:
        started[int(pixels)].set()
        return lambda: pixels

    batches = one_ahead(loader([], 3), watched)
    assert int(next(batches)) == 0
    assert started[1].wait(5), "its copy was not started beside the step"
    assert not started[2].is_set(), "two ahead would need memory for two"
    batches.close()


def test_an_error_comes_where_its_batch_would_have_come() -> None:
    batches = one_ahead(loader([], 3, fails_at=1), start_copy)
    assert int(next(batches)) == 0
    with pytest.raises(OSError, match="a damaged shard"):
        next(batches)


def test_closing_early_closes_the_loader() -> None:
    events: list[str] = []
    batches = one_ahead(loader(events, 100), start_copy)
    next(batches)
    batches.close()
    assert events == ["closed"]


def test_on_a_cpu_batches_are_passed_on_as_they_are() -> None:
    batches = loader([], 2)
    assert on_device(batches, torch.device("cpu")) is batches


class FakeStream:
    """A stream that writes down what is asked of it."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record_event(self) -> str:
        self.log.append("copied")
        return "event"

    def wait_event(self, event: str) -> None:
        self.log.append(f"step waits for {event}")


def test_a_step_waits_for_the_copy_of_its_batch_on_the_device_and_keeps_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    stream = FakeStream(log)

    class InStream:
        def __init__(self, given: FakeStream) -> None:
            assert given is stream

        def __enter__(self) -> None:
            log.append("in the stream")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", InStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: log.append("pinned") or self)
    monkeypatch.setattr(
        Tensor, "to", lambda self, device, non_blocking: log.append(f"to {device}, {non_blocking}") or self
    )
    monkeypatch.setattr(Tensor, "record_stream", lambda self, used_by: log.append("kept"))
    (batch,) = on_device(loader([], 1), torch.device("cuda"))
    assert int(batch) == 0
    assert log == ["in the stream", "pinned", "to cuda, True", "copied", "step waits for event", "kept"]
