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
from pydantic import Field
from torch import Tensor, nn

from methods.config import BaseConfig, Clock, Length
from methods.functional import Head
from methods.mining import Mining, MiningRequirements
from methods.optim import Optimizer, OptimizerConfig, build_optimizer
from methods.plans import Plan, class_balanced


class MethodConfig(BaseConfig):
    """What every method can be told."""

    name: str = Field(description="name of the method")
    classes_per_batch: int = Field(24, ge=2, description="P: groups of different classes in a batch")
    samples_per_class: int = Field(4, ge=2, description="K: images of one class in a batch")
    embedding_dim: int = Field(128, ge=1, description="D: dimension of the embedding")
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def needs_best(self) -> bool:
        """Whether the method calls `load_best`, so that there has to be an evaluation during training."""
        return False

    @property
    def requires_frozen_batch_norm(self) -> bool:
        """Whether the method needs frozen batch normalisation, as `Context.jvp` does."""
        return False

    @property
    def mining(self) -> MiningRequirements | None:
        """What the method mines; none: no mining server is started."""
        return None


@dataclass(frozen=True)
class Batch:
    """One step's plan row, whole, on every rank.

    Attributes:
        ids: sample of each slot.
        labels: its class.
        columns: further columns of the plan row.
    """

    ids: Int64[Tensor, " batch"]
    labels: Int64[Tensor, " batch"]
    columns: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Gradient:
    """Gradient of an objective, complete and the same on every rank.

    Attributes:
        value: of the objective.
        trunk: by the name of the trunk's parameter (those that are trained).
        extra: of the given tensors, in their order.
    """

    value: float
    trunk: Mapping[str, Tensor]
    extra: Sequence[Tensor]


@runtime_checkable
class Ranks(Protocol):
    """The processes of a run, for a method that shares out work; every process has to make the same calls in the same order.

    Work that is shared reads replicated values through `copy_to_ranks` and ends in `sum_over_ranks`: the gradient is then complete, and the
    same, in every process.
    """

    def slice(self, total: int) -> slice:
        """This process's contiguous share of `total` items; may be empty."""
        ...

    def copy_to_ranks(self, value: Tensor) -> Tensor:
        """A replicated value, as it is; its gradient is summed over the processes."""
        ...

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Sum over the processes; its gradient passes as it is."""
        ...


@runtime_checkable
class Context(Protocol):
    """What the loop offers to a method, alike on every rank unless said.

    Attributes:
        labels: class of every training sample, 0..num_classes-1.
        tracks: of video, the tracklet of every training sample.
        seed: of the run.
        clock: steps and epochs done.
        length: of the run, as `Length`.
        device, dtype: of features and of the method's parameters.
        generator: freshly seeded from (seed, step) before each step, from (seed, epoch) before the epoch's hooks.
        shards: the slots of the batch that each rank encodes, in rank order.
        ranks: for sharing out work among them.
        next_ids: samples of the next step, if it is of the same epoch.
        mining: the mining server; none unless the method's config says what it mines.
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
        """Pooled features of the batch (of the slots whose plan column `role` is one of `role`), gathered with gradient.

        The trunk runs once a call; a second call before the `backward` of the first is an error (ask for both roles at once).
        With `keep_for_jvp`, what the pass computes is kept for a `jvp` of the same slots, which takes less time then.
        """
        ...

    def gradient(
        self,
        role: str | Sequence[str] | None,
        objective: Callable[[Tensor], Tensor],
        extra: Sequence[Tensor] = (),
        shift: Mapping[str, Tensor] | None = None,
    ) -> Gradient:
        """Gradient of `objective(features)`, aside from the step's own: nothing is added to any parameter's `.grad`.

        Args:
            role: slots whose pooled features the objective gets, as in `encode`; may be called between an `encode` and
                its `backward`.
            objective: the same on every rank.
            extra: tensors of the method to differentiate by as well.
            shift: what to add to the trunk's parameters first, by name.

        Raises:
            RunError: the objective is not finite on some rank.
        """
        ...

    def jvp(
        self, role: str | Sequence[str] | None, direction: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch features"]]:
        """Pooled features, and their derivative when the trunk's parameters move along `direction` (forward mode).

        In float32 (float64) whatever the run's precision; batch normalisation has to be frozen (`MethodConfig.requires_frozen_batch_norm`).
        """
        ...

    def backward(self, loss: Float[Tensor, ""], retain_graph: bool = False) -> None:
        """Checks on all ranks that the loss is finite, then runs its backward pass; trunk gradients are summed over ranks.

        Raises:
            RunError: the loss is not finite on some rank. No parameter has been changed by this loss then.
        """
        ...

    def step(self, optimizer: str) -> None:
        """Updates the parameters of one optimizer at its scheduled rate and clears its gradients."""
        ...

    def embed_samples(self, ids: Int64[np.ndarray, " some"], embed: bool = True) -> Float[Tensor, "some dim"]:
        """Embeddings (or pooled features) of many training samples without gradient or augmentation, shared by the ranks."""
        ...

    def weights_hash(self) -> str:
        """Names the present weights of trunk and method: alike only for equal weights."""
        ...

    def load_best(self) -> None:
        """Puts the weights of the best checkpoint so far into trunk and method; optimizers keep their moments."""
        ...


class Method(nn.Module):
    """Base of every method: a linear head with L2 norm, class-balanced batches, one optimizer.

    Args:
        config: of the class's `Config`.
        features: width F of the pooled features.
        num_classes: training classes.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    plan_is_stored: ClassVar[bool] = False  # True: the plan depends on more than (labels, seed, epoch)

    def __init__(self, config: Any, features: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.head = Head(features, config.embedding_dim)

    def plan(self, epoch: int, context: Context) -> Plan:
        """What the epoch is trained on. A pure function of (context.labels, context.seed, epoch) unless `plan_is_stored`."""
        c = self.config
        return class_balanced(context.labels, c.classes_per_batch, c.samples_per_class, context.seed, epoch)

    def optimizers(self, trunk: nn.Module) -> dict[str, Optimizer]:
        """The optimizers by name, over the trunk's and the method's parameters; made once, before training."""
        own = {
            "head": self.head.parameters(),
            "loss": [p for n, p in self.named_parameters() if not n.startswith("head.")],
        }
        return {"main": build_optimizer(self.config.optimizer, {"trunk": trunk.parameters(), **own})}

    def on_epoch_start(self, epoch: int, context: Context) -> None:
        """Called before the epoch's first step (and before its plan, if `plan_is_stored`).

        Called again when a run resumes within the epoch: what it does has to follow from `epoch` and the state alone.
        """

    def on_epoch_end(self, epoch: int, context: Context, metrics: Mapping[str, float] | None) -> None:
        """Called after the epoch's last step and after its evaluation, whose metrics are given if there was one."""

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        """One step on one batch; returns what to log, "loss" among it."""
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
        """Pooled features to embeddings; what retrieval uses."""
        return self.head(features)

    def refine_embeddings(self, embeddings: Float[Tensor, "images dim"]) -> Float[Tensor, "images other"]:
        """Embeddings of all images of an evaluation together, for methods that let test images look at each other."""
        return embeddings
