"""A run folder, and states that are written quickly."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import stop
from pipeline.runs import run_state
from pipeline.runs.run_folder import CONFIG
from pipeline.storage import Folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes ten times as often as the slowest test needs."""
    monkeypatch.setattr(run_state, "LOCAL_EVERY_S", 0.05)
    monkeypatch.setattr(stop, "POLL_S", 0.02)


@pytest.fixture
def run_folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "runs" / "photos")
    folder.write(CONFIG, b"name: photos\n")
    return folder
