"""A checkpoint of a run, loaded: its recipe, its dataset and its network."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from methods import Method, plugins
from pipeline.config import Config
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.model.network import build_network, num_classes, untrained
from pipeline.model.trunk import Trunk
from pipeline.runs.checkpoint import METHOD, TRUNK, Checkpoints
from pipeline.runs.records import find_run
from pipeline.runs.run_folder import CLASS_NAMES, DATASET, read_config, read_values
from pipeline.storage import Folder

if TYPE_CHECKING:
    from pipeline.evaluation.embedder import Embedder


@dataclass(frozen=True)
class TrainedModel:
    """One checkpoint; can be sent to other processes.

    Attributes:
        run: The run's folder.
        dataset, fingerprint: Address of its store, and the content that it must have.
        kind: The checkpoint's folder, "checkpoints" or "best".
        step: Steps done at the checkpoint.
    """

    run: Folder
    dataset: str
    fingerprint: str
    kind: str
    step: int

    @property
    def title(self) -> str:
        """The checkpoint in words."""
        return f"{'best checkpoint' if self.kind == 'best' else 'checkpoint'} of step {self.step:,}"

    def store(self) -> Store:
        """Opens the dataset.

        Raises:
            UserError: It has changed since the run.
        """
        store = Store(Folder(self.dataset))
        if store.fingerprint != self.fingerprint:
            raise UserError(f"{store.folder} has changed since the run ({self.fingerprint} -> {store.fingerprint})")
        return store

    def weights(self) -> dict[str, str]:
        """SHA-256 of the files of trunk and method, which identify the network whatever its run is called."""
        checksums = Checkpoints(self.run).checksums(self.kind, self.step)
        return {name: checksums[name] for name in (TRUNK, METHOD)}

    @functools.cached_property
    def config(self) -> Config:
        """Its configuration."""
        return read_config(self.run)

    @functools.cached_property
    def num_classes(self) -> int:
        """Number of training classes: recorded, or (in runs of earlier versions) counted in the training dataset."""
        recorded = self.run.read_json(DATASET).get("classes") if self.run.exists(DATASET) else None
        if recorded is not None:
            return int(recorded)
        try:
            store = self.store()
        except UserError as error:
            raise UserError(
                f"run {self.run} does not record its number of training classes, as it was started by an earlier version, and "
                f"its training dataset cannot be opened to count them: {error}"
            ) from error
        return num_classes(store.select(["train"], without_fold=self.config.data.validation_fold))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the training classes by label; empty in runs of earlier versions."""
        return tuple(self.run.read_json(CLASS_NAMES)) if self.run.exists(CLASS_NAMES) else ()

    def load(self, store: Store, device: torch.device) -> tuple[Embedder, Trunk, Method]:
        """The network, and an embedder of a store's images for this process."""
        from pipeline.evaluation.embedder import build_embedder  # 0.4 CPU-s that the network alone does not need

        trunk, method = build_network(untrained(self.config), self.num_classes, device)
        Checkpoints(self.run).load(self.kind, self.step, trunk, method)
        return build_embedder(self.config, store, device, Ranks(), "in_process", 1), trunk, method


def load_run(name: str, checkpoint: str | None = None) -> TrainedModel:
    """Loads a checkpoint of a run.

    Args:
        name: The run's folder, URI, or name below the default storage.
        checkpoint: "best", "last", or a step; None: the run's `evaluation.checkpoint`.

    Raises:
        UserError: There is no such run or checkpoint.
    """
    folder = find_run(name)
    record = folder.read_json(DATASET)
    for plugins_folder in [os.getcwd(), *record.get("plugin_folders", [])]:
        plugins.add_folder(plugins_folder)
    kind, step = _checkpoint(checkpoint or _configured_checkpoint(folder), Checkpoints(folder))
    return TrainedModel(folder, record["dataset"], record["fingerprint"], kind, step)


def _configured_checkpoint(run: Folder) -> str:
    """The run's `evaluation.checkpoint`, read without the rest of the configuration, which imports what only trains."""
    name = read_values(run)["evaluation"].get("checkpoint")
    return str(name or read_config(run).evaluation.checkpoint)


def _checkpoint(name: str, checkpoints: Checkpoints) -> tuple[str, int]:
    """Kind and step of a checkpoint: the "best", the "last", or that of a step."""
    steps, best = checkpoints.steps(), checkpoints.steps("best")
    latest = checkpoints.latest()
    if latest is None:
        raise UserError(f"{checkpoints.run} has no checkpoint yet")
    if name == "best":
        if latest.best_step not in best:
            raise UserError(
                f"{checkpoints.run} has no best checkpoint: nothing was validated yet (--checkpoint last takes the newest one)"
            )
        return "best", latest.best_step
    if name == "last":
        return "checkpoints", steps[-1]
    if not name.isdigit() or int(name) not in {*steps, *best}:
        raise UserError(f"--checkpoint {name}: expected best, last or one of the steps {sorted({*steps, *best})}")
    return ("checkpoints" if int(name) in steps else "best"), int(name)


__all__ = ["TrainedModel", "load_run"]
