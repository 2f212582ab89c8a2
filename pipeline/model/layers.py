"""Layers of a backbone, from the pixels to the features: which of them are trained, and at which learning rates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from methods.config import Clock
from pipeline.config import ModelConfig
from pipeline.errors import UserError, did_you_mean, joined_lines
from pipeline.vision_libraries import timm

_LAST_BLOCKS = re.compile(r"last (\d+) blocks?")


def layers_of(backbone: nn.Module) -> dict[str, int]:
    """The layer of each parameter, by name: 0 is the one nearest to the pixels.

    Of timm's networks the layers are those of its layer-wise learning rates: the stem, then each block. Of others they are the
    modules that the network consists of, in their order.
    """
    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is not None:
        groups = timm.models.group_parameters(backbone, matcher(coarse=False), reverse=True)
        return {name: int(group) for name, group in groups.items()}
    parts = list(_parts(backbone, ""))
    return {
        name: layer
        for layer, (prefix, part) in enumerate(parts)
        for name in (prefix + inner for inner, _ in part.named_parameters())
    } | {name: 0 for name, _ in backbone.named_parameters(recurse=False)}


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a network consists of; what only wraps others is opened, as a Sequential is."""
    children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
    for name, child in children:
        if len(children) == 1 or isinstance(child, nn.Sequential):
            inner = list(_parts(child, f"{prefix}{name}."))
            yield from inner or [(f"{prefix}{name}.", child)]
        else:
            yield f"{prefix}{name}.", child


class TrainedParts:
    """Which parameters of a backbone are trained at a time of the run.

    Args:
        backbone: The backbone.
        config: The section `model` of the configuration.

    Raises:
        UserError: `model.trainable` names no parameter, or more blocks than there are.
    """

    def __init__(self, backbone: nn.Module, config: ModelConfig) -> None:
        self.config = config
        self.parameters = dict(backbone.named_parameters())
        self.layers = layers_of(backbone)
        self.chosen = self._chosen()
        self._stage: str | None = None

    def set(self, clock: Clock) -> None:
        """Lets exactly those parameters have gradients that are trained in the step at `clock`."""
        stage = self.stage(clock)
        if stage == self._stage:
            return
        self._stage = stage
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(stage == "all" or (stage == "chosen" and name in self.chosen))

    def stage(self, clock: Clock) -> str:
        """`head` alone, the `chosen` parts of the trunk too, or `all` of it."""
        model = self.config
        if clock.elapsed(model.head_first.unit) < model.head_first.value:
            return "head"
        if model.thaw_after is not None and clock.elapsed(model.thaw_after.unit) >= model.thaw_after.value:
            return "all"
        return "chosen"

    def _chosen(self) -> frozenset[str]:
        asked = self.config.trainable
        if asked in ("all", "none"):
            return frozenset(self.parameters if asked == "all" else ())
        last = _LAST_BLOCKS.fullmatch(asked)
        if last is not None:
            blocks = max(self.layers.values())  # layer 0 is the stem
            if int(last[1]) > blocks:
                raise UserError(
                    f"model.trainable is {asked!r}, {self.config.backbone} has {blocks} after its first layer: name fewer, or all"
                )
            return frozenset(name for name, layer in self.layers.items() if layer > blocks - int(last[1]))
        chosen: set[str] = set()
        for part in (part.strip() for part in asked.split(",")):
            found = {name for name in self.parameters if name == part or name.startswith(f"{part}.")}
            if not found:
                known = sorted(
                    {name.rpartition(".")[0] for name in self.parameters} | {n.split(".")[0] for n in self.parameters}
                )
                raise UserError(
                    f"model.trainable names {part!r}, which no parameter of {self.config.backbone} belongs to: "
                    f"{did_you_mean(part, known)}; or write all, none, or 'last 2 blocks'"
                )
            chosen |= found
        return frozenset(chosen)


def prepare_training(backbone: nn.Module, config: ModelConfig) -> TrainedParts:
    """Sets learning rates of layers and checkpoints of activations; returns which parts are trained when.

    Raises:
        UserError: The backbone has no activation checkpointing, or as `TrainedParts`.
    """
    if config.layer_decay != 1:
        set_rates(backbone, config.layer_decay)
    if config.activation_checkpointing:
        switch: Any = getattr(backbone, "set_grad_checkpointing", None)
        try:
            if switch is None:
                raise AssertionError("it has none")
            switch(True)
        except AssertionError as error:
            raise UserError(
                f"model.activation_checkpointing is true, but {config.backbone} cannot do that ({joined_lines(error)}): set "
                "runtime.images_per_pass, which any backbone can, or choose a network of timm that has it"
            ) from error
    return TrainedParts(backbone, config)


def set_rates(backbone: nn.Module, decay: float) -> None:
    """Scales the learning rate of each layer by `decay` for each layer above it, the head being the last (`lr_scale`).

    As in BEiT (Bao et al., 2021) and timm; `methods.optim.build_optimizer` reads the scales.
    """
    layers = layers_of(backbone)
    top = max(layers.values()) + 1
    for name, parameter in backbone.named_parameters():
        parameter.lr_scale = decay ** (top - layers[name])  # type: ignore[attr-defined]
