"""Losses, miners and metrics against pytorch-metric-learning, for `python -m benchmarks.peers`: one thread, equal results first.

losses      of the library, through the method `baseline` and called directly: forward and backward of a batch
default     its AccuracyCalculator as it stands (`k=None`: every query ranks the whole gallery), and with "max_bin_count"
memory      its peak memory at the size of Stanford Online Products, 64 dimensions, in a process of its own
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from benchmarks.alternate import alternate, as_it_comes, rows_of
from benchmarks.evaluation import THEIR_NAMES, clustered, in_fresh_process, peak_mib, product_sizes
from benchmarks.table import Row
from methods.base import Context
from methods.baseline import Baseline, BaselineConfig
from methods.functional import global_generators
from pipeline.evaluation.retrieval import retrieve

MOST = 1.05
DIM = 128
CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "MultiSimilarityLoss": ({}, None),
    "ContrastiveLoss": ({}, None),
    "TripletMarginLoss": ({}, None),
    "MultiSimilarityLoss, MultiSimilarityMiner": ({}, "MultiSimilarityMiner"),
    "TripletMarginLoss, BatchHardMiner": ({}, "BatchHardMiner"),
    "TripletMarginLoss, DistanceWeightedMiner": ({}, "DistanceWeightedMiner"),
}


def loss_rows(rounds: int = 15) -> list[Row]:
    rows = []
    context = cast(Context, SimpleNamespace(seed=0, clock=SimpleNamespace(step=5)))
    for batch in (128, 512):
        generator = torch.Generator().manual_seed(0)
        z = torch.nn.functional.normalize(torch.randn(batch, DIM, generator=generator))
        labels = torch.arange(batch) // 4
        for name, (arguments, miner_name) in CASES.items():
            if name == "TripletMarginLoss" and batch > 128:
                continue  # all triplets of 512 images take a second
            loss_name = name.partition(",")[0]
            method = Baseline(BaselineConfig(loss=loss_name, loss_args=arguments, miner=miner_name), 8, 2)
            loss = getattr(losses, loss_name)(**arguments)
            miner = None if miner_name is None else getattr(miners, miner_name)()

            def ours(method: Baseline = method, z: torch.Tensor = z, labels: torch.Tensor = labels) -> torch.Tensor:
                embeddings = z.clone().requires_grad_()
                method.loss(embeddings, labels, context).backward()
                assert embeddings.grad is not None
                return embeddings.grad

            def theirs(
                loss: Any = loss, miner: Any = miner, z: torch.Tensor = z, labels: torch.Tensor = labels
            ) -> torch.Tensor:
                embeddings = z.clone().requires_grad_()
                tuples = () if miner is None else (miner(embeddings, labels),)
                loss(embeddings, labels, *tuples).backward()
                assert embeddings.grad is not None
                return embeddings.grad

            with global_generators(0, 5):  # what `baseline` seeds with
                expected = theirs()
            if not torch.equal(ours(), expected):
                raise SystemExit(f"{name}: the gradients of the two sides differ")
            what = f"{name}, {batch} x {DIM}, through baseline / called directly"
            rows += rows_of(what, alternate(ours, theirs, rounds, least_s=0.1), MOST, 1e3, "ms")
    return rows


def default_rows(rounds: int = 5) -> list[Row]:
    """The three metrics on 4,000 x 512, against the library as it stands and as it is fastest."""
    embeddings, labels = clustered(np.full(1000, 4), dim=512, noise=2.4)
    rows = []
    for k, most in ((None, 0.1), ("max_bin_count", None)):
        calculator = AccuracyCalculator(include=tuple(THEIR_NAMES.values()), k=k, device=torch.device("cpu"))
        ours, theirs = retrieve(embeddings, labels).summary(), calculator.get_accuracy(embeddings, labels)
        for name, their_name in THEIR_NAMES.items():
            if abs(ours[name] - 100 * theirs[their_name]) > 1e-9:
                raise SystemExit(f"{name}: {ours[name]} here, {100 * theirs[their_name]} there")
        what = f"evaluation, 4,000 x 512 / pytorch-metric-learning, k={k}" + (", its default" if k is None else "")
        rounds_s = alternate(
            lambda: retrieve(embeddings, labels).summary(),
            lambda calculator=calculator: calculator.get_accuracy(embeddings, labels),  # type: ignore[misc]
            rounds,
        )
        rows += rows_of(what, rounds_s, most)
    return rows


def memory_rows() -> list[Row]:
    """Peak resident memory above the level after the imports; ours is the SOP row of benchmarks/evaluation.py."""
    ours = in_fresh_process("SOP")["retrieval MiB"]
    command = [sys.executable, "-c", "from benchmarks.metric_learning import their_memory; their_memory()"]
    theirs = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=as_it_comes()).stdout)
    what = "evaluation, 60,502 x 64, 11,316 classes / pytorch-metric-learning: peak MiB"
    return [Row(what, ours, theirs, ours / theirs, "<= 1536 MiB", ours <= 1536)]


def their_memory() -> None:
    """Prints the peak memory of their evaluation in this process, MiB, above the level before."""
    calculator = AccuracyCalculator(include=tuple(THEIR_NAMES.values()), k="max_bin_count", device=torch.device("cpu"))
    level = peak_mib(reset=True)
    embeddings, labels = clustered(product_sizes(), dim=64, noise=1.16)
    calculator.get_accuracy(embeddings, labels)
    print(peak_mib() - level)
