"""Optimizers and schedules, as values: a schedule is a pure function of the clock, so resuming needs no scheduler state.

Lengths are written with their unit, "200 steps" or "3 epochs"; an epoch may be fractional ("0.5 epochs").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from methods.config import BaseConfig, Clock, Length


class ScheduleConfig(BaseConfig):
    """Factor on the learning rate over time; any kind may start with a linear warm-up."""

    kind: Literal["constant", "cosine", "step"] = Field(
        "constant", description="shape of the schedule after the warm-up"
    )
    warmup: Length = Field(Length(value=0, unit="steps"), description="length of a linear rise from 0, steps or epochs")
    floor: float = Field(0.0, ge=0, le=1, description="cosine: factor at the end of the run, 0 to 1")
    every: Length | None = Field(None, description="step: time between two multiplications by gamma, steps or epochs")
    milestones: tuple[Length, ...] = Field(
        (), description="step: times at which the factor is multiplied by gamma, steps or epochs"
    )
    gamma: float = Field(0.5, gt=0, le=1, description="step: factor of one decay")
    staircase: bool = Field(False, description="the factor changes at the start of an epoch only")

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.kind == "step" and not (self.every or self.milestones):
            raise ValueError("a step schedule needs `every` or `milestones`, e.g. every: '10 epochs'")
        if self.kind != "step" and (self.every or self.milestones):
            raise ValueError(f"`every` and `milestones` belong to kind: step, the kind is {self.kind}")
        if self.staircase and any(
            p.unit == "steps" for p in (self.warmup, *filter(None, (self.every,)), *self.milestones) if p.value
        ):
            raise ValueError("a staircase schedule is counted in epochs: write its lengths as '3 epochs'")
        if self.every is not None and self.every.value == 0:
            raise ValueError("`every` must be longer than 0")
        return self

    def factor(self, clock: Clock, total: Length) -> float:
        """Factor on the learning rate for the step that starts at `clock` of a run of length `total`."""
        if self.staircase:
            clock = Clock(clock.step, float(math.floor(clock.epoch + 1e-9)))
        factor = 1.0
        if self.kind == "cosine":
            factor = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * total.fraction_done(clock)))
        elif self.kind == "step":
            decays = sum(clock.elapsed(m.unit) >= m.value for m in self.milestones)
            if self.every is not None:
                decays += int(clock.elapsed(self.every.unit) / self.every.value + 1e-9)
            factor = self.gamma**decays
        if self.warmup.value:
            one_step = 1.0 if self.warmup.unit == "steps" else 0.0  # never a first step of rate 0 when counted in steps
            factor *= min(1.0, (clock.elapsed(self.warmup.unit) + one_step) / self.warmup.value)
        return factor


class OptimizerConfig(BaseConfig):
    """One optimizer over the trunk and the method's modules."""

    name: Literal["adamw", "adam", "sgd", "radam"] = Field("adamw", description="optimizer of torch.optim")
    lr: float = Field(1e-4, gt=0, description="learning rate of the trunk")
    head_lr_multiplier: float = Field(1.0, gt=0, description="learning rate of the head, relative to the trunk's")
    loss_lr_multiplier: float | None = Field(
        None,
        gt=0,
        description="learning rate of the loss's own parameters, relative to the trunk's (none: 100 for proxies and class centres, as "
        "their papers have it, else 1)",
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay, 0 for none")
    decay_vectors: bool = Field(
        True, description="weight decay also on biases, scales of normalisations and other vectors"
    )
    decoupled: bool = Field(False, description="radam: decoupled weight decay (AdamW's always is)")
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="adam, adamw, radam: decay rates of the moving averages of gradient and square"
    )
    eps: float = Field(1e-8, gt=0, description="adam, adamw, radam: added to the denominator")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum")
    nesterov: bool = Field(False, description="sgd: Nesterov momentum")
    clip_value: float | None = Field(None, gt=0, description="clip every gradient element to this size")
    clip_norm: float | None = Field(None, gt=0, description="clip the gradient's global norm to this size")
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.name != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum and nesterov belong to sgd, the optimizer is {self.name}")
        if self.name != "radam" and self.decoupled:
            raise ValueError(f"decoupled belongs to radam, the optimizer is {self.name}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, expected 0 <= beta < 1")
        return self


PROXY_RATE = 100.0  # times the trunk's: of the proxies of Proxy Anchor and the centres of SoftTriple


def with_loss_rate(config: OptimizerConfig, has_proxies: bool) -> OptimizerConfig:
    """The configuration with the rate of a loss's parameters filled in: proxies and class centres learn faster than a trunk."""
    if config.loss_lr_multiplier is not None:
        return config
    return config.model_copy(update={"loss_lr_multiplier": PROXY_RATE if has_proxies else 1.0})


@dataclass
class Optimizer:
    """A torch optimizer with its schedule and clipping."""

    inner: torch.optim.Optimizer
    config: OptimizerConfig

    def step(self, clock: Clock, total: Length) -> None:
        """Sets the scheduled learning rates, clips as configured, and updates the parameters."""
        factor = self.config.schedule.factor(clock, total)
        parameters = [p for group in self.inner.param_groups for p in group["params"]]
        for group in self.inner.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if self.config.clip_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, self.config.clip_value)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.inner.step()


def build_optimizer(config: OptimizerConfig, groups: Mapping[str, Iterable[torch.nn.Parameter]]) -> Optimizer:
    """Makes the optimizer over named parameter groups.

    Args:
        config: The configuration of the optimizer.
        groups: Parameters by group name: "head" and "loss" have learning-rate multipliers, all other groups the trunk's
            rate. Empty groups are left out. A parameter's attribute `lr_scale`, if it has one, is a further factor on its rate
            (layer-wise rates); parameters of one rate and decay make one group, the highest rate first.

    Raises:
        ValueError: A multiplier is set for a group without parameters.
    """
    multiplier = {"head": config.head_lr_multiplier, "loss": config.loss_lr_multiplier or 1.0}
    groups = {name: list(parameters) for name, parameters in groups.items()}
    for name, value in multiplier.items():
        if value != 1 and not groups.get(name):
            raise ValueError(
                f"{name}_lr_multiplier is {value:g}, but this optimizer has no parameters of the {name}: leave it out"
            )
    param_groups: list[dict[str, Any]] = []
    for name, parameters in groups.items():
        parts: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            decays = config.decay_vectors or parameter.ndim > 1
            parts.setdefault((getattr(parameter, "lr_scale", 1.0), decays), []).append(parameter)
        for (scale, decays), part in sorted(parts.items(), key=lambda item: item[0], reverse=True):
            lr = config.lr * multiplier.get(name, 1.0) * scale
            undecayed = {} if decays else {"weight_decay": 0.0}
            param_groups.append({"params": part, "lr": lr, "initial_lr": lr, "name": name, **undecayed})
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            param_groups, momentum=config.momentum, nesterov=config.nesterov, **common
        )
    elif config.name == "radam":
        optimizer = torch.optim.RAdam(
            param_groups, betas=config.betas, eps=config.eps, decoupled_weight_decay=config.decoupled, **common
        )
    else:
        optimizer_class = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name]
        optimizer = optimizer_class(param_groups, betas=config.betas, eps=config.eps, **common)
    return Optimizer(optimizer, config)
