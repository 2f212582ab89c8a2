"""The methods that mine beyond the batch, for `python -m benchmarks.methods`: MMSI's step, Smart Mining's rule.

MMSI: a whole step of 80 + 10 images of 128 pixels with an EfficientNet-Lite0 and a memory of 98 classes x 100, against a plain
training step (the same loss, every weight 1), and against the form that differentiates through the virtual step twice, as the
authors' program does: with torch's batch normalisation. Ours and the plain step run as the pipeline runs them, folded.

Smart Mining: triplets of 59,551 anchors from exact lists of 200, one thread, against Algorithm 1 as it is written, entry by
entry (on 2,000 of the anchors, scaled). One thread in all of them.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.mining import make_rows
from benchmarks.table import Row
from methods.base import Batch
from methods.config import Clock, Length
from methods.mmsi import Mmsi, MmsiConfig
from methods.mmsi_weights import meta_loss, normalise_weights, select_pairs, weighted_loss
from methods.plans import Plan
from methods.smart_mining_rule import HALF_MINED, MINED, ClassIndex, mine_triplets
from pipeline.config import ModelConfig
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpus import use_cpus
from pipeline.mining.memory import EmbeddingMemory
from pipeline.model.trunk import build_trunk
from pipeline.neighbours.exact_search import Neighbours, search_all
from pipeline.training.context import RunContext

BATCH, META, SIZE, CLASSES = 80, 10, 128, 98
Step = Callable[[], list[Tensor]]


class _Mining:
    """A full memory, without a server; what is put is forgotten, so that every step finds the same."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(1)
        self.memory, self.step = EmbeddingMemory(dim, 100, dtype=dtype), 0
        features = torch.nn.functional.normalize(torch.randn(100 * CLASSES, dim, generator=random))
        self.memory.append(features.to(dtype), torch.arange(100 * CLASSES) % CLASSES, torch.arange(100 * CLASSES))

    def put(self, ids: Tensor, embeddings: Tensor, labels: Tensor, tag: str = "") -> None:
        pass


