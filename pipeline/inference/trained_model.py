"""A checkpoint of a run, found again: its recipe, its dataset, and the network that embeds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import yaml

from methods import Method
from pipeline.config import Config, build_config
from pipeline.data.store import Store
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.evaluation.build import build_embedder, build_network
from pipeline.evaluation.embedder import Embedder
from pipeline.model.trunk import Trunk
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import CHECKPOINT, CONFIG, DATASET, checkpoint_folder
from pipeline.storage import Folder, home


@dataclass(frozen=True)
class TrainedModel:
    """One checkpoint; can be sent to other processes.

    Attributes:
        run: the run's folder.
        config: its recipe.
        dataset, fingerprint: where its store is, and which it has to be.
        kind, step: of the checkpoint: "checkpoints" or "best", and the steps done.
    """

    run: Folder
    config: Config
    dataset: str
    fingerprint: str
    kind: str
    step: int

    def store(self) -> Store:
        """Opens the dataset.

        Raises:
            UserError: it has changed since the run.
        """
        store = Store(Folder(self.dataset))
        if store.fingerprint != self.fingerprint:
            raise UserError(f"{store.folder} has changed since the run ({self.fingerprint} -> {store.fingerprint})")
        return store

    def weights(self) -> dict[str, str]:
        """SHA-256 of the files of trunk and method: which network it is, whatever its run is called."""
        sums = self.run.read_json(f"{checkpoint_folder(self.kind, self.step)}/{CHECKPOINT}")["sha256"]
        return {name: sums[name] for name in ("trunk.safetensors", "method.safetensors")}

    def load(self, store: Store, device: torch.device) -> tuple[Embedder, Trunk, Method]:
        """The network with the checkpoint's weights, and what embeds with it, in this process."""
        config = self.config
        bare = config.model_copy(update={"model": config.model.model_copy(update={"weights": "none"})})
        samples = store.select(["train"], without_fold=config.data.validation_fold)
        trunk, method = build_network(bare, samples, device)
        Checkpoints(self.run).load(self.kind, self.step, trunk, method)
        return build_embedder(config, store, device, Ranks(), "in_process", 1), trunk, method


def load_run(name: str, checkpoint: str | None = None) -> TrainedModel:
    """A run's checkpoint.

    Args:
        name: the run's folder, URI, or name below the default storage.
        checkpoint: best, last, or a step; none: as the run's protocol says.

    Raises:
        UserError: there is none.
    """
    folder = _folder(name)
    config = build_config(yaml.safe_load(folder.read(CONFIG)))
    record = folder.read_json(DATASET)
    kind, step = _checkpoint(checkpoint or config.evaluation.checkpoint, Checkpoints(folder))
    return TrainedModel(folder, config, record["dataset"], record["fingerprint"], kind, step)


def _folder(name: str) -> Folder:
    for folder in (Folder(name), Folder(home()) / "runs" / name):
        if folder.exists(CONFIG):
            return folder
    raise UserError(f"{name!r} is neither a run folder nor a run in {home()}/runs (no config.yaml)")


def _checkpoint(wanted: str, checkpoints: Checkpoints) -> tuple[str, int]:
    """Folder and step of the checkpoint that was asked for."""
    steps, best = checkpoints.steps(), checkpoints.steps("best")
    latest = checkpoints.latest()
    if latest is None:
        raise UserError(f"{checkpoints.run} has no checkpoint yet")
    if wanted == "best":
        if latest.best_step not in best:
            raise UserError(f"{checkpoints.run} has no best checkpoint: nothing was validated yet")
        return "best", latest.best_step
    if wanted == "last":
        return "checkpoints", steps[-1]
    if not wanted.isdigit() or int(wanted) not in {*steps, *best}:
        raise UserError(f"--checkpoint {wanted}: expected best, last or one of the steps {sorted({*steps, *best})}")
    return ("checkpoints" if int(wanted) in steps else "best"), int(wanted)


__all__ = ["TrainedModel", "load_run"]
