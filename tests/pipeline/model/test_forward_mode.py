"""Forward-mode derivatives of trunks against those of a double backward pass and of plain `jvp`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from methods.baseline import Baseline, BaselineConfig
from methods.config import Clock, Length
from methods.plans import Plan
from pipeline.config import ModelConfig
from pipeline.data.store import Samples
from pipeline.distributed.collectives import Ranks
from pipeline.errors import RunError
from pipeline.evaluation.embedder import Embedder
from pipeline.model.forward_mode import Outputs, derivative
from pipeline.model.trunk import Trunk, build_trunk
from pipeline.training.context import RunContext


def make(backbone: str, pooling: str = "avg") -> tuple[Trunk, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    trunk = build_trunk(ModelConfig(backbone=backbone, weights="none", pooling=pooling), 32).double()  # type: ignore[arg-type]
    for name, value in trunk.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.add_(0.3 * torch.rand(value.shape, dtype=value.dtype) * (1 if "running_var" in name else 0.5))
    trunk.set_mode(True, Ranks())
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    return trunk, pixels, {n: 0.1 * torch.randn_like(p) for n, p in trunk.named_parameters() if p.requires_grad}


def by_double_backward(trunk: nn.Module, pixels: Tensor, direction: dict[str, Tensor]) -> Tensor:
    """J v as the derivative of Jᵀ w by w."""
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return _by_double_backward(trunk, pixels, direction)


def _by_double_backward(trunk: nn.Module, pixels: Tensor, direction: dict[str, Tensor]) -> Tensor:
    parameters = {n: p.detach().requires_grad_() for n, p in trunk.named_parameters() if n in direction}
    out = torch.func.functional_call(trunk, parameters, (pixels,))
    w = torch.zeros_like(out, requires_grad=True)
    back = torch.autograd.grad(out, list(parameters.values()), w, create_graph=True)
    return torch.autograd.grad(sum((g * direction[n]).sum() for n, g in zip(parameters, back, strict=True)), w)[0]


@pytest.mark.parametrize(
    ("backbone", "pooling"),
    [("test_efficientnet", "avg"), ("tf_efficientnet_lite0", "avg+max"), ("bn_inception", "max"), ("torchvision/googlenet", "avg"), ("test_vit", "native")],
)  # fmt: skip
def test_derivatives_of_trunks(backbone: str, pooling: str) -> None:
    trunk, pixels, direction = make(backbone, pooling)
    features, along = derivative(trunk, lambda t: t(pixels), direction)
    torch.testing.assert_close(features, trunk(pixels).detach(), rtol=1e-10, atol=1e-10)
    wanted = by_double_backward(trunk, pixels, direction)
    assert float(wanted.norm()) > 1e-3
    torch.testing.assert_close(along, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    assert not along.requires_grad and all(p.grad is None for p in trunk.parameters())
    check_known(trunk, pixels, direction, features, along)


def check_known(trunk: Trunk, pixels: Tensor, direction: dict[str, Tensor], features: Tensor, along: Tensor) -> None:
    """The same, image by image, from what an earlier pass gave; its graph stays as it was."""
    with Outputs() as outputs:
        learnt = trunk(pixels)
    for i in range(len(pixels)):
        some = slice(i, i + 1)
        found = derivative(trunk, lambda t, s=some: t(pixels[s]), direction, outputs.of(some))
        torch.testing.assert_close(found[0], features[some], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], along[some], rtol=1e-9, atol=1e-9 * float(along.abs().max()))
    parameters = [p for p in trunk.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(learnt.square().sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad(trunk(pixels).square().sum(), parameters, allow_unused=True)
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=0)


class Small(nn.Module):
    """Convolutions with what may follow them: clamps of each kind, in place and not, other functions in place, none."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.first, self.after, self.second = nn.Conv2d(3, 4, 3), after, nn.Conv2d(4, 5, 3, groups=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.first(x))
        return torch.tanh(self.second(x)).mean((2, 3))