def mmsi(side: str, dtype: torch.dtype = torch.float32) -> Step:
    """One step, on one thread: "ours", "plain" or "twice"; its results are the loss and the head's weight after it."""
    use_cpus(1)
    torch.manual_seed(0)
    trunk = build_trunk(ModelConfig(backbone="tf_efficientnet_lite0", weights="none", batch_norm="frozen"), SIZE)
    if side == "twice":
        trunk.folding = None
    config = MmsiConfig(loss="contrastive", margin=0.1, meta=side != "plain", optimizer={"name": "sgd", "lr": 1e-3})  # type: ignore[arg-type]
    method = Mmsi(config, trunk.features, CLASSES)
    trunk.to(dtype)
    method.to(dtype)
    mining = _Mining(config.embedding_dim, dtype)
    labels = np.concatenate([np.arange(BATCH) // 5, np.arange(META)])
    pixels = torch.randint(
        0, 256, (BATCH + META, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    count = BATCH if side == "plain" else BATCH + META
    role = np.repeat(np.array(["train", "meta"]), [BATCH, META])
    plan = Plan(np.arange(count)[None], {"role": role[None, :count]})
    context = RunContext(
        cast(Any, SimpleNamespace(labels=labels, ids=np.arange(len(labels)), tracks=None)), 0, Length(value=100, unit="steps"), "float32",
        torch.device("cpu"), Ranks(), trunk, method, cast(Any, None), lambda: None, cast(Any, mining),
    )  # fmt: skip

    def step() -> list[Tensor]:
        batch: Batch = context.begin_step(Clock(), plan, 0, pixels[:count])
        if side == "twice":
            value = _through_the_virtual_step(method, trunk, pixels, batch, mining.memory, context)
        else:
            value = method.training_step(batch, context)["loss"]
        return [torch.as_tensor(value), method.head.linear.weight.detach().clone()]

    return step


def _through_the_virtual_step(
    method: Mmsi, trunk: torch.nn.Module, pixels: Tensor, batch: Batch, memory: EmbeddingMemory, context: RunContext
) -> float:
    """The step as in the authors' program: weights from a gradient through a gradient."""
    c, labels = method.config, batch.labels[:BATCH]
    parts = {"trunk": trunk, "head": method.head}
    parameters = {f"{part}.{n}": p for part, module in parts.items() for n, p in module.named_parameters()}

    def embed(values: dict[str, Tensor], inputs: Tensor) -> Tensor:
        for part, module in parts.items():
            own = {n.split(".", 1)[1]: p for n, p in values.items() if n.startswith(f"{part}.")}
            inputs = torch.func.functional_call(module, own, (inputs,))
        return inputs

    embeddings = embed(parameters, pixels[:BATCH])
    similarity = embeddings @ embeddings.T
    pairs = select_pairs(similarity, labels, c)
    w = torch.zeros(pairs.slots.shape, requires_grad=True)
    gradients = torch.autograd.grad(
        weighted_loss(similarity, w, pairs, c), list(parameters.values()), create_graph=True
    )
    moved = {n: p - c.optimizer.lr * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    value = meta_loss(embed(moved, pixels[BATCH:]), batch.labels[BATCH:], batch.ids[BATCH:], memory, c)
    (u,) = torch.autograd.grad(value, w)
    del gradients, moved, value, embeddings, similarity
    again = embed(parameters, pixels[:BATCH])
    final = weighted_loss(again @ again.T, normalise_weights(-u, pairs, c.norm_scope), pairs, c)
    context.backward(final)
    context.step("main")
    return float(final.detach())


def measure_mmsi(rounds: int, cpu_s: Callable[[Step, int], float], peak: Callable[[str], float]) -> list[Row]:
    """Time against both forms, memory against the second; sides alternate."""
    ours, twice = (mmsi(side, torch.float64)() for side in ("ours", "twice"))
    # In float64: rounding of float32 moves weights near zero. The loss itself is logged in float32.
    for a, b, most in zip(ours, twice, (1e-6, 1e-9), strict=True):
        if float((a - b).norm() / b.norm()) > most:
            raise SystemExit(f"MMSI: the two forms differ by {float((a - b).norm() / b.norm()):.1e} in float64")
    sides = {side: mmsi(side) for side in ("ours", "plain", "twice")}
    for step in sides.values():
        step()
    out = []
    for other, what, most, times in (("plain", "a plain step", 1.7, rounds), ("twice", "double backward", 0.55, 3)):
        pairs = [[cpu_s(sides[side], 1) for side in ("ours", other)] for _ in range(times)]
        ratio = statistics.median(a / b for a, b in pairs)
        mine_s, other_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        out.append(Row(f"MMSI, whole step of 80 + 10 images, CPU ms / {what}", 1e3 * mine_s, 1e3 * other_s, ratio, f"<= {most}", ratio <= most))  # fmt: skip
    peaks = [peak(side) for side in ("ours", "twice")]
    ratio = peaks[0] / peaks[1]
    out.append(Row("MMSI, whole step, peak MiB / double backward", *peaks, ratio, "<= 0.5", ratio <= 0.5))
    return out


def measure_rule(rounds: int) -> list[Row]:
    """Smart Mining's rule at the size of Stanford Online Products."""
    torch.set_num_threads(1)
    rows = make_rows(59_551, 64, noise=1.5)  # R@1 66, as in training
    lists = Neighbours.concatenate([neighbours for _, neighbours in search_all(rows, 200)])
    queries, labels = SimpleNamespace(ids=rows.ids), np.asarray(rows.labels)
    classes = ClassIndex(labels, (0,))
    work = functools.partial(mine_triplets, queries, lists, classes, 1.2, 1, None)
    result = work()
    seconds, loops = [], []
    anchors = np.random.default_rng(0).permutation(len(rows))[:2000]
    for _ in range(rounds):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
        started = time.process_time()
        triplets = [_algorithm(int(i), lists.ids[i], lists.distances[i], labels, 1.2) for i in anchors]
        loops.append((time.process_time() - started) * len(rows) / len(anchors))
    t = result.triplets
    for i, (p, n, kind) in zip(anchors, triplets, strict=True):
        at = int(np.searchsorted(t.anchor, i))
        if (kind, n) != (t.kind[at], t.negative[at] if kind in (MINED, HALF_MINED) else n) or (
            kind == MINED and p != t.positive[at]
        ):
            raise SystemExit(f"Smart Mining: the two forms differ at anchor {i}")
    ratio, ours = statistics.median(b / a for a, b in zip(seconds, loops, strict=True)), statistics.median(seconds)
    what = f"Smart Mining, rule, 59,551 anchors, K = 200 ({(t.kind == MINED).mean():.0%} fully mined), CPU-s / Algorithm 1 in loops"
    return [
        Row(
            what,
            ours,
            statistics.median(loops),
            ours / statistics.median(loops),
            "< 2 s, <= 0.01",
            ours < 2 and ratio >= 100,
        )
    ]


def _algorithm(
    anchor: int, ids: np.ndarray, distances: np.ndarray, labels: np.ndarray, kappa: float
) -> tuple[int, int, int]:
    seen, bound = False, 0.0
    negatives: list[int] = []
    positives: list[tuple[int, set[int]]] = []
    for j, d in zip(ids, distances, strict=True):
        if not seen:
            if labels[j] == labels[anchor]:
                seen, bound = True, kappa * d
                positives.append((j, set()))
        elif d >= bound:
            if labels[j] == labels[anchor]:
                positives.append((j, set(negatives)))
            else:
                negatives.append(j)
    if not negatives:
        return -1, -1, 2
    p = next((j for j, nearer in positives if negatives[0] in nearer), -1)
    return p, negatives[0], MINED if p >= 0 else HALF_MINED
