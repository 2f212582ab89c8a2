"""A run seen from inside: every gradient before every optimizer step, every weight, every figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.run_status import RunStatus
from pipeline.runs.run_folder import run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.training.loop import Worker


@dataclass(frozen=True)
class FixedRanks(Ranks):
    """Shares of a batch as told; of anything else, the same proportions."""

    shares: tuple[int, ...] = (1,)

    def slice(self, total: int, rank: int | None = None) -> slice:
        rank = self.rank if rank is None else rank
        bounds = [total * sum(self.shares[:i]) // sum(self.shares) for i in (rank, rank + 1)]
        return slice(*bounds)


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


class StopAt(RunStatus):
    """A status that asks the run to stop after some steps."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def publish(self, progress: dict[str, Any]) -> None:
        super().publish(progress)
        if progress.get("step", 0) >= self.step:
            self.stop()


def make_worker(config: Config, rank: int, shares: tuple[int, ...], status: RunStatus | None = None) -> Worker:
    ranks = FixedRanks(rank, len(shares), shares)
    worker = Worker(config, config.data.source, ranks, torch.device("cpu"), status or RunStatus())
    shake(worker)
    return worker


def state(worker: Worker) -> dict[str, Tensor]:
    parts = {"trunk": worker.trunk, "method": worker.method}
    return {f"{part}.{n}": v.detach().clone() for part, m in parts.items() for n, v in m.state_dict().items()}


def watched(config: Config, rank: int, shares: tuple[int, ...], status: RunStatus | None = None) -> Seen:
    """Runs the whole loop as one rank of `len(shares)` and watches it."""
    worker = make_worker(config, rank, shares, status)
    names = {id(p): f"trunk.{n}" for n, p in worker.trunk.named_parameters()}
    names |= {id(p): f"method.{n}" for n, p in worker.method.named_parameters()}
    gradients, step = [], worker.context.step

    def watched_step(optimizer: str) -> None:
        groups = worker.context.optimizers[optimizer].inner.param_groups
        found = {names[id(p)]: p.grad for group in groups for p in group["params"] if p.grad is not None}
        gradients.append({name: gradient.clone() for name, gradient in found.items()})
        step(optimizer)

    worker.context.step = watched_step  # type: ignore[method-assign]
    before = state(worker)
    worker()
    seen = [
        line for line in read_metrics(run_folder(worker.config)) if line["kind"] in ("frozen", "validation", "test")
    ]
    return Seen(gradients, before, state(worker), seen)


def shake(worker: Worker) -> None:
    """Fresh networks start with zero biases and unit statistics: numbers that would hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in worker.trunk.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
                value.add_(0.2 * noise if "running_var" in name else 0.4 * noise - 0.2)


def error(got: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest difference, relative to the largest element expected."""
    scale = float(expected.abs().max()) if scale is None else scale
    return float((got - expected).abs().max()) / (scale or 1.0)
