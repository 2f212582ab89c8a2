"""`runtime.skip_nonfinite` in the real command: counted, told, kept by a resume, and ended with a diagnosis."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods import Baseline
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_state import read_run_state
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from tests.pipeline.conftest import Base
from tests.pipeline.training.conftest import Train, assert_one_error
from tests.pipeline.training.test_run import parameters

pytestmark = pytest.mark.usefixtures("fresh_readers")


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps whose loss is not finite; to be filled."""
    steps: set[int] = set()
    original = Baseline.loss

    def broken(self: Baseline, embeddings: torch.Tensor, labels: torch.Tensor, context: Any) -> torch.Tensor:
        loss = original(self, embeddings, labels, context)
        return loss * float("nan") if context.clock.step in steps else loss

    monkeypatch.setattr(Baseline, "loss", broken)
    return steps


def test_steps_that_are_left_out_are_counted(run: Train, base: Base, bad: set[int]) -> None:
    bad |= {2, 3, 6}
    status, _, err = run(name="skips", runtime__skip_nonfinite=2, checkpoint__every="1 steps", checkpoint__keep=9)
    assert status == 0
    folder = Folder(base.root / "runs" / "skips")
    lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 2, 2, 2, 3, 3]
    assert [line["step"] for line in lines if "loss" not in line] == [3, 4, 7]
    assert folder.read_json("summary.json")["skipped_steps"] == 3
    assert folder.read_json("summary.json")["images"] == 5 * 12 and folder.read_json("summary.json")["step"] == 8
    state = read_run_state(folder)
    assert state is not None and state.progress["skipped_steps"] == 3
    assert "left out, number 1: the loss is not finite at step 2 (nan on rank 0)" in err
    assert "left out, number 2: " in err and "left out, number 3: " not in err, "ever fewer lines"
    before, after = (parameters(folder, step) for step in (2, 4))
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert any(not torch.equal(after[name], value) for name, value in parameters(folder, 5).items())
    progress = Checkpoints(folder).progress("checkpoints", 4)
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (2, 2)
    assert Checkpoints(folder).progress("checkpoints", 5).skipped_in_a_row == 0
    folder.remove()


def test_too_many_in_a_row_end_the_run_also_over_a_resume(
    run: Train, base: Base, bad: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are left out, then the run is continued: the next one is the third in a row."""
    bad |= {2, 3, 4}
    settings = {"name": "rows", "runtime__skip_nonfinite": 2, "checkpoint__every": "1 steps"}
    assert run(**settings, length="4 steps", evaluation__test=False)[0] == 0
    outcome = run(**settings, length="8 steps", evaluation__test=False)
    assert_one_error(outcome, 1, "the loss is not finite at step 4 (nan on rank 0): no update was applied")
    told = outcome[2]
    assert "resumed at step 4" in told and "The 2 steps before it were left out for the same reason" in told
    assert "Lower the learning rate (main 0.003) or inspect these samples: sample ids " in told and " (train" in told
    folder = Folder(base.root / "runs" / "rows")
    state = read_run_state(folder)
    assert state is not None and state.state == "failed" and "runtime.skip_nonfinite is 2" in state.message
    assert Checkpoints(folder).steps()[-1] == 4
    bad.clear()
    assert run(**settings, length="8 steps", evaluation__test=False)[0] == 0
    assert Checkpoints(folder).progress("checkpoints", 8).skipped_steps == 2
    folder.remove()
