"""The graph network of GCA-HNG: every image a node, every pair of images an edge with a vector of its own.

    σ(x) = LN(GELU(x)), one LN for all σ of a block
    node:  t₁ = σ(n + attention over nodes of other classes);  t₂ = σ(t₁ + Σ_j GELU(W E_ij));  n' = σ(t₂ + W₂ GELU(W₁ t₂))
    edge:  g = GELU(W n');  q_ij = W_q E_ij, k_i = W_k g_i, v_i = W_v g_i;  (w_i, w_j) = softmax(q_ij·k_i, q_ij·k_j)/√D
           t = σ(w_i v_i + w_j v_j + E_ij);  E'_ij = σ(t + W_b LN(GELU(W_a t)))

Savings that leave the result unchanged:

- E_ij = E_ji in every layer, so each unordered pair is computed once; sums over pairs count the off-diagonal ones twice.
- Keys and values belong to nodes. So do the queries' products: q_ij·k_i = E_ij·(W_qᵀ k_i) + b_q·k_i, one matrix product
  of edges and nodes; the weighted values are one more. No vector of a node is copied to its edges.
- GELU and layer norm are computed anew in the backward pass instead of being kept.
- λ needs no gradient while the embedding learns: the last edge block then keeps nothing.
- Pairs can be shared among ranks: sums over pairs, and gradients of what they read, are then summed over the ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from methods.base import Ranks
from methods.functional import PlusOneAttention


@dataclass(frozen=True)
class Pairs:
    """The edges that this process computes.

    Attributes:
        first, second: Nodes i and j of each edge.
        weight: 2 where an edge represents both (i, j) and (j, i), else 1.
        index: Number of the edge of every ordered pair among the edges of all processes, [B, B].
        local: This process's share of the edges.
        ranks: The processes that divide the edges among them; None: this one computes all.
        symmetric: Whether (i, j) and (j, i) are one edge.
    """

    first: Int64[Tensor, " edges"]
    second: Int64[Tensor, " edges"]
    weight: Float[Tensor, " edges"]
    index: Int64[Tensor, "batch batch"]
    local: slice
    ranks: Ranks | None
    symmetric: bool

    @classmethod
    def of(cls, like: Tensor, symmetric: bool, ranks: Ranks | None) -> Pairs:
        """The edges among the rows of `like`; unordered pairs if `symmetric`."""
        count, device = len(like), like.device
        if symmetric:
            first, second = torch.triu_indices(count, count, device=device)
        else:
            first, second = torch.cartesian_prod(*[torch.arange(count, device=device)] * 2).T
        index = torch.empty(count, count, dtype=torch.int64, device=device)
        number = torch.arange(len(first), device=device)
        if symmetric:
            index[second, first] = number
        index[first, second] = number
        local = slice(0, len(first)) if ranks is None else ranks.slice(len(first))
        first, second = first[local], second[local]
        weight = torch.where(first == second, 1.0, 2.0) if symmetric else torch.ones(len(first), device=device)
        return cls(first, second, weight.to(like.dtype), index, local, ranks, symmetric)

    @property
    def total(self) -> int:
        """Number of the edges of all processes."""
        count = len(self.index)
        return count * (count + 1) // 2 if self.symmetric else count * count

    def row_sums(self, edges: Float[Tensor, "edges dim"]) -> Float[Tensor, "batch dim"]:
        """Σ_j of the edges of every node."""
        node_sums = edges.new_zeros(len(self.index), edges.shape[1]).index_add(0, self.first, edges)
        if self.symmetric:
            off_diagonal = (self.first != self.second)[:, None]
            node_sums = node_sums.index_add(0, self.second, edges * off_diagonal)
        return self.sum_over_ranks(node_sums)

    def dense(self, edges: Float[Tensor, "edges dim"]) -> Float[Tensor, "batch batch dim"]:
        """The edges of all processes, by ordered pair, for use by each process in parts."""
        if self.ranks is not None:
            all_edges = edges.new_zeros(self.total, edges.shape[1])
            positions = torch.arange(*self.local.indices(len(all_edges)), device=edges.device)
            edges = self.copy_to_ranks(self.sum_over_ranks(all_edges.index_copy(0, positions, edges)))
        return edges[self.index]

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum over the processes of values computed from local edges; the backward pass is the identity."""
        return x if self.ranks is None else self.ranks.sum_over_ranks(x)

    def copy_to_ranks(self, x: Tensor) -> Tensor:
        """Identity of a replicated `x`, for use with local edges; the backward pass sums its gradient over the processes."""
        return x if self.ranks is None else self.ranks.copy_to_ranks(x)

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The layer applied to local edges."""
        return F.linear(x, self.copy_to_ranks(layer.weight), self.copy_to_ranks(layer.bias))

    def gelu_norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """LN(GELU(x)) of local edges, recomputed in the backward pass."""
        return _gelu_norm(x, self.copy_to_ranks(norm.weight), self.copy_to_ranks(norm.bias), norm.eps)


def _gelu_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if not torch.is_grad_enabled():
        return _gelu_norm_plain(x, weight, bias, eps)
    return checkpoint(_gelu_norm_plain, x, weight, bias, eps, use_reentrant=False, preserve_rng_state=False)


def _gelu_norm_plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(F.gelu(x), (x.shape[-1],), weight, bias, eps)


class NodeBlock(nn.Module):
    """One round of messages to the nodes."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = PlusOneAttention(dim, heads)
        self.edge_to_node = nn.Linear(dim, dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        nodes: Float[Tensor, "batch dim"],
        edges: Float[Tensor, "edges dim"],
        pairs: Pairs,
        negatives: Bool[Tensor, "batch batch"],
    ) -> Float[Tensor, "batch dim"]:
        nodes = self.norm(F.gelu(nodes + self.attention(nodes, negatives)))
        received = pairs.row_sums(F.gelu(pairs.linear(self.edge_to_node, edges)))
        nodes = self.norm(F.gelu(nodes + received))
        return self.norm(F.gelu(nodes + self.linear2(F.gelu(self.linear1(nodes)))))


