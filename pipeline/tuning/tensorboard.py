"""A sweep in TensorBoard: a run for each trial, with its curves by images trained on and its setting for the HPARAMS tab.

    tensorboard --logdir STORAGE/sweeps/NAME/tensorboard

A trial's file follows from its record: events that the file lacks are added at its end, so that a record written again, or a
sweep that was killed and continues, adds nothing twice. Only a record that contradicts the file (a trial that was stopped and goes
on, or took over another's weights) begins a new one, which hides the curves of the one before. Nothing is kept in memory.

TensorBoard finds the settings by itself, from each run's session; its metrics are the tags of the curves.
"""

from __future__ import annotations

import math
import re
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.message import DecodeError
from tensorboardX.proto.api_pb2 import Status
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from pipeline.metric_names import COUNTS
from pipeline.storage import Folder
from pipeline.storage.folder import disk_full_as_error
from pipeline.tuning.sweep_folder import RunProgress, TrialRecord

TENSORBOARD = "tensorboard"
_FILE = "events.out.tfevents."
_POSITION = ("step", "epoch", "images", "seconds", "done")  # keys of a validation that are no metrics
_HEADER, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


class SweepBoard:
    """Writes the TensorBoard runs of a sweep.

    Args:
        folder: STORAGE/sweeps/NAME.
        metric: The metric that the sweep chooses by, whose mean over a trial's runs is its score.
    """

    def __init__(self, folder: Folder, metric: str) -> None:
        self.folder, self.metric = folder / TENSORBOARD, metric

    def update(self, record: TrialRecord) -> None:
        """Adds what is new in a record.

        Raises:
            RunError: The disk is full.
        """
        place = run_name(record)
        names = [name for name in self.folder.names(place) if name.startswith(_FILE)]
        number = int(names[-1].removeprefix(_FILE)) if names else 0
        data = self.folder.read(f"{place}/{names[-1]}") if names else b""
        old, size = read_events(data)
        new = list(events(record, self.metric))
        if old == new[: len(old)]:
            self._add(f"{place}/{_FILE}{number:05d}", data[:size], new[len(old) :])
        elif old[: len(new)] != new:  # a trial that was restarted from a checkpoint comes to the same events again
            self._add(f"{place}/{_FILE}{number + 1:05d}", b"", new)

    def _add(self, name: str, data: bytes, events: list[Event]) -> None:
        """Writes events behind the data that a file has already; a local file grows in place, as TensorBoard keeps it open."""
        now = time.time()
        for event in events:
            event.wall_time = now
        more = b"".join(map(_framed, events))
        if not more:
            return
        if not data or not self.folder.is_local:
            self.folder.write(name, data + more)
            return
        path = self.folder.path(name)
        with disk_full_as_error(path, len(more)), open(path, "r+b") as file:
            file.truncate(len(data))
            file.seek(len(data))
            file.write(more)


def run_name(record: TrialRecord) -> str:
    """Name of a trial's TensorBoard run: "00007-triplet", "00012-triplet-final-seed0"."""
    stage = "" if record.stage == "search" else "-final" + ("" if record.seed is None else f"-seed{record.seed}")
    return f"{record.number:05d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', record.method)}{stage}"


def events(record: TrialRecord, metric: str) -> Iterator[Event]:
    """All events of a record, in the order of training, without times; `metric` is the one that its score is the mean of."""
    yield Event(file_version="brain.Event:2")
    yield Event(session_log=SessionLog(status=SessionLog.START))  # any but a run's first hides what came before
    yield _start(record)
    best: list[float] = []
    before = 0
    for run in record.runs:
        kind = "" if len(record.runs) == 1 else f" {_place(run)}"
        own_best = -math.inf
        for point in run.curve:
            images = int(point["images"])
            yield from _scalars(f"validation{kind}", images, point)
            own_best = max(own_best, point.get(metric, -math.inf))
            score = sum([*best, own_best]) / (len(best) + 1)
            if math.isfinite(score):
                yield Event(step=before + images, summary=scalar("score", score))
        yield from _scalars(f"test{kind}", run.images, run.test)
        best.append(own_best)
        before += run.images
    if record.state != "running":
        yield _end(record)


def _place(run: RunProgress) -> str:
    return f"{'all' if run.fold is None else f'fold{run.fold}'}-seed{run.seed}"


def _scalars(kind: str, images: int, values: Mapping[str, Any]) -> Iterator[Event]:
    for name, value in values.items():
        if name not in (*_POSITION, *COUNTS) and isinstance(value, (int, float)) and math.isfinite(value):
            yield Event(step=images, summary=scalar(f"{kind}/{name}", value))


def _start(record: TrialRecord) -> Event:
    """The trial's setting, for the HPARAMS tab."""
    start = SessionStartInfo(group_name=run_name(record), start_time_secs=record.started_at)
    seed = {} if record.seed is None else {"seed": record.seed}
    for name, value in {"method": record.method, "stage": record.stage, **seed, **record.values}.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, (int, float)):
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = str(value)
    return _session("_hparams_/session_start_info", HParamsPluginData(session_start_info=start))


def _end(record: TrialRecord) -> Event:
    status = "STATUS_FAILURE" if record.state == "failed" else "STATUS_SUCCESS"
    end = SessionEndInfo(status=Status.Value(status), end_time_secs=record.ended_at)
    return _session("_hparams_/session_end_info", HParamsPluginData(session_end_info=end))


def _session(tag: str, content: HParamsPluginData) -> Event:
    data = content.SerializeToString(deterministic=True)
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="hparams", content=data))
    return Event(summary=Summary(value=[Summary.Value(tag=tag, metadata=plugin)]))


def _framed(event: Event) -> bytes:
    """An event as it stands in a file of TensorBoard (TFRecord)."""
    data = event.SerializeToString()
    length = _HEADER.pack(len(data))
    return b"".join((length, _CHECKSUM.pack(masked_crc32c(length)), data, _CHECKSUM.pack(masked_crc32c(data))))


def read_events(data: bytes) -> tuple[list[Event], int]:
    """The events of a file, without times, and their size in bytes; a last one that a killed process left unfinished is dropped."""
    found: list[Event] = []
    at = 0
    while at + _HEADER.size + _CHECKSUM.size <= len(data):
        (length,) = _HEADER.unpack_from(data, at)
        start = at + _HEADER.size + _CHECKSUM.size
        end = start + length + _CHECKSUM.size
        if end > len(data):
            break
        try:
            event = Event.FromString(data[start : start + length])
        except DecodeError:
            break
        event.ClearField("wall_time")
        found.append(event)
        at = end
    return found, at
