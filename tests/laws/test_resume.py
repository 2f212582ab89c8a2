"""The third law, with real processes: a run that is killed anywhere continues to the same weights, lines and figures.

Programs are runs of `pipeline.train.main` in processes of their own (tests.laws.runs); one test starts the command
itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.run_status import RunStatus
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.testing.tiny import tiny_values, write_tiny_store
from pipeline.testing.watched_run import Seen, make_worker, state
from tests.laws.runs import METHODS_TRIED, Reference, Run, kill_after_lines, kill_often, same, side_by_side
from tests.laws.test_laws import check, zero_gradient
from tests.pool import Pool, Program
from tests.stubs import registered

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def make_run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """`make_run("baseline", {"seed": 1})`: a run of 3 epochs of 4 steps that saves every 2 steps."""

    def make(method: str, changes: dict[str, Any] | None = None, source: str | None = None) -> Run:
        root = tmp_path_factory.mktemp(method)
        short = {"length": "3 epochs", "checkpoint": {"every": "2 steps", "keep": 2}}
        values = tiny_values(
            str(root), source or store.folder.uri, {**short, **METHODS_TRIED[method], **(changes or {})}
        )
        del values["runtime"]["workers"], values["runtime"]["loader"]
        (root / "recipe.yaml").write_text(yaml.safe_dump(values))
        return Run(root, root / "recipe.yaml")

    return make


EVERYDAY = ("baseline", "mined", "two_optimizers", "swept_plan", "smart_mining", "gca_hng")


def uninterrupted(make_run: MakeRun, method: str) -> Reference:
    """A run of a method that is left alone."""
    run = make_run(method)
    run.finish()
    return Reference(run.left(), Path(f"{run.root}/log.writes").read_text().splitlines())


@pytest.fixture(scope="session")
def references(make_run: MakeRun) -> dict[str, Reference]:
    """The uninterrupted run of each method that is killed every day."""
    found = {}

    def add(method: str) -> None:
        found[method] = uninterrupted(make_run, method)

    side_by_side(add, [(method,) for method in EVERYDAY])
    return found


# ---- killed ---------------------------------------------------------------------------------------------------------


def test_killed_at_random_moments(make_run: MakeRun, references: dict[str, Reference]) -> None:
    """The methods that keep most between steps; all methods, and chains of kills, are in the matrix below.

    Of the others, tests/compat continues recorded runs that were killed.
    """

    def kill_and_compare(method: str, seed: int) -> None:
        expected, run = references[method].left, make_run(method)
        assert kill_often(run, seed, kills=1, first=6, total=len(expected["lines"]))
        assert "resumed at step" in (run.root / "log").read_text()
        same(run.left(), expected)

    side_by_side(kill_and_compare, [(method, seed) for seed, method in enumerate(EVERYDAY, 1)])


def test_the_command_itself_continues(make_run: MakeRun, references: dict[str, Reference]) -> None:
    """`python -m pipeline.train`, in an interpreter of its own, after a kill; with the report, which the others leave out."""
    run = make_run("baseline")
    program = run.start()
    assert kill_after_lines(run, program, 8, 0.01) and program.wait() == -signal.SIGKILL
    command = [sys.executable, "-m", "pipeline.train", *run.arguments()]
    done = subprocess.run(command, cwd=ROOT, timeout=300, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr and "tiny: retrieval on" in done.stdout
    assert b"</html>" in run.folder.read("report.html")
    same(run.left(), references["baseline"].left)


WRITES = [
    ("baseline", "checkpoints/step-00000000/checkpoint.json", 0, False),  # before there is any checkpoint
    ("two_optimizers", "checkpoints/step-00000006/optimizers.pt", 0, False),  # within a checkpoint
    ("swept_plan", "checkpoints/step-00000010/plan.npz", 0, True),
    ("smart_mining", "plan.npz", 1, False),
    ("swept_plan", "best/step-00000004/checkpoint.json", 0, True),  # the best is saved, its checkpoint is not
    ("baseline", "best/step-00000012/checkpoint.json", -1, True),
    ("two_optimizers", "summary.json", -1, False),  # the test classes are measured, and logged
    ("swept_plan", "summary.json", -1, True),  # the summary is written, the run not marked as finished
    ("baseline", "report.html", -1, False),
]


def test_killed_between_two_writes(make_run: MakeRun, references: dict[str, Reference]) -> None:
    def kill_and_compare(method: str, name: str, which: int, after: bool) -> None:
        expected, run = references[method], make_run(method)
        program = run.start(kill_at_write=expected.write_of(name, which), after=after)
        assert program.wait() == -signal.SIGKILL, program.output()
        run.finish()
        same(run.left(), expected.left)
        assert run.folder.exists("report.html")

    side_by_side(kill_and_compare, WRITES)


def test_killed_between_mining_and_training(store: Store, tmp_path: Path) -> None:
    values = {"name": "hit", **METHODS_TRIED["smart_mining"], "method.random_epochs": 0, "length": "2 epochs"}
    left = []
    for name in ("calm", "hit"):
        config = Config.model_validate(tiny_values(str(tmp_path), store.folder.uri, values | {"name": name}))
        if name == "hit":
            worker = make_worker(config, 0, (1,))
            plan, method = worker.method.plan, worker.method

            def mined(epoch: int, context: Any, plan: Any = plan, method: Any = method) -> Any:
                found = plan(epoch, context)
                if epoch == 1:
                    assert method.seconds, "mined"
                    raise KeyboardInterrupt
                return found

            worker.method.plan = mined  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                worker()
        worker = make_worker(config, 0, (1,))
        worker()
        left.append(state(worker))
    same(left[1], left[0])


# ---- stopped --------------------------------------------------------------------------------------------------------


def test_a_stop_saves_first(make_run: MakeRun, references: dict[str, Reference]) -> None:
    def stop_and_compare(method: str, number: int, status: int) -> None:
        run = make_run(method)
        program = run.start("checkpoint.every=100 steps")
        assert kill_after_lines(run, program, lines=6, delay_s=0, number=number)
        assert program.wait() == status
        latest = Checkpoints(run.folder).latest()
        assert latest is not None and latest.step == read_metrics(run.folder)[-1]["step"] > 3 and not latest.finished
        said = program.output().split("stopping: saving a checkpoint ...\n")
        assert len(said) == 2 and f"stopped at step {latest.step}" in said[1]
        run.finish("checkpoint.every=100 steps")
        assert f"resumed at step {latest.step}" in program.output()
        same(run.left(), references[method].left)

    side_by_side(stop_and_compare, [("two_optimizers", signal.SIGTERM, 143), ("swept_plan", signal.SIGINT, 130)])


# ---- run again ------------------------------------------------------------------------------------------------------


def contents(run: Run) -> dict[Path, bytes]:
    """Every file of a run but for the count of its starts."""
    files = (p for p in Path(run.folder.path()).rglob("*") if p.is_file() and p.name != "incarnation")
    return {p: p.read_bytes() for p in files}


def refused(run: Run, *overrides: str) -> str:
    """The one line with which the program refuses to go on, status 2."""
    before = contents(run)
    program = run.start(*overrides)
    assert program.wait() == 2, program.output()
    errors = [line for line in program.output().splitlines() if line.startswith("error: ")]
    assert program.output().endswith(errors[-1] + "\n") and "Traceback" not in program.output()
    after = contents(run)
    assert (
        sorted(path for path in {*before, *after} if path.name != "state.json" and before.get(path) != after.get(path))
        == []
    )
    return errors[-1]


def test_a_finished_run_shows_its_summary_grows_and_cannot_become_another(
    make_run: MakeRun, references: dict[str, Reference], store: Store
) -> None:
    source = Path(shutil.copytree(store.folder.path(), make_run("baseline").root / "store"))
    run = make_run("baseline", source=str(source))
    run.finish("length=2 epochs")
    left = run.left()
    assert left["progress"]["step"] == 8

    before = contents(run)
    run.finish("length=2 epochs")  # nothing is trained, measured or written
    assert (run.root / "log").read_text().count("tiny: retrieval on") == 2
    assert contents(run) == before

    assert "exists with another config (seed: 3 -> 4)" in refused(run, "length=2 epochs", "seed=4")
    assert "length may only grow" in refused(run, "length=1 epochs")
    assert "length may only grow" in refused(run, "length=20 steps")

    # longer, but killed before it has saved anything new: the old end must not be taken for the new one
    program = run.start(kill_at_write=4)
    assert program.wait() == -signal.SIGKILL
    assert Config.model_validate(yaml.safe_load(run.folder.read("config.yaml"))).length.value == 3
    run.finish()
    longer, expected = run.left(), dict(references["baseline"].left)
    extra = [line for line in longer["lines"] if line["kind"] == "test" and line["step"] == 8]
    assert len(extra) == 1  # the figures of the shorter run stay in the log
    longer["lines"].remove(extra[0])
    for name in ("last", "best", "progress", "lines"):
        same(longer[name], expected[name])
    assert longer["summary"]["changed_while_running"] == ["length"] and not longer["summary"]["reproducible"]
    assert longer["summary"]["final"] == expected["summary"]["final"]

    shutil.rmtree(source)
    write_tiny_store(source.parent, seed=1)  # the same place, other images
    assert "was trained on a dataset of fingerprint" in refused(run, "length=5 epochs")


def test_runtime_keys_may_change_and_are_recorded(make_run: MakeRun, references: dict[str, Reference]) -> None:
    run = make_run("baseline")
    program = run.start()
    assert kill_after_lines(run, program, 9, 0)
    program.wait()
    run.finish("checkpoint.keep=1", "evaluation.batch_size=7")
    assert "changed: checkpoint.keep: 2 -> 1" in program.output()
    left, expected = run.left(), references["baseline"].left
    same(left["last"], expected["last"])
    assert left["summary"]["reproducible"] and left["summary"]["changed_while_running"] == []
    changes = json.loads(run.folder.read("changes.jsonl"))
    assert changes["changes"] == ["checkpoint.keep: 2 -> 1", "evaluation.batch_size: 16 -> 7"] and changes["step"] > 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    make_run: MakeRun, references: dict[str, Reference]
) -> None:
    run = make_run("baseline")
    program = run.start(kill_at_write=references["baseline"].write_of("summary.json"))
    assert program.wait() == -signal.SIGKILL
    newest = Path(run.folder.path("checkpoints")) / "step-00000012"
    (newest / "trunk.safetensors").write_bytes(b"damaged")
    assert "step-00000012/trunk.safetensors is damaged" in refused(run)
    shutil.rmtree(newest)
    run.finish()
    assert "resumed at step 10" in program.output()
    same(run.left(), references["baseline"].left)


def test_an_older_process_of_the_same_run_stops(make_run: MakeRun, references: dict[str, Reference]) -> None:
    run = make_run("baseline")
    older = run.start()
    assert kill_after_lines(run, older, 5, 0, signal.SIGSTOP)
    newer = Program(run.arguments(), str(run.root / "newer"))
    assert newer.wait() == 0, newer.output()
    older.signal(signal.SIGCONT)
    assert older.wait() == 1
    assert "error: another process (attempt 2) now owns the run" in older.output()
    expected = references["baseline"].left
    for name in ("last", "best", "progress", "summary"):
        same(run.left()[name], expected[name])


# ---- another number of ranks ----------------------------------------------------------------------------------------


class StopAt(RunStatus):
    """Asks for a stop once the worker has done so many steps."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step, self.done = step, 0

    def publish(self, progress: dict[str, Any]) -> None:
        self.done = progress.get("step", self.done)

    def stop_requested(self) -> bool:
        return self.done >= self.step


