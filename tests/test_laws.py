"""The first two laws, with real processes: what a run computes does not depend on how many ranks compute it.

Every case trains the real loop on the tiny dataset in float64, on 2 or 3 ranks of a gloo group and in one process, and
compares every gradient just before every optimizer step, every parameter after five steps, and the measured figures.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import collectives, evaluation
from pipeline.board import Board
from pipeline.collectives import Ranks
from pipeline.config import Config
from pipeline.data.loader import Item, fetch
from pipeline.data.store import Samples, Store
from pipeline.evaluation import Task, evaluate
from pipeline.summary import run_folder
from pipeline.tracking import read_metrics
from pipeline.worker import Worker
from tests.pool import Pool
from tests.stubs import registered, tiny_config, tiny_values

TOLERANCE = 1e-9  # relative to the largest element of a tensor
EVEN, UNEVEN, EMPTY = ((6, 6), (4, 4, 4)), ((7, 5), (5, 4, 3)), ((12, 0), (6, 6, 0))


@dataclass(frozen=True)
class FixedRanks(Ranks):
    """Shares of a batch as told; of anything else, the same proportions."""

    shares: tuple[int, ...] = (1,)

    def slice(self, total: int, rank: int | None = None) -> slice:
        rank = self.rank if rank is None else rank
        bounds = [total * sum(self.shares[:i]) // sum(self.shares) for i in (rank, rank + 1)]
        return slice(*bounds)


# ---- one run, seen from inside --------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one rank of a run leaves.

    Attributes:
        gradients: of every optimizer step, by "trunk.NAME" or "method.NAME".
        before, after: all parameters and buffers of the untrained and the trained model.
        metrics: of every evaluation, the final one last.
    """

    gradients: list[dict[str, Tensor]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    metrics: list[dict[str, float]]


def make_worker(config: Config, rank: int, shares: tuple[int, ...]) -> Worker:
    ranks = FixedRanks(rank, len(shares), shares)
    return Worker(config, config.data.source, ranks, torch.device("cpu"), Board())


def state(worker: Worker) -> dict[str, Tensor]:
    parts = {"trunk": worker.trunk, "method": worker.method}
    return {f"{part}.{n}": v.detach().clone() for part, m in parts.items() for n, v in m.state_dict().items()}


def train(rank: int, world: int, values: dict[str, Any], shares: tuple[int, ...], break_it: str | None = None) -> Seen:
    """Runs the whole loop as one rank and watches it; `break_it` names a defect to put in first."""
    with registered(), broken(break_it):
        worker = make_worker(Config.model_validate(values), rank, shares)
        shake(worker)
        names = {id(p): f"trunk.{n}" for n, p in worker.trunk.named_parameters()}
        names |= {id(p): f"method.{n}" for n, p in worker.method.named_parameters()}
        gradients, step = [], worker.context.step

        def watched(optimizer: str) -> None:
            groups = worker.context.optimizers[optimizer].torch.param_groups
            found = {names[id(p)]: p.grad for group in groups for p in group["params"] if p.grad is not None}
            gradients.append({name: gradient.clone() for name, gradient in found.items()})
            step(optimizer)

        worker.context.step = watched  # type: ignore[method-assign]
        before = state(worker)
        worker()
        seen = [line for line in read_metrics(run_folder(worker.config)) if line["kind"] in ("frozen", "validation", "test")]
        return Seen(gradients, before, state(worker), seen)


def shake(worker: Worker) -> None:
    """Fresh networks start with zero biases and unit statistics: numbers that would hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in worker.trunk.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
                value.add_(0.2 * noise if "running_var" in name else 0.4 * noise - 0.2)


@contextlib.contextmanager
def broken(defect: str | None) -> Iterator[None]:
    """Puts one of the classic mistakes of distributed training into the program, for the tests that have to notice it."""
    gather, total = collectives._Gather, collectives._Sum
    kept = gather.backward, total.backward

    def unreduced(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.start : ctx.start + ctx.count], None, None

    def scaled(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return 2 * kept[0](ctx, grad)[0], None, None

    if defect == "gather: no sum over ranks":
        gather.backward = staticmethod(unreduced)  # type: ignore[assignment]
    elif defect == "gather: gradient twice as large":
        gather.backward = staticmethod(scaled)  # type: ignore[assignment]
    elif defect == "batch norm: gradient of the own images' statistics only":
        total.backward = staticmethod(lambda ctx, grad: grad)  # type: ignore[assignment]
    try:
        yield
    finally:
        gather.backward, total.backward = (staticmethod(f) for f in kept)  # type: ignore[assignment]


# ---- law 1: every gradient, every parameter, every figure -----------------------------------------------------------

METHOD_CASES: dict[str, dict[str, Any]] = {
    "multi_similarity": {"method.loss": "MultiSimilarityLoss"},
    "proxies": {"method.loss": "ProxyAnchorLoss", "method.optimizer.loss_lr_multiplier": 10},
    "miner": {"method.loss": "TripletMarginLoss", "method.miner": "TripletMarginMiner"},
    "random_miner": {"method.loss": "TripletMarginLoss", "method.miner": "DistanceWeightedMiner"},
    "two_optimizers": {"method.name": "two_optimizers"},
    "swept_plan": {"method.name": "swept_plan", "method.load_best_at": 1},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {  # SGD shows a wrong scale of the gradient in the parameters, AdamW hides it
    "sgd": {"method.optimizer.name": "sgd", "method.optimizer.lr": 0.1, "method.optimizer.momentum": 0.9},
    "adamw": {"method.optimizer.name": "adamw", "method.optimizer.lr": 0.003, "method.optimizer.weight_decay": 0.01},
}
# Zero by construction: a constant added before a 1×1 convolution whose batch normalisation subtracts the mean again.
ZERO_GRADIENT = {
    "sync": {f"trunk.backbone.blocks.{layer}.bias" for layer in ("2.0.bn2", "3.0.bn3", "4.0.bn3")},
    "frozen": set(),
}


def case(method: str, optimizer: str, batch_norm: str) -> dict[str, Any]:
    return {
        "length": "5 steps",
        "evaluation.every": "2 steps",
        "model.batch_norm": batch_norm,
        **METHOD_CASES[method],
        **OPTIMIZERS[optimizer],
    }


class Runs:
    """Trains cases on the pool; one process once for all the comparisons with it."""

    def __init__(self, pool: Pool, store: str, root: str) -> None:
        self.pool, self.store, self.root = pool, store, root
        self.single = functools.cache(lambda *key: self(*key, (12,))[0])

    def __call__(self, method: str, optimizer: str, batch_norm: str, shares: tuple[int, ...], defect: str | None = None) -> list[Seen]:
        name = "-".join([method, optimizer, batch_norm, *map(str, shares), str(defect is not None)])
        values = tiny_values(self.root, self.store, {"name": name, **case(method, optimizer, batch_norm)})
        return self.pool(train, len(shares), values, shares, defect)


@pytest.fixture(scope="module")
def runs(pool: Pool, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(pool, store.folder.uri, str(tmp_path_factory.mktemp("runs")))


def error(got: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest difference, relative to the largest element expected."""
    scale = float(expected.abs().max()) if scale is None else scale
    return float((got - expected).abs().max()) / (scale or 1.0)


def check(got: list[Seen], expected: Seen, zero: set[str]) -> None:
    first = got[0]
    assert len(first.gradients) == len(expected.gradients)
    for found, wanted in zip(first.gradients, expected.gradients, strict=True):
        assert found.keys() == wanted.keys()
        errors = {n: error(found[n], wanted[n], 1e-3 if n in zero else None) for n in wanted}
        assert max(errors.values()) <= TOLERANCE, max(errors, key=errors.__getitem__)
    errors = {n: error(first.after[n].double(), v.double()) for n, v in expected.after.items()}
    assert max(errors.values()) <= TOLERANCE, max(errors, key=errors.__getitem__)
    for line, wanted_line in zip(first.metrics, expected.metrics, strict=True):
        assert line.pop("kind") == wanted_line["kind"]
        assert line == pytest.approx({n: v for n, v in wanted_line.items() if n != "kind"}, rel=TOLERANCE, abs=TOLERANCE)
    for other in got[1:]:  # heads and trunks are the same on all ranks, without a word between them
        assert all(torch.equal(other.after[n], v) for n, v in first.after.items())


def moved(seen: Seen) -> dict[str, float]:
    return {n: error(v.double(), seen.before[n].double()) for n, v in seen.after.items()}


@pytest.mark.parametrize("shares", [s for group in (EVEN, UNEVEN, EMPTY) for s in group], ids=lambda s: "+".join(map(str, s)))
@pytest.mark.parametrize("method", METHOD_CASES)
def test_any_shares_train_the_same(runs: Runs, method: str, shares: tuple[int, ...]) -> None:
    check(runs(method, "sgd", "sync", shares), runs.single(method, "sgd", "sync"), ZERO_GRADIENT["sync"])


@pytest.mark.parametrize(("optimizer", "batch_norm"), [("adamw", "sync"), ("adamw", "frozen"), ("sgd", "frozen")])
@pytest.mark.parametrize("method", METHOD_CASES)
def test_any_optimizer_and_normalisation_train_the_same(runs: Runs, method: str, optimizer: str, batch_norm: str) -> None:
    shares = (7, 5) if batch_norm == "sync" else (5, 4, 3)
    check(runs(method, optimizer, batch_norm, shares), runs.single(method, optimizer, batch_norm), ZERO_GRADIENT[batch_norm])


@pytest.mark.parametrize("batch_norm", ["sync", "frozen"])
@pytest.mark.parametrize("method", METHOD_CASES)
def test_the_comparison_means_something(runs: Runs, method: str, batch_norm: str) -> None:
    """Every gradient but the named ones is far from zero, and SGD moves every parameter far more than the tolerance."""
    seen = runs.single(method, "sgd", batch_norm)
    largest: dict[str, float] = {}
    for gradients in seen.gradients:
        for name, gradient in gradients.items():
            largest[name] = max(largest.get(name, 0.0), float(gradient.abs().max()))
    statistics = {n for n in seen.after if "running" in n or "num_batches" in n or "epochs_done" in n}
    assert set(largest) == set(seen.after) - statistics  # every parameter has a gradient
    assert {name for name, value in largest.items() if value < 1e-7} == ZERO_GRADIENT[batch_norm], largest
    assert max(largest[name] for name in ZERO_GRADIENT[batch_norm] | {""} if name) < 1e-12 if batch_norm == "sync" else True
    assert all(value > 1e-5 for name, value in moved(seen).items() if name in set(largest) - ZERO_GRADIENT[batch_norm])


@pytest.mark.parametrize(
    "defect",
    [
        "gather: no sum over ranks",
        "gather: gradient twice as large",
        "batch norm: gradient of the own images' statistics only",
    ],
)
def test_a_wrong_gradient_would_be_seen(runs: Runs, defect: str) -> None:
    """With SGD, in the parameters alone, by orders of magnitude."""
    expected = runs.single("multi_similarity", "sgd", "sync")
    got = runs("multi_similarity", "sgd", "sync", (7, 5), defect)
    wrong = {n: error(got[0].after[n].double(), v.double()) for n, v in expected.after.items() if n.startswith("trunk.")}
    assert max(wrong.values()) > 1e-4 > 1e5 * TOLERANCE
    with pytest.raises(AssertionError):
        check(got, expected, ZERO_GRADIENT["sync"])
