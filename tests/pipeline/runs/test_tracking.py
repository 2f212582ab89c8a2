"""What a run leaves behind to look at, also after it was killed, also in object storage."""

from __future__ import annotations

import io
import json
import math
import struct
from collections import defaultdict
from pathlib import Path

import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from pipeline.runs.terminal import Display, metrics_table, summary_table
from pipeline.runs.tracking import Tracker, read_metrics
from pipeline.storage import Folder


def events(folder: Folder) -> dict[str, list[tuple[int, float]]]:
    """Scalars of all TensorBoard files, as TensorBoard shows them: a restart at step s hides what came at s or later."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for name in folder.names("tensorboard"):  # TensorBoard reads them in the order of their names
        data, at = folder.read(f"tensorboard/{name}"), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                for tag in found:
                    found[tag] = [(s, v) for s, v in found[tag] if s < event.step]
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
    return dict(found)


def raw(folder: Folder) -> list[dict]:
    return [json.loads(line) for line in folder.read("metrics.jsonl").decode().splitlines()]


def test_lines_and_events(folder: Folder) -> None:
    tracker = Tracker(folder, 0)
    tracker.log(0, "frozen", {"map@r": 1.5})
    for step in (1, 2):
        tracker.log(step, "train", {"loss": 1 / step, "lr/main": 1e-4, "note": "text"})
    tracker.log(2, "validation", {"map@r": 12.0, "bad": math.inf})
    tracker.close()
    assert raw(folder) == read_metrics(folder) == [
        {"step": 0, "kind": "frozen", "map@r": 1.5},
        {"step": 1, "kind": "train", "loss": 1.0, "lr/main": 1e-4, "note": "text"},
        {"step": 2, "kind": "train", "loss": 0.5, "lr/main": 1e-4, "note": "text"},
        {"step": 2, "kind": "validation", "map@r": 12.0, "bad": math.inf},
    ]  # fmt: skip
    seen = events(folder)
    assert seen["train/loss"] == [(1, 1.0), (2, 0.5)] and seen["validation/map_r"] == [(2, 12.0)]
    assert "train/note" not in seen and "validation/bad" not in seen


def test_a_resumed_log_reads_as_if_never_killed(folder: Folder) -> None:
    killed = Tracker(folder, 0)
    for step in range(1, 8):
        killed.log(step, "train", {"loss": float(step)})
    killed.log(4, "validation", {"map@r": 1.0})
    killed.sync()  # and then the process is gone; the newest checkpoint is that of step 4
    resumed = Tracker(folder, 4)
    assert {line["step"] for line in read_metrics(folder)} == {1, 2, 3, 4}, "at once, not at the next sync"
    for step in range(5, 9):
        resumed.log(step, "train", {"loss": 10.0 * step})
    resumed.close()
    train = [(line["step"], line["loss"]) for line in read_metrics(folder) if line["kind"] == "train"]
    assert train == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0), (7, 70.0), (8, 80.0)]
    assert events(folder)["train/loss"] == train and events(folder)["validation/map_r"] == [(4, 1.0)]
    assert sum(line["kind"] == "validation" for line in read_metrics(folder)) == 1


@pytest.mark.parametrize(
    "rest", ['{"step": 3, "ki', "{", '{"step": 3, "kind": "train", "loss": 0.1', '"text"', "\0\0\0\0"]
)
def test_a_line_cut_off_by_a_kill_is_dropped(rest: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    whole = '{"step": 1, "kind": "train", "loss": 1.0}\n{"step": 2, "kind": "train", "loss": 0.5}\n'
    folder.write("metrics.jsonl", (whole + rest).encode())
    assert [line["step"] for line in read_metrics(folder)] == [1, 2]
    tracker = Tracker(folder, 2)
    tracker.log(3, "train", {"loss": 0.25})
    tracker.close()
    assert [(line["step"], line["loss"]) for line in raw(folder)] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_object_storage_sees_what_was_synced(bucket: str) -> None:
    folder = Folder(bucket) / "runs" / "x"
    tracker = Tracker(folder, 0)
    tracker.log(1, "train", {"loss": 1.0})
    assert read_metrics(folder) == []
    tracker.sync()
    assert [line["step"] for line in read_metrics(folder)] == [1] and events(folder)["train/loss"] == [(1, 1.0)]
    tracker.log(2, "train", {"loss": 2.0})
    tracker.close()
    assert [line["step"] for line in read_metrics(folder)] == [1, 2]


def test_nothing_logged_yet(folder: Folder) -> None:
    assert read_metrics(folder) == []


# ---- the terminal ----------------------------------------------------------------------------------------------------


def shown(terminal: bool, states: list[dict]) -> str:
    console = Console(force_terminal=terminal, width=120, record=True, file=io.StringIO())
    with Display(console) as display:
        for state in states:
            display({"messages": [], "progress": {}, "error": None} | state)
    return console.export_text()


def test_without_a_terminal_every_phase_is_a_line() -> None:
    training = {"phase": "training", "step": 1, "total": 9, "images_per_second": 12.3, "waiting": 0.05, "loss": 0.25}
    states = [
        {},
        {"progress": {"phase": "evaluating the frozen trunk"}, "messages": ["resumed at step 4"]},
        {"progress": training},
        {"progress": training | {"step": 2}},  # sooner than 15 s after the line before
        {"progress": {"phase": "validating"}},
    ]
    assert shown(False, states).splitlines() == [
        "starting workers",
        "resumed at step 4",
        "evaluating the frozen trunk",
        "training 1/9 loss 0.2500 12 images/s, 5.0% waiting for data",
        "validating",
    ]


def test_on_a_terminal_there_is_a_bar() -> None:
    text = shown(
        True, [{"progress": {"phase": "training", "step": 3, "total": 9, "images_per_second": 12.3, "waiting": 0.0}}]
    )
    assert "training" in text and "3/9" in text and "12 images/s" in text


def test_tables() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    metrics = {"recall@1": 51.239, "map@r": 20.0, "nmi": 70.0, "queries": 1234, "queries_without_positive": 5}
    console.print(metrics_table(metrics))
    console.print(summary_table({"final": metrics, "frozen": {"recall@1": 41.0, "map@r": 25.5, "queries": 1234}}))
    rows = [line.split() for line in console.export_text().replace("│", " ").splitlines()]
    assert ["recall@1", "51.24"] in rows and ["recall@1", "41.00", "51.24", "+10.24"] in rows
    assert ["map@r", "25.50", "20.00", "-5.50"] in rows and ["nmi", "70.00"] in rows
    assert "1,234 queries, 5 more without a positive left out" in " ".join(" ".join(row) for row in rows)
