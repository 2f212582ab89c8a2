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
from pipeline.runs.checkpoint_choice import checkpoint_title, choose_checkpoint
from pipeline.runs.records import find_run
from pipeline.runs.run_folder import CLASS_NAMES, DATASET, read_config
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
        return checkpoint_title(self.kind, self.step)

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
    kind, step = choose_checkpoint(folder, checkpoint)
    return TrainedModel(folder, record["dataset"], record["fingerprint"], kind, step)


__all__ = ["TrainedModel", "load_run"]
