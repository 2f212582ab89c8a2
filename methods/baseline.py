"""Baseline: any loss and miner of pytorch-metric-learning (Musgrave, Belongie, Lim, arXiv 2008.09164), by name.

    L = loss(z, y, miner(z, y)),    z = W f / |W f|,  f the pooled features

    method: {name: baseline, loss: MultiSimilarityLoss, loss_args: {alpha: 2, beta: 50, base: 0.5},
             miner: MultiSimilarityMiner, miner_args: {epsilon: 0.1}}

Two ways to look beyond the batch, each with a weight, through the mining server:

- `memory`: cross-batch memory (XBM; Wang, Zhang, Huang, Scott, CVPR 2020, arXiv 1912.06798). The loss of the batch against
  the last so many embeddings, from `memory_start` on:  L + memory_weight * loss(z, y, miner(z, y, M), M).
- `hard_negatives`: the k nearest of the newest embeddings of all samples of other classes, for every image of the batch, by
  the image's own stored embedding; asked for one step ahead, so that no step waits for them:
  L + hard_weight * loss(z, y, miner(z, y, H), H).

Deviations: XBM's memory is the one before the batch (the batch itself is in L); past embeddings of the same image stay in.
A loss or miner that draws random numbers draws them from (seed, step) instead of a global generator, so that a run can be
repeated and continued. A loss with parameters (proxies) is trained at `loss_lr_multiplier`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from methods.base import Batch, Context, Method, MethodConfig
from methods.config import Length
from methods.functional import global_generators
from methods.mining import Mining, MiningRequirements

DERIVED_ARGUMENTS = {
    "num_classes",
    "embedding_size",
    "descriptors_dim",
}  # arguments that follow from the data and the head


def _subclasses(module: Any, base: type, excluded: tuple[str, ...]) -> dict[str, type]:
    classes = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)}
    return {n: c for n, c in classes.items() if not n.startswith("Base") and n not in excluded}


@functools.cache
def loss_classes() -> Mapping[str, type]:
    """The losses by name, without wrappers around another loss and what is not a function of (embeddings, labels).

    The library is imported at the first call, here and below: it loads scipy, over 1 CPU-s, which other methods do not need.
    """
    from pytorch_metric_learning import losses

    return _subclasses(losses, losses.BaseMetricLossFunction, ("GenericPairLoss", "VICRegLoss", "ManifoldLoss"))


@functools.cache
def miner_classes() -> Mapping[str, type]:
    """The miners by name."""
    from pytorch_metric_learning import miners

    return _subclasses(miners, miners.BaseMiner, ("EmbeddingsAlreadyPackagedAsTriplets",))


def _lookup(kind: str, name: str, classes: Mapping[str, type]) -> type:
    if name not in classes:
        close_matches = difflib.get_close_matches(name, classes, n=1, cutoff=0.4)
        raise ValueError(
            f"{kind} {name!r} is unknown"
            + (f": did you mean {close_matches[0]!r}?" if close_matches else f", known: {sorted(classes)}")
        )
    return classes[name]


def _build(
    kind: str, name: str, arguments: Mapping[str, Any], classes: Mapping[str, type], derived: Mapping[str, int]
) -> Any:
    """Makes a loss or miner; every argument is checked against the signatures of the class and its bases."""
    cls = _lookup(kind, name, classes)
    accepted: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base) and base is not nn.Module and base is not object:
            parameters = inspect.signature(base).parameters
            accepted |= {
                n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
            }
    for argument in arguments:
        if argument in DERIVED_ARGUMENTS:
            raise ValueError(f"{kind}_args.{argument} follows from the data and the head: leave it out")
        if argument not in accepted:
            close_matches = difflib.get_close_matches(argument, accepted - DERIVED_ARGUMENTS, n=1, cutoff=0.4)
            hint = (
                f"did you mean {close_matches[0]!r}?"
                if close_matches
                else f"known: {sorted(accepted - DERIVED_ARGUMENTS)}"
            )
            raise ValueError(f"{name} takes no argument {argument!r}: {hint}")
    try:
        return cls(**{**{n: v for n, v in derived.items() if n in accepted}, **arguments})
    except Exception as error:  # whatever a third party's constructor raises
        raise ValueError(f"{name} does not accept {dict(arguments)}: {_first_line(error)}") from None


def _derived_arguments(num_classes: int, dim: int) -> dict[str, int]:
    return {"num_classes": num_classes, "embedding_size": dim, "descriptors_dim": dim}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class BaselineConfig(MethodConfig):
    name: Literal["baseline"] = "baseline"
    loss: str = Field("MultiSimilarityLoss", description="class of pytorch_metric_learning.losses")
    loss_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the loss")
    miner: str | None = Field(None, description="class of pytorch_metric_learning.miners; none: all pairs or triplets")
    miner_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the miner")
    memory: int = Field(0, ge=0, description="past embeddings that the batch is compared with (XBM); 0: none")
    memory_start: Length = Field(
        Length(value=0, unit="steps"),
        description="time before the memory is used, steps or epochs; it is filled from the start",
    )
    memory_weight: float = Field(1.0, ge=0, description="weight of the loss over the memory")
    hard_negatives: int = Field(
        0,
        ge=0,
        description="number of nearest samples of other classes mined for each image, from the whole training set; 0: none",
    )
    hard_weight: float = Field(1.0, ge=0, description="weight of the loss over the hard negatives")

    @property
    def mining(self) -> MiningRequirements | None:
        if not self.memory and not self.hard_negatives:
            return None
        return MiningRequirements(bool(self.hard_negatives), self.hard_negatives or 10, total=self.memory or None)

    @model_validator(mode="after")
    def _check(self) -> BaselineConfig:
        if self.miner is None and self.miner_args:
            raise ValueError("miner_args are given, but no miner: set miner, or leave out miner_args")
        with global_generators(0):
            loss = _build("loss", self.loss, self.loss_args, loss_classes(), _derived_arguments(2, self.embedding_dim))
            miner = _build("miner", self.miner, self.miner_args, miner_classes(), {}) if self.miner else None
            self._try_once(loss, miner)
        return self

    def _try_once(self, loss: Any, miner: Any) -> None:
        """Calls loss and miner once: many wrong argument values fail only in the call, which would be the first step."""
        embeddings, labels = torch.randn(8, self.embedding_dim), torch.arange(8) // 4
        try:
            loss(embeddings, labels, miner(embeddings, labels) if miner is not None else None)
            if self.mining is not None:
                _loss_against(loss, miner, embeddings, labels, embeddings[::2], labels[::2])
        except Exception as error:
            description = f"{self.loss} with {self.loss_args}" + (
                f", {self.miner} with {self.miner_args}" if miner is not None else ""
            )
            raise ValueError(f"{description} fails on a batch of random embeddings: {_first_line(error)}") from None


def _loss_against(
    loss: Any, miner: Any, embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor, ref_labels: Tensor
) -> Tensor:
    """The loss of a batch against constant embeddings."""
    tuples = miner(embeddings, labels, ref_embeddings, ref_labels) if miner is not None else None
    return loss(embeddings, labels, tuples, ref_emb=ref_embeddings, ref_labels=ref_labels).reshape(())


class Baseline(Method):
    Config = BaselineConfig

    def __init__(self, config: BaselineConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        derived = _derived_arguments(num_classes, config.embedding_dim)
        self.loss_function = _build("loss", config.loss, config.loss_args, loss_classes(), derived)
        self.miner = _build("miner", config.miner, config.miner_args, miner_classes(), {}) if config.miner else None
        for module in self.loss_function.modules():  # running statistics in plain tensors: into the state dict
            for name in [n for n, value in vars(module).items() if isinstance(value, Tensor)]:
                value = vars(module).pop(name)
                module.register_buffer(name, value)

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        config, mining = self.config, context.mining
        if mining is None:
            return super().training_step(batch, context)
        negatives = self._hard_negatives(batch, context, mining)
        embeddings = self.embed(context.encode())
        terms = {"batch": self.loss(embeddings, batch.labels, context)}
        with global_generators(context.seed, context.clock.step, 1):
            memory = mining.memory
            if memory is not None and config.memory_start.fraction_done(context.clock) >= 1 and len(memory.labels):
                ref_embeddings = memory.features.to(embeddings.dtype)
                loss_against = _loss_against(
                    self.loss_function, self.miner, embeddings, batch.labels, ref_embeddings, memory.labels
                )
                terms["memory"] = config.memory_weight * loss_against
            if negatives is not None:
                ref_embeddings = negatives[0].to(embeddings)
                loss_against = _loss_against(
                    self.loss_function, self.miner, embeddings, batch.labels, ref_embeddings, negatives[1]
                )
                terms["hard"] = config.hard_weight * loss_against
        loss = torch.stack(list(terms.values())).sum()
        context.backward(loss)
        context.step("main")
        mining.put(batch.ids, embeddings, batch.labels)
        return {"loss": float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}}

    def _hard_negatives(self, batch: Batch, context: Context, mining: Mining) -> tuple[Tensor, Tensor] | None:
        """Embeddings and classes of the distinct neighbours of the batch's images; None in the first steps."""
        k = self.config.hard_negatives
        if not k:
            return None
        search_options: dict[str, Any] = {"class_filter": "other", "with_embeddings": True, "missing": "empty"}
        neighbours = mining.take_prefetched("hard")
        if neighbours is None:  # the first step of an epoch
            neighbours = mining.neighbours(k, ids=batch.ids, **search_options)
        if context.next_ids is not None:
            mining.prefetch("hard", k, ids=context.next_ids, **search_options)
        ids, first_positions = np.unique(neighbours.ids, return_index=True)
        first_positions = first_positions[ids >= 0]
        if len(first_positions) == 0:
            return None
        assert neighbours.embeddings is not None
        embeddings = neighbours.embeddings.reshape(-1, neighbours.embeddings.shape[-1])[first_positions]
        labels = neighbours.labels.reshape(-1)[first_positions]
        return torch.from_numpy(embeddings), torch.from_numpy(labels).to(batch.labels.device)

    def loss(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"], context: Context
    ) -> Float[Tensor, ""]:
        for statistic in self.loss_function.buffers():
            statistic.detach_()  # some keep the graph of the step before
        with global_generators(context.seed, context.clock.step):
            tuples = self.miner(embeddings, labels) if self.miner is not None else None
            return self.loss_function(embeddings, labels, tuples).reshape(())


__all__ = ["Baseline", "BaselineConfig"]
