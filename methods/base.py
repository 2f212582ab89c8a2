"""The contract between a method and the training loop.

A method is a module that lives *after* the pooled features of the trunk: head, losses, graph networks, classifiers, and
their optimizers. The loop hands it the features of the whole batch, on every rank alike, so a method is written as if
there were one process, and its result does not depend on how many there are.

A simple method overrides `loss` alone. A demanding one overrides `training_step` and calls, on the context:

    encode -> backward -> step        (as often as it likes, one `encode` with gradient for each `backward`)

What must survive a restart has to be in the module's `state_dict` (parameters, buffers) or in its optimizers; everything
random has to come from `context.generator` or from (context.seed, context.clock.step).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, field_serializer, model_validator
from torch import Tensor, nn

from methods.config import BaseConfig, Clock, Length
from methods.head import Head, HeadConfig
from methods.mining import Mining, MiningRequirements
from methods.optim import Optimizer, OptimizerConfig, build_optimizer, with_loss_rate
from methods.plans import MAX_REPEATS, Plan, class_balanced


class MethodError(Exception):
    """A step that a method cannot compute: one line for the user, to which the loop adds the step and the batch."""


class MethodConfig(BaseConfig):
    """Options that every method has."""

    name: str = Field(description="name of the method, or module:CLASS of your own")
    classes_per_batch: int = Field(24, ge=2, description="P: groups of different classes in a batch")
    samples_per_class: int = Field(4, ge=2, description="K: images of one class in a batch")
    max_repeats: float = Field(
        MAX_REPEATS,
        ge=1,
        description="largest length of an epoch of class-balanced batches, relative to the shortest that holds every image; a class "
        "that is too large for so many steps has several groups of images in a step",
    )
    embedding_dim: int = Field(128, ge=1, description="D: dimension of the embedding")
    head: HeadConfig = HeadConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _check_max_repeats(self) -> MethodConfig:
        if self.max_repeats != MAX_REPEATS and not self.is_class_balanced:
            raise ValueError("max_repeats is for class-balanced batches, which these are not: leave it out")
        return self

    @model_validator(mode="after")
    def _fill_rates(self) -> MethodConfig:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, OptimizerConfig):  # frozen, but for its defaults
                object.__setattr__(self, name, with_loss_rate(value, name == "optimizer" and self.has_proxies))
        return self

    @property
    def has_proxies(self) -> bool:
        """True if the loss has proxies or class centres, which learn faster than the trunk (`loss_lr_multiplier`)."""
        return False

    @property
    def is_class_balanced(self) -> bool:
        """True if the batches are those of `methods.plans.class_balanced`."""
        return True

    @field_serializer("name")
    def _name(self, name: str) -> str:
        return name  # of a method by import string: not the one that its config may declare

    @property
    def needs_best(self) -> bool:
        """True if the method calls `load_best`: the run then needs evaluations during training."""
        return False

    @property
    def loads_best_after(self) -> Length | None:
        """Length of training before the first `load_best`; None: it is not called."""
        return None

    @property
    def requires_frozen_batch_norm(self) -> bool:
        """True if the method needs frozen batch normalisation, as `Context.jvp` does."""
        return False

    @property
    def nested_dims(self) -> tuple[int, ...]:
        """Dimensions of the prefixes that are trained to serve alone, ascending, the whole one last; empty: none.

        Evaluation measures each of them.
        """
        return ()

    @property
    def mining(self) -> MiningRequirements | None:
        """The method's requirements of the mining server; None: no server is started."""
        return None


@dataclass(frozen=True)
class Batch:
    """The plan of one step, all slots, on every rank.

    Attributes:
        ids: Sample of each slot.
        labels: Class of each slot's sample.
        columns: Further columns of the plan.
    """

    ids: Int64[Tensor, " batch"]
    labels: Int64[Tensor, " batch"]
    columns: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Gradient:
    """Gradient of an objective, summed over the ranks and the same on each.

    Attributes:
        value: Value of the objective.
        trunk: Gradients of the trunk's trained parameters, by name.
        extra: Gradients of the `extra` tensors, in their order.
    """

    value: float
    trunk: Mapping[str, Tensor]
    extra: Sequence[Tensor]


