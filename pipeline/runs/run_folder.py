"""The folder of a run: where it is, and its files."""

from __future__ import annotations

import json
from typing import Any

from pipeline.config import Config
from pipeline.storage import Folder


def run_folder(config: Config) -> Folder:
    return Folder(config.root) / "runs" / config.name


def read_changes(run: Folder) -> list[dict[str, Any]]:
    """Changes of runtime keys between starts of a run: {"step": ..., "changes": ["key: old -> new", ...]}."""
    text = run.read("changes.jsonl").decode() if run.exists("changes.jsonl") else ""
    return [json.loads(line) for line in text.splitlines()]
