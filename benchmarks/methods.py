"""Cost of the methods compared with literal implementations of their formulas.

    python -m benchmarks.methods [--only in_batch mmsi smart_mining] [--rounds 7] [--json PATH]

Sizes are those of each paper's CUB setting: GCA-HNG 27 x 3 images, D = 512, two layers; Intra-Batch Connections 6 x 9 images,
D = 512, one layer; OSM+CAA 8 x 7 images, D = 1024. The literal implementations follow the formulas as they are written: edge
lists with gathers and scatters for the graphs, loops over pairs for OSM+CAA. Both sides share their weights, and are compared
before they are timed. What is timed is all that a step does after the embeddings, forward and backward: for GCA-HNG the graph
and the synthesis of its phases A and C, for Intra-Batch Connections the message passing, for OSM+CAA the pair loss. Sides
alternate; the ratio is the median over pairs. Memory is the peak of a step above the level between steps, in a fresh process.
For these methods, rows give the share of a whole step with a ResNet-50 at 224 pixels (timed on 4 images, scaled to the batch).
For the measurements of MMSI and Smart Mining see benchmarks/whole_set.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.alternate import as_it_comes
from benchmarks.table import Row, finish
from benchmarks.whole_set import measure_mmsi, measure_rule, mmsi
from methods.gca_hng import BatchLayout, GcaHng, GcaHngConfig, similarity_term_mask, synthesise, synthetic_npair
from methods.intra_batch import IntraBatchConfig, MessageNetwork
from methods.osm_caa import OsmCaaConfig, soft_mining_loss
from pipeline.distributed.cpus import keep_freed_memory

THREADS = 2
P, K, DIM, CLASSES = 27, 3, 512, 100
Step = Callable[[], list[Tensor]]


# ---- literal forms ---------------------------------------------------------------------------------------------------


def plus_one_by_edges(
    layer: nn.Module, nodes: Tensor, target: Tensor, source: Tensor, allowed: Tensor | None
) -> Tensor:
    """Attention with the extra zero logit over an edge list: gathers, a scattered softmax, scattered messages."""
    count, dim, heads = len(nodes), nodes.shape[1], layer.heads  # type: ignore[attr-defined]
    q, k, v = (part(nodes) for part in (layer.query, layer.key, layer.value))  # type: ignore[operator]
    q, k, v = (x.view(len(x), heads, -1) for x in (q[target], k[source], v[source]))
    scores = (q * k).sum(-1) / math.sqrt(dim / heads)
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    top = torch.zeros(count, heads).index_reduce(0, target, scores.detach(), "amax")
    weights = torch.exp(scores - top[target])
    total = torch.exp(-top).index_add(0, target, weights)
    messages = torch.zeros(count, heads, dim // heads).index_add(0, target, (weights / total[target])[..., None] * v)
    return layer.out(messages.flatten(1))  # type: ignore[operator]


def edge_list(count: int) -> tuple[Tensor, Tensor]:
    target, source = torch.ones(count, count).nonzero().T
    return target, source


def graph_by_edges(method: GcaHng, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The correlation graph of GCA-HNG on the list of all ordered pairs."""
    graph, count, dim = method.graph, *z.shape
    r, c = edge_list(count)
    u = z - z.mean(1, keepdim=True)
    u = u / u.norm(dim=1, keepdim=True)
    edges, nodes = u[r] * u[c], graph.reduce(z)
    for node, edge in zip(graph.nodes, graph.edges, strict=True):
        n = node.norm(F.gelu(nodes + plus_one_by_edges(node.attention, nodes, r, c, labels[r] != labels[c])))
        received = torch.zeros_like(n).index_add(0, r, F.gelu(node.edge_to_node(edges)))
        n = node.norm(F.gelu(n + received))
        nodes = node.norm(F.gelu(n + node.linear2(F.gelu(node.linear1(n)))))
        ends = F.gelu(edge.node_to_edge(nodes))[torch.stack([r, c], 1)]
        query, keys, values = edge.query(edges), edge.key(ends), edge.value(ends)
        weights = ((query[:, None] * keys).sum(-1) / math.sqrt(dim)).softmax(1)
        t = edge.norm(F.gelu((weights[..., None] * values).sum(1) + edges))
        edges = edge.norm(F.gelu(t + edge.linear2(edge.hidden_norm(F.gelu(edge.linear1(t))))))
    normed = F.batch_norm(edges, None, None, graph.edge_norm.weight, None, True)
    lam = torch.sigmoid(graph.lambda_head(normed)).view(count, count, dim)
    return lam, graph.classifier(F.batch_norm(nodes, None, None, graph.node_norm.weight, None, True))


