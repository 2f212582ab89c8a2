"""GCA-HNG: its phases in a step, its config."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from methods.config import Clock
from methods.gca_hng import GcaHng, GcaHngConfig
from tests.methods.context import FakeContext, make_batch

# ---- the iteration ---------------------------------------------------------------------------------------------------


def make(**changes: Any) -> GcaHng:
    torch.manual_seed(0)
    values = {
        "classes_per_batch": 3,
        "samples_per_class": 2,
        "embedding_dim": 8,
        "heads": 2,
        "warmup": "0 epochs",
        **changes,
    }
    return GcaHng(GcaHngConfig(**values), 5, 4).double()


LABELS = [0, 0, 2, 2, 3, 3]


def test_running_means_are_replaced_at_the_end_of_an_epoch() -> None:
    method = make()
    context = FakeContext(method, features=torch.randn(6, 5, dtype=torch.float64))
    logs = [method.training_step(make_batch(LABELS), context) for _ in range(3)]
    assert float(method.metric_mean) == 1e6 and float(method.generator_mean) == 1e6
    method.on_epoch_end(0, context, None)
    assert float(method.metric_mean) == pytest.approx(np.mean([line["metric"] for line in logs]))
    assert float(method.generator_mean) == pytest.approx(np.mean([max(line["generator"], 1e-6) for line in logs]))
    assert not method.sums.any()
    assert {"metric_mean", "generator_mean", "sums", "iterations"} <= set(method.state_dict())


def test_the_classifier_learns_from_phase_b_alone() -> None:
    """What phase C's loss would send to the classifier is not waiting for its next step."""
    method = make()
    context = FakeContext(method, features=torch.randn(6, 5, dtype=torch.float64))
    method.training_step(make_batch(LABELS), context)
    assert all(p.grad is None for p in method.parameters())
    seen = dict(context.seen)
    method.zero_grad()
    assert set(seen) == {"main", "graph", "classifier"}


@pytest.mark.parametrize("keep", [True, False])
def test_zero_gradients(keep: bool) -> None:
    """With them, parameters a phase does not use decay and keep their momentum; from the second graph step on."""
    method = make(zero_gradients=keep)
    context = FakeContext(method, features=torch.randn(6, 5, dtype=torch.float64))
    for _ in range(2):
        method.training_step(make_batch(LABELS), context)
    graph = [found for name, found in context.seen if name == "graph"]
    unused = [
        "graph.lambda_head.weight",
        "graph.classifier.weight",
        "graph.lambda_head.weight",
        "graph.classifier.weight",
    ]
    given = [found[name] is not None for found, name in zip(graph, unused, strict=True)]
    assert given == ([False, True, True, True] if keep else [False] * 4)


def test_warm_up_leaves_the_trunk_alone() -> None:
    method, trunk = make(warmup="1 epochs"), nn.Linear(3, 5).double()
    context = FakeContext(method, trunk)
    x = torch.randn(6, 3, dtype=torch.float64)
    context.encode = lambda role=None: trunk(x)  # type: ignore[method-assign]
    before = trunk.weight.detach().clone()
    head = method.head.linear.weight.detach().clone()
    context.clock = Clock(3, 0.9)
    method.training_step(make_batch(LABELS), context)
    assert torch.equal(trunk.weight, before) and not torch.equal(method.head.linear.weight, head)
    context.clock = Clock(4, 1.0)
    method.training_step(make_batch(LABELS), context)
    assert not torch.equal(trunk.weight, before)


@pytest.mark.parametrize(("changes", "optimizers"), [({"generate": False}, {"main"}), ({"base_loss": "proxy_anchor"}, {"main", "graph", "classifier"})])  # fmt: skip
def test_variants(changes: dict[str, Any], optimizers: set[str]) -> None:
    method = make(**changes)
    context = FakeContext(method, features=torch.randn(6, 5, dtype=torch.float64))
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    method.training_step(make_batch(LABELS), context)
    assert {name for name, _ in context.seen} == optimizers
    moved = {n for n, p in method.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n, p in method.named_parameters() if p.requires_grad}
    method.eval()
    torch.testing.assert_close(method.embed(torch.randn(3, 5, dtype=torch.float64)).norm(dim=1), torch.ones(3).double())


DEGENERATE = {
    "an image twice": lambda x: torch.cat([x[:1], x[:1], x[2:]]),
    "the same image in every slot": lambda x: x[:1].expand(6, 5),
    "the same image in two classes": lambda x: torch.cat([x[:2], x[:2], x[4:]]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_are_finite(case: str, dtype: torch.dtype) -> None:
    method = make().to(dtype)
    method.metric_mean, method.generator_mean = method.metric_mean.double(), method.generator_mean.double()
    context = FakeContext(method, features=DEGENERATE[case](torch.randn(6, 5, dtype=dtype)))
    context.dtype = dtype
    method.training_step(make_batch(LABELS), context)
    for _, found in context.seen:
        assert all(torch.isfinite(g).all() for g in found.values() if g is not None)


def test_a_nan_image_is_not_hidden() -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    x[1, 2] = torch.nan
    method = make()
    with pytest.raises(AssertionError, match="not finite"):
        method.training_step(make_batch(LABELS), FakeContext(method, features=x))


def test_a_batch_of_another_layout_is_refused() -> None:
    method = make()
    context = FakeContext(method, features=torch.randn(6, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="every 2 slots have to be of one class"):
        method.training_step(make_batch([0, 1, 0, 1, 2, 2]), context)
