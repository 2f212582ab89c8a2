"""`check_method` accepts a method that keeps the laws and says which law another one breaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from methods import Baseline, Method
from pipeline.errors import UserError
from pipeline.testing import check_method

pytestmark = pytest.mark.cluster


class Good(Method):
    def loss(self, embeddings: Any, labels: Any, context: Any) -> Any:
        same = labels[:, None] == labels[None]
        similarity = 4 * embeddings @ embeddings.T
        return nn.functional.softplus(torch.where(same, -similarity, similarity)).mean()


class DrawsGlobally(Good):
    def loss(self, embeddings: Any, labels: Any, context: Any) -> Any:
        return super().loss(embeddings, labels, context) * float(np.random.uniform(0.5, 1.5))


class Forgets(Good):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.mean = 1.0  # neither parameter nor buffer

    def loss(self, embeddings: Any, labels: Any, context: Any) -> Any:
        loss = super().loss(embeddings, labels, context)
        self.mean = 0.9 * self.mean + 0.1 * float(loss.detach())
        return loss / self.mean


class SumsByItself(Good):
    def loss(self, embeddings: Any, labels: Any, context: Any) -> Any:
        return super().loss(embeddings, labels, context) * (dist.get_world_size() if dist.is_initialized() else 1)


class SeesNothing(Good):
    def loss(self, embeddings: Any, labels: Any, context: Any) -> Any:
        return super().loss(self.embed(torch.ones(12, self.head.linear.in_features).double()), labels, context)


class Raises(Good):
    def loss(self, embeddings: Any, labels: Any, context: Any) -> Any:
        raise KeyError("margin")


def test_a_method_that_keeps_the_laws() -> None:
    check_method(Good, {"classes_per_batch": 3, "samples_per_class": 4}, model__batch_norm="frozen")


@pytest.mark.slow
def test_a_method_of_the_program_keeps_the_laws() -> None:
    check_method(Baseline, {"loss": "ProxyAnchorLoss"})


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (DrawsGlobally, "other weights .*random numbers that are not context.generator's|differs at optimizer step"),
        pytest.param(
            Forgets,
            "a run that was stopped and continued ends with other weights .*state outside of state_dict",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            SumsByItself,
            r"on 2 workers \(rank 0\) the gradient of .* differs at optimizer step 0",
            marks=pytest.mark.slow,
        ),
        pytest.param(SeesNothing, "no gradient reaches the trunk", marks=pytest.mark.slow),
        (Raises, "KeyError: 'margin'"),
    ],
)
def test_a_broken_law_is_named(method: type[Method], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check_method(method)


def test_what_cannot_be_checked_is_told() -> None:
    class Local(Good):
        pass

    with pytest.raises(AssertionError, match="define it at the top of a module"):
        check_method(Local)
    with pytest.raises(UserError, match=r"unknown key 'method\.margn'"):
        check_method(Good, {"margn": 1})
