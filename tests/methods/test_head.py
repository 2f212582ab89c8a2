"""The head's layers, its start, and the methods that use it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from methods import METHODS
from methods.gca_hng import GcaHngConfig
from methods.head import Head, HeadConfig


def test_layer_norm_hidden_layers_and_length_one() -> None:
    head = Head(6, 4, HeadConfig(layer_norm=True, hidden=(5, 3)))
    x = torch.randn(7, 6)
    y = F.layer_norm(x, (6,))
    for layer in head.hidden:
        y = F.gelu(layer(y))
    torch.testing.assert_close(head.project(x), head.linear(y))
    torch.testing.assert_close(head(x), F.normalize(head.linear(y)))
    assert [tuple(layer.weight.shape) for layer in (*head.hidden, head.linear)] == [(5, 6), (3, 5), (4, 3)]


def test_orthogonal_start() -> None:
    head = Head(16, 4, HeadConfig(init="orthogonal"))
    torch.testing.assert_close(head.linear.weight @ head.linear.weight.T, torch.eye(4), rtol=1e-5, atol=1e-6)
    assert head.linear.bias.abs().max() == 0


def test_by_default_it_is_the_linear_layer_of_earlier_runs() -> None:
    torch.manual_seed(3)
    head = Head(6, 4)
    torch.manual_seed(3)
    linear = torch.nn.Linear(6, 4)
    assert set(head.state_dict()) == {"linear.weight", "linear.bias"} and torch.equal(head.linear.weight, linear.weight)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"gca_hng"}))
def test_every_method_takes_it(name: str) -> None:
    kind = METHODS[name]
    config = kind.Config(name=name, embedding_dim=4, head=HeadConfig(layer_norm=True, hidden=(5,)))
    names = set(dict(kind(config, 6, 3).head.named_parameters()))
    assert {"norm.weight", "hidden.0.weight", "linear.weight"} <= names


def test_a_method_with_a_head_of_its_own_refuses_it() -> None:
    with pytest.raises(ValidationError, match="head is for other methods"):
        GcaHngConfig(head=HeadConfig(layer_norm=True))