def synthesis_by_chunks(z: Tensor, lam: Tensor, strength: Tensor, uniforms: Tensor) -> Tensor:
    """Ẑ chunk by chunk: for each pair of anchor and negative chunks, distances, pulling, one link of the chain."""
    chunks, out = z.view(K, P, -1), []
    for k in range(K):
        near = F.pairwise_distance(chunks[k], chunks[(k + 1) % K])[:, None]
        chain: Tensor | None = None
        for m in range(K):
            far = F.pairwise_distance(chunks[k][:, None], chunks[m][None])
            part = lam[k * P : (k + 1) * P, m * P : (m + 1) * P]
            ratio = (near[..., None] + (far - near)[..., None] * part * strength) / far[..., None]
            pulled = chunks[k][:, None] + (chunks[m][None] - chunks[k][:, None]) * ratio
            pulled = torch.where((near >= far)[..., None], chunks[m][None], pulled)
            chain = pulled if chain is None else pulled + uniforms[k, m - 1] * (chain - pulled)
        assert chain is not None
        out.append(chain)
    return torch.cat(out)


def osm_by_loops(z: Tensor, labels: list[int], attention: Tensor, c: OsmCaaConfig) -> Tensor:
    p = n = wp = wn = torch.zeros(())
    for i in range(len(z)):
        for j in range(i):
            d = (z[i] - z[j]).norm()
            a = torch.minimum(attention[i], attention[j])
            if labels[i] == labels[j]:
                w = (torch.exp(-(d**2) / c.sigma**2) * a).detach()
                p, wp = p + w * d**2, wp + w
            else:
                gap = torch.relu(c.alpha - d)
                w = (gap * a).detach()
                n, wn = n + w * gap**2, wn + w
    return 0.5 * ((1 - c.lam) * p / (wp + 1e-12) + c.lam * n / (wn + 1e-12))


# ---- the sides -------------------------------------------------------------------------------------------------------


def gca_hng(ours: bool) -> Step:
    """Phases A and C of an iteration, without optimizer steps."""
    torch.manual_seed(0)
    config = GcaHngConfig(classes_per_batch=P, samples_per_class=K, embedding_dim=DIM, edge_dropout=0.0)
    method = GcaHng(config, 8, CLASSES)
    method.metric_mean.fill_(4.0)
    z, uniforms = (0.2 * torch.randn(P * K, DIM)).requires_grad_(), torch.rand(K, K - 1)
    layout = BatchLayout(P, K, torch.arange(P).repeat(K), slice(0, P * K))
    strength = method._pull_strength()

    def synthetic(z: Tensor, lam: Tensor) -> Tensor:
        return (
            synthesise(z, lam, layout, strength, uniforms) if ours else synthesis_by_chunks(z, lam, strength, uniforms)
        )

    def generator(z: Tensor) -> Tensor:
        if ours:
            return method.generator_loss(z, layout, uniforms)["generator"]
        lam, _ = graph_by_edges(method, z, layout.labels)
        joined = synthesis_by_chunks(z, lam, strength, uniforms)
        scores = F.linear(joined.flatten(0, 1), method.classifier.weight.detach(), method.classifier.bias.detach())
        soft = config.softmax_weight * F.cross_entropy(scores, layout.labels[:P].repeat(len(z)))
        similar = ((1 - F.cosine_similarity(z[:, None], joined, dim=-1)) * similarity_term_mask(layout, False)).mean()
        spread = (lam - lam.mean(1, keepdim=True)).square().sum() / len(z) ** 2
        diverse = 1e-2 * (1 - spread.sqrt())
        return 0.5 * (soft + config.similarity_weight * similar + config.diversity_weight * diverse)

    def step() -> list[Tensor]:
        method.zero_grad()
        z.grad = None
        if ours:
            lam, logits = method.graph(z, layout.labels, None, train_lambda=False)
        else:
            lam, logits = graph_by_edges(method, z, layout.labels)
        assert logits is not None
        loss = synthetic_npair(z, synthetic(z, lam.detach()), layout) + F.cross_entropy(logits, layout.labels)
        loss.backward()
        del lam, logits
        last = generator(z.detach())
        last.backward()
        assert z.grad is not None
        return [
            loss.detach(),
            last.detach(),
            z.grad.clone(),
            *(p.grad for p in method.graph.parameters() if p.grad is not None),
        ]

    return step


def intra_batch(ours: bool) -> Step:
    """The message passing: embeddings to nodes and back."""
    torch.manual_seed(0)
    network = MessageNetwork(IntraBatchConfig(dropout=0.0), CLASSES)
    z, weigh = F.normalize(torch.randn(54, DIM)).requires_grad_(), torch.randn(54, DIM)
    target, source = edge_list(54)

    def step() -> list[Tensor]:
        network.zero_grad()
        z.grad = None
        if ours:
            nodes = network.nodes(z)
        else:
            nodes = network.input(z)
            for layer in network.layers:
                heard = plus_one_by_edges(layer.attention, nodes, target, source, None)  # type: ignore[arg-type]
                nodes = layer.norm1(nodes + heard)  # type: ignore[operator]
                nodes = layer.norm2(nodes + layer.linear2(torch.relu(layer.linear1(nodes))))  # type: ignore[operator]
        (nodes * weigh).sum().backward()
        assert z.grad is not None
        return [nodes.detach(), z.grad.clone()]

    return step


