"""The third law, with real processes: a run that is killed anywhere continues to the same weights, lines and figures.

Programs are runs of `pipeline.train.main` in processes of their own (tests.pool.Program); one test starts the command
itself. "Equal" is `torch.equal` of every tensor of trunk, method and optimizers, and the same metrics.jsonl and
summary.json but for what was timed.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load as load_safetensors

from methods import METHODS
from pipeline import train
from pipeline.board import Board
from pipeline.checkpoint import Checkpoints
from pipeline.collectives import Ranks
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.storage import Folder
from pipeline.summary import run_folder
from pipeline.tracking import read_metrics
from pipeline.worker import Worker
from tests.conftest import write_tiny_store
from tests.pool import Pool, Program
from tests.stubs import STUBS, registered, tiny_values

ROOT = Path(__file__).parents[2]
TIMED = {"images_per_second", "waiting", "seconds", "waiting_for_data"}
METHODS_TRIED: dict[str, dict[str, Any]] = {
    "baseline": {"method.loss": "TripletMarginLoss", "method.miner": "DistanceWeightedMiner"},
    "two_optimizers": {"method.name": "two_optimizers", "method.optimizer.schedule": {"kind": "cosine"}},
    "swept_plan": {"method.name": "swept_plan", "method.load_best_at": 2},
}


@dataclass
class Run:
    """One run folder and the command that makes it.

    Attributes:
        root: storage of this run alone.
        recipe: file.
    """

    root: Path
    recipe: Path

    @property
    def folder(self) -> Folder:
        return Folder(self.root / "runs" / "tiny")

    def arguments(self, *overrides: str) -> list[str]:
        wanted = ("runtime.workers=0", "runtime.loader=in_process", *overrides)
        return [str(self.recipe), *itertools.chain.from_iterable(("--set", o) for o in wanted)]

    def start(self, *overrides: str, kill_at_write: int | None = None, after: bool = False) -> Program:
        return Program(self.arguments(*overrides), str(self.root / "log"), kill_at_write, after)

    def finish(self, *overrides: str) -> None:
        program = self.start(*overrides)
        assert program.wait() == 0, program.output()

    def lines(self) -> int:
        path = Path(self.folder.path("metrics.jsonl"))
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def checkpoint(self, kind: str, step: int) -> dict[str, Any]:
        """Every tensor of a checkpoint, by file and name."""
        base = f"{kind}/step-{step:08d}"
        optimizers = torch.load(io.BytesIO(self.folder.read(f"{base}/optimizers.pt")), weights_only=True)
        parts = {n: load_safetensors(self.folder.read(f"{base}/{n}.safetensors")) for n in ("trunk", "method")}
        return parts | {"optimizers": optimizers}

    def left(self) -> dict[str, Any]:
        """All that two equal runs have in common."""
        latest = Checkpoints(self.folder).latest()
        assert latest is not None and latest.finished
        summary = self.folder.read_json("summary.json")
        return {
            "last": self.checkpoint("checkpoints", latest.step),
            "best": self.checkpoint("best", latest.best_step),
            "progress": {n: v for n, v in vars(latest).items() if n not in ("seconds", "waited_s")},
            "lines": [{n: v for n, v in line.items() if n not in TIMED} for line in read_metrics(self.folder)],
            "summary": {n: v for n, v in summary.items() if n not in TIMED},
        }


def same(a: Any, b: Any, where: str = "") -> None:
    """Compares nested values; tensors have to be equal bit by bit."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b), f"{where}: {a} {b}"
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}/{i}")
    else:
        assert a == b, where


MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def make_run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """`make_run("baseline", {"seed": 1})`: a run of 4 epochs, about 20 steps, that saves at steps 3, 6, 9, ..."""

    def make(method: str, changes: dict[str, Any] | None = None, source: str | None = None) -> Run:
        root = tmp_path_factory.mktemp(method)
        short = {"length": "4 epochs", "checkpoint": {"every": "3 steps", "keep": 2}}
        values = tiny_values(str(root), source or store.folder.uri, {**short, **METHODS_TRIED[method], **(changes or {})})
        del values["runtime"]["workers"], values["runtime"]["loader"]
        (root / "recipe.yaml").write_text(yaml.safe_dump(values))
        return Run(root, root / "recipe.yaml")

    return make


@pytest.fixture(scope="session")
def reference(make_run: MakeRun) -> Callable[..., dict[str, Any]]:
    """What the run of a method leaves that was never interrupted, and the names of the files it wrote, in order."""

    @functools.cache
    def uninterrupted(method: str, *overrides: str) -> dict[str, Any]:
        run = make_run(method)
        run.finish(*overrides)
        writes = Path(f"{run.root}/log.writes").read_text().splitlines()
        return {"left": run.left(), "writes": writes}

    return uninterrupted


def kill_after_lines(run: Run, program: Program, lines: int, delay_s: float, number: int = signal.SIGKILL) -> bool:
    """Sends a signal a moment after the run has written so many lines; False if it ended before."""
    while program.running():
        if run.lines() >= lines:
            time.sleep(delay_s)
            if program.running():
                program.signal(number)
                return True
        time.sleep(0.002)
    return False


def kill_often(run: Run, seed: int, kills: int, total: int) -> list[int]:
    """Kills a run at random moments, then lets it end; returns how many lines it had at each kill."""
    draw = random.Random(seed)
    killed_at = []
    for target in sorted(draw.sample(range(1, total), kills)):
        program = run.start()
        if kill_after_lines(run, program, target, draw.uniform(0, 0.06)):
            assert program.wait() == -signal.SIGKILL
            killed_at.append(run.lines())
        else:
            assert program.wait() == 0, program.output()
    run.finish()
    return killed_at


# ---- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "seed"), [("baseline", 1), ("two_optimizers", 2), ("swept_plan", 3)])
def test_killed_at_random_moments(make_run: MakeRun, reference: Callable[..., Any], method: str, seed: int) -> None:
    expected = reference(method)["left"]
    run = make_run(method)
    assert kill_often(run, seed, kills=3, total=len(expected["lines"]))
    same(run.left(), expected)


def test_the_command_itself_is_killed_and_run_again(make_run: MakeRun, reference: Callable[..., Any]) -> None:
    run = make_run("baseline")
    command = [sys.executable, "-m", "pipeline.train", *run.arguments()]
    common: dict[str, Any] = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True, "capture_output": True}
    first = subprocess.Popen(command, cwd=ROOT, env=common["env"], stderr=subprocess.DEVNULL)
    while first.poll() is None and run.lines() < 8:
        time.sleep(0.002)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    second = subprocess.run(command, timeout=300, **common)
    assert second.returncode == 0, second.stderr
    assert "resumed at step" in second.stderr and "retrieval on unseen classes" in second.stdout
    same(run.left(), reference("baseline")["left"])


def write_of(writes: list[str], name: str, which: int = 0) -> int:
    """Number of the write of a file whose name contains `name`: the first such, or of `which` place (-1: the last)."""
    return [i for i, written in enumerate(writes) if name in written][which]


@pytest.mark.parametrize(
    ("method", "name", "which", "after"),
    [
        ("swept_plan", "frozen", 0, True),
    ],
)
def test_killed_at_a_write(
    make_run: MakeRun, reference: Callable[..., Any], method: str, name: str, which: int, after: bool
) -> None:
    pass