AFTER = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-0.1, 0.2), nn.SiLU(inplace=True), nn.Identity(),
    nn.ZeroPad2d(1), nn.ConstantPad2d((0, 2, 1, 0), 0.5), nn.ReflectionPad2d(1),
]  # fmt: skip


@pytest.mark.parametrize("after", AFTER, ids=str)
@pytest.mark.parametrize("which", [["first.weight"], ["first.bias", "second.weight"], ["second.weight"], ["first.weight", "first.bias", "second.weight"]])  # fmt: skip
def test_known_outputs(after: nn.Module, which: list[str]) -> None:
    """Kernels alone, biases alone, all; whatever was overwritten since is computed anew."""
    torch.manual_seed(0)
    net, x = Small(after).double(), 3 * torch.randn(4, 3, 7, 7, dtype=torch.float64)
    direction = {n: torch.randn_like(p) for n, p in net.named_parameters() if n in which}
    with Outputs() as outputs:
        net(x)
    features, along = derivative(net, lambda t: t(x), direction)
    known = derivative(net, lambda t: t(x), direction, outputs.of(slice(0, 4)))
    torch.testing.assert_close(known, (features, along), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(along, by_double_backward(net, x, direction), rtol=1e-9, atol=1e-12)
    assert float(along.norm()) > 1e-3


def test_known_outputs_are_not_computed_again() -> None:
    torch.manual_seed(0)
    net, x = Small(nn.ReLU6(inplace=True)), torch.randn(4, 3, 7, 7)
    direction = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    with Outputs() as outputs:
        net(x)
    for known, wanted in ((outputs.of(slice(0, 4)), 3), (None, 6)):
        with torch.profiler.profile() as watched:
            derivative(net, lambda t: t(x), direction, known)
        # by kernel, and for the second by its input; torch's own: of both, by both, and the outputs
        assert sum(e.count for e in watched.key_averages() if e.key == "aten::_convolution") == wanted
    with pytest.raises(RuntimeError, match="not those of this pass"):
        derivative(net, lambda t: t(x), direction, outputs.of(slice(0, 3)))


def test_part_of_the_parameters() -> None:
    """Those that are not named stand still: of a kernel, of a normalisation, of neither."""
    trunk, pixels, direction = make("test_efficientnet")
    names = [n for n in direction if "conv" in n][:2] + [n for n in direction if "bn" in n][:3]
    some = {n: direction[n] for n in names}
    along = derivative(trunk, lambda t: t(pixels), some)[1]
    wanted = by_double_backward(trunk, pixels, some)
    torch.testing.assert_close(along, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    assert float(wanted.norm()) > 1e-6


class _Twice(nn.Module):
    """Writes over what it has used already."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv, self.inplace = nn.Conv2d(3, 4, 3), inplace

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        beside = out.sigmoid()
        return (beside + nn.functional.relu(out, inplace=self.inplace)).mean((2, 3))


@pytest.mark.parametrize("inplace", [False, True])
def test_outputs_that_do_not_fit_are_an_error(inplace: bool) -> None:
    """Of a network that overwrites an output after its first use; without that it is a network like any other."""
    trunk, _, _ = make("test_efficientnet")
    trunk.backbone, trunk.pool = _Twice(inplace), nn.Identity()
    samples = Samples(np.arange(2), np.zeros(2, np.int64), ("one",))
    context = RunContext(
        samples, 0, Length(value=1, unit="steps"), "float32", torch.device("cpu"), Ranks(), trunk.float(),
        Baseline(BaselineConfig(), 4, 2), Embedder.__new__(Embedder), lambda: None,
    )  # fmt: skip
    context.begin_step(Clock(), Plan(np.arange(2)[None], {}), 0, torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    features = context.encode(keep_for_jvp=True)
    direction = {n: torch.ones_like(p) for n, p in trunk.named_parameters()}
    if inplace:
        with pytest.raises(RunError, match=r"test_efficientnet gives different features .* Choose another"):
            context.jvp(None, direction)
    else:
        torch.testing.assert_close(context.jvp(None, direction)[0], features.detach())
