"""A run's mining as a method sees it (`methods.mining.Mining`): the same results on every rank; rank 0 calls the servers."""

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
    """Rank 0 calls the servers and broadcasts their responses; every rank keeps a mirror of the memory.

    Args:
        needs: The mining requirements of the method.
        spec: The specification of the servers.
        transports: Transports to the servers; only rank 0 uses them.
        ranks: This worker's rank and the collectives.
        device: Device of the mirror.
        folder: The run folder.
        swap_after: Number of steps from the start of building an index to its first use.
        options: Options of the client: ordered, in_flight, deadline_s.
    """

    def __init__(
        self, needs: MiningRequirements, spec: ServerSpec, transports: Sequence[Transport], ranks: Ranks, device: torch.device,
        folder: Folder, swap_after: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        self.needs = needs
        self.spec = spec
        self.ranks = ranks
        self.device = device
        self.folder = folder
        self._transports = transports
        self._swap_after = swap_after
        self._options = options
        self._client: MiningClient | None = None
        self.memory: EmbeddingMemory | None = None  # the mirror
        self._pending: dict[str, Future[SearchResponse]] = {}
        self._generation = 0
        self.step = 0  # the training step

    # ---- called by the training loop -----------------------------------------------------------------------------

    def begin(self, incarnation: int, snapshot: Folder | None) -> None:
        """Acquires the servers for this start of the run, with the state of a checkpoint's snapshot, or empty."""

        def start() -> Any:
            self._client = MiningClient(self._transports, self.spec, incarnation, self.folder, **self._options)
            self._client.begin(snapshot.uri if snapshot is not None else None)
            for name in (self.folder / "mining").names():
                if name.startswith("log-"):  # of an earlier start, which cannot come back
                    (self.folder / "mining").remove(name)
            if snapshot is not None:
                self._load_pending(snapshot)
            return self._generation, self._client.changes_since(0) if self.needs.memory else None

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
        self._on_rank0_then_broadcast(
            lambda: self._rank0_client.rebuild(self._generation, now, now + self._swap_after, base)
        )

    def save(self, folder: Folder) -> None:
        """Writes the servers' state and the prefetched responses into a folder of a checkpoint; only rank 0 calls it."""
        self._rank0_client.save(folder.uri)
        buffer = io.BytesIO()
        arrays = {"generation": np.array(self._generation)}
        for name, future in self._pending.items():
            response = self._rank0_client.wait(future)
            for field in fields(response):
                if (value := getattr(response, field.name)) is not None:
                    arrays[f"{name}/{_key_in_file(field.name)}"] = np.asarray(value)
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        data = buffer.getvalue()
        folder.write("pending.npz", data)
        folder.write("pending.sha256", hashlib.sha256(data).hexdigest().encode())

    def prune(self, checkpoints: Sequence[Folder]) -> None:
        """Removes saved index rows that none of the remaining checkpoints refers to; only rank 0 calls it."""
        bases_in_use: set[str] = set()
        for checkpoint in checkpoints:
            for shard in (checkpoint / "mining").names():
                if (checkpoint / "mining").exists(f"{shard}/mining.json"):
                    built = (checkpoint / "mining").read_json(f"{shard}/mining.json")["built"]
                    bases_in_use |= {posixpath.basename(b["base"]) for b in built}
        for name in (self.folder / "mining").names():
            if name.startswith("base-") and name not in bases_in_use and int(name.split("-")[1]) < self._generation:
                (self.folder / "mining").remove(name)

    def logs(self) -> dict[str, float]:
        """Metrics of rank 0: recoveries, and of the newest response: puts not reflected, number and recall of the index."""
        client = self._client
        if client is None:
            return {}
        values = {
            "recoveries": client.recoveries,
            "lag": client.lag,
            "generation": client.generation,
            "recall": client.recall,
        }
        return {f"mining/{name}": float(value) for name, value in values.items()}

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    # ---- called by the method ------------------------------------------------------------------------------------

    def put(
        self,
        ids: Int64[Tensor, " rows"],
        embeddings: Float[Tensor, "rows dim"],
        labels: Int64[Tensor, " rows"],
        tag: str = "",
    ) -> None:
        embeddings = embeddings.detach()
        if self.memory is None and self.ranks.rank != 0:
            return
        precise = embeddings if self.spec.memory_dtype == "float64" else embeddings.float()
        on_host = precise.cpu()  # waits for the device, once
        host_ids, host_labels = ids.cpu(), labels.cpu()
        if self.memory is not None:
            self.memory.append(embeddings, host_labels, host_ids, on_host)
        if self.ranks.rank == 0:
            arrays = (host_ids.numpy(), on_host.numpy(), host_labels.numpy())
            self._rank0_client.put(*arrays, self.step, self.needs.table, self.needs.memory, tag)

    def neighbours(self, k: int, **search_options: Any) -> SearchResponse:
        request = self._search_request(k, search_options)
        return self._on_rank0_then_broadcast(lambda: self._rank0_client.wait(self._rank0_client.search(request)))

    def prefetch(self, name: str, k: int, **search_options: Any) -> None:
        request = replace(self._search_request(k, search_options), step=self.step + 1)
        if self.ranks.rank == 0:
            self._pending[name] = self._rank0_client.search(request)

    def take_prefetched(self, name: str) -> SearchResponse | None:
        return self._on_rank0_then_broadcast(
            lambda: self._rank0_client.wait(self._pending.pop(name)) if name in self._pending else None
        )

    def all_neighbours(
        self,
        k: int,
        class_filter: ClassFilter = "all",
        map_block: Callable[[Queries, Neighbours], Any] | None = None,
        tag: str = "",
        approximate: bool = False,
    ) -> AllNeighbours:
        return self._on_rank0_then_broadcast(
            lambda: self._rank0_client.all_neighbours(k, class_filter, map_block, tag, approximate)
        )

    # ---- internal ------------------------------------------------------------------------------------------------

    @property
    def _rank0_client(self) -> MiningClient:
        if self._client is None:
            raise RuntimeError("no mining client: `begin` has not been called, or this is not rank 0")
        return self._client

    def _search_request(self, k: int, search_options: dict[str, Any]) -> SearchRequest:
        arrays: dict[str, Any] = {
            n: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for n, v in search_options.items()
        }
        if arrays.get("embeddings") is not None:
            arrays["embeddings"] = np.asarray(arrays["embeddings"], np.float32)
        return SearchRequest(k, self.step, **arrays)

    def _on_rank0_then_broadcast(self, call: Callable[[], Any]) -> Any:
        """The result of `call` on rank 0, returned on every rank; an error of rank 0 is raised on every rank."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.ranks.rank == 0:
            try:
                outcome = (call(), None)
            except (RunError, UserError) as raised:
                outcome = (None, raised)
        result, error = self.ranks.broadcast(outcome)
        if error is not None:
            raise error
        return result

    def _load_pending(self, folder: Folder) -> None:
        data = folder.read("pending.npz")
        if hashlib.sha256(data).hexdigest().encode() != folder.read("pending.sha256"):
            raise UserError(f"{folder}/pending.npz is damaged: resume from an older checkpoint")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            self._generation = int(arrays["generation"])
            for name in {n.split("/")[0] for n in arrays.files if "/" in n}:
                response: dict[str, Any] = {"embeddings": None}
                for field in fields(SearchResponse):
                    array = arrays.get(f"{name}/{_key_in_file(field.name)}")
                    if array is not None:
                        response[field.name] = array.item() if array.ndim == 0 else array
                self._pending[name] = Future()
                self._pending[name].set_result(SearchResponse(**response))


def _key_in_file(field_name: str) -> str:
    """The name of a field of `SearchResponse` in `pending.npz`."""
    return "values" if field_name == "embeddings" else field_name
