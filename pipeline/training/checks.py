"""Checks before a run starts: the machine, the cluster, the dataset, and the config of an earlier start of the same run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from methods import Context
from methods.config import Clock
from pipeline.config import Config, RuntimeConfig, changed_keys, differences, name_for
from pipeline.console import counted
from pipeline.data.store import Samples, Store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.ray_session import check_visible, cluster_maximum, node_groups, on_cluster
from pipeline.errors import NameTakenError, UserError
from pipeline.evaluation.tasks import test_task, validation_task
from pipeline.model.layers import prepare_training
from pipeline.model.network import build_method, num_classes
from pipeline.model.run_weights import load_head, run_of
from pipeline.model.trunk import Trunk, build_trunk
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import CONFIG, DATASET, read_config
from pipeline.storage import Folder
from pipeline.training.dataset_notes import dataset_notes, epoch_note
from pipeline.training.elastic import worker_resources
from pipeline.training.node_labels import asked_labels, unmet_labels

FORMER_DEFAULTS: Mapping[str, Any] = {"hard_weight": 1.0}  # of a method, by key


class _PlanContext(Context):
    """The part of a context that a plan may use which is a function of the labels, the seed and the epoch."""

    ranks = Ranks()  # one process; beartype reads the attribute where it checks arguments
    mining = None

    def __init__(self, samples: Samples, seed: int) -> None:
        self.labels = samples.labels
        self.tracks = samples.tracks
        self.seed = seed
        self.clock = Clock()


@dataclass(frozen=True)
class CheckedRun:
    """What the checks of a run have found.

    Attributes:
        epoch_shape: Steps of an epoch and images of a step; None if they are only known when it begins.
        epoch_note: A line on the length of an epoch; None if it is only known when it begins.
        dataset_notes: Lines on the dataset.
    """

    epoch_shape: tuple[int, int] | None
    epoch_note: str | None
    dataset_notes: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """All lines for the user."""
        return self.dataset_notes if self.epoch_note is None else (self.epoch_note, *self.dataset_notes)


def check_run(config: Config, store: Store) -> CheckedRun:
    """Checks that the dataset fits the config: folds, classes, images.

    Raises:
        UserError: it does not.
    """
    folds = len(store.manifest["folds"])
    fold = config.data.validation_fold
    if "train" not in store.manifest["splits"]:
        raise UserError(f"{store.folder} has no training images: it is a dataset to be measured on only")
    if fold is not None and fold >= folds:
        raise UserError(f"data.validation_fold is {fold}, the dataset has the folds 0 to {folds - 1}")
    samples = store.select(["train"], without_fold=fold)
    if len(samples) == 0:
        raise UserError(f"{store.folder} has no training images")
    if config.protocol == "paper" and not (store.split != "train").any():
        raise UserError("the paper protocol chooses on test classes, but the dataset has none")
    try:
        method = build_method(config, 8, num_classes(samples))
        method.optimizers(nn.Linear(1, 1))
        epoch_shape = method.epoch_shape(_PlanContext(samples, config.seed))  # type: ignore[abstract]
    except ValueError as error:
        raise UserError(f"method: {error}") from error
    _check_best(config, epoch_shape)
    _check_evaluation(config, store)
    note = None if epoch_shape is None else epoch_note(epoch_shape, samples)
    return CheckedRun(epoch_shape, note, tuple(dataset_notes(config, store, samples)))


def _check_best(config: Config, epoch_shape: tuple[int, int] | None) -> None:
    """Checks that there is a best checkpoint when the method first loads it.

    Raises:
        UserError: There is none.
    """
    first, every = config.method.loads_best_after, config.evaluation.every
    if first is None:
        return
    times = (first.value, every.value)
    if first.unit != every.unit:
        if epoch_shape is None:
            return
        times = (first.steps(epoch_shape[0]), every.steps(epoch_shape[0]))
    if times[1] > times[0]:
        raise UserError(
            f"the method returns to the best weights after {first}, but evaluation.every is {every}: none are known by then. Set "
            f"evaluation.every to {first} or less, or let the method return later"
        )


def checked_trunk(config: Config) -> Trunk:
    """Builds the run's trunk with its weights.

    Raises:
        UserError: As `build_trunk` and `prepare_training`; the head of a run to start from does not fit; or it cannot be passed a batch in parts, which `runtime.images_per_pass` asks for.
    """
    trunk = build_trunk(config.model, config.data.transforms.size)
    if config.data.transforms.evaluation_scale != 1:
        trunk.check_evaluation(config.data.transforms.of_evaluation().size)
    prepare_training(trunk.backbone, config.model)
    if run_of(config.model.weights) is not None:
        load_head(config.model, build_method(config, trunk.features, 2).head)
    if config.model.compile and config.method.requires_frozen_batch_norm:
        raise UserError(
            f"model.compile is true, but {config.method.name} takes derivatives in forward mode, which torch.compile has not: leave "
            "model.compile out"
        )
    asked, batch_norm = config.runtime.images_per_pass, config.model.batch_norm
    has_statistics = batch_norm != "frozen" and any(isinstance(m, _BatchNorm) for m in trunk.modules())
    if config.model.activation_checkpointing and has_statistics:
        raise UserError(
            f"model.activation_checkpointing passes a batch twice, which would count twice in the statistics of model.batch_norm: "
            f"{batch_norm}. Set model.batch_norm to frozen, or leave activation_checkpointing out"
        )
    if config.model.ema == 1 and has_statistics:
        raise UserError(
            f"model.ema is 1, the mean of all weights, but model.batch_norm is {batch_norm}: its running statistics are those of the "
            "newest weights. Set model.batch_norm to frozen, or model.ema to a decay such as 0.99"
        )
    if asked is not None and has_statistics:
        raise UserError(
            f"runtime.images_per_pass is {asked}, but model.batch_norm is {batch_norm}: statistics of a batch need all of its images "
            "in one pass. Set model.batch_norm to frozen, choose a backbone without batch normalisation, or leave images_per_pass out"
        )
    if asked == "auto" and not config.runtime.gpus_per_worker:
        raise UserError(
            "runtime.images_per_pass: auto measures the memory of a GPU, runtime.gpus_per_worker is 0: give a number, such as 32"
        )
    return trunk


def _check_evaluation(config: Config, store: Store) -> None:
    """Checks that the configured metrics can be measured on the dataset.

    Raises:
        UserError: they cannot.
    """
    evaluation = config.evaluation
    if store.protocol != "reid" and (evaluation.reranking is not None or evaluation.distractors != "wrong"):
        raise UserError(
            f"evaluation.reranking and evaluation.distractors are for datasets of re-identification, the protocol of "
            f"{store.title} is {store.protocol}: leave them out"
        )
    tasks = {"validation": validation_task(config, store), "test": test_task(config, store)}
    for name, task in tasks.items():
        try:
            if task is not None:
                task.check(cluster=config.evaluation.clustering and name == "test")
                metrics = task.metrics(config.evaluation.recall_at)
                if config.evaluation.metric not in metrics:
                    raise ValueError(
                        f"evaluation.metric is {config.evaluation.metric!r}, expected one of {', '.join(metrics)}"
                    )
        except ValueError as error:
            raise UserError(f"{name} classes of {store.folder}: {error}") from error


def check_dataset(folder: Folder, store: Store) -> None:
    """Checks that the dataset is the one that the run was started with.

    Raises:
        UserError: it has another fingerprint.
    """
    recorded = folder.read_json(DATASET)["fingerprint"] if folder.exists(DATASET) else store.fingerprint
    if recorded != store.fingerprint:
        raise UserError(
            f"run {folder} was trained on a dataset of fingerprint {recorded}, {store.folder} has {store.fingerprint}: "
            "point data.source to the former, or start over with another name or --fresh"
        )


def with_former_defaults(config: Config, folder: Folder) -> Config:
    """The config of an existing run with the defaults that it was started with, where they have changed since and are not given."""
    if not folder.exists(CONFIG):
        return config
    method, recorded = config.method, read_config(folder).method
    kept = {
        key: former
        for key, former in FORMER_DEFAULTS.items()
        if key not in method.model_fields_set and getattr(method, key, None) != former == getattr(recorded, key, None)
    }
    return config.model_copy(update={"method": method.model_copy(update=kept)}) if kept else config


def runtime_changes(config: Config, folder: Folder) -> list[str]:
    """Compares with the config that an existing run was started with; returns the runtime keys that have changed.

    Raises:
        UserError: A key that is not marked runtime differs, the run would become shorter, or its config
            is not one of this version.
    """
    if not folder.exists(CONFIG):
        if Checkpoints(folder).steps():  # of an unknown config: --fresh was killed while it removed them
            raise UserError(f"run {folder} has checkpoints but no config.yaml: start over with --fresh")
        return []
    old_config = read_config(folder)
    old, new = (c.model_dump(mode="json") for c in (old_config, config))
    changes = differences(old, new, runtime=False)
    if changes:
        settings = {key: value for key, (_, value) in changed_keys(old, new, runtime=False).items()}
        raise NameTakenError(
            f"run {folder} exists with another config ({'; '.join(changes[:4])}{' ...' if len(changes) > 4 else ''}): "
            "replace it with --fresh, or give this one another name (name=auto makes one)",
            name_for(config.name, settings),
        )
    if old_config.length.unit != config.length.unit or config.length.value < old_config.length.value:
        raise UserError(
            f"run {folder} has length {old_config.length}, got {config.length}: length may only grow, in the same unit"
        )
    return differences(old, new, runtime=True)


def with_machine_defaults(runtime: RuntimeConfig) -> RuntimeConfig:
    """The runtime section with its machine-dependent defaults filled in: threads of a worker."""
    if runtime.cpus_per_worker is not None:
        return runtime
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = 2 if on_cluster() else max(1, cores // max(1, runtime.max_workers))
    return runtime.model_copy(update={"cpus_per_worker": threads})


def needed_cpus(config: Config, workers: int | None = None) -> int:
    """Logical CPUs of workers, loaders and mining servers.

    Args:
        workers: Number of workers; None: the largest.
    """
    runtime = config.runtime
    workers = runtime.max_workers if workers is None else workers
    loaders = runtime.loader_cpus if runtime.loader == "ray" else 0
    servers = config.mining.shards * config.mining.cpus if config.method.mining and workers else 0
    return max(1, workers) * ((runtime.cpus_per_worker or 1) + loaders) + servers


def check_machine(config: Config) -> list[str]:
    """Checks GPUs and threads of this machine, where the run is not on a cluster; returns warnings.

    Raises:
        UserError: more GPUs than the machine has, or more than four threads a core.
    """
    runtime = config.runtime
    import torch

    if runtime.gpus_per_worker and not on_cluster():
        num_gpus = runtime.gpus_per_worker * max(1, runtime.max_workers)
        if num_gpus > torch.cuda.device_count():
            raise UserError(
                f"{num_gpus:g} GPUs requested (runtime.workers × gpus_per_worker), this machine has "
                f"{torch.cuda.device_count()}: reduce runtime.workers or gpus_per_worker, or submit the run to a cluster"
            )
    if "TORCHELASTIC_RUN_ID" in os.environ and runtime.loader == "ray":
        raise UserError("under torchrun there is no Ray: set runtime.loader to in_process")
    cores = os.cpu_count() or 1
    threads = max(1, runtime.max_workers) * (runtime.cpus_per_worker or 1)
    if not on_cluster() and threads > 4 * cores:
        raise UserError(
            f"{threads} threads requested (runtime.workers × cpus_per_worker), this machine has {cores} cores: "
            "reduce runtime.workers or cpus_per_worker"
        )
    if not on_cluster() and threads > cores:
        return [
            f"warning: {threads} threads on {cores} cores (runtime.workers × cpus_per_worker): steps will be slower"
        ]
    return []


def server_bundle(config: Config) -> dict[str, float]:
    """What Ray reserves for one mining server; empty if the method does not mine."""
    mining = config.mining
    if config.method.mining is None:
        return {}
    bundle = {"CPU": float(mining.cpus)} | ({"GPU": float(mining.gpus)} if mining.gpus else {})
    return bundle | ({mining.resource: 0.001} if mining.resource is not None else {})


def requested(config: Config, workers: int | None = None) -> dict[str, float]:
    """CPUs and GPUs of workers, their loaders and mining servers together.

    Args:
        config: The run's configuration.
        workers: Number of workers; None: the largest.
    """
    gpus = config.mining.shards * config.mining.gpus if config.method.mining is not None else 0.0
    workers = max(1, config.runtime.max_workers if workers is None else workers)
    return {"CPU": float(needed_cpus(config, workers)), "GPU": config.runtime.gpus_per_worker * workers + gpus}


def bundles_on(node: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many bundles fit on one node."""
    return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items())


