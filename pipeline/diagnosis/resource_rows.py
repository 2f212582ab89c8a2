"""Rows about what the recipe asks for: workers, loaders and servers on a cluster, and the memory of each. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.console import counted
from pipeline.diagnosis.measured_step import MeasuredStep
from pipeline.diagnosis.node_facts import NodeFacts
from pipeline.diagnosis.node_rows import each
from pipeline.diagnosis.rows import Row, graded, named, size
from pipeline.distributed.ray_session import OBJECT_STORE_BYTES
from pipeline.mining.server_bytes import ServerBytes
from pipeline.training.checks import bundles_on, placement_problems, requested, server_bundle
from pipeline.training.elastic import worker_resources
from pipeline.training.node_labels import asked_labels, has_labels, label_text

FULL = 0.8  # of a node's memory, from which on there is a warning: Ray ends processes from 95 % on
GPU_FULL = 0.9
RAY_BYTES = 600 << 20  # Ray's own processes and the driver, on the machine that starts Ray


@dataclass(frozen=True)
class Expected:
    """Memory that a run is expected to take, bytes.

    Attributes:
        worker: Of a worker's process.
        worker_gpu: Of a worker on its GPU; None: not measured on one.
        loader: Of a loader's process.
        shared: The part of each that processes of one machine share.
        server: Of a mining server; None: the method does not mine.
        checkpoint: Of a checkpoint on disk, with the servers' snapshots.
    """

    worker: int
    worker_gpu: int | None
    loader: int
    shared: int
    server: ServerBytes | None
    checkpoint: int

    @property
    def server_process(self) -> int:
        """Bytes of a mining server with its Python."""
        return 0 if self.server is None else self.server.total + self.loader


def expected_memory(config: Config, step: MeasuredStep, server: ServerBytes | None, mirror: int) -> Expected:
    """What follows from a measured step and from the sizes of a server and of a worker's mirror of the memory."""
    on_gpu = step.gpu_bytes is not None
    worker = step.peak_bytes + (0 if on_gpu else mirror)
    if server is not None and not config.runtime.max_workers:
        worker += server.total  # it lives in this process
    snapshot = 0 if server is None else (server.table + server.memory) * config.mining.shards
    gpu = None if step.gpu_bytes is None else step.gpu_bytes + mirror
    return Expected(worker, gpu, step.start_bytes, step.shared_bytes, server, step.checkpoint_bytes + snapshot)


def resources(
    config: Config,
    maximum: Mapping[str, float],
    groups: Sequence[tuple[Mapping[str, float], int]],
    free: Sequence[Mapping[str, float]],
) -> list[Row]:
    """Workers, loaders and servers against the cluster at its largest, and against what is free now.

    Args:
        config: The run's configuration.
        maximum, groups: See `pipeline.training.checks.placement_problems`.
        free: What is free on each node now.
    """
    wanted = {name: amount for name, amount in requested(config).items() if amount}
    asked = f"{_amounts(wanted)} for {counted(config.runtime.max_workers, 'worker')}, their loaders and mining servers"
    largest = _amounts({name: maximum.get(name, 0.0) for name in ("CPU", "GPU")})
    problems = list(placement_problems(config, maximum, groups))
    rows = [Row("resources", "fails", f"at most {largest}", asked, problem) for problem in problems]
    if problems:
        return rows
    rows = [Row("resources", "ok", f"at most {largest}", asked)]
    room = sum(bundles_on(node, worker_resources(config)) for node in free)
    servers = config.mining.shards if config.method.mining is not None else 0
    server_room = sum(bundles_on(node, server_bundle(config)) for node in free) if servers else 0
    total_free = {name: sum(node.get(name, 0.0) for node in free) for name in wanted}
    short = [f"{name}s" for name, amount in wanted.items() if total_free[name] < amount]
    grows = any(count > 1 for _, count in groups)
    found = f"{_amounts(total_free)} free: room for {min(room, config.runtime.max_workers)} of {counted(config.runtime.max_workers, 'worker')}"
    found += f" and {min(server_room, servers)} of {counted(servers, 'mining server')}" if servers else ""
    waits = "the run waits until the autoscaler has started nodes" if grows else "the run waits until others have ended"
    lacking = room < config.runtime.max_workers or server_room < servers or bool(short)
    change = f"{waits}; or reduce runtime.workers" if lacking else ""
    if config.runtime.min_workers <= room < config.runtime.max_workers and server_room >= servers:
        change = f"the run starts with {counted(room, 'worker')}, and with more as soon as there is room"
    rows.append(graded("resources now", found, asked, warning=change))
    return rows


def labels(config: Config, nodes: Sequence[NodeFacts], grows: bool) -> list[Row]:
    """Whether there are nodes of the labels that workers, loaders and servers ask for; no row where none are asked for.

    Args:
        config: The run's configuration.
        nodes: The nodes that are up.
        grows: Whether an autoscaler may start others.
    """
    rows = []
    for key, wanted in asked_labels(config).items():
        matching = [n.node for n in nodes if has_labels(n.labels, wanted)]
        change = f"start nodes with these labels (ray start --labels), or change {key}"
        rows.append(
            graded(
                "labels",
                counted(len(matching), "node") + (f": {named(matching)}" if matching else ""),
                f"{key} {label_text(wanted)}",
                fails="" if matching or grows else change,
                warning="" if matching else f"none is up: the autoscaler has to start one; else {change}",
            )
        )
    return rows