class EdgeBlock(nn.Module):
    """One round of messages to the edges."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.node_to_edge = nn.Linear(dim, dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.hidden_norm = nn.LayerNorm(4 * dim)
        self.dropout = dropout

    def forward(
        self, nodes: Float[Tensor, "batch dim"], edges: Float[Tensor, "edges dim"], pairs: Pairs
    ) -> Float[Tensor, "edges dim"]:
        nodes = F.gelu(self.node_to_edge(nodes))
        key, value = self.key(nodes), pairs.copy_to_ranks(self.value(nodes))
        products = pairs.copy_to_ranks(key @ self.query.weight)  # W_qᵀ k of every node
        offsets = pairs.copy_to_ranks(key @ self.query.bias)
        scores = edges @ products.T + offsets
        end_nodes = torch.stack([pairs.first, pairs.second], 1)
        weights = (scores.gather(1, end_nodes) / math.sqrt(edges.shape[1])).softmax(1)
        weights = weights * self._dropout_weights(pairs, weights)
        node_weights = torch.zeros_like(scores).scatter_add(1, end_nodes, weights)
        edges = pairs.gelu_norm(self.norm, node_weights @ value + edges)
        hidden = pairs.gelu_norm(self.hidden_norm, pairs.linear(self.linear1, edges))
        return pairs.gelu_norm(self.norm, edges + pairs.linear(self.linear2, hidden))

    def _dropout_weights(self, pairs: Pairs, like: Tensor) -> Tensor:
        """Dropout of the two weights of every edge, drawn for the edges of all processes alike; this process's share."""
        ones = like.new_ones(pairs.total, 2)
        return F.dropout(ones, self.dropout, self.training)[pairs.local]


class EdgeNorm(nn.Module):
    """Batch norm over all B² edges, with a learnt scale and no shift."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, edges: Float[Tensor, "edges dim"], pairs: Pairs) -> Float[Tensor, "edges dim"]:
        count = len(pairs.index) ** 2
        mean = pairs.copy_to_ranks(pairs.sum_over_ranks(pairs.weight @ edges) / count)
        centred = edges - mean
        variance = pairs.copy_to_ranks(pairs.sum_over_ranks(pairs.weight @ centred.square()) / count)
        return centred * (torch.rsqrt(variance + 1e-5) * pairs.copy_to_ranks(self.weight))


class CorrelationGraph(nn.Module):
    """Embeddings and classes of a batch to λ of every ordered pair and channel, and class logits of every node."""

    def __init__(
        self, dim: int, num_classes: int, layers: int, heads: int, edge_dropout: float, symmetric: bool
    ) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.reduce = nn.Linear(dim, dim)
        self.nodes = nn.ModuleList(NodeBlock(dim, heads) for _ in range(layers))
        self.edges = nn.ModuleList(EdgeBlock(dim, edge_dropout) for _ in range(layers))
        self.edge_norm = EdgeNorm(dim)
        self.lambda_head = nn.Linear(dim, dim)
        self.node_norm = nn.BatchNorm1d(dim, track_running_stats=False)
        self.node_norm.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(
        self,
        z: Float[Tensor, "batch dim"],
        labels: Int64[Tensor, " batch"],
        ranks: Ranks | None,
        train_lambda: bool,
        classify: bool = True,
    ) -> tuple[Float[Tensor, "batch batch dim"], Float[Tensor, "batch classes"] | None]:
        """λ in (0, 1) and logits.

        Args:
            z: Embeddings.
            labels: Class of each row; nodes receive messages from other classes only.
            ranks: The processes that divide the edges among them; None: this one computes all.
            train_lambda: Whether λ has a gradient.
            classify: Whether to compute logits.
        """
        pairs = Pairs.of(z, self.symmetric, ranks)
        unit = pairs.copy_to_ranks(F.normalize(z - z.mean(1, keepdim=True)))
        edges, nodes = unit[pairs.first] * unit[pairs.second], self.reduce(z)
        negatives = labels[:, None] != labels[None]
        last = len(self.nodes) - 1
        for number, (to_nodes, to_edges) in enumerate(zip(self.nodes, self.edges, strict=True)):
            nodes = to_nodes(nodes, edges, pairs, negatives)
            with torch.set_grad_enabled(torch.is_grad_enabled() and (train_lambda or number < last)):
                edges = to_edges(nodes, edges, pairs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_lambda):
            normed = self.edge_norm(edges, pairs)
            lam = pairs.dense(torch.sigmoid(pairs.linear(self.lambda_head, normed)))
        return lam, self.classifier(self.node_norm(nodes)) if classify else None
