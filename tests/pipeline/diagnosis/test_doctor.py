"""The command: one real diagnosis of this machine, and what a run would fail of, each seen in its row."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from pipeline import doctor, train
from pipeline.data.store import Store
from pipeline.diagnosis import diagnose
from pipeline.diagnosis.measured_step import MeasuredStep, StepProcess, StepTimeout
from pipeline.diagnosis.rows import Row, as_json, print_table, worst
from pipeline.errors import RunError
from pipeline.storage import Folder
from pipeline.testing.tiny import tiny_values

Doctor = Callable[..., tuple[int, dict[str, Any]]]
STEP = MeasuredStep(1 << 30, 2 << 30, 1 << 29, None, 1 << 20, 0.1, 12, 9)


class Process(StepProcess):
    """A measured step without a process."""

    result_or_error: Any = STEP

    def __init__(self, config: Any, store: str | None) -> None:
        self.config, self.store = config, store

    def result(self, timeout_s: float = 1.0) -> MeasuredStep:
        if isinstance(self.result_or_error, Exception):
            raise self.result_or_error
        return self.result_or_error


@pytest.fixture
def said(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """`said(**changes)`: exit status of the doctor and its rows by name of the check; the step is not measured."""
    monkeypatch.setattr(diagnose, "StepProcess", Process)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(changes: dict[str, Any] | None = None, *arguments: str) -> tuple[int, dict[str, Any]]:
        recipe = write(tmp_path, store, changes)
        capsys.readouterr()
        status = doctor.main([recipe, "--json", *arguments])
        found = json.loads(capsys.readouterr().out)
        assert found["run"] == "tiny" and (found["status"] == "fails") == (status == 1)
        return status, {row["check"]: row for row in sorted(found["checks"], key=lambda row: row["status"] == "fails")}

    return run


def write(tmp_path: Path, store: Store, changes: dict[str, Any] | None = None) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_values(str(tmp_path / "storage"), store.folder.uri, changes)))
    return str(path)


def test_this_machine(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything real; nothing is left behind, and `train --dry-run` prints the same table."""
    recipe = write(tmp_path, store)
    assert doctor.main([recipe]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny: before a run") and re.search(
        r"a run can start: \d+ ok, \d+ with a warning, 0 that fail", out
    )
    for check in (
        "network",
        "dataset",
        "recipe",
        "versions",
        "training step",
        "memory",
        "storage",
        "disk: cache",
        "open files",
    ):
        assert re.search(rf"^  (ok|warning) +{check} ", out, re.MULTILINE), check
    assert "found" in out and "what to change" in out
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_train_dry_run_is_the_same(said: Doctor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = said()
    assert status == 0 and rows["recipe"]["found"].startswith(
        "4 classes × 3 images; length 3 epochs: 12 steps of 12 images, 144 images"
    )
    assert train.main([str(tmp_path / "recipe.yaml"), "--dry-run", "--set", "name=other"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("other: before a run")
    assert re.findall(r"^  (?:ok|warning) +(\S.*?)  ", out, re.MULTILINE) == list(rows)
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    ("changes", "check", "change"),
    [
        ({"data.source": "nowhere"}, "dataset", "there is no dataset 'nowhere'"),
        ({"model.backbone": "resnet5O"}, "network", "did you mean 'resnet50'"),
        ({"model.weights": "weights.pth"}, "network", "no such file"),
        ({"method.classes_per_batch": 40}, "recipe", "classes"),
        ({"data.validation_fold": 9}, "recipe", "the dataset has the folds 0 to 3"),
        ({"storage": "/proc/raydml"}, "storage", "check the path"),
        ({"cache.folder": "/proc/raydml"}, "disk: cache", "set cache.folder"),
        ({"precision": "float32", "runtime.gpus_per_worker": 1}, "machine", "this machine has 0"),
        ({"precision": "float32", "runtime.gpus_per_worker": 1}, "GPUs", "use a machine with GPUs"),
        ({"runtime.workers": 1, "runtime.cpus_per_worker": 9999}, "machine", "reduce runtime.workers"),
    ],
)
def test_what_would_fail(said: Doctor, changes: dict[str, Any], check: str, change: str) -> None:
    status, rows = said(changes)
    assert status == 1 and rows[check]["status"] == "fails", rows
    assert change in rows[check]["change"]


def test_a_run_of_other_settings_has_the_name(said: Doctor, tmp_path: Path, store: Store) -> None:
    recipe = write(tmp_path, store)
    from pipeline.config import to_yaml
    from pipeline.recipes import load_config

    run = Folder(tmp_path / "storage" / "runs" / "tiny")
    run.write("config.yaml", to_yaml(load_config(recipe)).encode())
    assert said()[1]["run"]["status"] == "ok"
    status, rows = said({"seed": 4})
    assert status == 1 and "exists with another config (seed: 3 -> 4)" in rows["run"]["change"]
    run.write_json("run.json", {"fingerprint": "0" * 16})
    assert said()[1]["dataset of the run"]["status"] == "fails"


@pytest.mark.parametrize(
    ("error", "expected"),
    [(RunError("killed by signal 9"), "fails"), (StepTimeout("took more than 300 s"), "warning")],
)
def test_a_step_that_was_not_measured(
    said: Doctor, error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "result_or_error", error)
    status, rows = said()
    assert rows["training step"]["status"] == expected and status == (expected == "fails")
    assert "memory" not in rows


def test_methods_that_mine_have_their_servers(said: Doctor) -> None:
    _, rows = said(
        {"method": {"name": "smart_mining", "embedding_dim": 8, "triplets_per_batch": 4}, "mining.shards": 2}
    )
    assert rows["mining servers: 2"]["status"] == "ok" and "table" in rows["mining servers: 2"]["found"]


def test_a_cluster_that_does_not_answer(said: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.5:8265")
    status, rows = said()
    assert status == 1 and "set RAY_ADDRESS=10.0.0.5:6379" in rows["cluster"]["change"]


def test_bad_input(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path, store)
    assert doctor.main([recipe, "--set", "sed=1"]) == 2
    assert "unknown key 'sed'" in capsys.readouterr().err
    assert doctor.main([str(tmp_path / "none.yaml")]) == 2
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert doctor.main([recipe, "--set", "storage=here"]) == 2
    assert "relative path" in capsys.readouterr().err


# ---- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_takes_texts_as_they_are() -> None:
    rows = [
        Row("a", "ok", "[red]x[/red] :cat:", "[/b]"),
        Row("b", "warning", "1", "2", "3"),
        Row("c", "fails", "4", "5", "6"),
    ]
    console = Console(width=100, record=True, file=io.StringIO(), markup=False, emoji=False)
    print_table("[bold]run", rows, console)
    text = console.export_text()
    assert "[red]x[/red] :cat:" in text and "[/b]" in text and text.startswith("[bold]run")
    assert "a run would fail: 1 ok, 1 with a warning, 1 that fail" in text
    assert [worst(rows), worst(rows[:2]), worst(rows[:1])] == ["fails", "warning", "ok"]
    assert as_json("r", rows[1:2]) == {
        "run": "r",
        "status": "warning",
        "checks": [{"check": "b", "status": "warning", "found": "1", "expected": "2", "change": "3"}],
    }
