"""Layers of backbones: which parts are trained when, at which rates, with which activations kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from methods.config import Clock
from methods.optim import OptimizerConfig, build_optimizer
from pipeline.config import Config, ModelConfig
from pipeline.errors import UserError
from pipeline.model.layers import TrainedParts, layers_of, prepare_training, set_rates
from pipeline.model.trunk import build_trunk
from pipeline.training.checks import checked_trunk

Make = Callable[..., Config]
VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "weights": "none",
    "backbone_args": {"depth": 4, "img_size": 32},
}


def backbone(**changes: Any) -> tuple[nn.Module, ModelConfig]:
    config = ModelConfig(**(VIT | changes))
    return build_trunk(config, 32).backbone, config


def trained(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_layers_of_a_vit_are_its_stem_and_its_blocks() -> None:
    net, _ = backbone()
    layers = layers_of(net)
    assert layers["pos_embed"] == layers["patch_embed.proj.weight"] == 0
    assert [layers[f"blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [1, 2, 3, 4] and layers["norm.weight"] == 4


def test_layers_of_any_other_network_are_its_modules_in_order() -> None:
    net = nn.Sequential()
    net.add_module(
        "features", nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    )
    net.add_module("last", nn.Linear(4, 2))
    layers = layers_of(net)
    assert set(layers) == {name for name, _ in net.named_parameters()}
    assert (
        list(dict.fromkeys(layers.values())) == [0, 1, 2, 3]
        and layers["last.weight"] == 3
        and layers["features.0.weight"] == 0
    )


def test_what_is_trained_follows_the_clock() -> None:
    net, config = backbone(trainable="last 2 blocks", head_first="3 steps", thaw_after="2 epochs")
    parts = TrainedParts(net, config)
    parts.set(Clock(2, 0.9))
    assert trained(net) == set()
    parts.set(Clock(3, 1.0))
    chosen = trained(net)
    assert {name.split(".")[0] for name in chosen} == {"blocks", "norm"}
    assert {name.split(".")[1] for name in chosen if name.startswith("blocks")} == {"2", "3"}
    parts.set(Clock(9, 2.0))
    assert trained(net) == {name for name, _ in net.named_parameters()}
    parts.set(Clock(4, 1.5))  # as after a resume
    assert trained(net) == chosen


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("all", None),
        ("None", set()),
        (["norm", "blocks.3.attn"], {"norm", "blocks.3.attn"}),
        ("cls_token", {"cls_token"}),
    ],
)
def test_names_of_what_is_trained(asked: Any, expected: set[str] | None) -> None:
    net, config = backbone(trainable=asked)
    TrainedParts(net, config).set(Clock())
    names = {name for name, _ in net.named_parameters()}
    wanted = names if expected is None else {n for n in names if any(n == e or n.startswith(f"{e}.") for e in expected)}
    assert trained(net) == wanted


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainable": "last 5 blocks"}, "model.trainable is 'last 5 blocks', vit_tiny_patch16_224 has 4 after its first layer"),
        ({"trainable": "blocks.3, blocks.9"}, "names 'blocks.9', which no parameter of vit_tiny_patch16_224 belongs to"),
        ({"backbone": "torchvision/resnet18", "backbone_args": {}, "activation_checkpointing": True}, "torchvision/resnet18 cannot do that (it has none)"),
    ],
)  # fmt: skip
def test_what_a_backbone_has_not_is_one_line(changes: dict[str, Any], says: str) -> None:
    net, config = backbone(**changes)
    with pytest.raises(UserError) as caught:
        prepare_training(net, config)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"thaw_after": "2 epochs"}, "nothing to thaw where trainable is all"),
        ({"trainable": "none", "head_first": "9 steps", "thaw_after": "5 steps"}, "thaw_after is 5 steps, before the end of head_first, 9 steps"),
    ],
)  # fmt: skip
def test_times_that_contradict_each_other(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ModelConfig(**changes)


def test_rates_fall_from_layer_to_layer() -> None:
    net, _ = backbone()
    set_rates(net, 0.5)
    head = nn.Linear(2, 2)
    config = OptimizerConfig(lr=1.0, head_lr_multiplier=3.0, weight_decay=0.1, decay_vectors=False)
    optimizer = build_optimizer(config, {"trunk": net.parameters(), "head": head.parameters()})
    groups = optimizer.inner.param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    names = dict(net.named_parameters())
    assert rates[id(names["blocks.3.mlp.fc1.weight"])] == (0.5, 0.1) and rates[id(names["blocks.0.mlp.fc1.bias"])] == (
        0.0625,
        0.0,
    )
    assert rates[id(names["patch_embed.proj.weight"])] == (0.03125, 0.1) and rates[id(names["norm.weight"])] == (
        0.5,
        0.0,
    )
    assert rates[id(head.weight)] == (3.0, 0.1) and rates[id(head.bias)] == (3.0, 0.0)
    assert (
        groups[0]["lr"] == 0.5 and len(rates) == len(names) + 2
    )  # the highest of the trunk, which is logged, comes first


def test_activations_of_blocks_are_computed_again() -> None:
    pixels = torch.randn(3, 3, 32, 32)

    def kept(net: nn.Module) -> tuple[int, list[torch.Tensor]]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
            output = net(pixels)
        output.square().sum().backward()
        return sum(sizes), [p.grad.clone() for p in net.parameters() if p.grad is not None]

    net, config = backbone(activation_checkpointing=True)
    net.train()
    whole, gradients = kept(net)
    net.zero_grad()
    prepare_training(net, config)
    parts, again = kept(net)
    assert parts < whole / 4
    for a, b in zip(gradients, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_reaches_the_blocks() -> None:
    net, _ = backbone(drop_path=0.3)
    rates = [module.drop_prob for module in net.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3) and min(rates) < 0.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.activation_checkpointing": True, "model.batch_norm": "sync"}, "which would count twice in the statistics of model.batch_norm: sync"),
        ({"model.compile": True, "method": {"name": "mmsi", "embedding_dim": 8, "meta_classes": 3}, "model.batch_norm": "frozen"}, "mmsi takes derivatives in forward mode"),
        ({"model.backbone": "vit_tiny_patch16_224", "data.transforms": {"size": 32, "evaluation_scale": 1.5}}, "cannot take images of 48×48 in evaluation"),
        ({"model.ema": 1, "model.batch_norm": "local"}, "its running statistics are those of the newest weights"),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other(make_config: Make, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        checked_trunk(make_config(changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)
