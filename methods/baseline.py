"""Baseline: any loss and miner of pytorch-metric-learning (Musgrave, Belongie, Lim, arXiv 2008.09164), by name.

    L = loss(z, y, miner(z, y)),    z = W f / |W f|,  f the pooled features

    method: {name: baseline, loss: MultiSimilarityLoss, loss_args: {alpha: 2, beta: 50, base: 0.5},
             miner: MultiSimilarityMiner, miner_args: {epsilon: 0.1}}

Two ways to look beyond the batch, each with a weight, through the mining server:

- `memory`: cross-batch memory (XBM; Wang, Zhang, Huang, Scott, CVPR 2020, arXiv 1912.06798). The loss of the batch against itself
  and the last so many embeddings before it, M, from `memory_start` on:  L + memory_weight * loss(z, y, miner(z, y, M'), M'),
  M' = [z; M], constant; no image is compared with itself. So every image has its positives of the batch beside those of M, however
  many classes there are.
- `hard_negatives`: the k nearest of the newest embeddings of all samples of other classes, H, for every image of the batch, by
  the image's own stored embedding; asked for one step ahead, so that no step waits for them:
  L + hard_weight * loss(z, y, miner(z, y, H'), H'),  H' = [z; H], of which z gives positives only, and H negatives only.

Both need a loss that keeps to the pairs or triplets that it is given: ContrastiveLoss, TripletMarginLoss, MultiSimilarityLoss,
NTXentLoss, SupConLoss, CircleLoss, MarginLoss, the lifted structure losses, TupletMarginLoss and others; a loss that takes its pairs
from the labels alone is refused.

Prefixes that serve alone: `matryoshka: [16, 32, 64]` (Matryoshka representation learning; Kusupati et al., NeurIPS 2022,
arXiv 2205.13147) trains the first 16, 32 and 64 dimensions too, each at length one, with a miner's choice of its own:

    L = sum over m in {16, 32, 64, D} of loss_m(z_m, y, miner(z_m, y)),    z_m = z[:m] / |z[:m]|

A loss with parameters or running statistics has them for each prefix (the paper's MRL, not MRL-E), all weights are 1 as in
the paper, and the memory and the hard negatives are cut likewise. Evaluation measures each of these dimensions.

Deviations: past embeddings of the same image stay in the memory.
A loss or miner that draws random numbers draws them from (seed, step) instead of a global generator, so that a run can be
repeated and continued. A loss with parameters is trained at `loss_lr_multiplier`, which is 100 for proxies and class centres where
nothing is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from methods.base import Batch, Context, Method, MethodConfig, MethodError
from methods.config import Length
from methods.functional import global_generators, prefix
from methods.metric_learning import (
    References,
    build_loss,
    build_miner,
    check_references,
    evaluate_loss,
    loss_classes,
    miner_classes,
)
from methods.mining import Mining, MiningRequirements


class BaselineConfig(MethodConfig):
    name: Literal["baseline"] = "baseline"
    loss: str = Field(
        "MultiSimilarityLoss", description="class of pytorch_metric_learning.losses, or module:CLASS of your own"
    )
    loss_args: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the loss; distance, reducer and regularizers by name, or as {name: LpDistance, p: 2}",
    )
    miner: str | None = Field(
        None,
        description="class of pytorch_metric_learning.miners, or module:CLASS of your own; none: all pairs or triplets",
    )
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
    hard_weight: float = Field(
        0.1,
        ge=0,
        description="weight of the loss over the hard negatives; 1 made the embeddings collapse with MultiSimilarityLoss",
    )
    matryoshka: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="dimensions of prefixes of the embedding that are trained beside the whole one, ascending, so that a "
        "prefix at length one serves alone; null: the whole embedding only",
    )

    @property
    def nested_dims(self) -> tuple[int, ...]:
        return () if self.matryoshka is None else tuple(dict.fromkeys((*self.matryoshka, self.embedding_dim)))

    @property
    def has_proxies(self) -> bool:
        loss = build_loss(self.loss, self.loss_args, 2, self.embedding_dim)
        return any(parameter.ndim > 1 for parameter in loss.parameters())

    @property
    def mining(self) -> MiningRequirements | None:
        if not self.memory and not self.hard_negatives:
            return None
        return MiningRequirements(bool(self.hard_negatives), self.hard_negatives or 10, total=self.memory or None)

    @model_validator(mode="after")
    def _check(self) -> BaselineConfig:
        if self.miner is None and self.miner_args:
            raise ValueError("miner_args are given, but no miner: set miner, or leave out miner_args")
        self._check_prefixes()
        with global_generators(0):
            miner = build_miner(self.miner, self.miner_args) if self.miner else None
            for dim in self.nested_dims or (self.embedding_dim,):
                loss = build_loss(self.loss, self.loss_args, 2, dim)
                self._try_once(loss, miner, dim)
        return self

    def _check_prefixes(self) -> None:
        dims = self.matryoshka
        if dims is None:
            return
        if not dims or list(dims) != sorted(set(dims)) or dims[-1] > self.embedding_dim:
            raise ValueError(
                f"matryoshka is {list(dims)}, expected ascending dimensions of at most embedding_dim, {self.embedding_dim}, "
                "such as [16, 32, 64]; null trains the whole embedding only"
            )

    def _try_once(self, loss: Any, miner: Any, dim: int) -> None:
        """Calls loss and miner once: many wrong argument values fail only in the call, which would be the first step."""
        embeddings, labels = torch.randn(8, dim), torch.arange(8) // 4
        try:
            evaluate_loss(loss, miner, embeddings, labels)
            if self.mining is not None:
                self._check_references(miner, dim)
        except MethodError as error:
            description = f"{self.loss} with {self.loss_args}" + (
                f", {self.miner} with {self.miner_args}" if miner is not None else ""
            )
            problem = str(error).partition(": ")[2]
            raise ValueError(f"{description} fails on a batch of random embeddings: {problem}") from None

    def _check_references(self, miner: Any, dim: int) -> None:
        try:
            check_references(lambda: build_loss(self.loss, self.loss_args, 8, dim), miner, dim)
        except ValueError as error:
            keys = " and ".join(name for name in ("memory", "hard_negatives") if getattr(self, name))
            raise ValueError(
                f"{self.loss} cannot be used with {keys}: {error}; choose a loss of given pairs or triplets, such as ContrastiveLoss, "
                "TripletMarginLoss, MultiSimilarityLoss, NTXentLoss or SupConLoss"
            ) from None


class Baseline(Method):
    Config = BaselineConfig

    def __init__(self, config: BaselineConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.loss_function = build_loss(config.loss, config.loss_args, num_classes, config.embedding_dim)
        self.prefix_losses = nn.ModuleDict(
            {
                str(dim): build_loss(config.loss, config.loss_args, num_classes, dim)
                for dim in config.nested_dims
                if dim < config.embedding_dim
            }
        )
        self.miner = build_miner(config.miner, config.miner_args) if config.miner else None
        for module in (*self.loss_function.modules(), *self.prefix_losses.modules()):
            # running statistics in plain tensors: into the state dict
            for name in [n for n, value in vars(module).items() if isinstance(value, Tensor)]:
                value = vars(module).pop(name)
                module.register_buffer(name, value)
        self._has_statistics = any(True for _ in (*self.loss_function.buffers(), *self.prefix_losses.buffers()))

    def training_step(self, batch: Batch, context: Context) -> Mapping[str, float | Tensor]:
        config, mining = self.config, context.mining
        if mining is None:
            return super().training_step(batch, context)
        negatives = self._hard_negatives(batch, context, mining)
        embeddings = self.embed(context.encode())
        terms = {"batch": self.loss(embeddings, batch.labels, context)}
        with global_generators(context.seed, context.clock.step, 1):
            memory = mining.memory
            if memory is not None and config.memory_start.fraction_done(context.clock) >= 1 and len(memory.labels):
                past = References.of(embeddings, batch.labels, memory.features, memory.labels, negatives_only=False)
                terms["memory"] = config.memory_weight * self._sum_over_prefixes(embeddings, batch.labels, past)
            if negatives is not None:
                hard = References.of(embeddings, batch.labels, *negatives, negatives_only=True)
                terms["hard"] = config.hard_weight * self._sum_over_prefixes(embeddings, batch.labels, hard)
        loss = torch.stack(list(terms.values())).sum()
        context.backward(loss)
        context.step("main")
        mining.put(torch.from_numpy(batch.host_ids), embeddings, torch.from_numpy(batch.host_labels))
        return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    def _sum_over_prefixes(self, embeddings: Tensor, labels: Tensor, references: References | None = None) -> Tensor:
        """The loss of the batch, among itself or against references, over the nested prefixes."""
        total = evaluate_loss(self.loss_function, self.miner, embeddings, labels, references)
        for name, loss in self.prefix_losses.items():
            dim = int(name)
            cut = None if references is None else references.prefix(dim)
            total = total + evaluate_loss(loss, self.miner, prefix(embeddings, dim), labels, cut)
        return total

    def _hard_negatives(self, batch: Batch, context: Context, mining: Mining) -> tuple[Tensor, Tensor] | None:
        """Embeddings and classes of the distinct neighbours of the batch's images; None in the first steps."""
        k = self.config.hard_negatives
        if not k:
            return None
        search_options: dict[str, Any] = {"class_filter": "other", "with_embeddings": True, "missing": "empty"}
        neighbours = mining.take_prefetched("hard")
        if neighbours is None:  # the first step of an epoch
            neighbours = mining.neighbours(k, ids=batch.host_ids, **search_options)
        if context.next_ids is not None:
            mining.prefetch("hard", k, ids=context.next_ids, **search_options)
        ids, first_positions = np.unique(neighbours.ids, return_index=True)
        first_positions = first_positions[ids >= 0]
        if len(first_positions) == 0:
            return None
        assert neighbours.embeddings is not None
        embeddings = neighbours.embeddings.reshape(-1, neighbours.embeddings.shape[-1])[first_positions]
        labels = neighbours.labels.reshape(-1)[first_positions]
        return torch.from_numpy(embeddings), torch.from_numpy(labels).to(batch.labels.device, non_blocking=True)

    def loss(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"], context: Context
    ) -> Float[Tensor, ""]:
        if self._has_statistics:
            for statistic in (*self.loss_function.buffers(), *self.prefix_losses.buffers()):
                statistic.detach_()  # some keep the graph of the step before
        with global_generators(context.seed, context.clock.step):
            return self._sum_over_prefixes(embeddings, labels)


__all__ = ["Baseline", "BaselineConfig", "loss_classes", "miner_classes"]
