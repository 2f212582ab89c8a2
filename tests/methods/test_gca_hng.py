"""GCA-HNG against two iterations of the authors' program, and its graph against plain loops over edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.gca_hng import BatchLayout, GcaHng, GcaHngConfig, npair, similarity_term_mask, synthesise, synthetic_npair
from methods.gca_hng_graph import CorrelationGraph, EdgeNorm, Pairs
from methods.optim import OptimizerConfig
from tests.methods.context import FakeContext

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("gca_hng_k2_l1", "gca_hng_k3_l2")
OURS = (
    ("feature_extractor.fc", "head.linear"), ("softmax_classifier", "classifier"), ("gnn.dim_red", "graph.reduce"),
    ("gnn.bottleneck1.0", "graph.edge_norm"), ("gnn.bottleneck2.0", "graph.node_norm"), ("gnn.fc.0", "graph.lambda_head"),
    ("gnn.cls.0", "graph.classifier"),
)  # fmt: skip
BLOCKS = (
    ("att.q_linear", "query"), ("att.k_linear", "key"), ("att.v_linear", "value"), ("norm.1", "norm"),
    ("linear.0", "linear1"), ("linear.2", "hidden_norm"), ("linear.3", "linear2"),
)  # fmt: skip


def renamed(name: str) -> str | None:
    """A parameter of the authors' program in ours; None where it does nothing."""
    for old, new in OURS:
        name = name.replace(old, new)
    if "update_node" in name or "running" in name or "num_batches" in name or name == "graph.edge_norm.bias":
        return None
    if "node_model" in name:
        number, rest = name.removeprefix("gnn.gnn.").split(".node_model.layers.0.")
        for old, new in (("att.q_linear", "attention.query"), ("att.k_linear", "attention.key"),
                         ("att.v_linear", "attention.value"), ("att.out", "attention.out"), ("norm.1", "norm")):  # fmt: skip
            rest = rest.replace(old, new)
        return f"graph.nodes.{number}.{rest}"
    if "edge_model" in name:
        number, rest = name.removeprefix("gnn.gnn.").split(".edge_model.")
        for old, new in BLOCKS:
            rest = rest.replace(old, new)
        return f"graph.edges.{number}.{rest}"
    return name


