"""Reads the file that W&B writes offline: records of a LevelDB log, whose content W&B's own protocol buffers decode."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 32768
FULL, LAST = 1, 4  # kinds of a chunk that end a record


def records(path: Path) -> Iterator[Any]:
    """Every record that was written completely."""
    data, at, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class WandbFile:
    """One offline run: its description, config, history by step, summary, artifacts, and whether it was finished."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("*.wandb")
        self.config: dict[str, Any] = {}
        self.history: dict[int, dict[str, float]] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: dict[str, list[str]] = {}
        self.exit: int | None = None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = int(items.pop("_step"))
                assert step not in self.history
                self.history[step] = {name: value for name, value in items.items() if not name.startswith("_")}
            elif kind == "summary":
                for item in record.summary.update:
                    self.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            elif kind == "artifact":
                self.artifacts[record.artifact.type] = [entry.path for entry in record.artifact.manifest.contents]
            elif kind == "exit":
                self.exit = record.exit.exit_code
