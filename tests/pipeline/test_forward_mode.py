"""Forward-mode derivatives of trunks against those of a double backward pass and of plain `jvp`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.collectives import Ranks
from pipeline.forward_mode import derivative
from pipeline.model import ModelConfig, Trunk, build_trunk


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


def test_part_of_the_parameters() -> None:
    """Those that are not named stand still: of a kernel, of a normalisation, of neither."""
    trunk, pixels, direction = make("test_efficientnet")
    names = [n for n in direction if "conv" in n][:2] + [n for n in direction if "bn" in n][:3]
    some = {n: direction[n] for n in names}
    along = derivative(trunk, lambda t: t(pixels), some)[1]
    wanted = by_double_backward(trunk, pixels, some)
    torch.testing.assert_close(along, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    assert float(wanted.norm()) > 1e-6
