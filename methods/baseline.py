"""Baseline: any loss and miner of pytorch-metric-learning (Musgrave, Belongie, Lim, arXiv 2008.09164), by name.

    L = loss(z, y, miner(z, y)),    z = W f / |W f|,  f the pooled features

    method: {name: baseline, loss: MultiSimilarityLoss, loss_args: {alpha: 2, beta: 50, base: 0.5},
             miner: MultiSimilarityMiner, miner_args: {epsilon: 0.1}}

Deviation: a loss or miner that draws random numbers draws them from (seed, step) instead of a global generator, so
that a run can be repeated and continued. A loss with parameters (proxies) is trained at `loss_lr_multiplier`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

from methods.base import Context, Method, MethodConfig
from methods.functional import global_generators

GIVEN = {"num_classes", "embedding_size"}  # arguments that follow from the data and the head


def _candidates(module: Any, base: type, without: tuple[str, ...]) -> dict[str, type]:
    found = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)}
    return {n: c for n, c in found.items() if not n.startswith("Base") and n not in without}


# Left out: wrappers around another loss, and losses that are not a function of (embeddings, labels).
LOSSES = _candidates(
    losses, losses.BaseMetricLossFunction, ("GenericPairLoss", "WeightRegularizerMixin", "VICRegLoss", "MultipleLosses")
)
MINERS = _candidates(miners, miners.BaseMiner, ())


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
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{name} refuses {dict(arguments)}: {error}") from None


class BaselineConfig(MethodConfig):
    name: Literal["baseline"] = "baseline"
    loss: str = Field("MultiSimilarityLoss", description="class of pytorch_metric_learning.losses")
    loss_args: dict[str, Any] = Field(default_factory=dict)
    miner: str | None = Field(None, description="class of pytorch_metric_learning.miners")
    miner_args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> BaselineConfig:
        _build("loss", self.loss, self.loss_args, LOSSES, {"num_classes": 2, "embedding_size": self.embedding_dim})
        if self.miner is not None:
            _build("miner", self.miner, self.miner_args, MINERS, {})
        elif self.miner_args:
            raise ValueError("miner_args are given, but no miner")
        return self


class Baseline(Method):
    Config = BaselineConfig

    def __init__(self, config: BaselineConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        given = {"num_classes": num_classes, "embedding_size": config.embedding_dim}
        self.loss_function = _build("loss", config.loss, config.loss_args, LOSSES, given)
        self.miner = _build("miner", config.miner, config.miner_args, MINERS, {}) if config.miner else None

    def loss(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, batch], context: Context
    ) -> Float[Tensor, ""]:
        with global_generators(context.seed, context.clock.step):
            tuples = self.miner(embeddings, labels) if self.miner is not None else None
            return self.loss_function(embeddings, labels, tuples).reshape(())


__all__ = ["Baseline", "BaselineConfig"]
