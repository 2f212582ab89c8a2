"""An average of weights (`model.ema`): its values, what is evaluated and kept, and a resume."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.run_status import RunStatus
from pipeline.evaluation.evaluate_task import evaluate
from pipeline.evaluation.tasks import validation_task
from pipeline.inference.load_model import load_model
from pipeline.inference.trained_model import load_run
from pipeline.runs.checkpoint import METHOD, TRAINING, TRUNK, Checkpoints
from pipeline.runs.run_folder import run_folder
from pipeline.runs.tracking import read_metrics
from pipeline.testing.watched_run import make_worker, state
from pipeline.training.start import record
from pipeline.training.weight_average import WeightAverage

Make = Callable[..., Config]
CHANGES = {"length": "6 steps", "model.ema": 0.8, "evaluation.every": "6 steps", "checkpoint.every": "2 steps"}


class StopAfter(RunStatus):
    """Asks for a stop once so many steps are done."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.done = steps, 0

    def publish(self, progress: dict[str, object]) -> None:
        self.done = int(str(progress.get("step", self.done)))

    def stop_requested(self) -> bool:
        return self.done >= self.steps


def tensors(config: Config, kind: str) -> dict[str, dict[str, Tensor]]:
    checkpoints = Checkpoints(run_folder(config))
    step = checkpoints.steps(kind)[-1]
    names = (TRUNK, METHOD, TRAINING) if kind == "checkpoints" else (TRUNK, METHOD)
    return {name: checkpoints.tensors(kind, step, name) for name in names}


@pytest.mark.parametrize("ema", [0.8, 1])
def test_the_average_is_kept_beside_what_is_trained_and_is_what_is_evaluated(
    ema: float, make_config: Make, store: Store
) -> None:
    config = make_config({**CHANGES, "model.ema": ema})
    worker = make_worker(config, 0, (1,))
    parameters = {f"trunk.{n}": p for n, p in worker.trunk.named_parameters()}
    average = {name: p.detach().clone() for name, p in parameters.items()}
    assert worker.average is not None
    worker.average.take()  # the worker's weights were moved after it was made
    update, count = worker.average.update, 0

    def by_hand(steps: int) -> None:
        nonlocal count
        count += 1
        assert steps == count
        decay = min(0.8, (1 + count) / (10 + count)) if ema < 1 else count / (count + 1)
        for name, parameter in parameters.items():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
        update(steps)

    worker.average.update = by_hand  # type: ignore[method-assign]
    worker()
    assert count == 6
    kept = tensors(config, "checkpoints")
    for name, value in average.items():
        torch.testing.assert_close(kept[TRUNK][name.removeprefix("trunk.")], value, rtol=1e-12, atol=1e-14)
    assert set(kept[TRAINING]) == set(parameters) | {f"method.{n}" for n, _ in worker.method.named_parameters()}
    moved = [float((kept[TRAINING][n] - average[n]).abs().max()) for n in parameters]
    assert max(moved) > 1e-4, "the newest weights are others"
    assert set(tensors(config, "best")) == {TRUNK, METHOD}

    record(config, run_folder(config), store, [])
    model = load_run(run_folder(config).uri, "last")
    embedder, trunk, method = model.load(store, torch.device("cpu"))
    task = validation_task(config, store)
    assert task is not None
    measured = evaluate(task, embedder, trunk, method, config.evaluation.recall_at).metrics
    (line,) = [line for line in read_metrics(run_folder(config)) if line["kind"] == "validation"]
    assert {name: line[name] for name in measured} == pytest.approx(measured, abs=1e-9)
    loaded = dict(load_model(run_folder(config).uri, "last").trunk.named_parameters())
    assert torch.equal(loaded["backbone.conv_stem.weight"].double(), kept[TRUNK]["backbone.conv_stem.weight"].double())


@pytest.mark.parametrize("ema", [0.8, 1])
def test_a_resumed_run_has_the_same_average(ema: float, make_config: Make) -> None:
    whole, cut = (make_config({**CHANGES, "model.ema": ema}, name=name) for name in ("whole", "cut"))
    worker = make_worker(whole, 0, (1,))
    worker()
    expected = state(worker)
    make_worker(cut, 0, (1,), StopAfter(3))()
    worker = make_worker(cut, 0, (1,))
    worker()
    for name, value in state(worker).items():
        assert torch.equal(value, expected[name]), name
    first, second = tensors(whole, "checkpoints"), tensors(cut, "checkpoints")
    for part, values in first.items():
        for name, value in values.items():
            assert torch.equal(value, second[part][name]), (part, name)


def test_a_block_has_the_average_and_gives_the_weights_back() -> None:
    trunk, method = nn.Linear(2, 2), nn.Linear(2, 1)
    before = trunk.weight.detach().clone()
    average = WeightAverage(trunk, method, 0.5)
    with torch.no_grad():
        trunk.weight += 1
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(trunk.weight, before)
        raise KeyError
    assert torch.equal(trunk.weight, before + 1)
    average.update(100)
    with average.applied():
        torch.testing.assert_close(trunk.weight.detach(), before + 0.5)
    mean = WeightAverage(trunk, method, 1.0)
    weights = [trunk.weight.detach().clone()]
    for step in (1, 2, 3):
        with torch.no_grad():
            trunk.weight += step
        weights.append(trunk.weight.detach().clone())
        mean.update(step)
    with mean.applied():
        torch.testing.assert_close(trunk.weight.detach(), torch.stack(weights).mean(0))
    with pytest.raises(RuntimeError, match="1 trained weights, the network has 4"):
        average.restore({"trunk.weight": before})
