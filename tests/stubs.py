"""Two methods that exist to prove the method contract, and the tiny run that every test of the laws trains.

The product does not know them: `registered` puts them into METHODS, in a test or in one of its processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from methods import METHODS, Batch, Method, MethodConfig
from methods.optim import OptimizerConfig, build_optimizer
from methods.plans import Plan
from pipeline.config import Config, build_config
from pipeline.testing.tiny import tiny_values


class TwoOptimizersConfig(MethodConfig):
    name: Literal["two_optimizers"] = "two_optimizers"
    classifier: OptimizerConfig = OptimizerConfig(lr=1e-2)


class TwoOptimizers(Method):
    """A metric loss on trunk and head, then a classifier with an optimizer of its own on the detached embeddings.

    The metric loss sees random noise and dropout, and is divided by a running scalar that is a buffer.
    """

    Config = TwoOptimizersConfig

    def __init__(self, config: Any, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.classifier = nn.Linear(config.embedding_dim, num_classes)
        self.register_buffer("running", torch.ones(()))

    def optimizers(self, trunk):
        main = {"trunk": trunk.parameters(), "head": self.head.parameters()}
        return {
            "main": build_optimizer(self.config.optimizer, main),
            "classifier": build_optimizer(self.config.classifier, {"classifier": self.classifier.parameters()}),
        }

    def training_step(self, batch: Batch, context) -> dict[str, float]:
        embeddings = self.embed(context.encode())
        drawn = {"generator": context.generator, "device": context.device, "dtype": context.dtype}
        kept = torch.rand(embeddings.shape, **drawn) > 0.1
        noisy = embeddings * kept + 0.05 * torch.randn(embeddings.shape, **drawn)
        loss = pair_loss(noisy, batch.labels) / (0.5 + self.running)
        context.backward(loss)
        context.step("main")
        classification = nn.functional.cross_entropy(self.classifier(noisy.detach()), batch.labels)
        context.backward(classification)
        context.step("classifier")
        self.running.lerp_(loss.detach(), 0.1)
        return {"loss": float(loss.detach()), "classification": float(classification.detach())}


def pair_loss(embeddings, labels):
    """Mean softplus over all pairs: of -s for equal classes, of s for others."""
    same = labels[:, None] == labels[None]
    similarity = 4 * embeddings @ embeddings.T
    return nn.functional.softplus(torch.where(same, -similarity, similarity)).mean()


class SweptPlanConfig(MethodConfig):
    name: Literal["swept_plan"] = "swept_plan"
    steps: int = 4
    triplets: int = 3
    load_best_at: int = 2


class SweptPlan(Method):
    """Triplets mined anew for every epoch from the embeddings of all training samples: a plan that has to be stored.

    Beside the triplets every step has as many slots of the role "spare", which are loaded and never encoded.
    """

    Config = SweptPlanConfig
    plan_is_stored = True
    ROLES = ("anchor", "positive", "negative")

    def __init__(self, config: Any, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.register_buffer("epochs_done", torch.zeros((), dtype=torch.int64))

    def plan(self, epoch: int, context) -> Plan:
        if epoch == self.config.load_best_at:
            context.load_best()
        labels = torch.from_numpy(context.labels)
        embeddings = self_similarity = context.embed_samples(np.arange(len(labels))).cpu()
        self_similarity = embeddings @ embeddings.T
        same = labels[:, None] == labels[None]
        hardest_negative = self_similarity.masked_fill(same, -torch.inf).argmax(1)
        others = same & ~torch.eye(len(labels), dtype=torch.bool)
        hardest_positive = self_similarity.masked_fill(~others, torch.inf).argmin(1)
        anchors = others.any(1).nonzero()[:, 0]
        count = self.config.steps * self.config.triplets
        drawn = torch.randint(len(anchors), (count,), generator=context.generator, device=context.device).cpu()
        anchors = anchors[drawn]
        spare = torch.randint(len(labels), (count,), generator=context.generator, device=context.device).cpu()
        ids = torch.stack([anchors, hardest_positive[anchors], hardest_negative[anchors], spare], 1)
        ids = ids.view(self.config.steps, -1).numpy()
        # the spare slots stand in the middle: the encoded ones are then no contiguous stretch of the batch
        order = np.argsort(np.tile(np.array([0, 2, 3, 1]), self.config.triplets), kind="stable")
        roles = np.tile(np.array(["anchor", "positive", "negative", "spare"]), self.config.triplets)[order]
        return Plan(ids[:, order], {"role": np.tile(roles, (self.config.steps, 1))})

    def on_epoch_end(self, epoch: int, context, metrics: Mapping[str, float] | None) -> None:
        self.epochs_done += 1

    def training_step(self, batch: Batch, context) -> dict[str, float]:
        roles = batch.columns["role"][np.isin(batch.columns["role"], self.ROLES)]
        embeddings = self.embed(context.encode(self.ROLES))
        anchor, positive, negative = (embeddings[torch.from_numpy(roles == role)] for role in self.ROLES)
        margin = 0.5 + 0.1 * self.epochs_done
        loss = nn.functional.softplus((anchor * (negative - positive)).sum(1) + margin).mean()
        context.backward(loss)
        context.step("main")
        return {"loss": float(loss.detach())}


STUBS: dict[str, type[Method]] = {"two_optimizers": TwoOptimizers, "swept_plan": SweptPlan}


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The stubs are methods like any other inside the block."""
    METHODS.update(STUBS)
    try:
        yield
    finally:
        for name in STUBS:
            del METHODS[name]


def tiny_config(root: str, store: str, changes: Mapping[str, Any] | None = None) -> Config:
    """The same, validated; the stubs have to be registered if it uses one."""
    return build_config(tiny_values(root, store, changes))