def _amounts(values: Mapping[str, float]) -> str:
    return ", ".join(counted(amount, name) for name, amount in values.items()) or "nothing"


def step_row(step: MeasuredStep, config: Config, made_up: bool) -> Row:
    """The measured step itself."""
    per_second = f"{step.images / max(step.seconds, 1e-9):,.0f} images per second and worker, without loading"
    where = "GPU" if step.gpu_bytes is not None else f"{config.runtime.cpus_per_worker or 1} threads"
    found = f"{step.images} images in {step.seconds:.2f} s ({where}; {per_second}), checkpoint {size(step.checkpoint_bytes)}"
    note = f" (random pixels, {step.classes:,} made-up classes: the dataset is not prepared yet)" if made_up else ""
    return Row("training step", "ok", found + note, "two steps on random pixels")


def memory(config: Config, expected: Expected, nodes: Sequence[NodeFacts]) -> list[Row]:
    """Memory of what would run on each node, against the node's memory or its container's limit."""
    runtime = config.runtime
    loaders = runtime.loader_cpus if runtime.loader == "ray" else 0
    server = expected.server if runtime.max_workers else None

    def row(node: NodeFacts) -> Row:
        workers = max(1, runtime.max_workers)
        servers = config.mining.shards if server is not None else 0
        if node.resources is not None:
            workers = min(workers, bundles_on(node.resources, worker_resources(config)))
            fits = servers and bundles_on(node.resources, server_bundle(config))
            servers = min(servers, 1 if fits else 0)  # they are spread over the nodes
        parts = [(workers, "worker", expected.worker), (workers * loaders, "loader", expected.loader)]
        parts.append((servers, "mining server", expected.server_process))
        need = sum(count * (num_bytes - expected.shared) for count, _, num_bytes in parts) + expected.shared
        if node.resources is None and (runtime.max_workers or loaders):
            parts.append((1, "Ray with its object store", RAY_BYTES + OBJECT_STORE_BYTES))
            need += RAY_BYTES + OBJECT_STORE_BYTES
        found = f"{size(need)}: " + ", ".join(f"{count} {name} {size(b)}" for count, name, b in parts if count)
        found += f" ({size(expected.shared)} of each shared)" if sum(count for count, _, _ in parts) > 1 else ""
        limit = node.memory_bytes
        where = "limit of the container" if node.memory_from == "container" else "memory of the machine"
        change = "reduce runtime.workers, a batch (classes_per_batch × samples_per_class) or data.transforms.size, or use more memory"
        free = node.free_memory_bytes
        tight = need > FULL * limit
        return graded(
            "memory", found if workers or servers else "nothing is placed here", f"at most {size(limit)}, the {where}",
            fails=change if need > limit else "",
            warning=change if tight else f"other programs leave {size(free)}: end them" if need > free else "",
        )  # fmt: skip

    return each(nodes, row)


def gpu_memory(config: Config, expected: Expected, nodes: Sequence[NodeFacts]) -> list[Row]:
    """Memory of a worker on its GPU; no row where none is asked for or it was not measured there."""
    share = config.runtime.gpus_per_worker
    if not share or expected.worker_gpu is None:
        return []
    need = expected.worker_gpu

    def row(node: NodeFacts) -> Row:
        limit = int(min(num_bytes for _, num_bytes in node.torch_gpus) * min(1.0, share))
        change = "reduce the batch, data.transforms.size or precision (bf16), or set runtime.gpus_per_worker to 1"
        return graded(
            "GPU memory", f"{size(need)} a worker", f"at most {size(limit)}, its share of a GPU",
            fails=change if need > limit else "",
            warning=change if need > GPU_FULL * limit else "",
        )  # fmt: skip

    return each([n for n in nodes if n.torch_gpus], row)


def mining(config: Config, server: ServerBytes | None, nodes: Sequence[NodeFacts]) -> list[Row]:
    """Memory of one mining server, its index included; no row if the method does not mine."""
    if server is None:
        return []
    parts = {"table": server.table, "memory": server.memory, "index": server.index, "building the next": server.build}
    found = f"{size(server.total)} each: " + ", ".join(f"{name} {size(b)}" for name, b in parts.items() if b)
    able = [
        n for n in nodes
        if n.error is None and (n.resources is None or not config.runtime.max_workers or bundles_on(n.resources, server_bundle(config)))
    ]  # fmt: skip
    limit = max((n.memory_bytes for n in able), default=0)
    change = (
        "raise mining.shards, set mining.dtype to float16 or mining.engine to ivf_pq, or place servers on larger nodes"
    )
    where = f"at most {size(limit)}, the largest node that may hold it" if able else "a node that may hold it"
    too_large = bool(able) and server.total > limit
    return [graded(f"mining servers: {config.mining.shards}", found, where, fails=change if too_large else "")]
