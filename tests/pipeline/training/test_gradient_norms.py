"""The norm of each optimizer's gradient in the lines of a run, and the time that counts as training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.runs.run_folder import run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.testing.tiny import tiny_values
from pipeline.testing.watched_run import make_worker, state
from tests.pool import Pool


def test_norms_are_of_the_gradient_before_clipping_where_a_line_is_logged(make_config: Callable[..., Config]) -> None:
    changes = {"length": "4 steps", "runtime.log_every": 2, "method.optimizer.clip_norm": 1e-3}
    config = make_config(changes)
    worker = make_worker(config, 0, (1,))
    (optimizer,) = worker.context.optimizers.values()
    parameters = [p for group in optimizer.inner.param_groups for p in group["params"]]
    norms, step = [], optimizer.step

    def watched(*args: Any) -> None:
        norms.append(float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()))
        step(*args)

    optimizer.step = watched  # type: ignore[method-assign]
    worker()
    lines = [line for line in read_metrics(run_folder(config)) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 4]
    for line in lines:
        torch.testing.assert_close(line["gradient/main"], norms[line["step"] - 1], rtol=1e-6, atol=0)
    assert min(norms) > 1e-2, "they are not of the clipped gradient"
    quiet = make_worker(make_config({**changes, "runtime.log_every": 100}, name="quiet"), 0, (1,))
    quiet()
    for name, value in state(quiet).items():
        assert torch.equal(value, state(worker)[name]), f"{name}: measuring changes the training"


def norms(rank: int, world: int, values: dict[str, Any], shares: tuple[int, ...]) -> dict[str, float]:
    worker = make_worker(Config.model_validate(values), rank, shares)
    worker()
    return {name: float(norm) for name, norm in worker.context.gradient_norms.items()}


def test_norms_do_not_depend_on_the_number_of_workers(pool: Pool, store: Store, tmp_path: Path) -> None:
    found = {}
    for shares in ((12,), (8, 4)):
        changes = {"name": f"on-{len(shares)}", "length": "2 steps"}
        values = tiny_values(str(tmp_path), store.folder.uri, changes)
        first, *others = pool(norms, len(shares), values, shares)
        found[len(shares)] = first["gradient/main"]
        assert others == [{}] * (len(shares) - 1), "they are computed where lines are logged"
    assert found[2] == pytest.approx(found[1], rel=1e-9)


def test_the_time_of_a_plan_counts_as_training(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mining over the whole set happens where an epoch's plan is made."""
    worker = make_worker(make_config({"length": "1 steps"}), 0, (1,))
    plan = worker.method.plan

    def slow(*args: Any) -> Any:
        time.sleep(3)
        return plan(*args)

    monkeypatch.setattr(worker.method, "plan", slow)
    worker()
    assert worker.progress.seconds > 3


def test_each_optimizer_has_its_own(make_config: Callable[..., Config]) -> None:
    config = make_config({
        "method": {"name": "gca_hng", "classes_per_batch": 4, "samples_per_class": 3, "embedding_dim": 8, "warmup": "0 epochs"},
        "length": "1 steps",
    })  # fmt: skip
    worker = make_worker(config, 0, (1,))
    worker()
    (line,) = [line for line in read_metrics(run_folder(config)) if line["kind"] == "train"]
    assert {name for name in line if name.startswith("gradient/")} == {
        f"gradient/{name}" for name in worker.context.optimizers
    }
