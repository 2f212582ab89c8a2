"""A run's mining as a method sees it (`methods.base.Mining`): alike on every rank, spoken for by rank 0."""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from methods.mining import ClassFilter, MiningRequirements
from pipeline.distributed.collectives import Ranks
from pipeline.errors import RunError, UserError
from pipeline.mining.client import MiningClient
from pipeline.mining.memory import EmbeddingMemory
from pipeline.mining.messages import AllNeighbours, SearchRequest, SearchResponse, ServerSpec
from pipeline.mining.transport import Transport
from pipeline.neighbours.exact_search import Neighbours, Queries
from pipeline.storage import Folder


class MethodMining:
    """Rank 0 talks to the servers and tells the others what they said; the memory is mirrored on every rank.

    Args:
        needs: of the method.
        spec: of the servers.
        transports: to them; used by rank 0 alone.
        ranks: this worker's place.
        device: of the mirror.
        folder: of the run.
        swap_after: steps from the start of building an index to its first use.
        options: of the client: ordered, in_flight, deadline_s.
    """

    def __init__(
        self, needs: MiningRequirements, spec: ServerSpec, transports: Sequence[Transport], ranks: Ranks, device: torch.device,
        folder: Folder, swap_after: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        self.needs, self.spec, self.ranks, self.device, self.folder = needs, spec, ranks, device, folder
        self._transports, self._swap_after, self._options = transports, swap_after, options
        self._client: MiningClient | None = None
        self.memory: EmbeddingMemory | None = None  # the mirror
        self._pending: dict[str, Future[SearchResponse]] = {}
        self._generation = 0
        self.step = 0  # of training

    # ---- for the worker ------------------------------------------------------------------------------------------

    def begin(self, incarnation: int, snapshot: Folder | None) -> None:
        """Takes the servers over for this start of the run, in the state of a checkpoint's snapshot, or empty."""

        def start() -> Any:
            self._client = MiningClient(self._transports, self.spec, incarnation, self.folder, **self._options)
            self._client.begin(snapshot.uri if snapshot is not None else None)
            for name in (self.folder / "mining").names():
                if name.startswith("log-"):  # of an earlier start, which cannot come back
                    (self.folder / "mining").remove(name)
            if snapshot is not None:
                self._load_pending(snapshot)
            return self._generation, self._client.delta(0) if self.needs.memory else None

        self._generation, delta = self._on_rank0_then_broadcast(start)
        if delta is not None:
            dtype = getattr(torch, self.spec.memory_dtype)
            self.memory = EmbeddingMemory(self.spec.dim, self.needs.per_class, self.needs.total, dtype, self.device)
            self.memory.apply(delta)

    def rebuild(self) -> None:
        """Starts building a new index of the table, if an approximate one is used."""
        if not self.needs.table or self.spec.engine == "exact":
            return
        self._generation += 1
        base = (self.folder / "mining" / f"base-{self._generation:06d}").uri
        now = self.step + 1  # the step is over
        self._on_rank0_then_broadcast(lambda: self._leader.rebuild(self._generation, now, now + self._swap_after, base))

    def save(self, folder: Folder) -> None:
        """Writes what the servers hold and what has been prefetched into a folder of a checkpoint; rank 0 alone calls it."""
        self._leader.save(folder.uri)
        buffer = io.BytesIO()
        arrays = {"generation": np.array(self._generation)}
        for name, answer in self._pending.items():
            found = self._leader.wait(answer)
            arrays |= {
                f"{name}/{f.name}": np.asarray(v) for f in fields(found) if (v := getattr(found, f.name)) is not None
            }
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        data = buffer.getvalue()
        folder.write("pending.npz", data)
        folder.write("pending.sha256", hashlib.sha256(data).hexdigest().encode())

    def prune(self, checkpoints: Sequence[Folder]) -> None:
        """Removes saved bases of indexes that none of the kept checkpoints names; rank 0 alone calls it."""
        named: set[str] = set()
        for checkpoint in checkpoints:
            for shard in (checkpoint / "mining").names():
                if (checkpoint / "mining").exists(f"{shard}/mining.json"):
                    built = (checkpoint / "mining").read_json(f"{shard}/mining.json")["built"]
                    named |= {posixpath.basename(b["base"]) for b in built}
        for name in (self.folder / "mining").names():
            if name.startswith("base-") and name not in named and int(name.split("-")[1]) < self._generation:
                (self.folder / "mining").remove(name)

    def logs(self) -> dict[str, float]:
        """What rank 0 logs with a step: deaths survived, and of the newest answer: puts not reflected, index, its recall."""
        c = self._client
        if c is None:
            return {}
        found = {"recoveries": c.recoveries, "lag": c.lag, "generation": c.generation, "recall": c.recall}
        return {f"mining/{name}": float(value) for name, value in found.items()}

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    # ---- for the method ------------------------------------------------------------------------------------------

    def put(
        self,
        ids: Int64[Tensor, " rows"],
        embeddings: Float[Tensor, "rows dim"],
        labels: Int64[Tensor, " rows"],
        tag: str = "",
    ) -> None:
        if self.memory is not None:
            self.memory.append(embeddings, labels, ids)
        if self.ranks.rank == 0:
            values = embeddings.detach()
            values = values if self.spec.memory_dtype == "float64" else values.float()
            arrays = (ids.cpu().numpy(), values.cpu().numpy(), labels.cpu().numpy())
            self._leader.put(*arrays, self.step, self.needs.table, self.needs.memory, tag)

    def neighbours(self, k: int, **ask: Any) -> SearchResponse:
        wanted = self._ask(k, ask)
        return self._on_rank0_then_broadcast(lambda: self._leader.wait(self._leader.ask(wanted)))

    def prefetch(self, name: str, k: int, **ask: Any) -> None:
        wanted = replace(self._ask(k, ask), step=self.step + 1)
        if self.ranks.rank == 0:
            self._pending[name] = self._leader.ask(wanted)

    def take_prefetched(self, name: str) -> SearchResponse | None:
        return self._on_rank0_then_broadcast(
            lambda: self._leader.wait(self._pending.pop(name)) if name in self._pending else None
        )

    def all_neighbours(
        self,
        k: int,
        which: ClassFilter = "all",
        reduce: Callable[[Queries, Neighbours], Any] | None = None,
        tag: str = "",
        approximate: bool = False,
    ) -> AllNeighbours:
        return self._on_rank0_then_broadcast(lambda: self._leader.all_neighbours(k, which, reduce, tag, approximate))

    # ---- within --------------------------------------------------------------------------------------------------

    @property
    def _leader(self) -> MiningClient:
        if self._client is None:
            raise RuntimeError("mining is for training: it has not begun, or this is not rank 0")
        return self._client

    def _ask(self, k: int, ask: dict[str, Any]) -> SearchRequest:
        arrays: dict[str, Any] = {n: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for n, v in ask.items()}
        if arrays.get("values") is not None:
            arrays["values"] = np.asarray(arrays["values"], np.float32)
        return SearchRequest(k, self.step, **arrays)

    def _on_rank0_then_broadcast(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on every rank; an error there is raised everywhere."""
        box: tuple[Any, Exception | None] = (None, None)
        if self.ranks.rank == 0:
            try:
                box = (work(), None)
            except (RunError, UserError) as error:
                box = (None, error)
        result, failure = self.ranks.broadcast(box)
        if failure is not None:
            raise failure
        return result

    def _load_pending(self, folder: Folder) -> None:
        data = folder.read("pending.npz")
        if hashlib.sha256(data).hexdigest().encode() != folder.read("pending.sha256"):
            raise UserError(f"{folder}/pending.npz is damaged: resume from an older checkpoint")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            self._generation = int(arrays["generation"])
            for name in {n.split("/")[0] for n in arrays.files if "/" in n}:
                values = {
                    f.name: arrays[f"{name}/{f.name}"] for f in fields(SearchResponse) if f"{name}/{f.name}" in arrays
                }
                found: dict[str, Any] = {n: v.item() if v.ndim == 0 else v for n, v in values.items()}
                self._pending[name] = Future()
                self._pending[name].set_result(SearchResponse(**{"values": None, **found}))