def train_until(rank: int, world: int, values: dict[str, Any], shares: tuple[int, ...], step: float) -> Seen:
    with registered():
        config = Config.model_validate(values)
        worker = make_worker(config, rank, shares, StopAt(step))
        worker()
        metrics = [line for line in read_metrics(run_folder(config)) if line["kind"] in ("validation", "test")]
        return Seen([], {}, state(worker), metrics)


@pytest.mark.parametrize("method", ["two_optimizers", "swept_plan", "gca_hng"])
def test_the_number_of_ranks_may_change(pool: Pool, store: Store, tmp_path: Path, method: str) -> None:
    """One rank to step 3, two to step 7, three to the end: within an epoch each, and stored plans among them."""
    changes = {"length": "3 epochs", "evaluation.checkpoint": "last", **METHODS_TRIED[method]}
    values = tiny_values(str(tmp_path), store.folder.uri, changes)
    expected = pool(train_until, 1, values | {"name": "one"}, (1,), torch.inf)[0]
    pool(train_until, 1, values, (1,), 3)
    pool(train_until, 2, values, (7, 5), 7)
    got = pool(train_until, 3, values, (6, 6, 0), torch.inf)
    check(got, expected, zero_gradient(method, "sync"))


# ---- the long matrix ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_matrix_of_kills(
    make_run: MakeRun, references: dict[str, Reference], capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills at every third file write, and chains of kills at random moments; every run has to end alike."""
    rows = ["| method | killed | kills | resumed and equal |", "|---|---|---:|---|"]
    total = 0
    for seed, method in enumerate(METHODS_TRIED):
        expected = references[method] if method in references else uninterrupted(make_run, method)

        def kill_at(write: int, method: str = method, expected: Reference = expected) -> None:
            run = make_run(method)
            program = run.start(kill_at_write=write, after=bool(write % 2))
            assert program.wait() == -signal.SIGKILL, program.output()
            run.finish()
            same(run.left(), expected.left)

        points = range(seed, len(expected.writes), 3)
        side_by_side(kill_at, [(write,) for write in points])
        where = f"just before or after every third of {len(expected.writes)} file writes"
        rows.append(f"| {method} | {where} | {len(points)} | yes |")
        total += len(points)
        for chain in range(3):
            run = make_run(method)
            killed_at = kill_often(run, 10 * seed + chain, kills=5, first=1, total=len(expected.left["lines"]))
            same(run.left(), expected.left)
            moments = ", ".join(map(str, killed_at))
            rows.append(f"| {method} | one run, when its log had {moments} lines | {len(killed_at)} | yes |")
            total += len(killed_at)
    assert total >= 20
    text = "\n".join(rows)
    with capsys.disabled():
        print(f"\n{text}\n{total} kills")
    if os.environ.get("RAYDML_WRITE_DOCS") == "1":
        head = (
            f"# {total} kills\n\nRuns of the tiny test dataset in real processes, killed with SIGKILL and started again with the same "
            "command, beside a run that\nwas left alone. Equal: `torch.equal` of every tensor of trunk, method and optimizers, of "
            "the last checkpoint and of the best;\nthe same metrics.jsonl and summary.json but for what is timed. Made by\n\n"
            "    RAYDML_WRITE_DOCS=1 make test-slow ARGS=tests/laws/test_resume.py\n\n"
        )
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "kill_matrix.md").write_text(f"{head}{text}\n")
