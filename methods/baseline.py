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
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

from methods.base import Batch, Context, Method, MethodConfig
from methods.config import Length
from methods.functional import global_generators
from methods.mining import Mining, MiningRequirements

GIVEN = {"num_classes", "embedding_size", "descriptors_dim"}  # arguments that follow from the data and the head


def _candidates(module: Any, base: type, without: tuple[str, ...]) -> dict[str, type]:
    found = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)}
    return {n: c for n, c in found.items() if not n.startswith("Base") and n not in without}


# Left out: wrappers around another loss, and what is not a function of (embeddings, labels).
LOSSES = _candidates(losses, losses.BaseMetricLossFunction, ("GenericPairLoss", "VICRegLoss", "ManifoldLoss"))
MINERS = _candidates(miners, miners.BaseMiner, ("EmbeddingsAlreadyPackagedAsTriplets",))


def _find(kind: str, name: str, known: Mapping[str, type]) -> type:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise ValueError(
            f"{kind} {name!r} is unknown" + (f": did you mean {near[0]!r}?" if near else f", known: {sorted(known)}")
        )
    return known[name]


def _build(
    kind: str, name: str, arguments: Mapping[str, Any], known: Mapping[str, type], given: Mapping[str, int]
) -> Any:
    """Makes a loss or miner; every argument is checked against the signatures of the class and its bases."""
    cls = _find(kind, name, known)
    accepted: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base) and base is not nn.Module and base is not object:
            parameters = inspect.signature(base).parameters
            accepted |= {
                n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
            }
    for argument in arguments:
        if argument in GIVEN:
            raise ValueError(f"{kind}_args.{argument} follows from the data and the head: leave it out")
        if argument not in accepted:
            near = difflib.get_close_matches(argument, accepted - GIVEN, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {sorted(accepted - GIVEN)}"
            raise ValueError(f"{name} takes no argument {argument!r}: {hint}")
    try:
        return cls(**{**{n: v for n, v in given.items() if n in accepted}, **arguments})
    except Exception as error:  # whatever a third party's constructor raises
        raise ValueError(f"{name} refuses {dict(arguments)}: {_first_line(error)}") from None


def _given(num_classes: int, dim: int) -> dict[str, int]:
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
            raise ValueError("miner_args are given, but no miner")
        with global_generators(0):
            loss = _build("loss", self.loss, self.loss_args, LOSSES, _given(2, self.embedding_dim))
            miner = _build("miner", self.miner, self.miner_args, MINERS, {}) if self.miner else None
            self._try(loss, miner)
        return self

    def _try(self, loss: Any, miner: Any) -> None:
        """Runs them once: a value of the wrong type is often noticed in the call only, which would be the first step."""
        embeddings, labels = torch.randn(8, self.embedding_dim), torch.arange(8) // 4
        try:
            loss(embeddings, labels, miner(embeddings, labels) if miner is not None else None)
            if self.mining is not None:
                _against(loss, miner, embeddings, labels, embeddings[::2], labels[::2])
        except Exception as error:
            used = f"{self.loss} with {self.loss_args}" + (
                f", {self.miner} with {self.miner_args}" if miner is not None else ""
            )
            raise ValueError(f"{used} fails on a batch of random embeddings: {_first_line(error)}") from None


def _against(loss: Any, miner: Any, embeddings: Tensor, labels: Tensor, others: Tensor, classes: Tensor) -> Tensor:
    """The loss of a batch against constant embeddings."""
    tuples = miner(embeddings, labels, others, classes) if miner is not None else None
    return loss(embeddings, labels, tuples, ref_emb=others, ref_labels=classes).reshape(())


class Baseline(Method):
    Config = BaselineConfig

    def __init__(self, config: BaselineConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        given = _given(num_classes, config.embedding_dim)
        self.loss_function = _build("loss", config.loss, config.loss_args, LOSSES, given)
        self.miner = _build("miner", config.miner, config.miner_args, MINERS, {}) if config.miner else None
        for module in self.loss_function.modules():  # running statistics in plain tensors: into the state dict
            for name in [n for n, value in vars(module).items() if isinstance(value, Tensor)]:
                value = vars(module).pop(name)
                module.register_buffer(name, value)

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        c, mining = self.config, context.mining
        if mining is None:
            return super().training_step(batch, context)
        negatives = self._hard_negatives(batch, context, mining)
        embeddings = self.embed(context.encode())
        terms = {"batch": self.loss(embeddings, batch.labels, context)}
        with global_generators(context.seed, context.clock.step, 1):
            m = mining.memory
            if m is not None and c.memory_start.fraction_done(context.clock) >= 1 and len(m.labels):
                others = m.features.to(embeddings.dtype)
                found = _against(self.loss_function, self.miner, embeddings, batch.labels, others, m.labels)
                terms["memory"] = c.memory_weight * found
            if negatives is not None:
                others = negatives[0].to(embeddings)
                found = _against(self.loss_function, self.miner, embeddings, batch.labels, others, negatives[1])
                terms["hard"] = c.hard_weight * found
        loss = torch.stack(list(terms.values())).sum()
        context.backward(loss)
        context.step("main")
        mining.put(batch.ids, embeddings, batch.labels)
        return {"loss": float(loss.detach()), **{name: float(term.detach()) for name, term in terms.items()}}

    def _hard_negatives(self, batch: Batch, context: Context, mining: Mining) -> tuple[Tensor, Tensor] | None:
        """Embeddings and classes of the samples that are near the batch's, each once; none in the first steps."""
        k = self.config.hard_negatives
        if not k:
            return None
        ask: dict[str, Any] = {"which": "other", "with_values": True, "unknown": "empty"}
        found = mining.take_prefetched("hard")
        if found is None:  # the first step of an epoch
            found = mining.neighbours(k, ids=batch.ids, **ask)
        if context.next_ids is not None:
            mining.prefetch("hard", k, ids=context.next_ids, **ask)
        ids, first = np.unique(found.ids, return_index=True)
        first = first[ids >= 0]
        if len(first) == 0:
            return None
        assert found.values is not None
        values, labels = found.values.reshape(-1, found.values.shape[-1])[first], found.labels.reshape(-1)[first]
        return torch.from_numpy(values), torch.from_numpy(labels).to(batch.labels.device)

    def loss(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"], context: Context
    ) -> Float[Tensor, ""]:
        for statistic in self.loss_function.buffers():
            statistic.detach_()  # some keep the graph of the step before
        with global_generators(context.seed, context.clock.step):
            tuples = self.miner(embeddings, labels) if self.miner is not None else None
            return self.loss_function(embeddings, labels, tuples).reshape(())


__all__ = ["Baseline", "BaselineConfig"]
