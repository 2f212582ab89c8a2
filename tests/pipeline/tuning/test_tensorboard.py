"""A sweep in TensorBoard: what its readers find in the files, also after restarts and in object storage."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from pipeline.storage import Folder
from pipeline.tuning.sweep_folder import RunProgress, TrialRecord
from pipeline.tuning.tensorboard import TENSORBOARD, SweepBoard, read_events, run_name
from tests.pipeline.tuning.synthetic import final, large_sweep, search


@dataclass
class Shown:
    """A trial's run as TensorBoard shows it.

    Attributes:
        scalars: Steps and values by tag.
        values: The setting.
        status: 1 success, 2 failure, None while it runs.
    """

    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    values: dict[str, Any] = field(default_factory=dict)
    status: int | None = None


def shown(folder: Folder, record: TrialRecord) -> Shown:
    """Reads as TensorBoard does: files by name, a session's start but the first hides all before it."""
    found = Shown()
    started = False
    for event in stored(folder, record):
        if event.session_log.status == SessionLog.START:
            found.scalars = defaultdict(list) if started else found.scalars
            started = True
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                if content.HasField("session_end_info"):
                    found.status = content.session_end_info.status
                else:
                    start = content.session_start_info
                    found.values = {k: getattr(v, v.WhichOneof("kind")) for k, v in start.hparams.items()}
            else:
                found.scalars[value.tag].append((event.step, value.simple_value))
    return found


def stored(folder: Folder, record: TrialRecord) -> list[Event]:
    place = folder / TENSORBOARD / run_name(record)
    return [event for name in place.names() for event in read_events(place.read(name))[0]]


def board(folder: Folder) -> SweepBoard:
    return SweepBoard(folder, "map@r")


def curve(*scores: float) -> list[dict[str, Any]]:
    return [
        {
            "step": i,
            "epoch": i / 2,
            "images": 100 * i,
            "done": i / 10,
            "queries": 9,
            "map@r": score,
            "recall@1": 2 * score,
        }
        for i, score in enumerate(scores, 1)
    ]


def trial(*scores: float, **values: Any) -> TrialRecord:
    record = search(7, "triplet", None, state="running", started_at=5.0, **values)
    record.runs[0].curve = curve(*scores)
    return record


def test_curves_by_images_and_the_setting(folder: Folder) -> None:
    record = trial(10.0, 12.0, 11.0)
    record.values = {"method.optimizer.lr": 1e-3, "method.embedding_dim": 64, "model.channels_last": False,
                     "method.optimizer.name": "adamw"}  # fmt: skip
    board(folder).update(record)
    found = shown(folder, record)
    assert found.scalars == {
        "score": [(100, 10.0), (200, 12.0), (300, 12.0)],
        "validation/map_r": [(100, 10.0), (200, 12.0), (300, 11.0)],
        "validation/recall_1": [(100, 20.0), (200, 24.0), (300, 22.0)],
    }
    assert found.values == {"method": "triplet", "stage": "search", **record.values} and found.status is None
    assert isinstance(found.values["model.channels_last"], bool)


def test_a_trial_grows(folder: Folder) -> None:
    """Each record adds its events at the end of the same file, and nothing if there is nothing new."""
    place = folder / TENSORBOARD / "00007-triplet"
    data = b""
    for count in range(5):
        record = trial(*[10.0, 12.0, 11.0, 13.0][:count])
        board(folder).update(record)
        (name,) = place.names()
        more = place.read(name)
        assert more.startswith(data) and len(more) > len(data)
        data = more
        board(folder).update(record)  # also a sweep that was started again
        assert place.read(name) == data
    record.state, record.ended_at, record.score = "finished", 9.0, 13.0
    record.runs[0].images, record.runs[0].test = 400, {"map@r": 8.0, "queries": 70.0}
    board(folder).update(record)
    board(folder).update(record)
    found = shown(folder, record)
    assert found.scalars["score"][-1] == (400, 13.0) and found.scalars["test/map_r"] == [(400, 8.0)]
    assert found.status == 1 and len(stored(folder, record)) == 3 + 3 * 4 + 1 + 1