def osm_caa(ours: bool) -> Step:
    torch.manual_seed(0)
    config = OsmCaaConfig()
    f, labels, attention = torch.randn(56, 1024).requires_grad_(), torch.arange(56) // 7, torch.rand(56)

    def step() -> list[Tensor]:
        f.grad = None
        z = F.normalize(f)
        loss = (
            soft_mining_loss(z, labels, attention, config).loss
            if ours
            else osm_by_loops(z, labels.tolist(), attention, config)
        )
        loss.backward()
        assert f.grad is not None
        return [loss.detach(), f.grad.clone()]

    return step


SIDES = {"GCA-HNG, graph and synthesis": (gca_hng, 81), "Intra-Batch, message passing": (intra_batch, 54), "OSM+CAA, pair loss": (osm_caa, 56)}  # fmt: skip
PROMISED_TIME = {"GCA-HNG, graph and synthesis": 0.3, "Intra-Batch, message passing": 0.5, "OSM+CAA, pair loss": 0.05}
PROMISED_MEMORY = {"GCA-HNG, graph and synthesis": 0.35}


def check(name: str) -> None:
    """Checks that both sides compute the same, in float64, where rounding neither hides nor looks like a mistake."""
    torch.set_default_dtype(torch.float64)
    for number, (one, other) in enumerate(zip(*(SIDES[name][0](ours)() for ours in (True, False)), strict=True)):
        difference = float((one - other).norm() / other.norm().clamp(min=1e-9))
        if difference > 1e-6:
            raise SystemExit(f"{name}: the two sides differ by {difference:.1e} in result {number}")
    torch.set_default_dtype(torch.float32)


def cpu_s(step: Step, repeats: int) -> float:
    started = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - started) / repeats


def peak_mib(name: str, side: str) -> float:
    """Peak memory of a step above the level between steps, in a fresh process; freed tensors go back to the system at once."""
    environment = as_it_comes() | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.methods", "--peak", name, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def measure_peak(name: str, side: str) -> None:
    step = mmsi(side) if name == "mmsi" else SIDES[name][0](side == "ours")
    step()  # libraries that are loaded when first used
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_mib("VmRSS")
    step()
    print(status_mib("VmHWM") - before)


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def encoder_cpu_s() -> float:
    """CPU seconds an image of a ResNet-50 at 224 pixels, forward and backward."""
    import torchvision

    network = torchvision.models.resnet50(weights=None).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def step() -> list[Tensor]:
        network(images).sum().backward()
        return []

    step()
    return cpu_s(step, 2) / 4


def measure_in_batch(rounds: int) -> list[Row]:
    keep_freed_memory()  # as the pipeline's workers do
    rows, seconds = list[Row](), {}
    for name, (make, _) in SIDES.items():
        check(name)
        steps = [make(True), make(False)]
        repeats = [max(1, round(0.3 / max(1e-4, cpu_s(step, 2)))) for step in steps]
        pairs = [[cpu_s(s, r) for s, r in zip(steps, repeats, strict=True)] for _ in range(rounds)]
        ratio = statistics.median(a / b for a, b in pairs)
        ours, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        seconds[name] = ours
        limit = PROMISED_TIME[name]
        rows.append(Row(f"{name}, CPU ms a step", 1e3 * ours, 1e3 * other, ratio, f"<= {limit}", ratio <= limit))
    for name, bound in PROMISED_MEMORY.items():
        peaks = [statistics.median(peak_mib(name, side) for _ in range(3)) for side in ("ours", "theirs")]
        ratio = peaks[0] / peaks[1]
        bound = PROMISED_MEMORY.get(name)
        rows.append(
            Row(f"{name}, peak MiB", *peaks, ratio, f"<= {bound}" if bound else "", bound is None or ratio <= bound)
        )
    encoder = encoder_cpu_s()
    for name, (_, batch) in SIDES.items():
        share = seconds[name] / (seconds[name] + batch * encoder)
        rows.append(Row(f"{name}, % of a step with ResNet-50", 100 * share))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = ["in_batch", "mmsi", "smart_mining"]
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.peak:
        measure_peak(*options.peak)
        return 0
    rows = []
    if "in_batch" in options.only:
        rows += measure_in_batch(options.rounds)
    if "mmsi" in options.only:
        rows += measure_mmsi(options.rounds, cpu_s, lambda side: peak_mib("mmsi", side))
    if "smart_mining" in options.only:
        rows += measure_rule(options.rounds)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
