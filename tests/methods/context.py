"""A context for one process and features that are given: the tests of methods need no run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methods import Batch, Method
from methods.config import Clock, Length
from pipeline.distributed.collectives import Ranks


class FakeContext:
    """Takes the method's steps and keeps the gradients that each optimizer saw, after clipping."""

    def __init__(self, method: Method, trunk: nn.Module | None = None, features: Tensor | None = None) -> None:
        trunk = trunk or nn.Identity()
        self.optimizers = method.optimizers(trunk)
        self.names = {id(p): n for n, p in [*method.named_parameters(), *((f"trunk.{n}", p) for n, p in trunk.named_parameters())]}  # fmt: skip
        self.features = features
        self.labels, self.tracks = np.zeros(0, dtype=np.int64), None
        self.seed, self.clock, self.length = 0, Clock(), Length(value=10, unit="epochs")
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.generator = torch.Generator().manual_seed(0)
        self.ranks: Any = Ranks()
        self.shards: Sequence[slice] = (slice(0, 10**6),)
        self.seen: list[tuple[str, dict[str, Tensor | None]]] = []
        self.next_ids: Any = None
        self.mining: Any = None
        self.loaded_best = 0

    def encode(self, role: Any = None, keep_for_jvp: bool = False) -> Tensor:
        assert self.features is not None
        return self.features

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        assert torch.isfinite(loss.detach()), "the loss is not finite"
        loss.backward(retain_graph=retain_graph)

    def step(self, name: str) -> None:
        optimizer = self.optimizers[name]
        parameters = [p for group in optimizer.inner.param_groups for p in group["params"]]
        clip = optimizer.config.clip_value
        if clip is not None:
            nn.utils.clip_grad_value_(parameters, clip)
        found = {self.names[id(p)]: None if p.grad is None else p.grad.clone() for p in parameters}
        self.seen.append((name, found))
        optimizer.step(self.clock, self.length)
        optimizer.inner.zero_grad(set_to_none=True)

    def gradient(self, role: Any, objective: Any, extra: Any = (), shift: Any = None) -> Any:
        raise AssertionError("not expected")

    def jvp(self, role: Any, direction: Any) -> Any:
        raise AssertionError("not expected")

    def embed_samples(self, ids: Any, embed: bool = True) -> Tensor:
        raise AssertionError("not expected")

    def weights_hash(self) -> str:
        return "weights"

    def load_best(self) -> None:
        self.loaded_best += 1


def make_batch(labels: Sequence[int] | Tensor) -> Batch:
    labels = torch.as_tensor(labels)
    return Batch(torch.arange(len(labels)), labels, {})