def test_times_are_those_of_the_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for now, scores in ((100.0, [1.0]), (200.0, [1.0, 2.0])):
        monkeypatch.setattr("pipeline.tuning.tensorboard.time.time", lambda now=now: now)
        board(Folder(tmp_path)).update(trial(*scores))
    place = tmp_path / TENSORBOARD / "00007-triplet"
    (file,) = place.iterdir()
    data, times, at = file.read_bytes(), [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        times.append(Event.FromString(data[at + 12 : at + 12 + length]).wall_time)
        at += 16 + length
    assert times == [100.0] * 6 + [200.0] * 3


def test_a_local_file_is_the_same_file(tmp_path: Path) -> None:
    """TensorBoard keeps it open: one that was put in its place would not be read."""
    inodes = set()
    for scores in ([], [1.0], [1.0, 2.0]):
        board(Folder(tmp_path)).update(trial(*scores))
        inodes |= {path.stat().st_ino for path in (tmp_path / TENSORBOARD / "00007-triplet").iterdir()}
    assert len(inodes) == 1


def test_an_event_that_a_killed_process_left_unfinished_is_replaced(folder: Folder) -> None:
    board(folder).update(trial(1.0))
    place = folder / TENSORBOARD / "00007-triplet"
    (name,) = place.names()
    whole = place.read(name)
    for missing in (1, 5, 20, len(whole) - 3):
        place.write(name, whole[:-missing])
        board(folder).update(trial(1.0))
        assert read_events(place.read(name))[0] == read_events(whole)[0]
        assert shown(folder, trial(1.0)).scalars["score"] == [(100, 1.0)]


def test_a_trial_that_is_restarted_from_a_checkpoint_comes_to_the_same(folder: Folder) -> None:
    board(folder).update(trial(1.0, 2.0, 3.0))
    before = stored(folder, trial())
    board(folder).update(trial(1.0))
    assert stored(folder, trial()) == before
    board(folder).update(trial(1.0, 2.0, 3.0, 4.0))
    assert stored(folder, trial())[: len(before)] == before
    assert [value for _, value in shown(folder, trial()).scalars["score"]] == [1.0, 2.0, 3.0, 4.0]


def test_a_stopped_trial_that_goes_on(folder: Folder) -> None:
    record = trial(1.0, 2.0)
    record.state, record.ended_at = "stopped", 7.0
    board(folder).update(record)
    record.state, record.ended_at = "running", 0.0
    board(folder).update(record)
    record.runs[0].curve = curve(1.0, 2.0, 3.0)
    board(folder).update(record)
    record.state, record.ended_at = "finished", 11.0
    board(folder).update(record)
    board(folder).update(record)
    found = shown(folder, record)
    assert found.scalars["score"] == [(100, 1.0), (200, 2.0), (300, 3.0)] and found.status == 1
    assert len((folder / TENSORBOARD / "00007-triplet").names()) == 2


def test_a_record_that_contradicts_hides_what_was_shown(folder: Folder) -> None:
    board(folder).update(trial(1.0, 2.0))
    other = trial(1.0, 5.0)
    other.values = {"method.optimizer.lr": 0.5}  # copied from a better trial
    board(folder).update(other)
    found = shown(folder, other)
    assert found.scalars["score"] == [(100, 1.0), (200, 5.0)] and found.values["method.optimizer.lr"] == 0.5


def test_runs_of_a_trial_are_told_apart(folder: Folder) -> None:
    record = trial(10.0, 20.0)
    record.runs[0].images = 200
    record.runs.append(RunProgress("x", 1, 3, curve=curve(6.0)))
    board(folder).update(record)
    found = shown(folder, record)
    assert set(found.scalars) == {"score"} | {
        f"validation_{place}/{name}" for place in ("fold0-seed0", "fold1-seed3") for name in ("map_r", "recall_1")
    }
    assert found.scalars["score"] == [(100, 10.0), (200, 20.0), (300, 13.0)], "by the images of all runs"
    assert found.scalars["validation_fold1-seed3/map_r"] == [(100, 6.0)]


def test_figures_that_are_no_numbers_and_failures(folder: Folder) -> None:
    record = trial(math.nan, 4.0)
    record.state, record.error, record.method = "failed", "diverged", "a/b c"
    board(folder).update(record)
    found = shown(folder, record)
    assert run_name(record) == "00007-a_b_c" and (folder / TENSORBOARD).names() == ["00007-a_b_c"]
    assert found.status == 2 and found.values["method"] == "a/b c"
    assert found.scalars["validation/map_r"] == [(200, 4.0)] and found.scalars["score"] == [(200, 4.0)]


def test_final_runs(folder: Folder) -> None:
    record = final(3, "triplet", 4, [31.0])
    record.seed = 4
    board(folder).update(record)
    found = shown(folder, record)
    assert (folder / TENSORBOARD).names() == ["00003-triplet-final-seed4"]
    assert found.scalars == {"test/map_r": [(2000, 31.0)], "test/recall_1": [(2000, 61.0)]}
    assert found.values == {"method": "triplet", "stage": "final", "seed": 4.0, "method.optimizer.lr": 1e-3}


def test_a_large_sweep_keeps_nothing_in_memory(tmp_path: Path) -> None:
    _, records = large_sweep(40)
    made = board(Folder(tmp_path))
    before = copy.deepcopy(vars(made), {id(made.folder): made.folder})
    for record in records:
        made.update(record)
    assert vars(made) == before and len((made.folder).names()) == len(records)
