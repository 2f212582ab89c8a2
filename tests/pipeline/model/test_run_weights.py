"""`model.weights: RUN`: trunk and head of another run to start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.model.network import build_network
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import run_folder
from pipeline.testing.watched_run import make_worker
from pipeline.training.checks import checked_trunk
from pipeline.training.start import record

Make = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture
def trained(make_config: Make, store: Store) -> Config:
    """A run of 4 steps that was best at step 2."""
    config = make_config(
        {"length": "4 steps", "evaluation.every": "2 steps", "evaluation.checkpoint": "best"}, name="first"
    )
    worker = make_worker(config, 0, (1,))
    worker()
    record(config, run_folder(config), store, [])
    return config


def started(make_config: Make, trained: Config, **changes: Any) -> Config:
    return make_config({"seed": 9, "model.weights": run_folder(trained).uri, **changes}, name="second")


def test_trunk_and_head_come_along(make_config: Make, trained: Config) -> None:
    checkpoints = Checkpoints(run_folder(trained))
    step = checkpoints.steps("best")[-1]
    trunk, method = build_network(started(make_config, trained), 6, CPU)
    for name, value in checkpoints.tensors("best", step, "trunk.safetensors").items():
        assert torch.equal(trunk.state_dict()[name], value.float().double()), name
    head = {n: v for n, v in checkpoints.tensors("best", step, "method.safetensors").items() if n.startswith("head.")}
    assert head and all(torch.equal(method.state_dict()[n].float(), v.float()) for n, v in head.items())
    note = checked_trunk(started(make_config, trained)).weights_note
    assert note == f"weights of the best checkpoint of step {step} of run {run_folder(trained)}"


def test_the_trunk_alone(make_config: Make, trained: Config) -> None:
    fresh = build_network(make_config({"seed": 9, "method.embedding_dim": 5}), 6, CPU)[1]
    trunk, method = build_network(
        started(make_config, trained, **{"model.weights_of": "trunk", "method.embedding_dim": 5}), 6, CPU
    )
    assert method.head.linear.weight.shape[0] == 5 and method.head.linear.weight.shape == fresh.head.linear.weight.shape
    step = Checkpoints(run_folder(trained)).steps("best")[-1]
    kept = Checkpoints(run_folder(trained)).tensors("best", step, "trunk.safetensors")
    assert torch.equal(
        trunk.state_dict()["backbone.conv_stem.weight"], kept["backbone.conv_stem.weight"].float().double()
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"method.embedding_dim": 5},
            "set method.embedding_dim and method.head as there, or model.weights_of to trunk",
        ),
        ({"method.head": {"layer_norm": True}}, "this run's has linear.bias 8, linear.weight"),
        ({"model.backbone": "resnet18"}, "do not fit the backbone"),
        ({"model.weights": "no-such-run"}, "weights 'no-such-run': no such file or run"),
    ],
)
def test_what_does_not_fit_is_one_line(make_config: Make, trained: Config, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        checked_trunk(started(make_config, trained, **changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)
