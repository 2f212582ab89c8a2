"""Intra-Batch Connections (Seidenschwarz, Elezi, Leal-Taixé, ICML 2021, arXiv 2102.07753).

In training, the images of a batch exchange messages in a fully connected graph, and the resulting node features are
classified beside the plain embeddings. The graph is discarded afterwards: retrieval uses the embedding alone.

    f = W x,  z = f / |f|                    n⁰ = W_in z
    m_t = W_out Σ_s α_ts v_s over all s, heads concatenated, α with an extra zero logit (`PlusOneAttention`)
    n ← LN(n + m),  n ← LN(n + W₂ relu(W₁ n))            per layer, dropout on α, m, the hidden layer and its output
    L = LS(W_c f / T) + LS(W_g BN(n^L) / T)  LS: cross-entropy with label smoothing; BN without bias

Batches: the authors' CombineSampler (groups of K images, every image at least once an epoch, a class may stand twice in a
batch) or NumberSampler (the same, with a shape P × K drawn anew each epoch among the divisors of the batch size).
`reload_best` goes back to the best weights so far at the start of given epochs, the optimizer keeps its moments; lower the
rate there with the schedule. `inference: reciprocal` re-runs the graph at test time on each image and its k-reciprocal
neighbours: it is transductive, and not what the published tables show.

Deviations: best is measured on the validation fold, under the paper protocol on the test classes (as the authors do);
NumberSampler draws from the run's seed; running statistics of the trunk's batch norms move once a step (theirs, recomputing
layers 1 to 4 in the backward pass, twice); at evaluation images are resized bicubically. The authors' released recipe for
Stanford Online Products leaves the graph out; `graph: false` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Batch, Context, Method, MethodConfig
from methods.config import Length
from methods.functional import PlusOneAttention
from methods.intra_batch_reciprocal import reciprocal_neighbours
from methods.optim import Optimizer, OptimizerConfig, build_optimizer
from methods.plans import Plan, combine_sampler, number_sampler


class IntraBatchConfig(MethodConfig):
    name: Literal["intra_batch"] = "intra_batch"
    classes_per_batch: int = Field(6, ge=2, description="P: groups in a batch")
    samples_per_class: int = Field(9, ge=2, description="K: images of a group, all of one class")
    embedding_dim: int = Field(512, ge=1, description="D: dimension of the embedding")
    sampler: Literal["combine", "number", "balanced"] = Field(
        "combine", description="P×K of the authors | with P and K redrawn each epoch | no class twice in a batch"
    )
    graph: bool = Field(
        True, description="pass messages between the images of a batch; false: the cross-entropy of the embedding alone"
    )
    layers: int = Field(1, ge=1, description="layers of message passing")
    heads: int = Field(2, ge=1, description="heads of the attention; a divisor of embedding_dim")
    concatenate: bool = Field(
        False, description="classify the concatenated outputs of all layers instead of the last one's"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the message passing, probability")
    temperature: float = Field(0.2, gt=0, description="T: logits are divided by it")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing of the cross-entropy, 0 to 1")
    reload_best: tuple[int, ...] = Field((), description="epochs (from 0) that start from the best weights so far")
    inference: Literal["embedding", "reciprocal"] = Field(
        "embedding", description="reciprocal: the graph on each test image and its k-reciprocal neighbours"
    )
    neighbours: int = Field(7, ge=2, description="inference reciprocal: images of a test graph")
    reciprocal_k: int = Field(30, ge=1, description="inference reciprocal: k of the k-reciprocal neighbours")
    optimizer: OptimizerConfig = OptimizerConfig(name="radam", lr=1e-4, decoupled=True)

    @property
    def is_class_balanced(self) -> bool:
        return self.sampler == "balanced"

    @model_validator(mode="after")
    def _check(self) -> IntraBatchConfig:
        if self.embedding_dim % self.heads:
            raise ValueError(f"heads is {self.heads}: expected a divisor of embedding_dim ({self.embedding_dim})")
        if self.inference == "reciprocal" and not self.graph:
            raise ValueError("inference 'reciprocal' runs the graph, which is off: set graph to true")
        if any(epoch < 1 for epoch in self.reload_best):
            raise ValueError(
                f"reload_best is {self.reload_best}: expected epochs from 1 on, there are no weights before"
            )
        return self

    @property
    def needs_best(self) -> bool:
        return bool(self.reload_best)

    @property
    def loads_best_after(self) -> Length | None:
        return Length(value=min(self.reload_best), unit="epochs") if self.reload_best else None


class MessageLayer(nn.Module):
    """One round of messages: attention and a two-layer network, each with dropout, skip connection and layer norm."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = PlusOneAttention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Float[Tensor, "nodes dim"], allowed: Tensor | None = None) -> Float[Tensor, "nodes dim"]:
        nodes = self.norm1(nodes + self.dropout(self.attention(nodes, allowed)))
        hidden = self.dropout(torch.relu(self.linear1(nodes)))
        return self.norm2(nodes + self.dropout(self.linear2(hidden)))


