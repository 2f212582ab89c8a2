"""What one trial holds, and how many trials fit on a machine or cluster at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Config
from pipeline.console import counted
from pipeline.distributed.ray_session import cluster_maximum, node_groups
from pipeline.errors import UserError
from pipeline.training.checks import bundles_on, requested
from pipeline.training.elastic import worker_resources
from pipeline.training.node_labels import asked_labels, unmet_labels

HEAD = {"node:__internal_head__": 0.001}  # a driver without CPUs of its own, on the node that is not a spot node


@dataclass(frozen=True)
class TrialResources:
    """The resources that one trial holds.

    Attributes:
        workers: Number of workers.
        worker: Resources of each worker, which have to be free on one node.
        total: CPUs and GPUs of workers, loaders and mining servers together.
        labels: Labels of the nodes that its parts are placed on, by key of the config.
    """

    workers: int
    worker: Mapping[str, float]
    total: Mapping[str, float]
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def in_process(self) -> bool:
        """True if the trial's process is its only worker; else it starts Ray Train."""
        return self.workers == 1

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray Tune reserves for the trial's process."""
        return dict(self.worker) if self.in_process else HEAD

    @property
    def bundle_labels(self) -> dict[str, str]:
        """Labels of the node of the trial's process."""
        return dict(self.labels.get("runtime.worker_labels", {})) if self.in_process else {}

    def __str__(self) -> str:
        return ", ".join(counted(amount, name) for name, amount in self.total.items() if amount)


def trial_resources(config: Config) -> TrialResources:
    """The resources of a trial whose runs have this configuration."""
    workers = max(1, config.runtime.max_workers)
    return TrialResources(workers, worker_resources(config), requested(config), asked_labels(config))


def trials_here(trials: Iterable[TrialResources]) -> int:
    """How many trials this machine holds at once: at least one, also where it is too small for its threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(int(cores // trial.total["CPU"]) for trial in trials))


def check_labels(ray: Any, trials: Iterable[TrialResources]) -> None:
    """Checks that there are nodes of the labels that trials ask for.

    Raises:
        UserError: Some label no node has.
    """
    for trial in trials:
        for problem in unmet_labels(trial.labels, ray):
            raise UserError(problem)


def trials_on_cluster(ray: Any, trials: Iterable[TrialResources]) -> int:
    """How many trials the cluster holds at once at its largest, autoscaling counted.

    Raises:
        UserError: Some trial can never be placed.
    """
    limits = cluster_maximum(ray)
    groups = node_groups(ray)
    return min(_fitting(trial, limits, groups) for trial in trials)


def _fitting(
    trial: TrialResources, limits: Mapping[str, float], groups: Sequence[tuple[Mapping[str, float], int]]
) -> int:
    slots = sum(count * bundles_on(node, trial.worker) for node, count in groups)
    if slots < trial.workers:
        wanted = " and ".join(counted(amount, name) for name, amount in trial.worker.items())
        largest = max((dict(node) for node, _ in groups), key=lambda n: (n.get("GPU", 0), n.get("CPU", 0)), default={})
        nodes = " and ".join(counted(largest.get(name, 0), name) for name in trial.worker)
        raise UserError(
            f"a trial needs {counted(trial.workers, 'worker')} of {wanted} each, the cluster at its largest has room for {slots} "
            f"(its largest node has {nodes}): reduce runtime.workers, cpus_per_worker or gpus_per_worker, or enlarge the cluster"
        )
    at_once = slots // trial.workers
    for name, amount in trial.total.items():
        if amount > limits.get(name, 0.0):
            raise UserError(
                f"a trial needs {counted(amount, name)} (workers, loaders, mining servers), the cluster has at most "
                f"{limits.get(name, 0.0):g}: reduce runtime.workers or cpus_per_worker, or enlarge the cluster"
            )
        if amount:
            at_once = min(at_once, int(limits.get(name, 0.0) / amount + 1e-9))
    return at_once


def local_cpus(at_once: int, trials: Iterable[TrialResources]) -> int:
    """Logical CPUs of a Ray that is started here."""
    return at_once * int(max(trial.total["CPU"] for trial in trials))