@runtime_checkable
class Ranks(Protocol):
    """The processes of a run, for a method that divides work among them; all make the same calls in the same order.

    Divided work reads replicated values through `copy_to_ranks` and ends in `sum_over_ranks`: the gradient is then complete,
    and the same, in every process.
    """

    def slice(self, total: int) -> slice:
        """This process's contiguous share of `total` items; may be empty."""
        ...

    def copy_to_ranks(self, value: Tensor) -> Tensor:
        """Identity of a replicated value; the backward pass sums its gradient over the processes."""
        ...

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Sum over the processes; the backward pass is the identity."""
        ...


@runtime_checkable
class Context(Protocol):
    """The training loop's interface to a method; the same on every rank unless stated otherwise.

    Attributes:
        labels: Class of every training sample, 0..num_classes-1.
        tracks: Tracklet of every training sample; None for still images.
        seed: Seed of the run.
        clock: Steps and epochs done.
        length: Length of the run.
        device, dtype: Device and data type of features and of the method's parameters.
        generator: Seeded from (seed, step) before each step, from (seed, epoch) before the epoch's hooks.
        shards: Slots of the batch that each rank encodes, in rank order.
        ranks: The processes of the run, to divide work among them.
        next_ids: Samples of the next step, if it belongs to the same epoch.
        mining: The mining server; None unless `MethodConfig.mining` asks for it.
    """

    labels: Int64[np.ndarray, " samples"]
    tracks: Int64[np.ndarray, " samples"] | None
    seed: int
    length: Length
    clock: Clock
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator
    shards: Sequence[slice]
    next_ids: Int64[np.ndarray, " slots"] | None

    @property
    def ranks(self) -> Ranks: ...

    @property
    def mining(self) -> Mining | None: ...

    def encode(
        self, role: str | Sequence[str] | None = None, keep_for_jvp: bool = False
    ) -> Float[Tensor, "batch features"]:
        """Pooled features of the batch (of the slots whose plan column `role` is one of those given), gathered with gradient.

        The trunk runs once per call; a second call before the `backward` of the first is an error (encode both roles at once).
        With `keep_for_jvp`, the outputs of the pass are kept for a `jvp` of the same slots, which is faster then.
        """
        ...

    def gradient(
        self,
        role: str | Sequence[str] | None,
        objective: Callable[[Tensor], Tensor],
        extra: Sequence[Tensor] = (),
        shift: Mapping[str, Tensor] | None = None,
    ) -> Gradient:
        """Gradient of `objective(features)`, without adding to any parameter's `.grad`.

        May be called between an `encode` and its `backward`.

        Args:
            role: The slots whose pooled features the objective gets, as in `encode`.
            objective: Function of the features, the same on every rank.
            extra: Further tensors to differentiate with respect to.
            shift: Offsets to add to the trunk's parameters first, by name.

        Raises:
            RunError: The objective is not finite on some rank.
        """
        ...

    def jvp(
        self, role: str | Sequence[str] | None, direction: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch features"]]:
        """Pooled features, and their derivative along `direction` of the trunk's parameters (forward mode).

        Computed in float32 (or float64), not in bf16; batch normalisation has to be frozen
        (`MethodConfig.requires_frozen_batch_norm`).
        """
        ...

    def backward(self, loss: Float[Tensor, ""], retain_graph: bool = False) -> None:
        """Checks on all ranks that the loss is finite, then runs its backward pass; trunk gradients are summed over ranks.

        Raises:
            RunError: The loss is not finite on some rank; this loss has not changed any parameter then.
        """
        ...

    def step(self, optimizer: str) -> None:
        """Updates the parameters of one optimizer at its scheduled rate and clears its gradients."""
        ...

    def embed_samples(self, ids: Int64[np.ndarray, " samples"], embed: bool = True) -> Float[Tensor, "samples dim"]:
        """Embeddings (or pooled features) of many training samples, without gradient or augmentation; divided among ranks."""
        ...

    def weights_hash(self) -> str:
        """Hash of the present weights of trunk and method."""
        ...

    def load_best(self) -> None:
        """Loads the weights of the best checkpoint so far into trunk and method; optimizers keep their moments."""
        ...


class Method(nn.Module):
    """Base of every method: a linear head with L2 norm, class-balanced batches, one optimizer.

    Args:
        config: An instance of the class's `Config`.
        features: Width F of the pooled features.
        num_classes: Number of training classes.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    plan_is_stored: ClassVar[bool] = False  # True: the plan depends on more than (labels, seed, epoch)

    def __init__(self, config: Any, features: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.head = Head(features, config.embedding_dim, config.head)

    def plan(self, epoch: int, context: Context) -> Plan:
        """The plan of an epoch: a pure function of (context.labels, context.seed, epoch) unless `plan_is_stored`."""
        c = self.config
        return class_balanced(
            context.labels, c.classes_per_batch, c.samples_per_class, context.seed, epoch, c.max_repeats
        )

    def epoch_shape(self, context: Context) -> tuple[int, int] | None:
        """Steps of the first epoch and slots of a step, before training; None if they are not known from labels and seed."""
        return None if self.plan_is_stored else self.plan(0, context).ids.shape

    def optimizers(self, trunk: nn.Module) -> dict[str, Optimizer]:
        """The optimizers by name, over the trunk's and the method's parameters; made once, before training."""
        method_parameters = {
            "head": self.head.parameters(),
            "loss": [p for n, p in self.named_parameters() if not n.startswith("head.")],
        }
        return {"main": build_optimizer(self.config.optimizer, {"trunk": trunk.parameters(), **method_parameters})}

    def on_epoch_start(self, epoch: int, context: Context) -> None:
        """Called before the epoch's first step (and before its plan, if `plan_is_stored`).

        Called again when a run resumes within the epoch: its effect may depend only on `epoch` and the saved state.
        """

    def on_epoch_end(self, epoch: int, context: Context, metrics: Mapping[str, float] | None) -> None:
        """Called after the epoch's last step and after its evaluation, whose metrics are given if there was one."""

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        """One step on one batch; returns the metrics to log, "loss" among them."""
        loss = self.loss(self.embed(context.encode()), batch.labels, context)
        context.backward(loss)
        context.step("main")
        return {"loss": float(loss.detach())}

    def loss(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"], context: Context
    ) -> Float[Tensor, ""]:
        """The loss of a batch: all that a simple method writes."""
        raise TypeError(f"{type(self).__name__} overrides neither `loss` nor `training_step`")

    def embed(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """Embeddings of pooled features, as used for retrieval."""
        return self.head(features)

    @property
    def skipped_steps(self) -> Mapping[str, int]:
        """Numbers of steps so far that changed no weight, by reason; for the summary of a run."""
        return {}

    def refine_embeddings(self, embeddings: Float[Tensor, "images dim"]) -> Float[Tensor, "images other"]:
        """Refines all embeddings of an evaluation together; overridden by transductive methods."""
        return embeddings