class MessageNetwork(nn.Module):
    """The graph part: embeddings of length 1 [B, D] to class logits [B, C], every image a node, all connected."""

    def __init__(self, config: IntraBatchConfig, num_classes: int) -> None:
        super().__init__()
        self.concatenate = config.concatenate
        dim = config.embedding_dim
        width = dim * (config.layers if config.concatenate else 1)
        self.input = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(MessageLayer(dim, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.BatchNorm1d(width)
        self.norm.bias.requires_grad_(False)
        self.classifier = nn.Linear(width, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=1e-3)

    def nodes(
        self, embeddings: Float[Tensor, "nodes dim"], allowed: Tensor | None = None
    ) -> Float[Tensor, "nodes width"]:
        """Node features after all layers; `allowed` [target, source] is True where a message passes."""
        nodes, outputs = self.input(embeddings), []
        for layer in self.layers:
            nodes = layer(nodes, allowed)
            outputs.append(nodes)
        return torch.cat(outputs, 1) if self.concatenate else nodes

    def forward(self, embeddings: Float[Tensor, "nodes dim"]) -> Float[Tensor, "nodes classes"]:
        return self.classifier(self.norm(self.nodes(embeddings)))


class IntraBatch(Method):
    Config = IntraBatchConfig
    reloads: Tensor

    def __init__(self, config: IntraBatchConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.classifier = nn.Linear(config.embedding_dim, num_classes)
        self.network = MessageNetwork(config, num_classes) if config.graph else None
        self.register_buffer("reloads", torch.zeros((), dtype=torch.int64))  # how many have been done

    def plan(self, epoch: int, context: Context) -> Plan:
        c = self.config
        if c.sampler == "balanced":
            return super().plan(epoch, context)
        make_plan = {"combine": combine_sampler, "number": number_sampler}[c.sampler]
        return make_plan(context.labels, c.classes_per_batch, c.samples_per_class, context.seed, epoch)

    def optimizers(self, trunk: nn.Module) -> dict[str, Optimizer]:
        return {
            "main": build_optimizer(self.config.optimizer, {"trunk": trunk.parameters(), "head": self.parameters()})
        }

    def on_epoch_start(self, epoch: int, context: Context) -> None:
        num_due = sum(epoch >= reload_epoch for reload_epoch in self.config.reload_best)
        if num_due > int(self.reloads):
            context.load_best()
            self.reloads.fill_(num_due)

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        terms = self.terms(self.head.project(context.encode()), batch.labels)
        context.backward(terms["loss"])
        context.step("main")
        return {name: float(value.detach()) for name, value in terms.items()}

    def terms(self, f: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"]) -> Mapping[str, Float[Tensor, ""]]:
        """The loss of a batch and its parts; `f` are the embeddings before normalisation."""
        plain = self._cross_entropy(self.classifier(f), labels)
        if self.network is None:
            return {"loss": plain}
        graph = self._cross_entropy(self.network(F.normalize(f)), labels)
        return {"loss": plain + graph, "cross_entropy": plain, "graph_cross_entropy": graph}

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits / self.config.temperature, labels, label_smoothing=self.config.label_smoothing)

    def refine_embeddings(self, embeddings: Float[Tensor, "images dim"]) -> Float[Tensor, "images width"]:
        """Each image's node after messages among it and its k-reciprocal neighbours, where the config asks for it."""
        if self.config.inference == "embedding" or self.network is None:
            return embeddings
        groups = reciprocal_neighbours(embeddings, self.config.reciprocal_k, self.config.neighbours)
        refined = []
        for ids in groups.split(64):  # one graph of 64 × neighbours nodes; messages pass within a group only
            group_of_node = torch.arange(len(ids), device=embeddings.device).repeat_interleave(ids.shape[1])
            nodes = self.network.nodes(embeddings[ids.flatten()], group_of_node[:, None] == group_of_node[None])
            refined.append(F.normalize(nodes.unflatten(0, ids.shape)[:, 0]))
        return torch.cat(refined)


__all__ = ["IntraBatch", "IntraBatchConfig"]
