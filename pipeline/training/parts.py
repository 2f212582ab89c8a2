"""Parts of a worker that are made from the configuration: the source of the pixels, the method's mining."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config import Config
from pipeline.data.cache import Cache, split_bytes
from pipeline.data.decoded import keeps_decoded
from pipeline.data.loader import ImageSource
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.mining.messages import ServerSpec
from pipeline.mining.method_view import MethodMining
from pipeline.mining.server import MiningServer
from pipeline.mining.transport import LocalTransport, Transport
from pipeline.runs.run_folder import run_folder
from pipeline.storage import Folder


def image_source(config: Config, store: Store) -> ImageSource:
    """The source of the run's pixels: this node's copy of the training split, or row groups where that is too large."""
    max_bytes = config.cache.max_bytes
    decoded = config.cache.decoded and keeps_decoded(store, max_bytes)
    cache = None
    if decoded or split_bytes(store, "train") <= max_bytes:
        cache = Cache(Folder(cache_folder(config)).uri, max_bytes, decoded)
    labels = config.runtime.loader_labels
    return ImageSource(store.folder.uri, store.fingerprint, cache, config.data.transforms, config.seed, labels)


def cache_folder(config: Config) -> str:
    """The folder of a node's copies; "~" stands for that node's home."""
    root = Folder(config.root)
    return config.cache.folder or ((root / "cache").uri if root.is_local else "~/raydml/cache")


def server_spec(config: Config, samples: int, servers: int) -> ServerSpec:
    """The specification of the mining servers of a run with so many training samples; the method has to mine.

    Args:
        config: The run's configuration.
        samples: Number of training samples.
        servers: Number of servers; 0: one in the worker's own process.
    """
    requirements, mining = config.method.mining, config.mining
    assert requirements is not None
    memory_dtype = "float64" if config.precision == "float64" else mining.memory_dtype
    return ServerSpec(
        run=run_folder(config).uri, dim=config.method.embedding_dim, capacity=samples // max(1, servers) * 11 // 10 + 1,
        dtype=mining.dtype, engine=mining.engine, k=requirements.neighbours, target=mining.recall, seed=config.seed,
        threads=mining.cpus, per_class=requirements.per_class, total=requirements.total, memory_dtype=memory_dtype, wait_s=mining.deadline_s,
    )  # fmt: skip


def build_mining(
    config: Config, samples: int, servers: Sequence[Transport], ranks: Ranks, device: torch.device
) -> MethodMining | None:
    """The mining that the config's method needs, or None."""
    requirements, mining = config.method.mining, config.mining
    if requirements is None:
        return None
    spec = server_spec(config, samples, len(servers))
    if not servers and ranks.rank == 0:
        servers = [LocalTransport(MiningServer())]
    options = {"ordered": mining.consistency == "exact", "in_flight": mining.in_flight, "deadline_s": mining.deadline_s}
    return MethodMining(requirements, spec, servers, ranks, device, run_folder(config), mining.swap_after, **options)