def placement_problems(
    config: Config, limits: Mapping[str, float], groups: Sequence[tuple[Mapping[str, float], int]]
) -> Iterator[str]:
    """Why a cluster can never hold a run, one sentence each; nothing if it can.

    Args:
        config: The run's configuration.
        limits: Resources of the cluster at its largest.
        groups: Resources of a node and the largest number of such nodes, for each kind of node.
    """
    workers, bundle = config.runtime.min_workers, worker_resources(config)
    for resource, amount in requested(config, workers).items():
        if amount > limits.get(resource, 0.0):
            yield (
                f"{counted(amount, resource)} requested ({counted(workers, 'worker')}, their loaders, mining servers), the cluster "
                f"has at most {limits.get(resource, 0.0):g}: reduce runtime.workers or cpus_per_worker, or enlarge the cluster"
            )
    room = sum(count * bundles_on(node, bundle) for node, count in groups)
    if room < workers:
        wanted = " and ".join(counted(amount, name) for name, amount in bundle.items())
        largest = max((dict(node) for node, _ in groups), key=lambda n: (n.get("GPU", 0), n.get("CPU", 0)), default={})
        has = " and ".join(counted(largest.get(name, 0), name) for name in bundle)
        yield (
            f"{counted(workers, 'worker')} of {wanted} each requested, the nodes of the cluster at its largest have room for {room} (the "
            f"largest node has {has}): reduce runtime.workers, cpus_per_worker or gpus_per_worker, or enlarge the cluster"
        )
    resource_name = config.mining.resource
    if config.method.mining is not None and resource_name is not None and not limits.get(resource_name):
        yield (
            f"mining.resource is {resource_name!r}, which no node of the cluster has (its resources: "
            f"{', '.join(sorted(limits)) or 'none'}): give it to the nodes that are not spot, or set mining.resource to null"
        )


def check_cluster(config: Config, ray: Any) -> None:
    """Checks that Ray's nodes can provide the run's resources and have its labels, and that all of them see the storage.

    Raises:
        UserError: Labels that no node has, more resources than the cluster has at its largest, or storage that not all nodes
            see.
    """
    for problem in unmet_labels(asked_labels(config), ray):
        raise UserError(problem)
    if not on_cluster() or config.runtime.max_workers == 0:
        return
    for problem in placement_problems(config, cluster_maximum(ray), node_groups(ray)):
        raise UserError(problem)
    check_visible(ray, Folder(config.root), "storage")
