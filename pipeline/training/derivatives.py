"""Derivatives of a trunk on a batch that is split over the ranks, aside from the training step's own backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from methods.base import Gradient
from pipeline.distributed.collectives import Ranks, gather
from pipeline.errors import RunError
from pipeline.model.forward_mode import Outputs, derivative
from pipeline.model.network import trunk_features
from pipeline.model.trunk import Trunk

# Pixels of one forward-mode pass, beside the step's own graph in memory: 40 images of 128 × 128 pixels, 13 of 224 × 224.
_PIXELS_PER_PASS = 2_000_000


class RoleSlots(NamedTuple):
    """This rank's images among the slots of a role.

    Attributes:
        pixels: Pixels of the images.
        start: Position of the first one among these slots of all ranks.
        total: Number of these slots of all ranks.
    """

    pixels: Tensor
    start: int
    total: int


def trunk_gradient(
    trunk: Trunk,
    ranks: Ranks,
    precision: str,
    role_slots: RoleSlots,
    objective: Callable[[Tensor], Tensor],
    extra: Sequence[Tensor],
    shift: Mapping[str, Tensor] | None,
    value_of: Callable[[Tensor], float],
    images_per_pass: int | None = None,
) -> Gradient:
    """Gradient of an objective of the gathered features; see `methods.base.Context.gradient`.

    Args:
        trunk: The trunk, without DDP around it.
        ranks: This worker's rank and the collectives.
        precision: float64, float32 or bf16.
        role_slots: The images.
        objective: Function of the features, the same on every rank.
        extra: Further tensors to differentiate with respect to.
        shift: Offsets to add to the trunk's parameters first, by name.
        value_of: Value of the objective; raises unless it is finite on every rank.
        images_per_pass: Largest number of images of one pass through the trunk; None: all.
    """
    parameters = {n: p for n, p in trunk.named_parameters() if p.requires_grad}
    with _shifted(parameters, shift or {}):
        with torch.enable_grad():
            in_parts = images_per_pass is not None and len(role_slots.pixels) > images_per_pass
            run = functools.partial(trunk, images_per_pass=images_per_pass) if in_parts else trunk
            local = trunk_features(run, role_slots.pixels, precision)
            loss = objective(gather(local, role_slots.start, role_slots.total, ranks))
        value = value_of(loss)
        inputs = [*parameters.values(), *extra]
        partial = torch.autograd.grad(loss, inputs, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, partial, strict=True)]
    # Every rank holds the same loss, so that the backward pass of `gather` has counted each of them.
    summed = [ranks.sum(g) / ranks.world for g in gradients[: len(parameters)]]
    return Gradient(value, dict(zip(parameters, summed, strict=True)), gradients[len(parameters) :])


@contextlib.contextmanager
def _shifted(parameters: Mapping[str, Tensor], shift: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which parameters are moved; afterwards they are the very tensors that they were, also for graphs made before."""
    kept = {name: parameters[name].data for name in shift if name in parameters}
    try:
        for name, value in kept.items():
            parameters[name].data = value + shift[name]
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value


def trunk_jvp(
    trunk: Trunk,
    ranks: Ranks,
    role_slots: RoleSlots,
    direction: Mapping[str, Tensor],
    outputs: Outputs | None,
    features: Tensor,
    images_per_pass: int | None = None,
) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch features"]]:
    """Gathered features and their derivative along `direction`; see `methods.base.Context.jvp`.

    Args:
        trunk: The trunk, without DDP around it.
        ranks: This worker's rank and the collectives.
        role_slots: The images.
        direction: Tangents of the trunk's parameters, by name.
        outputs: Outputs kept by the forward pass of the same images, if any.
        features: This rank's features of that pass.
        images_per_pass: Largest number of images of one pass; None: as many as fit beside the step's own graph.

    Raises:
        RunError: The pass in forward mode gives other features than the kept one.
    """
    tangents = {n: direction[n] for n, p in trunk.named_parameters() if n in direction}
    pixels = role_slots.pixels
    if not tangents:  # the trunk is frozen
        with torch.no_grad():
            local = gather(trunk_features(trunk, pixels, "float32"), role_slots.start, role_slots.total, ranks)
        return local, torch.zeros_like(local)
    fitting = max(1, _PIXELS_PER_PASS // pixels[0].numel() if len(pixels) else 1)
    images_per_pass = min(fitting, images_per_pass or fitting)
    passes, same = [], []
    for start in range(0, max(1, len(pixels)), images_per_pass):
        block = slice(start, start + images_per_pass)
        kept = outputs.of(block) if outputs else None
        # without autocast, which has no forward mode
        run = functools.partial(trunk_features, pixels=pixels[block], precision="float32")
        passes.append(derivative(trunk, run, tangents, kept))
        if kept:
            same.append(torch.isclose(passes[-1][0], features[block], rtol=1e-3, atol=1e-4).all())
    if same and not bool(torch.stack(same).all()):
        raise RunError(
            f"the backbone {trunk.config.backbone} gives different features in forward mode than in the pass before: it "
            "draws random numbers, or overwrites an output that it uses twice. Choose another backbone for this method"
        )
    local, tangent = (
        gather(torch.cat(blocks), role_slots.start, role_slots.total, ranks) for blocks in zip(*passes, strict=True)
    )
    return local, tangent
