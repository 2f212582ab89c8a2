"""Passing a batch through the trunk in parts: random numbers, memory, the search for the largest part, bad settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import Config, ModelConfig
from pipeline.errors import UserError
from pipeline.model.cached_gradients import in_parts, largest_fitting
from pipeline.model.trunk import build_trunk
from pipeline.training.checks import checked_trunk

Make = Callable[..., Config]


def gradients(run: Callable[[Tensor], Tensor], network: nn.Module, pixels: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    features = run(pixels)
    torch.rand(3)  # of a method, between the passes
    (features**2).sum().backward()
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return [features.detach(), *found]


def test_dropout_draws_the_same_in_both_passes() -> None:
    """In the gradient, too: equal to that of a graph that was kept for the same parts."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 4), nn.Dropout(0.3)).double()
    pixels = torch.randn(10, 3, 2, 2, dtype=torch.float64)
    kept = gradients(lambda x: torch.cat([network(part) for part in x.split(4)]), network, pixels)
    again = gradients(lambda x: in_parts(network, x, 4), network, pixels)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert float((kept[0] == 0).double().mean()) > 0.1  # it does drop


def test_stochastic_depth_of_a_backbone_draws_the_same_in_both_passes() -> None:
    config = ModelConfig(
        backbone="vit_tiny_patch16_224", weights="none", backbone_args={"drop_path_rate": 0.5, "depth": 3}
    )
    trunk = build_trunk(config, 224).train()
    pixels = torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8)
    kept = gradients(lambda x: torch.cat([trunk(part) for part in x.split(2)]), trunk, pixels)
    again = gradients(lambda x: trunk(x, images_per_pass=2), trunk, pixels)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_activations_of_one_part_are_kept() -> None:
    """The largest number of elements that wait for the backward pass at once."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    pixels = torch.randn(64, 3, 2, 2)

    def kept(run: Callable[[Tensor], Tensor]) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
            run(pixels)
        return sum(sizes)

    whole, parts = kept(network), kept(lambda x: in_parts(network, x, 4))
    assert parts < whole / 10


def test_a_batch_of_one_pass_and_passes_without_gradients_are_plain() -> None:
    calls: list[int] = []

    def run(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return pixels.flatten(1).double()

    pixels = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8)
    assert torch.equal(in_parts(run, pixels, None), in_parts(run, pixels, 7)) and calls == [7, 7]
    with torch.no_grad():
        assert torch.equal(in_parts(run, pixels, 3), run(pixels)) and calls == [7, 7, 3, 3, 1, 7]
    assert in_parts(run, pixels[:0], 3).shape == (0, 12)


@pytest.mark.parametrize("room", [0, 1, 2, 31, 100, 4095, 4096, 10_000])
def test_the_largest_part_that_fits(room: int) -> None:
    asked: list[int] = []

    def fits(images: int) -> bool:
        asked.append(images)
        return images <= room

    found = largest_fitting(4096, fits)
    fitting = max(1, min(room, 4096))
    assert fitting * 0.875 - 1 <= found <= fitting
    assert len(asked) <= 14 and len(set(asked)) == len(asked)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.batch_norm": "sync"}, "runtime.images_per_pass is 4, but model.batch_norm is sync: statistics of a batch need all"),
        ({"model.batch_norm": "local"}, "but model.batch_norm is local"),
        ({"model.batch_norm": "frozen", "runtime.images_per_pass": "auto"}, "auto measures the memory of a GPU, runtime.gpus_per_worker is 0"),
    ],
)  # fmt: skip
def test_what_cannot_pass_in_parts_is_one_line(make_config: Make, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        checked_trunk(make_config({"runtime.images_per_pass": 4} | changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_trunk_without_batch_normalisation_takes_any_setting(make_config: Make) -> None:
    model = {
        "model.backbone": "vit_tiny_patch16_224",
        "model.backbone_args": {"img_size": 32, "depth": 1},
        "model.batch_norm": "sync",
    }
    assert checked_trunk(make_config(model | {"runtime.images_per_pass": 4, "data.transforms.size": 32})).features > 0
