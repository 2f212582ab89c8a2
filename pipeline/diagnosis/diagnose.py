"""The diagnosis of a recipe: gathers facts of the recipe, this machine, the cluster's nodes, and makes the rows of a table."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config
from pipeline.data.decoded import training_copy
from pipeline.data.find_store import find_store
from pipeline.data.store import Store
from pipeline.diagnosis import node_rows, resource_rows
from pipeline.diagnosis.cluster_facts import facts_of_nodes
from pipeline.diagnosis.imports import import_facts
from pipeline.diagnosis.measured_step import MeasuredStep, StepProcess, StepTimeout, measured_here
from pipeline.diagnosis.node_facts import NodeFacts, Wanted, gather
from pipeline.diagnosis.recipe_rows import check_recipe
from pipeline.diagnosis.rows import Row
from pipeline.distributed.ray_session import (
    answers_to,
    cluster_maximum,
    free_on_nodes,
    node_groups,
    on_cluster,
    ray_session,
)
from pipeline.errors import RunError, UserError, one_line
from pipeline.mining.server_bytes import ServerBytes, memory_bytes, server_bytes
from pipeline.model.network import num_classes
from pipeline.storage import Folder
from pipeline.training.checks import needed_cpus
from pipeline.training.parts import cache_folder, server_spec
from pipeline.training.start import located, uses_ray

Say = Callable[[str], None]


@dataclass(frozen=True)
class Supply:
    """What a cluster has.

    Attributes:
        nodes: Facts of its nodes.
        address: Of its control store.
        is_open: Whether that answers without a token.
        resources: Rows about what the recipe asks of it.
    """

    nodes: list[NodeFacts]
    address: str
    is_open: bool
    resources: list[Row]


def diagnose(config: Config, say: Say) -> list[Row]:
    """Checks everything that a run needs before it starts; starts no run, and leaves nothing in the storage.

    Args:
        config: The configuration, as it was read.
        say: Called with a line before what takes seconds.

    Raises:
        UserError: The storage is a relative path and the run is on a cluster.
    """
    config = located(config)
    store = _store_uri(config)
    step_process = StepProcess(config, store)  # beside everything else
    say("checking the recipe ...")
    checked = check_recipe(config)
    rows = list(checked.rows)
    with ExitStack() as stack:
        ray: Any = None
        if on_cluster():
            say("asking the nodes of the cluster ...")
            try:
                ray = stack.enter_context(ray_session(needed_cpus(config)))
            except UserError as error:
                rows.append(Row("cluster", "fails", "no connection", "a cluster that answers", one_line(error)))
        driver, supply = _gather(config, checked.store, ray)
        say("measuring a training step ...")
        step = _measured(config, store, step_process, ray)
    nodes = [driver] if supply is None else supply.nodes
    answering = [node for node in nodes if node.error is None]
    rows += node_rows.answers(nodes)
    rows += node_rows.versions(answering, driver)
    servers = config.mining.gpus if config.method.mining is not None else 0.0
    rows += node_rows.devices(answering, config.runtime.gpus_per_worker, servers)
    if supply is not None:
        rows += supply.resources
    rows += _memory_rows(config, checked.store, step, answering)
    copies = config.checkpoint.keep + 2  # the best one, and one that is being written
    expected = None if isinstance(step, Row) else step.checkpoint_bytes * copies
    rows += node_rows.storage(answering, config.root, expected)
    split = None if checked.store is None else _copy(config, checked.store)[1]
    rows += node_rows.cache(answering, cache_folder(config), split, config.cache.max_bytes)
    rows += node_rows.limits(answering, uses_ray(config))
    if supply is not None:
        rows += node_rows.clocks(answering, not Folder(config.root).is_local)
        rows.append(node_rows.authentication(supply.is_open, supply.address, supply.nodes))
    return rows


def _store_uri(config: Config) -> str | None:
    """URI of the dataset, if it is prepared; what is wrong with it is told later."""
    try:
        return find_store(config.data.source, [config.root]).uri
    except (UserError, RunError):
        return None


def _copy(config: Config, store: Store) -> tuple[str, int]:
    """File name and size of the copy of the training split that each node keeps."""
    return training_copy(store, config.cache.max_bytes, config.cache.decoded)


def _gather(config: Config, store: Store | None, ray: Any) -> tuple[NodeFacts, Supply | None]:
    """Facts of this machine and of the cluster."""
    folder = Folder(config.root)
    address = None if ray is None else str(ray.get_runtime_context().gcs_address)
    copy = None if store is None else _copy(config, store)[0]
    port = None if address is None else int(address.rpartition(":")[2])
    wanted = Wanted(config.root, None, cache_folder(config), copy, port)
    driver = NodeFacts(socket.gethostname(), **gather(wanted, import_facts))
    if ray is None or address is None:
        return driver, None
    probe = f".visible-{uuid.uuid4().hex}"
    written = driver.storage_error is None
    if written:
        folder.write(probe, b"")
    try:
        nodes = facts_of_nodes(ray, Wanted(config.root, probe if written else None, wanted.cache, copy, port))
    finally:
        if written:
            folder.remove(probe)
    groups = node_groups(ray)
    resources = resource_rows.resources(config, cluster_maximum(ray), groups, free_on_nodes(ray))
    answering = [node for node in nodes if node.error is None]
    resources += resource_rows.labels(config, answering, grows=any(count > 1 for _, count in groups))
    return driver, Supply(nodes, address, answers_to(address), resources)


def _measured(config: Config, store: str | None, process: StepProcess, ray: Any) -> MeasuredStep | Row:
    """The measured step, on a GPU of the cluster if one is asked for and free; or a row that says why there is none."""
    gpus = config.runtime.gpus_per_worker
    expected = "two steps on random pixels"
    try:
        if ray is None or not gpus:
            return process.result()
        process.stop()
        if any(node.get("GPU", 0.0) >= gpus for node in free_on_nodes(ray)):
            task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(measured_here)
            return MeasuredStep(**ray.get(task.remote(config.model_dump(mode="json"), store)))
        change = "run the diagnosis while a GPU is free, to know the memory before the start"
        return Row("training step", "warning", "no GPU is free now", expected, change)
    except StepTimeout as error:
        change = "a machine with GPUs, a smaller batch or smaller images; memory is not known before the start"
        return Row("training step", "warning", one_line(error), expected, change)
    except RunError as error:
        return Row("training step", "fails", "no step", expected, one_line(error))


def _memory_rows(config: Config, store: Store | None, step: MeasuredStep | Row, nodes: list[NodeFacts]) -> list[Row]:
    if isinstance(step, Row):
        return [step]
    server, mirror = _mining_bytes(config, store, step)
    expected = resource_rows.expected_memory(config, step, server, mirror)
    return [
        resource_rows.step_row(step, config, made_up=store is None),
        *resource_rows.memory(config, expected, nodes),
        *resource_rows.gpu_memory(config, expected, nodes),
        *resource_rows.mining(config, server, nodes),
    ]


def _mining_bytes(config: Config, store: Store | None, step: MeasuredStep) -> tuple[ServerBytes | None, int]:
    """Sizes of the largest mining server and of a worker's mirror of its memory."""
    needs = config.method.mining
    if needs is None:
        return None, 0
    samples, classes = 10 * step.classes, step.classes
    if store is not None:
        selected = store.select(["train"], without_fold=config.data.validation_fold)
        samples, classes = len(selected), num_classes(selected)
    servers = config.mining.shards if config.runtime.max_workers else 0
    spec = server_spec(config, samples, servers)
    return server_bytes(needs, spec, classes), memory_bytes(needs, spec, classes)