class Plain(nn.Module):
    """The head of the golden case: one linear layer."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def load(case: str, **changes: Any) -> tuple[dict[str, Any], GcaHng]:
    golden = torch.load(GOLDEN / f"{case}.pt", weights_only=True)
    m = golden["meta"]
    clip = m["clip_value"]
    values: dict[str, Any] = {
        "classes_per_batch": m["C"], "samples_per_class": m["K"], "embedding_dim": m["D"], "layers": m["layers"],
        "heads": m["heads"], "edge_dropout": 0.0, "alpha": m["alpha"], "beta": m["beta"], "softmax_weight": m["softmax_factor"],
        "similarity_weight": m["dot_weight"], "diversity_weight": m["div_weight"], "similarity_mask": "reference",
        "zero_gradients": not m["zero_grad_set_to_none"], "warmup": "0 epochs",
        "optimizer": OptimizerConfig(lr=m["lr_c"], weight_decay=m["wd_c"], clip_value=clip),
        "graph_optimizer": OptimizerConfig(lr=m["lr_gnn"], weight_decay=m["wd_gnn"], clip_value=clip),
        "classifier_optimizer": OptimizerConfig(lr=m["lr_s"], weight_decay=m["wd_s"]),
    }  # fmt: skip
    method = GcaHng(GcaHngConfig(**{**values, **changes}), golden["x"].shape[1], m["n_class"])
    method.head = Plain(golden["x"].shape[1], m["D"])  # type: ignore[assignment]
    method.double()
    state = {renamed(k): v for k, v in golden["state_before"].items() if renamed(k) is not None}
    missing, unexpected = method.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"metric_mean", "generator_mean", "sums", "iterations"}
    method.metric_mean.fill_(m["j_avg"])
    method.generator_mean.fill_(m["j_gen"])
    return golden, method


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_golden_iterations(case: str, symmetric: bool) -> None:
    """Every loss, every clipped gradient of the four optimizer steps, and every weight after each iteration."""
    golden, method = load(case, edge_symmetry=symmetric)
    m = golden["meta"]
    layout = BatchLayout(m["C"], m["K"], golden["label"], slice(0, len(golden["label"])))
    context = FakeContext(method)
    for step in golden["steps"]:
        k = m["K"]
        uniforms = torch.tensor(step["uniforms"], dtype=torch.float64).view(2, k, k - 1)
        logs = method.iterate(golden["x"], layout, list(uniforms), context)
        wanted, weight = step["metrics"], 1 - np.exp(-m["beta"] / m["j_gen"])
        got = {
            "J_m": logs["metric"], "J_gnnce": logs["graph_cross_entropy"], "J_syn": weight * logs["synthetic"],
            "J_metric": logs["loss"], "J_softce": logs["classifier"], "J_div": logs["diversity"], "J_gence": logs["soft"],
            "J_gen": logs["generator"],
        }  # fmt: skip
        assert got == pytest.approx({name: wanted[name] for name in got}, rel=1e-7)
        assert [name for name, _ in context.seen] == ["main", "graph", "classifier", "graph"]
        prefix = {"main": "feature_extractor.", "graph": "gnn.", "classifier": "softmax_classifier."}
        for (name, found), (_, gradients) in zip(context.seen, step["step_grads"], strict=True):
            for parameter, gradient in gradients.items():
                ours = renamed(prefix[name] + parameter)
                if ours is None or gradient is None:
                    assert ours is None or found.get(ours) is None or not found[ours].any()
                    continue
                noise = 1e-7 * float(gradient.abs().max()) + 2e-9  # their softmax adds its "+1" in float32
                torch.testing.assert_close(found[ours], gradient, rtol=1e-7, atol=noise)
        context.seen.clear()
        state = method.state_dict()
        for name, value in step["state_after"].items():
            if renamed(name) is not None:
                torch.testing.assert_close(state[renamed(name)], value, rtol=1e-7, atol=2e-7)


# ---- oracles ---------------------------------------------------------------------------------------------------------


def npair_loops(z: Tensor, k: int, c: int) -> Tensor:
    chunks = z.view(k, c, -1)
    entropy = torch.zeros((), dtype=z.dtype)
    for m in range(1, k):
        for i in range(c):
            scores = torch.stack([chunks[0, i] @ chunks[m, j] for j in range(c)])
            entropy = entropy + (scores.logsumexp(0) - scores[i]) / c / (k - 1)
    return entropy + 7.5e-4 / c * sum(row @ row for row in z)


def synthesis_loops(z: Tensor, lam: Tensor, k: int, c: int, strength: float, u: Tensor) -> Tensor:
    """Ẑ by the definition, one anchor and negative at a time: [K·P, P, D]."""
    out = torch.zeros(k * c, c, z.shape[1], dtype=z.dtype)

    def distance(a: int, b: int) -> Tensor:
        return ((z[a] - z[b] + 1e-6) ** 2).sum().sqrt()

    for chunk in range(k):
        for i in range(c):
            b = chunk * c + i
            near = distance(b, ((chunk + 1) % k) * c + i)
            for j in range(c):
                chain = None
                for m in range(k):
                    other = m * c + j
                    far = distance(b, other)
                    r = (near + (far - near) * lam[b, other] * strength) / far
                    pulled = z[other] if near >= far else z[b] + (z[other] - z[b]) * r
                    chain = pulled if chain is None else pulled + u[chunk, m - 1] * (chain - pulled)
                out[b, j] = chain
    return out


def some(k: int = 3, c: int = 4, d: int = 6) -> tuple[Tensor, Tensor, Tensor, BatchLayout]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(k * c, d, generator=generator, dtype=torch.float64)
    lam = torch.rand(k * c, k * c, d, generator=generator, dtype=torch.float64)
    u = torch.rand(k, k - 1, generator=generator, dtype=torch.float64)
    return z, lam, u, BatchLayout(c, k, torch.arange(c).repeat(k), slice(0, k * c))


def test_npair_against_loops() -> None:
    z, *_ = some()
    torch.testing.assert_close(npair(z, 4), npair_loops(z, 3, 4))
    torch.testing.assert_close(npair(z, 4, torch.tensor([0, 1, 2, 3])), npair_loops(z, 3, 4))
    assert torch.autograd.gradcheck(lambda x: npair(x, 4), z.requires_grad_())


def test_npair_shares_the_target_of_a_repeated_label() -> None:
    z = torch.randn(6, 4, dtype=torch.float64)
    repeated = npair(z, 3, torch.tensor([7, 7, 2]))
    scores = z[:3] @ z[3:].T
    log_p = scores.log_softmax(1)
    target = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(repeated, -(target * log_p).sum() / 3 + 7.5e-4 / 3 * z.square().sum())


def test_synthesis_against_loops() -> None:
    z, lam, u, layout = some()
    expected = synthesis_loops(z, lam, 3, 4, 0.7, u)
    torch.testing.assert_close(synthesise(z, lam, layout, 0.7, u), expected)
    part = layout._replace(rows=slice(2, 7))
    torch.testing.assert_close(synthesise(z, lam[2:7], part, 0.7, u), expected[2:7])
    assert torch.autograd.gradcheck(
        lambda x, y: synthesise(x, y, layout, 0.7, u), (z.requires_grad_(), lam.requires_grad_())
    )


def test_synthetic_npair_against_loops() -> None:
    z, lam, u, layout = some()
    joined = synthesis_loops(z, lam, 3, 4, 0.7, u)
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        for i in range(4):
            row = joined[k * 4 + i].clone()
            row[i] = z[((k + 1) % 3) * 4 + i]
            scores = row @ z[k * 4 + i]
            expected += (scores.logsumexp(0) - scores[i]) / 12 + 7.5e-4 / 3 * (
                z[k * 4 + i].square().sum() / 4 + row.square().sum() / 16
            )
    torch.testing.assert_close(synthetic_npair(z, joined, layout), expected)
    halves = [layout._replace(rows=s) for s in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(sum(synthetic_npair(z, joined[h.rows], h) for h in halves), expected)


def test_similarity_masks() -> None:
    layout = BatchLayout(27, 3, torch.arange(27).repeat(3), slice(0, 81))
    correct, reference = (similarity_term_mask(layout, reference=flag) for flag in (False, True))
    assert torch.equal(correct, torch.arange(81)[:, None] % 27 != torch.arange(27)[None])
    assert int((~reference).sum()) == 81 and int((~reference & ~correct).sum()) == 3


class LoopGraph(nn.Module):
    """The graph network by its formulas, an edge list and a loop over nodes; weights of the real one."""

    def __init__(self, graph: CorrelationGraph) -> None:
        super().__init__()
        self.g = graph

    def forward(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        g, count = self.g, len(z)
        u = z - z.mean(1, keepdim=True)
        u = u / u.norm(dim=1, keepdim=True)
        edges = {(i, j): u[i] * u[j] for i in range(count) for j in range(count)}
        nodes = g.reduce(z)
        for node, edge in zip(g.nodes, g.edges, strict=True):
            nodes = torch.stack([self.node(node, nodes, edges, labels, i) for i in range(count)])
            hidden = F.gelu(edge.node_to_edge(nodes))
            keys, values = edge.key(hidden), edge.value(hidden)
            for (i, j), e in list(edges.items()):
                q = edge.query(e)
                w = torch.stack([q @ keys[i], q @ keys[j]]).div(len(e) ** 0.5).softmax(0)
                t = edge.norm(F.gelu(w[0] * values[i] + w[1] * values[j] + e))
                edges[i, j] = edge.norm(F.gelu(t + edge.linear2(edge.hidden_norm(F.gelu(edge.linear1(t))))))
        table = torch.stack([edges[i, j] for i in range(count) for j in range(count)])
        normed = F.batch_norm(table, None, None, g.edge_norm.weight, None, True)
        lam = torch.sigmoid(g.lambda_head(normed)).view(count, count, -1)
        return lam, g.classifier(F.batch_norm(nodes, None, None, g.node_norm.weight, None, True))

    @staticmethod
    def node(block: Any, nodes: Tensor, edges: dict[tuple[int, int], Tensor], labels: Tensor, t: int) -> Tensor:
        a, d = block.attention, nodes.shape[1]
        q, parts = a.query(nodes[t]), []
        for head in torch.arange(d).view(a.heads, -1):
            e = {
                s: torch.exp(q[head] @ a.key(nodes[s])[head] / len(head) ** 0.5)
                for s in range(len(nodes))
                if labels[s] != labels[t]
            }
            total = 1 + sum(e.values())
            parts.append(
                sum(w / total * a.value(nodes[s])[head] for s, w in e.items())
                + torch.zeros(len(head), dtype=nodes.dtype)
            )
        n = block.norm(F.gelu(nodes[t] + a.out(torch.cat(parts))))
        n = block.norm(F.gelu(n + sum(F.gelu(block.edge_to_node(edges[t, j])) for j in range(len(nodes)))))
        return block.norm(F.gelu(n + block.linear2(F.gelu(block.linear1(n)))))


def shaken(graph: CorrelationGraph) -> CorrelationGraph:
    with torch.no_grad():
        for parameter in graph.parameters():
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return graph


@pytest.mark.parametrize("symmetric", [True, False])
def test_graph_against_loops(symmetric: bool) -> None:
    torch.manual_seed(0)
    graph = shaken(CorrelationGraph(6, 3, layers=2, heads=2, edge_dropout=0.0, symmetric=symmetric).double())
    z, labels = torch.randn(6, 6, dtype=torch.float64).requires_grad_(), torch.arange(3).repeat(2)
    found = graph(z, labels, None, train_lambda=True)
    expected = LoopGraph(graph)(z, labels)
    wanted = [z, *(p for p in graph.parameters() if p.requires_grad)]
    for got, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(got, oracle)
    weigh = [torch.randn_like(x) for x in expected]
    ours, theirs = (
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weigh, strict=True)), wanted)
        for outputs in (found, expected)
    )
    for got, oracle in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, oracle, rtol=1e-7, atol=1e-9)


def test_lambda_without_gradient_is_the_same() -> None:
    torch.manual_seed(0)
    graph = shaken(CorrelationGraph(6, 3, 2, 2, 0.0, True).double())
    z, labels = torch.randn(6, 6, dtype=torch.float64).requires_grad_(), torch.arange(3).repeat(2)
    kept, logits = graph(z, labels, None, train_lambda=False)
    trained, same = graph(z, labels, None, train_lambda=True)
    assert not kept.requires_grad and trained.requires_grad and logits.requires_grad
    assert torch.equal(kept, trained) and torch.equal(logits, same)
    first = torch.autograd.grad(logits.sum() + logits.square().sum(), z)[0]
    assert torch.equal(first, torch.autograd.grad(same.sum() + same.square().sum(), z)[0])


def test_edge_norm_is_batch_norm_over_ordered_pairs() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64)
    pairs, every = Pairs.of(x, True, None), Pairs.of(x, False, None)
    norm = EdgeNorm(3).double()
    edges = x[pairs.first] + x[pairs.second]
    expected = F.batch_norm((x[:, None] + x[None]).view(25, 3), None, None, training=True).view(5, 5, 3)
    torch.testing.assert_close(pairs.dense(norm(edges, pairs)), expected)
    torch.testing.assert_close(every.dense(norm(x[every.first] + x[every.second], every)), expected)
    torch.testing.assert_close(pairs.row_sums(edges), (x[:, None] + x[None]).sum(1))


def test_edge_dropout_in_training_only() -> None:
    torch.manual_seed(0)
    graph = CorrelationGraph(6, 3, 1, 2, 0.5, True).double()
    z, labels = torch.randn(6, 6, dtype=torch.float64), torch.arange(3).repeat(2)
    one, other = (graph(z, labels, None, True)[0] for _ in range(2))
    assert not torch.equal(one, other) and torch.equal(one, one.transpose(0, 1))
    graph.eval()
    assert torch.equal(*(graph(z, labels, None, True)[0] for _ in range(2)))
