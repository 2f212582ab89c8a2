"""Runs of `pipeline.train.main` in processes of their own: started, killed, compared.

"Equal" is `torch.equal` of every tensor of trunk, method and optimizers, and the same metrics.jsonl and summary.json but for
what was timed.
"""

from __future__ import annotations

import io
import itertools
import random
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.tracking import read_metrics
from pipeline.storage import Folder
from tests.laws.test_laws import TRIPLETS
from tests.pool import Program

TIMED = {"images_per_second", "waiting", "seconds", "validation_seconds", "waiting_for_data"} | {
    f"seconds/{n}" for n in ("sweep", "lists", "rule")
}
METHODS_TRIED: dict[str, dict[str, Any]] = {
    "baseline": {"method.loss": "TripletMarginLoss", "method.miner": "DistanceWeightedMiner"},
    "mined": {"method.hard_negatives": 3, "method.memory": 30},
    "two_optimizers": {"method.name": "two_optimizers", "method.optimizer.schedule": {"kind": "cosine"}},
    "swept_plan": {"method.name": "swept_plan", "method.load_best_at": 2},
    "osm_caa": {"method.name": "osm_caa", "method.mode": "caffe"},
    "intra_batch": {"method.name": "intra_batch", "method.sampler": "number", "method.reload_best": [1, 2]},
    "mmsi": {
        "method.name": "mmsi",
        "method.meta_classes": 3,
        "method.alpha": 4,
        "method.warmup_classes": 6,
        "method.memory_per_class": 4,
        "model.batch_norm": "frozen",
    },
    "smart_mining": TRIPLETS | {"method.random_epochs": 1, "method.triplets_per_batch": 8},
    "gca_hng": {
        "method.name": "gca_hng",
        "method.heads": 2,
        "method.layers": 1,
        "method.warmup": "1 epochs",
        "method.graph_optimizer": {
            "name": "sgd",
            "lr": 0.1,
        },  # AdamW makes steps of gradients that are zero but for rounding
    },
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
        checkpoints = Checkpoints(self.folder)
        latest = checkpoints.latest()
        assert latest is not None and latest.finished
        for step in checkpoints.steps():  # the best that any checkpoint refers to is there, should it be resumed from
            assert checkpoints.progress("checkpoints", step).best_step in [-1, *checkpoints.steps("best")]
        summary = self.folder.read_json("summary.json")
        return {
            "last": self.checkpoint("checkpoints", latest.step),
            "best": self.checkpoint("best", latest.best_step),
            "progress": {n: v for n, v in vars(latest).items() if n not in ("seconds", "waited_s", "validation_s")},
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


def side_by_side(work: Callable[..., None], cases: Iterable[tuple[Any, ...]]) -> None:
    """Works on all cases, two at a time, since each is a program of one thread; the first failure names its case."""
    with ThreadPoolExecutor(2) as threads:
        futures = {case: threads.submit(work, *case) for case in cases}
    for case, future in futures.items():
        try:
            future.result()
        except Exception as error:
            error.add_note(f"case: {case}")
            raise


@dataclass(frozen=True)
class Reference:
    """What a run leaves that was never interrupted, and the names of the files it wrote, in order."""

    left: dict[str, Any]
    writes: list[str]

    def write_of(self, name: str, which: int = 0) -> int:
        """Number of the write of a file whose path contains `name`: the first such, or another (-1: the last)."""
        return [i for i, written in enumerate(self.writes) if name in written][which]


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


def kill_often(run: Run, seed: int, kills: int, first: int, total: int) -> list[int]:
    """Kills a run at random moments, when its log has from `first` to `total` lines, then lets it end.

    Returns:
        how many lines it had at each kill; one fewer if a run ended before it was killed.
    """
    draw = random.Random(seed)
    killed_at = []
    for target in sorted(draw.sample(range(first, total), kills)):
        program = run.start()
        if kill_after_lines(run, program, target, draw.uniform(0, 0.06)):
            assert program.wait() == -signal.SIGKILL
            killed_at.append(run.lines())
        else:
            assert program.wait() == 0, program.output()
    run.finish()
    return killed_at
