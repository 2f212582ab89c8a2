"""Frozen batch normalisations that convolutions do the work of: the same features and gradients, nothing folded that must not be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ModelConfig
from pipeline.distributed.collectives import Ranks
from pipeline.model.bn_folding import Folding
from pipeline.model.trunk import Trunk, build_trunk


def make(backbone: str, batch_norm: str = "frozen", pooling: str = "avg") -> tuple[Trunk, Tensor]:
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, weights="none", pooling=pooling, batch_norm=batch_norm)  # type: ignore[arg-type]
    trunk = build_trunk(config, 32).double()
    for name, value in trunk.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.add_(0.3 * torch.rand(value.shape, dtype=value.dtype) * (1 if "running_var" in name else 0.5))
    trunk.set_mode(True, Ranks())
    return trunk, torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)


def learn(trunk: Trunk, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Features, and a gradient of all parameters."""
    trunk.zero_grad()
    features = trunk(pixels)
    (features.square().sum() + features.sum()).backward()
    return features.detach(), {n: p.grad.clone() for n, p in trunk.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "backbone",
    ["test_efficientnet", "tf_efficientnet_lite0", "bn_inception", "torchvision/googlenet", "torchvision/resnet18", "test_vit"],
)  # fmt: skip
def test_features_and_gradients_are_the_same(backbone: str) -> None:
    trunk, pixels = make(backbone, pooling="native" if backbone == "test_vit" else "avg")
    norms = [m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    assert trunk.folding is not None and {id(n) for _, n in trunk.folding.pairs} == {id(n) for n in norms}
    assert bool(norms) == (backbone != "test_vit")
    features, gradients = learn(trunk, pixels)
    trunk.folding.pairs = []
    plain, wanted = learn(trunk, pixels)
    torch.testing.assert_close(features, plain, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-8, atol=1e-9 * float(gradient.abs().max()) + 1e-12
        )


def normalisations_run(trunk: Trunk, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many batch normalisations torch computes in a pass."""
    count = 0
    original = torch.batch_norm

    def counting(*args: object, **kwargs: object) -> Tensor:
        nonlocal count
        count += 1
        return original(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(torch, "batch_norm", counting)
        trunk(pixels)
    return count


def test_only_frozen_ones_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen: always. Others: while evaluating, and never while they learn statistics."""
    trunk, pixels = make("test_efficientnet")
    assert normalisations_run(trunk, pixels, monkeypatch) == 0
    trunk, pixels = make("test_efficientnet", batch_norm="local")
    before = trunk.backbone.bn1.running_mean.clone()  # type: ignore[union-attr, operator]
    assert normalisations_run(trunk, pixels, monkeypatch) == 13
    assert not torch.equal(before, trunk.backbone.bn1.running_mean)  # type: ignore[union-attr, arg-type]
    trunk.set_mode(False, Ranks())
    assert normalisations_run(trunk, pixels, monkeypatch) == 0


def test_parameters_of_the_moment_are_folded() -> None:
    """After an optimizer step, and under other parameters (functional_call)."""
    trunk, pixels = make("test_efficientnet")
    assert trunk.folding is not None
    moved = {n: p.detach() * 1.1 + 0.01 for n, p in trunk.named_parameters()}
    elsewhere = torch.func.functional_call(trunk, moved, (pixels,))
    before = trunk(pixels)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            p.copy_(moved[name])
    after = trunk(pixels)
    torch.testing.assert_close(after, elsewhere)
    assert float((after - before).detach().norm()) > 1e-3
    trunk.folding.pairs = []
    torch.testing.assert_close(after, trunk(pixels), rtol=1e-10, atol=1e-10)


class Branching(nn.Module):
    """A convolution whose output is used beside its normalisation, too: it cannot be folded."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.branch = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (F.relu(self.bn(y)) + (y if self.branch else 0)).mean((2, 3))


@pytest.mark.parametrize("branch", [True, False])
def test_what_cannot_be_folded_is_left_alone(branch: bool) -> None:
    torch.manual_seed(0)
    net = Branching(branch).eval()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    folding = Folding(net, torch.zeros(1, 3, 8, 8))
    assert folding.pairs == ([] if branch else [(net.conv, net.bn)])
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    x = torch.randn(2, 3, 8, 8)
    plain = net(x)
    with folding():
        torch.testing.assert_close(net(x), plain)
